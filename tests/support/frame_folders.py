"""Small frame folders with their annotation list and class list, made of noisy JPEGs."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image


@dataclass(frozen=True)
class FrameFolders:
    """Frame folders on disk: root, annotation list and class list."""

    root: Path
    annotations: Path
    labels: Path
    names: list[str]


def jpeg(seed: int, width: int = 48, height: int = 32, **options) -> bytes:
    """A small noisy JPEG, another one for each seed."""
    pixels = np.random.default_rng(seed).integers(0, 256, (height // 8, width // 8, 3), np.uint8)
    stream = io.BytesIO()
    image = Image.fromarray(pixels).resize((width, height), Image.Resampling.BICUBIC)
    image.save(stream, "JPEG", quality=85, **options)
    return stream.getvalue()


def make_frame_folders(
    base: Path,
    counts: Sequence[int],
    *,
    num_classes: int = 3,
    prefix: str = "class/video",
    first_seed: int = 0,
    labels: Sequence[str] | None = None,
) -> FrameFolders:
    """Folders `prefix_0000` … of `counts` frames named img_00001.jpg …, and the two lists.

    labels: the label field of each video, such as "0,2"; by default the classes in turn.
    """
    root = base / "frames"
    lines, names, seed = [], [], first_seed
    for number, count in enumerate(counts):
        name = f"{prefix}_{number:04d}"
        folder = root / name
        folder.mkdir(parents=True)
        for frame in range(1, count + 1):
            (folder / f"img_{frame:05d}.jpg").write_bytes(jpeg(seed))
            seed += 1
        names.append(name)
        lines.append(f"{name} {count} {labels[number] if labels else number % num_classes}")
    annotations, classes = base / f"{root.name}.txt", base / "labels.csv"
    annotations.write_text("\n".join(lines))
    classes.write_text("id,name\n" + "".join(f"{number},class {number}\n" for number in range(num_classes)))
    return FrameFolders(root, annotations, classes, names)
