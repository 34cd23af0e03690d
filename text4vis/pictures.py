"""Pictures for people: what the model saw and what it thought. Imports nothing of text4vis but types."""

from __future__ import annotations

from pathlib import Path

from matplotlib.figure import Figure

from text4vis.predictor import Prediction

_INK, _QUIET, _BAR, _BAR_REST = "#22262b", "#6b7280", "#2f6fab", "#b9cbe0"


def save_prediction(prediction: Prediction, title: str, path: str | Path) -> None:
    """One PNG: the sampled frames with their numbers, and below them the likeliest classes as bars."""
    num_frames, num_classes = len(prediction.frames), len(prediction.top)
    columns = min(num_frames, 8)
    rows = -(-num_frames // columns)
    width = 1.55 * columns
    bars = 0.34 * num_classes + 0.45
    figure = Figure(figsize=(width, 1.75 * rows + bars + 0.5), dpi=120, facecolor="white", layout="constrained")
    top, bottom = figure.subfigures(2, 1, squeeze=False, height_ratios=(1.75 * rows, bars)).flat
    top.suptitle(title, color=_INK, fontsize=12, parse_math=False)
    for axes, frame, index in zip(
        top.subplots(rows, columns, squeeze=False).flat, prediction.frames, prediction.indices, strict=False
    ):
        axes.imshow(frame)
        axes.set_title(f"frame {index}", fontsize=8, color=_QUIET)
    for axes in top.axes:
        axes.set_axis_off()
    axes = bottom.subplots()
    names = [name for name, _ in prediction.top]
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
