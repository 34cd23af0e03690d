"""Geometry of crops: parity with the published recipe, and randomness that depends on (seed, epoch, sample) alone."""

import dataclasses

import numpy as np
import pytest
from PIL import Image
from torchvision.transforms import v2

from text4vis.augmentation import draw, eval_geometry, generator, scaled_size, train_geometry
from text4vis.config import DataConfig

SIZES = [(240, 320), (256, 340), (320, 240), (1080, 1920), (256, 256), (257, 401), (31, 900), (180, 320)]


def test_a_draw_depends_on_seed_epoch_and_sample_alone():
    data = DataConfig()
    first = draw(data, 300, generator(3, 2, 17))
    for key in [(3, 2, 18), (3, 3, 17), (4, 2, 17)]:
        assert draw(data, 300, generator(*key)).x != first.x
    again = draw(data, 300, generator(3, 2, 17))
    for field in dataclasses.fields(first):
        np.testing.assert_array_equal(getattr(first, field.name), getattr(again, field.name))


@pytest.mark.parametrize("size", SIZES)
def test_random_crops_lie_inside_and_keep_the_recipe(size):
    height, width = size
    data = DataConfig(crop_area=(0.08, 1.0))
    shares, flips, greys = [], [], []
    for sample in range(300):
        drawn = draw(data, 10, generator(0, 0, sample))
        geometry = train_geometry(drawn, height, width, 224)
        top, left, h, w = geometry.region
        assert 0 <= top <= height - h and 0 <= left <= width - w and h > 0 and w > 0
        assert (geometry.height, geometry.width) == (224, 224)
        shares.append(h * w / (height * width))
        flips.append(drawn.flip)
        greys.append(drawn.grey)
        if (h, w) != (min(size), min(size)):
            assert 3 / 4 - 0.05 <= w / h <= 4 / 3 + 0.05
    assert 0.4 < np.mean(flips) < 0.6 and 0.13 < np.mean(greys) < 0.27
    if max(size) / min(size) < 1.5:
        assert min(shares) < 0.2 and max(shares) > 0.7


@pytest.mark.parametrize("size", SIZES)
def test_sizes_and_centre_crop_are_torchvisions(size):
    height, width = size
    image = Image.fromarray(np.random.default_rng(0).integers(0, 255, (height, width, 3), dtype=np.uint8))
    resized = v2.Resize(256, v2.InterpolationMode.BICUBIC)(image)
    assert scaled_size(height, width, 256) == (resized.height, resized.width)
    geometry = eval_geometry(height, width, 256, 224, 1)
    crop = geometry.crops[0]
    ours = np.asarray(resized)[crop.top : crop.top + 224, crop.left : crop.left + 224]
    np.testing.assert_array_equal(ours, np.asarray(v2.CenterCrop(224)(resized)))


def test_crops_stand_where_the_original_puts_them():
    def places(count):
        return [(c.left, c.top, c.flip) for c in eval_geometry(256, 340, 256, 224, count).crops]

    x, y = (340 - 224) // 4, (256 - 224) // 4
    assert places(3) == [(0, 2 * y, False), (4 * x, 2 * y, False), (2 * x, 2 * y, False)]
    corners = [(0, 0), (4 * x, 0), (0, 4 * y), (4 * x, 4 * y), (2 * x, 2 * y)]
    assert places(5) == [(*corner, False) for corner in corners]
    assert places(10) == [(*corner, flip) for corner in corners for flip in (False, True)]
    with pytest.raises(ValueError, match="num_crops"):
        eval_geometry(256, 340, 256, 224, 2)
