"""RandAugment's operations (Cubuk et al., 2020) on a Pillow image (RGB). Only `pixels.operate` uses them."""

from __future__ import annotations

import math
from collections.abc import Callable

from PIL import Image
from torchvision.transforms.v2 import functional as F

from text4vis.data.augmentation import Operation
from text4vis.data.pixels import solarize

CUTOUT_COLOUR = (125, 123, 114)


def _affine(
    picture: Image.Image, *, shear: tuple[float, float] = (0, 0), translate: tuple[float, float] = (0, 0)
) -> Image.Image:
    """Takes pixel (x, y) from (x + shear_x * y + translate_x, y + shear_y * x + translate_y), nearest neighbour."""
    degrees = [math.degrees(math.atan(tangent)) for tangent in shear]
    return F.affine(
        picture, angle=0, translate=[-offset for offset in translate], scale=1, shear=degrees, center=[0, 0]
    )


def _cutout(picture: Image.Image, operation: Operation) -> Image.Image:
    """Draws a grey square around (x, y), clipped to the frame; it includes both its borders, as Pillow's does."""
    width, height = picture.size
    centre_y, centre_x, side = operation.y * height, operation.x * width, operation.value
    top, left = int(max(0, centre_y - side / 2)), int(max(0, centre_x - side / 2))
    bottom, right = int(min(height - 1, top + side)) + 1, int(min(width - 1, left + side)) + 1
    picture = picture.copy()
    picture.paste(CUTOUT_COLOUR, (left, top, right, bottom))
    return picture


OPERATIONS: dict[str, Callable] = {
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
