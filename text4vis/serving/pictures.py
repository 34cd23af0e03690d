"""Pictures of predictions: a video's frames with its likeliest classes, the timeline of a long video, found moments.

C classes, W windows, T frames, S their side in pixels.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path, PurePath
from typing import BinaryIO

import numpy as np
from matplotlib.figure import Figure

from text4vis.report.pictures import INK, QUIET, plain
from text4vis.serving.answers import Prediction, Timeline
from text4vis.serving.search import Moment

_SHOWN_FRAMES = 3  # of a moment
LINES = ("#2f6fab", "#d1662f", "#4b8f5b", "#8a5fa8", "#b08b2e")
BAR, BAR_REST = "#2f6fab", "#b9cbe0"


def save_prediction(prediction: Prediction, title: str, path: str | Path) -> None:
    """One PNG: the sampled frames with their numbers, and below them the likeliest classes as bars.

    Dark are the likeliest class, or all that the video shows of a model of several labels a video.
    """
    num_frames, num_classes = len(prediction.frames), len(prediction.top)
    columns = min(num_frames, 8)
    rows = -(-num_frames // columns)
    width = 1.55 * columns
    bars = 0.34 * num_classes + 0.45
    figure = Figure(figsize=(width, 1.75 * rows + bars + 0.5), dpi=120, facecolor="white", layout="constrained")
    top, bottom = figure.subfigures(2, 1, squeeze=False, height_ratios=(1.75 * rows, bars)).flat
    top.suptitle(plain(title, 120), color=INK, fontsize=12, parse_math=False)
    for axes, frame, index in zip(
        top.subplots(rows, columns, squeeze=False).flat, prediction.frames, prediction.indices, strict=False
    ):
        axes.imshow(frame)
        axes.set_title(f"frame {index}", fontsize=8, color=QUIET)
    for axes in top.axes:
        axes.set_axis_off()
    axes = bottom.subplots()
    names = [plain(name) for name, _ in prediction.top]
    shares = [100 * probability for _, probability in prediction.top]
    shown = prediction.top[:1] if prediction.present is None else prediction.present
    colours = [BAR if entry in shown else BAR_REST for entry in prediction.top]
    axes.barh(range(num_classes), shares, color=colours, height=0.7)
    for row, share in enumerate(shares):
        axes.text(share + 1, row, f"{share:.1f} %", va="center", fontsize=9, color=INK)
    axes.set_yticks(range(num_classes), names, fontsize=10, color=INK, parse_math=False)
    axes.invert_yaxis()
    axes.set_xlim(0, 112)
    axes.set_xticks([])
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    figure.savefig(path)


def save_timeline(timeline: Timeline, title: str, path: str | Path | BinaryIO) -> None:
    """One PNG: pictures of the video in order, and below them the likeliest classes' probabilities over time.

    A window's picture and probability are drawn at its middle; the line changes half-way between two middles.
    path: a stream, too.
    """
    middles_W = timeline.seconds_W2.mean(axis=1)
    start, end = timeline.seconds_W2[0, 0], timeline.seconds_W2[-1, 1]
    edges = np.concatenate([[start], (middles_W[1:] + middles_W[:-1]) / 2, [end]])
    count = min(8, len(middles_W))
    wanted = start + (np.arange(count) + 0.5) * (end - start) / count  # the middles of the pictures on the page
    shown = np.abs(middles_W[:, None] - wanted).argmin(axis=0)
    best_C = np.argsort(-timeline.scores_WC.max(axis=0), kind="stable")[: len(LINES)]
    figure = Figure(figsize=(12, 5), dpi=120, facecolor="white", layout="constrained")
    top, bottom = figure.subfigures(2, 1, squeeze=False, height_ratios=(1.75, 3.25)).flat
    top.suptitle(plain(title, 120), color=INK, fontsize=12, parse_math=False)
    for axes, window in zip(top.subplots(1, len(shown), squeeze=False).flat, shown, strict=True):
        axes.imshow(timeline.thumbnails[window])
        axes.set_title(f"{middles_W[window]:.1f} s", fontsize=8, color=QUIET)
        axes.set_axis_off()
    axes = bottom.subplots()
    for colour, label in zip(LINES, best_C, strict=False):
        axes.stairs(100 * timeline.scores_WC[:, label], edges, baseline=None, color=colour, linewidth=2)
    names = [plain(timeline.class_names[label]) for label in best_C]
    legend = axes.legend(names, loc="upper center", bbox_to_anchor=(0.5, -0.15), ncols=2, frameon=False, labelcolor=INK)
    for text in legend.get_texts():
        text.set_parse_math(False)
    axes.set_xlim(edges[0], edges[-1])
    axes.set_ylim(0, 102)
    axes.set_xlabel("seconds", color=QUIET)
    axes.set_ylabel("%", color=QUIET, rotation=0)
    axes.tick_params(colors=QUIET, length=0)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path)


def save_moments(
    moments: Sequence[Moment], frames: Sequence[np.ndarray | None], title: str, path: str | Path | BinaryIO
) -> None:
    """One PNG, two moments a row: some frames of each, with its place, score, time and file.

    frames: (T, S, S, 3) uint8 of each moment, or None for a file that cannot be read any more. path: a stream, too.
    """
    columns = 1 if len(moments) == 1 else 2
    rows = max(1, -(-len(moments) // columns))
    figure = Figure(figsize=(6.2 * columns, 2.45 * rows + 0.6), dpi=100, facecolor="white", layout="constrained")
    figure.suptitle(plain(title, 100), color=INK, fontsize=13, parse_math=False)
    cells = figure.subfigures(rows, columns, squeeze=False, hspace=0.02).flat
    for number, (moment, frames_TSS3, cell) in enumerate(zip(moments, frames, cells, strict=False), start=1):
        times = f"{clock(moment.start)} to {clock(moment.end)}"
        cell.suptitle(
            f"{number}   {moment.score:.3f}   {times}   {plain(PurePath(moment.video).name, 42)}",
            color=INK, fontsize=9, x=0.02, ha="left", parse_math=False,
        )  # fmt: skip
        drawn = cell.subplots(1, _SHOWN_FRAMES)
        for place, axes in enumerate(drawn):
            axes.set_axis_off()
            if frames_TSS3 is not None:
                axes.imshow(frames_TSS3[(2 * place + 1) * len(frames_TSS3) // (2 * _SHOWN_FRAMES)])
            elif place == 0:
                axes.text(0, 0.5, "the file cannot be read any more", color=QUIET, fontsize=9)
    figure.savefig(path)


def clock(seconds: float) -> str:
    """Seconds as people read them on a player: `1:02:03.4`, `2:03.4`."""
    tenths = round(10 * seconds)
    hours, minutes = divmod(tenths // 600, 60)
    rest = f"{tenths // 10 % 60:02}.{tenths % 10}"
    return f"{hours}:{minutes:02}:{rest}" if hours else f"{minutes}:{rest}"
