"""What the recipes do to a frame beside cropping it: RandAugment's operations, blur, solarisation, resizing.

Each function takes a Pillow image (RGB) or a tensor (..., 3, H, W) uint8 and returns the same kind. The CPU uses
Pillow: its results are those of the published recipe, and it is the fastest there. Tensors are for the GPU.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import TypeVar

import torch
from PIL import Image, ImageFilter
from torchvision.transforms.v2 import functional as F

from text4vis.data.augmentation import Crop, Operation

Picture = TypeVar("Picture", Image.Image, torch.Tensor)

CUTOUT_COLOUR = (125, 123, 114)
SOLARIZE_THRESHOLD = 128


def operate(picture: Picture, operations: Iterable[Operation]) -> Picture:
    """Applies RandAugment's operations (Cubuk et al., 2020) in order. Pixels from outside the frame become black."""
    for operation in operations:
        picture = _OPERATIONS[operation.name](picture, operation)
    return picture


def recolour(picture: Picture, crop: Crop) -> Picture:
    """Applies the crop's blur, then its solarisation."""
    picture = blur(picture, crop.blur) if crop.blur else picture
    return solarize(picture) if crop.solarize else picture


def resize(picture_NCHW: torch.Tensor, side: int) -> torch.Tensor:
    """Resizes images (N, 3, H, W) uint8 to (N, 3, side, side), bilinear with antialias."""
    return F.resize(picture_NCHW, [side, side], F.InterpolationMode.BILINEAR, antialias=True)


def blur(picture: Picture, sigma: float) -> Picture:
    """Gaussian blur with a standard deviation of `sigma` pixels, which Pillow approximates by three box blurs."""
    if isinstance(picture, Image.Image):
        return picture.filter(ImageFilter.GaussianBlur(sigma))
    return F.gaussian_blur(picture, [2 * math.ceil(3 * sigma) + 1] * 2, [sigma] * 2)


def solarize(picture: Picture, threshold: float = SOLARIZE_THRESHOLD, addend: float = 0) -> Picture:
    """Adds `addend` to each value, to at most 255, then inverts the values from `threshold` up."""
    table = [min(int(value + addend), 255) for value in range(256)]
    table = [value if value < threshold else 255 - value for value in table]
    if isinstance(picture, Image.Image):
        return picture.point(table * 3)
    return torch.tensor(table, dtype=torch.uint8, device=picture.device)[picture.int()]


def _affine(
    picture: Picture, *, shear: tuple[float, float] = (0, 0), translate: tuple[float, float] = (0, 0)
) -> Picture:
    """Takes pixel (x, y) from (x + shear_x * y + translate_x, y + shear_y * x + translate_y), nearest neighbour."""
    degrees = [math.degrees(math.atan(tangent)) for tangent in shear]
    return F.affine(
        picture, angle=0, translate=[-offset for offset in translate], scale=1, shear=degrees, center=[0, 0]
    )


def _cutout(picture: Picture, operation: Operation) -> Picture:
    """Draws a grey square around (x, y), clipped to the frame; it includes both its borders, as Pillow's does."""
    height, width = F.get_size(picture)
    centre_y, centre_x, side = operation.y * height, operation.x * width, operation.value
    top, left = int(max(0, centre_y - side / 2)), int(max(0, centre_x - side / 2))
    bottom, right = int(min(height - 1, top + side)) + 1, int(min(width - 1, left + side)) + 1
    if isinstance(picture, Image.Image):
        picture = picture.copy()
        picture.paste(CUTOUT_COLOUR, (left, top, right, bottom))
        return picture
    colour_311 = torch.tensor(CUTOUT_COLOUR, dtype=torch.uint8, device=picture.device)[:, None, None]
    return F.erase(picture, top, left, bottom - top, right - left, colour_311)


_OPERATIONS: dict[str, Callable] = {
    "autocontrast": lambda picture, _: F.autocontrast(picture),
    "equalize": lambda picture, _: F.equalize(picture),
    "invert": lambda picture, _: F.invert(picture),
    "rotate": lambda picture, operation: F.rotate(picture, operation.value),
    "posterize": lambda picture, operation: F.posterize(picture, max(1, int(operation.value))),  # 0 bits: black
    "solarize": lambda picture, operation: solarize(picture, operation.value),
    "solarize_add": lambda picture, operation: solarize(picture, addend=operation.value),
    "color": lambda picture, operation: F.adjust_saturation(picture, operation.value),
    "contrast": lambda picture, operation: F.adjust_contrast(picture, operation.value),
    "brightness": lambda picture, operation: F.adjust_brightness(picture, operation.value),
    "sharpness": lambda picture, operation: F.adjust_sharpness(picture, operation.value),
    "shear_x": lambda picture, operation: _affine(picture, shear=(operation.value, 0)),
    "shear_y": lambda picture, operation: _affine(picture, shear=(0, operation.value)),
    "cutout": _cutout,
    "translate_x": lambda picture, operation: _affine(picture, translate=(operation.value, 0)),
    "translate_y": lambda picture, operation: _affine(picture, translate=(0, operation.value)),
}
