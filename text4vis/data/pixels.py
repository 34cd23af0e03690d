"""What the recipes do to a Pillow image (RGB) beside cropping it: RandAugment's operations, blur, solarisation.

Pillow's results are those of the published recipe, and it is the fastest on a CPU. RandAugment is done here alone, so
its recipes decode on the CPU; blur and solarisation are in the GPU's graph too (`dali.py`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable

from PIL import Image, ImageFilter
from torchvision.transforms.v2 import functional as F

from text4vis.data.augmentation import Crop, Operation

CUTOUT_COLOUR = (125, 123, 114)
SOLARIZE_THRESHOLD = 128


def operate(picture: Image.Image, operations: Iterable[Operation]) -> Image.Image:
    """Applies RandAugment's operations (Cubuk et al., 2020) in order. Pixels from outside the frame become black."""
    for operation in operations:
        picture = _OPERATIONS[operation.name](picture, operation)
    return picture


def recolour(picture: Image.Image, crop: Crop) -> Image.Image:
    """Applies the crop's blur, then its solarisation."""
    picture = blur(picture, crop.blur) if crop.blur else picture
    return solarize(picture) if crop.solarize else picture


def blur(picture: Image.Image, sigma: float) -> Image.Image:
    """Gaussian blur with a standard deviation of `sigma` pixels, which Pillow approximates by three box blurs."""
    return picture.filter(ImageFilter.GaussianBlur(sigma))


def solarize(picture: Image.Image, threshold: float = SOLARIZE_THRESHOLD, addend: float = 0) -> Image.Image:
    """Adds `addend` to each value, to at most 255, then inverts the values from `threshold` up."""
    table = [min(int(value + addend), 255) for value in range(256)]
    table = [value if value < threshold else 255 - value for value in table]
    return picture.point(table * 3)


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
