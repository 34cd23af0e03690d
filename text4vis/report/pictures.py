"""Pictures for people: what the model saw and what it thought. Imports nothing of text4vis but types.

Names come from data, so they are shown by `plain`: nothing in them is a command to whoever shows them.

T frames of a clip, S their side in pixels, C classes.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import matplotlib as mpl
import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image, ImageDraw, ImageFont

if TYPE_CHECKING:
    from text4vis.serving.predictor import Prediction, Timeline

_LINES = ("#2f6fab", "#d1662f", "#4b8f5b", "#8a5fa8", "#b08b2e")
_INK, _QUIET, _BAR, _BAR_REST = "#22262b", "#6b7280", "#2f6fab", "#b9cbe0"
CAPTION_PIXELS, GAP_PIXELS = 28, 2  # of `contact_sheet`: above a clip, and between frames
MOST_CLASSES = 24  # of a confusion matrix that can still be read


def plain(text: str, limit: int = 60) -> str:
    """The text on one line, without control characters, and not longer than `limit` characters."""
    line = "".join(character if character.isprintable() else " " for character in text)
    return line if len(line) <= limit else f"{line[: limit - 1]}\u2026"


def contact_sheet(clips: Sequence[tuple[np.ndarray, str]]) -> np.ndarray:
    """One picture (H, W, 3) uint8 of clips (T, S, S, 3) uint8 with their captions: a row each, pixel for pixel.

    Frame t of row r begins at (CAPTION_PIXELS + r * (CAPTION_PIXELS + S), t * (S + GAP_PIXELS)).
    """
    font = ImageFont.truetype(str(Path(mpl.get_data_path()) / "fonts/ttf/DejaVuSans.ttf"), 15)
    num_frames, side = clips[0][0].shape[:2]
    width = num_frames * (side + GAP_PIXELS) - GAP_PIXELS
    width = max(width, *(int(font.getlength(caption)) + 12 for _, caption in clips))
    sheet = Image.new("RGB", (width, len(clips) * (CAPTION_PIXELS + side)), "white")
    draw = ImageDraw.Draw(sheet)
    for row, (frames_TSS3, caption) in enumerate(clips):
        top = row * (CAPTION_PIXELS + side)
        draw.text((4, top + CAPTION_PIXELS // 2), caption, _INK, font, anchor="lm")
        for t, frame in enumerate(frames_TSS3):
            sheet.paste(Image.fromarray(frame), (t * (side + GAP_PIXELS), top + CAPTION_PIXELS))
    return np.asarray(sheet)


def most_confused(confusion_CC: np.ndarray, count: int = MOST_CLASSES) -> np.ndarray:
    """Ascending ids of the classes in the largest counts off the diagonal, `count` of them or all."""
    wrong_CC = confusion_CC - np.diag(np.diag(confusion_CC))
    pairs = np.column_stack(np.unravel_index(np.argsort(-wrong_CC, axis=None, kind="stable"), wrong_CC.shape))
    return np.sort(np.array(list(dict.fromkeys(pairs.ravel().tolist()))[:count], int))


def draw_confusion(confusion_CC: np.ndarray, class_names: Sequence[str]) -> np.ndarray:
    """The counts (true class, predicted class) as a picture (H, W, 3) uint8: of many classes the most confused ones."""
    shown = most_confused(confusion_CC)
    counts = confusion_CC[np.ix_(shown, shown)]
    shares = counts / np.maximum(confusion_CC.sum(axis=1), 1)[shown, None]
    side = 2.5 + 0.42 * len(shown)
    figure = Figure(figsize=(side + 1, side), dpi=110, facecolor="white", layout="constrained")
    axes = figure.subplots()
    axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    for row, column in zip(*np.nonzero(counts), strict=True):
        ink = "white" if shares[row, column] > 0.5 else _INK
        axes.text(column, row, str(counts[row, column]), ha="center", va="center", fontsize=8, color=ink)
    names = [plain(class_names[label], 28) for label in shown]
    axes.set_yticks(range(len(shown)), names, fontsize=8, color=_INK, parse_math=False)
    axes.set_xticks(range(len(shown)), names, fontsize=8, color=_INK, parse_math=False, rotation=90)
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    axes.set_xlabel("predicted", color=_QUIET)
    axes.set_ylabel("true", color=_QUIET)
    some = len(shown) < len(confusion_CC)
    which = f"the {len(shown)} of {len(confusion_CC)} classes confused most" if some else f"{len(shown)} classes"
    axes.set_title(f"videos of {which}", fontsize=11, color=_INK)
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.array(canvas.buffer_rgba())[..., :3]


def save_prediction(prediction: Prediction, title: str, path: str | Path) -> None:
    """One PNG: the sampled frames with their numbers, and below them the likeliest classes as bars."""
    num_frames, num_classes = len(prediction.frames), len(prediction.top)
    columns = min(num_frames, 8)
    rows = -(-num_frames // columns)
    width = 1.55 * columns
    bars = 0.34 * num_classes + 0.45
    figure = Figure(figsize=(width, 1.75 * rows + bars + 0.5), dpi=120, facecolor="white", layout="constrained")
    top, bottom = figure.subfigures(2, 1, squeeze=False, height_ratios=(1.75 * rows, bars)).flat
    top.suptitle(plain(title, 120), color=_INK, fontsize=12, parse_math=False)
    for axes, frame, index in zip(
        top.subplots(rows, columns, squeeze=False).flat, prediction.frames, prediction.indices, strict=False
    ):
        axes.imshow(frame)
        axes.set_title(f"frame {index}", fontsize=8, color=_QUIET)
    for axes in top.axes:
        axes.set_axis_off()
    axes = bottom.subplots()
    names = [plain(name) for name, _ in prediction.top]
    shares = [100 * probability for _, probability in prediction.top]
    axes.barh(range(num_classes), shares, color=[_BAR] + [_BAR_REST] * (num_classes - 1), height=0.7)
    for row, share in enumerate(shares):
        axes.text(share + 1, row, f"{share:.1f} %", va="center", fontsize=9, color=_INK)
    axes.set_yticks(range(num_classes), names, fontsize=10, color=_INK, parse_math=False)
    axes.invert_yaxis()
    axes.set_xlim(0, 112)
    axes.set_xticks([])
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    figure.savefig(path)


def save_timeline(timeline: Timeline, title: str, path: str | Path) -> None:
    """One PNG: pictures of the video in order, and below them the likeliest classes' probabilities over time.

    A window's picture and probability are drawn at its middle; the line changes half-way between two middles.
    """
    middles_W = timeline.seconds_W2.mean(axis=1)
    start, end = timeline.seconds_W2[0, 0], timeline.seconds_W2[-1, 1]
    edges = np.concatenate([[start], (middles_W[1:] + middles_W[:-1]) / 2, [end]])
    count = min(8, len(middles_W))
    wanted = start + (np.arange(count) + 0.5) * (end - start) / count  # the middles of the pictures on the page
    shown = np.abs(middles_W[:, None] - wanted).argmin(axis=0)
    best_C = np.argsort(-timeline.scores_WC.max(axis=0), kind="stable")[: len(_LINES)]
    figure = Figure(figsize=(12, 5), dpi=120, facecolor="white", layout="constrained")
    top, bottom = figure.subfigures(2, 1, squeeze=False, height_ratios=(1.75, 3.25)).flat
    top.suptitle(plain(title, 120), color=_INK, fontsize=12, parse_math=False)
    for axes, window in zip(top.subplots(1, len(shown), squeeze=False).flat, shown, strict=True):
        axes.imshow(timeline.thumbnails[window])
        axes.set_title(f"{middles_W[window]:.1f} s", fontsize=8, color=_QUIET)
        axes.set_axis_off()
    axes = bottom.subplots()
    for colour, label in zip(_LINES, best_C, strict=False):
        axes.stairs(100 * timeline.scores_WC[:, label], edges, baseline=None, color=colour, linewidth=2)
    names = [plain(timeline.class_names[label]) for label in best_C]
    legend = axes.legend(
        names, loc="upper center", bbox_to_anchor=(0.5, -0.15), ncols=2, frameon=False, labelcolor=_INK
    )
    for text in legend.get_texts():
        text.set_parse_math(False)
    axes.set_xlim(edges[0], edges[-1])
    axes.set_ylim(0, 102)
    axes.set_xlabel("seconds", color=_QUIET)
    axes.set_ylabel("%", color=_QUIET, rotation=0)
    axes.tick_params(colors=_QUIET, length=0)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path)
