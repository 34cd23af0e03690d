"""What the recipes do to a Pillow image (RGB) beside cropping it: RandAugment's operations, blur, solarisation.

Pillow's results are those of the published recipe, and it is the fastest on a CPU. RandAugment is done here alone, so
its recipes decode on the CPU; blur and solarisation are in the GPU's graph too (`dali.py`).
"""

from __future__ import annotations

from collections.abc import Iterable

from PIL import Image, ImageFilter

from text4vis.data.augmentation import Crop, Operation

SOLARIZE_THRESHOLD = 128


def operate(picture: Image.Image, operations: Iterable[Operation]) -> Image.Image:
    """Applies RandAugment's operations (Cubuk et al., 2020) in order. Pixels from outside the frame become black."""
    from text4vis.data.randaugment import OPERATIONS  # loads torchvision: 90 MB that other recipes do without

    for operation in operations:
        picture = OPERATIONS[operation.name](picture, operation)
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
