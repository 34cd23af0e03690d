"""Pictures of an evaluation: clips with captions, and the confusion matrix.

Class names are untrusted: `plain` removes their control characters before they are drawn or logged.

T frames of a clip, S their side in pixels, C classes.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import matplotlib as mpl
import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image, ImageDraw, ImageFont

INK, QUIET = "#22262b", "#6b7280"  # of text
CAPTION_PIXELS, GAP_PIXELS = 28, 2  # of `contact_sheet`: above a clip, and between frames
MOST_CLASSES = 24  # in a confusion matrix; more would be unreadable


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
        draw.text((4, top + CAPTION_PIXELS // 2), caption, INK, font, anchor="lm")
        for t, frame in enumerate(frames_TSS3):
            sheet.paste(Image.fromarray(frame), (t * (side + GAP_PIXELS), top + CAPTION_PIXELS))
    return np.asarray(sheet)


def most_confused(confusion_CC: np.ndarray, count: int = MOST_CLASSES) -> np.ndarray:
    """Ascending ids of the (at most `count`) classes that have the largest counts off the diagonal."""
    wrong_CC = confusion_CC - np.diag(np.diag(confusion_CC))
    pairs = np.column_stack(np.unravel_index(np.argsort(-wrong_CC, axis=None, kind="stable"), wrong_CC.shape))
    return np.sort(np.array(list(dict.fromkeys(pairs.ravel().tolist()))[:count], int))


def draw_confusion(confusion_CC: np.ndarray, class_names: Sequence[str]) -> np.ndarray:
    """The confusion matrix as a picture (H, W, 3) uint8; beyond MOST_CLASSES classes, only the most confused ones."""
    shown = most_confused(confusion_CC)
    counts = confusion_CC[np.ix_(shown, shown)]
    shares = counts / np.maximum(confusion_CC.sum(axis=1), 1)[shown, None]
    side = 2.5 + 0.42 * len(shown)
    figure = Figure(figsize=(side + 1, side), dpi=110, facecolor="white", layout="constrained")
    axes = figure.subplots()
    axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    for row, column in zip(*np.nonzero(counts), strict=True):
        ink = "white" if shares[row, column] > 0.5 else INK
        axes.text(column, row, str(counts[row, column]), ha="center", va="center", fontsize=8, color=ink)
    names = [plain(class_names[label], 28) for label in shown]
    axes.set_yticks(range(len(shown)), names, fontsize=8, color=INK, parse_math=False)
    axes.set_xticks(range(len(shown)), names, fontsize=8, color=INK, parse_math=False, rotation=90)
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    axes.set_xlabel("predicted", color=QUIET)
    axes.set_ylabel("true", color=QUIET)
    some = len(shown) < len(confusion_CC)
    which = f"the {len(shown)} of {len(confusion_CC)} classes confused most" if some else f"{len(shown)} classes"
    axes.set_title(f"videos of {which}", fontsize=11, color=INK)
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.array(canvas.buffer_rgba())[..., :3]
