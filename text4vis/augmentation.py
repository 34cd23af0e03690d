"""What is done to a video's frames: region, size, crops, flip, grey, drawn in Python and applied by the pipeline.

Randomness is counter-based: the generator of a training sample is keyed by (seed, epoch, sample id), so its content
depends on nothing else: not on rank, world size, batch size, threads or restarts. Imports numpy and `sampling` only.

    source frame (h, w) --region--> part that is decoded --resize--> (height, width) --crops--> side x side views
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from text4vis import sampling
from text4vis.config import DataConfig


@dataclass(frozen=True)
class Crop:
    """A square of the model's input size at (top, left) of the resized frame."""

    top: int
    left: int
    flip: bool = False
    grey: bool = False


@dataclass(frozen=True)
class Geometry:
    """How one source frame becomes views. Lengths in pixels; region is (top, left, height, width) of the source."""

    region: tuple[int, int, int, int]
    height: int
    width: int
    cubic: bool  # bicubic with antialias (evaluation); else bilinear (training)
    crops: tuple[Crop, ...]


@dataclass(frozen=True)
class Draw:
    """The random decisions for one training sample, the same for all its frames.

    area and aspect are ten attempts of the random resized crop; x and y in [0, 1) place it.
    """

    indices: np.ndarray
    area: np.ndarray
    aspect: np.ndarray
    swap: np.ndarray
    x: float
    y: float
    flip: bool
    grey: bool


def generator(seed: int, epoch: int, sample: int) -> np.random.Generator:
    """The random numbers of one sample in one epoch: Philox with the key (seed, sample) and the epoch as counter."""
    return np.random.Generator(np.random.Philox(key=[seed, sample], counter=[0, 0, 0, epoch]))


def draw(data: DataConfig, num_frames: int, rng: np.random.Generator) -> Draw:
    """All random decisions for a training sample of `num_frames` frames."""
    indices = sampling.train_indices(num_frames, data.num_segments, rng, data.dense)
    low, high = data.crop_area
    area, aspect, swap = rng.random((3, 10))
    x, y, flip, grey = rng.random(4)
    return Draw(
        indices=indices,
        area=low + area * (high - low),
        aspect=3 / 4 + aspect * (4 / 3 - 3 / 4),
        swap=swap < 0.5,
        x=float(x),
        y=float(y),
        flip=bool(flip < data.flip),
        grey=bool(grey < data.grey),
    )


def train_geometry(drawn: Draw, height: int, width: int, side: int) -> Geometry:
    """Random resized crop of a (height, width) frame: share of the area in `crop_area`, sides in a ratio of 3/4 to 4/3.

    The original first scales the frame's short side to 256; the same region is cut from the source here, which is
    the same up to rounding and decodes less. When none of ten attempts fits, a square of the short side is taken.
    """
    target = drawn.area * (height * width)
    w = np.rint(np.sqrt(target * drawn.aspect)).astype(int)
    h = np.rint(np.sqrt(target / drawn.aspect)).astype(int)
    w, h = np.where(drawn.swap, h, w), np.where(drawn.swap, w, h)
    fits = np.flatnonzero((w <= width) & (h <= height) & (w > 0) & (h > 0))
    crop_h, crop_w = (int(h[fits[0]]), int(w[fits[0]])) if len(fits) else (min(height, width),) * 2
    top, left = int(drawn.y * (height - crop_h + 1)), int(drawn.x * (width - crop_w + 1))
    return Geometry((top, left, crop_h, crop_w), side, side, False, (Crop(0, 0, drawn.flip, drawn.grey),))


def scaled_size(height: int, width: int, short_side: int) -> tuple[int, int]:
    """Size after scaling the short side to `short_side`; the long side is truncated, as torchvision's Resize does."""
    if height <= width:
        return short_side, int(short_side * width / height)
    return int(short_side * height / width), short_side


def eval_geometry(height: int, width: int, scale_size: int, side: int, num_crops: int) -> Geometry:
    """Short side to `scale_size`, bicubic with antialias, then `num_crops` crops of `side`.

    1: centre (rounded as torchvision's CenterCrop). 3: left, right, centre at steps of a quarter of the free margin.
    5: corners and centre. 10: those and their mirror images. The order is the original's.
    """
    height_to, width_to = scaled_size(height, width, scale_size)
    step_y, step_x = (height_to - side) // 4, (width_to - side) // 4
    if num_crops == 1:
        crops = [Crop(round((height_to - side) / 2), round((width_to - side) / 2))]
    elif num_crops == 3:
        crops = [Crop(2 * step_y, x * step_x) for x in (0, 4, 2)]
    elif num_crops in {5, 10}:
        places = [(0, 0), (0, 4), (4, 0), (4, 4), (2, 2)]
        crops = [Crop(y * step_y, x * step_x, flip) for y, x in places for flip in (False, True)[: num_crops // 5]]
    else:
        raise ValueError(f"num_crops must be 1, 3, 5 or 10, got {num_crops}")
    return Geometry((0, 0, height, width), height_to, width_to, True, tuple(crops))
