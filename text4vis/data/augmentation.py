"""Decides what is done to a video's frames: region, size, crops, flip, colours. Nothing here touches a pixel.

Randomness is counter-based: the generator of a training sample is keyed by (seed, epoch, sample id), so what is drawn
does not depend on rank, world size, batch size, threads or restarts.

    source frame (h, w) --region--> part that is decoded --resize--> (height, width) --crops--> side x side views

With RandAugment the whole frame is decoded, the operations are applied to it, and the drawn part is cut out afterwards.

Presets of `data.augmentation`:
    released    random resized crop, flip, grey, as the original project's code does it
    paper       RandAugment of two operations of strength 9 before them, as its published runs on Kinetics list it
    something   multi-scale crop at fixed places, and a flip that swaps the labels it turns into each other
    none        the centre crop of the evaluation
"""

from __future__ import annotations

import math
from typing import Literal, NamedTuple

import numpy as np

from text4vis.config.schema import ConfigError, DataConfig
from text4vis.data import sampling

Resize = Literal["shortest", "squash", "longest"]
Interpolation = Literal["bicubic", "bilinear"]
Region = tuple[int, int, int, int]  # top, left, height, width, pixels

# RandAugment's operations: (magnitude at strength 0, at strength 30, whether its sign is drawn). They are those of the
# package that the original project uses (ildoonet/pytorch-randaugment). Rotation is in degrees, shears are tangents,
# translations and the side of the cut-out square are in pixels of the stored frame, posterise is the number of bits
# kept, solarise a threshold, solarise_add an addend, and the rest are Pillow's enhancement factors.
OPERATIONS: dict[str, tuple[float, float, bool]] = {
    "autocontrast": (0, 1, False),
    "equalize": (0, 1, False),
    "invert": (0, 1, False),
    "rotate": (0, 30, True),
    "posterize": (0, 4, False),
    "solarize": (0, 256, False),
    "solarize_add": (0, 110, False),
    "color": (0.1, 1.9, False),
    "contrast": (0.1, 1.9, False),
    "brightness": (0.1, 1.9, False),
    "sharpness": (0.1, 1.9, False),
    "shear_x": (0, 0.3, True),
    "shear_y": (0, 0.3, True),
    "cutout": (0, 40, False),
    "translate_x": (0, 100, True),
    "translate_y": (0, 100, True),
}
MULTI_SCALES = (1, 0.875, 0.75, 0.66)
# Labels of Something-Something that a mirror turns into each other: to pull, push or turn something left or right.
SOMETHING_SWAPS = ((86, 87), (93, 94), (166, 167))


class Operation(NamedTuple):
    """One step of RandAugment.

    name: of OPERATIONS. value: its magnitude. x, y: the centre of a cut-out, in [0, 1) of the frame.
    """

    name: str
    value: float
    x: float
    y: float


class Crop(NamedTuple):
    """A square of the model's input size at (top, left) of the resized frame, and what is done to it, in this order.

    Both may be negative: what lies outside the frame is black.
    flip: left to right. grey: three equal channels. blur: the standard deviation of a Gaussian in pixels, 0 for none.
    solarize: values from 128 up are inverted.
    """

    top: int
    left: int
    flip: bool = False
    grey: bool = False
    blur: float = 0.0
    solarize: bool = False


class Geometry(NamedTuple):
    """How one source frame becomes views. Lengths in pixels.

    region: the part of the source frame that is decoded. operations: applied to it first. part: then cut out of it;
    None without operations. height, width: the size after resizing. resampling: bicubic or bilinear with antialias, as
    in evaluation, or fast, as in training: bilinear without antialias, of the mean of pixels where it shrinks by two or
    more. crops: cut out of the resized image.
    """

    region: Region
    height: int
    width: int
    resampling: Literal["bicubic", "bilinear", "fast"]
    crops: tuple[Crop, ...]
    operations: tuple[Operation, ...] = ()
    part: Region | None = None


class ResizedCrop(NamedTuple):
    """Ten drawn attempts at a random resized crop.

    areas: shares of the frame's area. aspects: width over height. swaps: whether width and height are exchanged. x, y:
    in [0, 1), the place of the attempt that fits.
    """

    areas: list[float]
    aspects: list[float]
    swaps: list[bool]
    x: float
    y: float

    def region(self, height: int, width: int, side: int) -> Region:
        """The first attempt that fits into a (height, width) frame, else a square of its short side. Ignores `side`.

        The original first scales the frame's short side to 256. Here the same region is cut from the source: that is
        the same up to rounding, and decodes less.
        """
        crop_h = crop_w = min(height, width)
        for area, aspect, swap in zip(self.areas, self.aspects, self.swaps, strict=True):
            pixels = area * (height * width)
            w, h = round(math.sqrt(pixels * aspect)), round(math.sqrt(pixels / aspect))
            w, h = (h, w) if swap else (w, h)
            if 0 < w <= width and 0 < h <= height:
                crop_h, crop_w = h, w
                break
        return int(self.y * (height - crop_h + 1)), int(self.x * (width - crop_w + 1)), crop_h, crop_w


class MultiScaleCrop(NamedTuple):
    """The multi-scale crop of TSN (Wang et al., ECCV 2016): `size` and `place`, in [0, 1), choose among fixed ones."""

    size: float
    place: float

    def region(self, height: int, width: int, side: int) -> Region:
        """The chosen region of a (height, width) frame, for a model with inputs of `side` pixels.

        Height and width are each one of MULTI_SCALES times the frame's short side, at most one scale apart; a length
        within two pixels of `side` becomes `side`. The thirteen places are corners, centre, edges' centres, quarters.
        The original also squeezes each frame to 240 x 320 first; here frames keep their shape, as in evaluation.
        """
        scaled = [max(1, int(min(height, width) * scale)) for scale in MULTI_SCALES]
        lengths = [side if abs(length - side) < 3 else length for length in scaled]
        near = [(h, w) for i, h in enumerate(lengths) for j, w in enumerate(lengths) if abs(i - j) <= 1]
        crop_h, crop_w = near[int(self.size * len(near))]
        crop_h, crop_w = min(crop_h, height), min(crop_w, width)  # a frame may be a pixel or two below `side`
        step_y, step_x = (height - crop_h) // 4, (width - crop_w) // 4
        places = [(y, x) for y in range(5) for x in range(5) if (x + y) % 2 == 0]
        y, x = places[int(self.place * len(places))]
        return y * step_y, x * step_x, crop_h, crop_w


class Draw(NamedTuple):
    """The random decisions for one training sample, shared by all its frames. indices: frame numbers, (T,) int64."""

    indices: np.ndarray
    crop: ResizedCrop | MultiScaleCrop
    flip: bool
    grey: bool
    blur: float
    solarize: bool
    operations: tuple[Operation, ...]


def generator(seed: int, time: int, sample: int, stream: int = 0) -> np.random.Generator:
    """The random numbers of one sample at one time: Philox with the key (seed, sample) and the time in its counter.

    stream: who draws; each stream has its own numbers and its own notion of time. Stream 0 is augmentation's, and its
    time is the epoch.
    """
    return np.random.Generator(np.random.Philox(key=[seed, sample], counter=[0, 0, stream, time]))


def draw(data: DataConfig, num_frames: int, rng: np.random.Generator) -> Draw:
    """Draws all random decisions for a training sample of `num_frames` frames.

    The original draws RandAugment's operations anew for each frame; here all frames of a video share them.
    """
    indices = sampling.train_indices(num_frames, data.num_segments, rng, data.dense)
    low, high = data.crop_area
    areas, aspects, swaps = rng.random((3, 10)).tolist()
    x, y, flip, grey, blur, sigma, solarize = rng.random(7).tolist()
    crop: ResizedCrop | MultiScaleCrop = MultiScaleCrop(x, y)
    if data.augmentation != "something":
        crop = ResizedCrop(
            [low + area * (high - low) for area in areas],
            [3 / 4 + aspect * (4 / 3 - 3 / 4) for aspect in aspects],
            [swap < 0.5 for swap in swaps],
            x,
            y,
        )
    return Draw(
        indices=indices,
        crop=crop,
        flip=flip < data.flip,
        grey=grey < data.grey,
        blur=0.1 + 1.9 * sigma if blur < data.blur else 0.0,
        solarize=solarize < data.solarize,
        operations=tuple(_operation(numbers, data.randaug.M) for numbers in rng.random((num_operations(data), 4))),
    )


def _operation(numbers_4: np.ndarray, strength: float) -> Operation:
    """The operation that four numbers in [0, 1) choose; all kinds are equally likely. strength: 0 to 30."""
    which, sign, x, y = numbers_4.tolist()
    name, (low, high, signed) = list(OPERATIONS.items())[int(which * len(OPERATIONS))]
    value = low + strength / 30 * (high - low)
    return Operation(name, -value if signed and sign > 0.5 else value, x, y)


def num_operations(data: DataConfig) -> int:
    """How many operations of RandAugment each video gets: `data.randaug.N`, or the preset's number."""
    preset = 2 if data.augmentation == "paper" else 0
    return preset if data.randaug.N is None else data.randaug.N


def flip_swaps(data: DataConfig) -> dict[int, int]:
    """Maps each label that a flip changes to its new one: the pairs of `data.flip_swaps`, or of the preset."""
    preset = SOMETHING_SWAPS if data.augmentation == "something" else ()
    pairs = preset if data.flip_swaps is None else data.flip_swaps
    return {a: b for pair in pairs for a, b in (pair, pair[::-1])}


def train_geometry(drawn: Draw, height: int, width: int, side: int) -> Geometry:
    """The geometry of a (height, width) training frame: the drawn crop becomes one view of side x side."""
    region = drawn.crop.region(height, width, side)
    crop = Crop(0, 0, drawn.flip, drawn.grey, drawn.blur, drawn.solarize)
    if drawn.operations:
        return Geometry((0, 0, height, width), side, side, "fast", (crop,), drawn.operations, region)
    return Geometry(region, side, side, "fast", (crop,))


def scaled_size(height: int, width: int, short_side: int) -> tuple[int, int]:
    """(height, width) after scaling the short side to `short_side`; truncates the long side, as torchvision does."""
    if height <= width:
        return short_side, int(short_side * width / height)
    return int(short_side * height / width), short_side


def frame_rule(data: DataConfig) -> tuple[Resize, Interpolation]:
    """`data.resize` and `data.interpolation`. Raises ConfigError where they are not settled: they follow from the
    model, of which this room knows nothing."""
    if data.resize is None or data.interpolation is None:
        raise ConfigError(
            "data.resize, data.interpolation: they follow from the model, which was not asked; take the configuration "
            "that text4vis.model.settle returns, or give both keys"
        )
    return data.resize, data.interpolation


def eval_geometry(
    height: int,
    width: int,
    scale_size: int,
    side: int,
    num_crops: int,
    *,
    resize: Resize = "shortest",
    interpolation: Interpolation = "bicubic",
) -> Geometry:
    """The geometry of a (height, width) evaluation frame, whose views are side x side.

    resize: as `data.resize`. shortest: short side to `scale_size`, then `num_crops` crops; squash: the whole frame as
    a square; longest: long side to `side`, black around (open_clip's ResizeKeepRatio and CenterCropOrPad).
    """
    if resize == "squash":
        height_to, width_to, crops = side, side, [Crop(0, 0)]
    elif resize == "longest":
        ratio = max(height / side, width / side)
        height_to, width_to = (max(1, round(length / ratio)) for length in (height, width))
        crops = [Crop(-((side - height_to) // 2), -((side - width_to) // 2))]
    else:
        height_to, width_to = scaled_size(height, width, scale_size)
        crops = _fixed_crops(height_to, width_to, side, num_crops)
    return Geometry((0, 0, height, width), height_to, width_to, interpolation, tuple(crops))


def _fixed_crops(height: int, width: int, side: int, num_crops: int) -> list[Crop]:
    """Crops of side x side of a scaled (height, width) frame, in the original's order.

    num_crops: 1 is the centre (rounded as torchvision's CenterCrop does); 3 are left, right and centre at steps of a
    quarter of the free margin; 5 are corners and centre; 10 are those and their mirror images. Else ValueError.
    """
    step_y, step_x = (height - side) // 4, (width - side) // 4
    if num_crops == 1:
        return [Crop(round((height - side) / 2), round((width - side) / 2))]
    if num_crops == 3:
        return [Crop(2 * step_y, x * step_x) for x in (0, 4, 2)]
    if num_crops in {5, 10}:
        places = [(0, 0), (0, 4), (4, 0), (4, 4), (2, 2)]
        return [Crop(y * step_y, x * step_x, flip) for y, x in places for flip in (False, True)[: num_crops // 5]]
    raise ValueError(f"num_crops must be 1, 3, 5 or 10, got {num_crops}")
