"""Operations on pixels, against the published rules written out."""

import math

import numpy as np
import pytest
from PIL import Image, ImageDraw, ImageEnhance, ImageFilter, ImageOps
from sklearn.datasets import load_sample_image

from text4vis.data import pixels
from text4vis.data.augmentation import OPERATIONS, Crop, Operation

PICTURE = Image.fromarray(load_sample_image("flower.jpg")).resize((340, 256))
X, Y = 0.97, 0.3


def affine(*matrix):
    return lambda image: image.transform(image.size, Image.Transform.AFFINE, matrix)


def cutout(side):
    def draw(image):
        x, y = int(max(0, X * image.width - side / 2)), int(max(0, Y * image.height - side / 2))
        image = image.copy()
        corner = (min(image.width, x + side), min(image.height, y + side))
        ImageDraw.Draw(image).rectangle((x, y, *corner), (125, 123, 114))
        return image

    return draw


def solarize_add(addend):
    def add(image):
        brighter = np.clip(np.asarray(image, int) + addend, 0, 255).astype(np.uint8)
        return ImageOps.solarize(Image.fromarray(brighter), 128)

    return add


PLAIN = {
    "autocontrast": lambda v: ImageOps.autocontrast,
    "equalize": lambda v: ImageOps.equalize,
    "invert": lambda v: ImageOps.invert,
    "rotate": lambda v: lambda image: image.rotate(v),
    "posterize": lambda v: lambda image: ImageOps.posterize(image, int(v)),
    "solarize": lambda v: lambda image: ImageOps.solarize(image, v),
    "solarize_add": solarize_add,
    "color": lambda v: lambda image: ImageEnhance.Color(image).enhance(v),
    "contrast": lambda v: lambda image: ImageEnhance.Contrast(image).enhance(v),
    "brightness": lambda v: lambda image: ImageEnhance.Brightness(image).enhance(v),
    "sharpness": lambda v: lambda image: ImageEnhance.Sharpness(image).enhance(v),
    "shear_x": lambda v: affine(1, v, 0, 0, 1, 0),
    "shear_y": lambda v: affine(1, 0, 0, v, 1, 0),
    "cutout": cutout,
    "translate_x": lambda v: affine(1, 0, v, 0, 1, 0),
    "translate_y": lambda v: affine(1, 0, 0, 0, 1, v),
}


def cases():
    for name, (low, high, signed) in OPERATIONS.items():
        for strength in (9, 17):
            value = low + strength / 30 * (high - low)
            yield from ((name, sign * value) for sign in ((1, -1) if signed else (1,)))


@pytest.mark.parametrize(("name", "value"), cases())
def test_each_operation_is_pillows(name, value):
    """The published package's formulas, to the bit."""
    operation = Operation(name, value, X, Y)
    expected = PLAIN[name](value)(PICTURE)
    np.testing.assert_array_equal(np.asarray(pixels.operate(PICTURE, [operation])), np.asarray(expected))
    assert (np.asarray(expected) != np.asarray(PICTURE)).any()


def test_operations_follow_each_other_and_leave_their_input_alone():
    before = np.array(PICTURE)
    steps = [Operation("cutout", 12, 0.5, 0.5), Operation("invert", 0, 0, 0), Operation("rotate", 9, 0, 0)]
    expected = ImageOps.invert(pixels.operate(PICTURE, steps[:1])).rotate(9)
    np.testing.assert_array_equal(np.asarray(pixels.operate(PICTURE, steps)), np.asarray(expected))
    np.testing.assert_array_equal(np.asarray(PICTURE), before)


def test_no_strength_breaks_an_operation():
    for name, (low, high, _) in OPERATIONS.items():
        for value in (low, high):
            out = pixels.operate(PICTURE, [Operation(name, value, 0.0, 0.999)])
            assert out.size == PICTURE.size and out.mode == "RGB"
    assert np.asarray(pixels.operate(PICTURE, [Operation("posterize", 0, 0, 0)])).max() == 128  # not all black


@pytest.mark.parametrize("sigma", [0.1, 0.7, 1.3, 2.0])
def test_blur_is_pillows(sigma):
    expected = PICTURE.filter(ImageFilter.GaussianBlur(sigma))
    np.testing.assert_array_equal(np.asarray(pixels.blur(PICTURE, sigma)), np.asarray(expected))


def test_a_view_is_blurred_then_solarised():
    expected = ImageOps.solarize(PICTURE.filter(ImageFilter.GaussianBlur(1.5)))
    np.testing.assert_array_equal(
        np.asarray(pixels.recolour(PICTURE, Crop(0, 0, blur=1.5, solarize=True))), np.asarray(expected)
    )


def test_solarize_keeps_what_is_below_the_threshold():
    ramp = Image.fromarray(np.arange(256, dtype=np.uint8).reshape(16, 16)).convert("RGB")
    expected = [value if value < 76.8 else 255 - value for value in range(256)]
    assert np.asarray(pixels.solarize(ramp, 76.8))[..., 0].ravel().tolist() == expected
    assert math.isclose(OPERATIONS["solarize"][1] * 9 / 30, 76.8)
