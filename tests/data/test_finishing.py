"""Frames of a batch: the published recipe's pixels."""

import numpy as np
import pytest
import torch
from batches import settings
from open_clip.transform import image_transform
from PIL import Image
from torchvision.transforms import v2

from text4vis.data.augmentation import eval_geometry
from text4vis.data.finishing import place
from text4vis.data.loader import build_loader
from text4vis.data.sampling import test_indices as clip_indices
from text4vis.serving.standalone import scale_and_crop


def test_evaluation_pixels_are_those_of_the_published_recipe(photographs):
    """4 clips x 3 crops on real photographs against Pillow and torchvision."""
    folder, root = photographs
    data = {"input_size": 224, "scale_size": 256, "num_segments": 8, "test_clips": 4, "test_crops": 3, "batch_size": 24}
    with build_loader(settings(folder, **data), "val") as loader:
        batch = next(iter(loader))
        names = [loader.dataset.name(int(i)) for i in batch.ids]
    assert batch.frames.shape == (2, 12, 8, 3, 224, 224) and batch.frames.dtype == torch.uint8
    for b, name in enumerate(names):
        for position, frame in enumerate(clip_indices(30, 8, 4)):
            with Image.open(root / name / f"img_{frame + 1:05d}.jpg") as file:
                image = v2.Resize(256, v2.InterpolationMode.BICUBIC)(file.convert("RGB"))
            x, y = (image.width - 224) // 4, (image.height - 224) // 4
            for c, left in enumerate((0, 4 * x, 2 * x)):
                expected = np.asarray(image.crop((left, 2 * y, left + 224, 2 * y + 224)), dtype=int)
                ours = batch.frames[b, position // 8 * 3 + c, position % 8].permute(1, 2, 0).numpy().astype(int)
                assert np.abs(ours - expected).mean() <= 0.5 and np.abs(ours - expected).max() <= 4


@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
@pytest.mark.parametrize("resize", ["shortest", "squash", "longest"])
@pytest.mark.parametrize("size", [(100, 60), (60, 100), (33, 97), (64, 64), (500, 5), (20, 31)])
def test_each_resize_is_open_clips_and_the_exported_programs(size, resize, interpolation):
    """To the last bit."""
    side, (width, height) = 64, size
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8))
    transform = image_transform(
        side, is_train=False, mean=(0.0,) * 3, std=(1.0,) * 3, resize_mode=resize, interpolation=interpolation
    )
    expected_SS3 = (transform(image) * 255).round().to(torch.uint8).permute(1, 2, 0).numpy()
    geometry = eval_geometry(height, width, side, side, 1, resize=resize, interpolation=interpolation)
    on_cpu = np.full((1, 1, side, side, 3), 77, np.uint8)
    place(np.asarray(image), geometry, [(0, 0, 0)], on_cpu)
    np.testing.assert_array_equal(on_cpu[0, 0], expected_SS3)
    rule = {"scale_size": side, "input_size": side, "resize": resize, "interpolation": interpolation}
    np.testing.assert_array_equal(scale_and_crop(image, rule).transpose(1, 2, 0), expected_SS3)


def test_a_batch_of_an_evaluation_is_squashed_or_framed_in_black_as_the_configuration_says(photographs):
    folder, root = photographs
    for resize, interpolation, kernel in (("squash", "bilinear", 2), ("longest", "bicubic", 3)):
        data = {"input_size": 96, "scale_size": None, "num_segments": 2, "resize": resize}
        with build_loader(settings(folder, **data, interpolation=interpolation), "val") as loader:
            batch = next(iter(loader))
            name = loader.dataset.name(int(batch.ids[0]))
        with Image.open(root / name / "img_00001.jpg") as file:
            width, height = file.size if resize == "longest" else (96, 96)
            scale = 96 / max(width, height)
            small = file.convert("RGB").resize((round(width * scale), round(height * scale)), kernel)
        top, left = (96 - small.height) // 2, (96 - small.width) // 2
        first = batch.frames[0, 0, 0].permute(1, 2, 0).numpy()
        inside = first[top : top + small.height, left : left + small.width].astype(int)
        assert np.abs(inside - np.asarray(small, dtype=int)).max() <= 1
        assert first.astype(int).sum() == inside.sum(), "black beside it"
        assert (resize == "longest") == (small.size != (96, 96))


def test_training_pixels_are_the_drawn_region(photographs):
    """A training view looks like Pillow's bilinear resize of the region that was drawn."""
    folder, root = photographs
    config = settings(folder, input_size=112, scale_size=112, num_segments=8, batch_size=3, grey=0.3)
    with build_loader(config, "train") as loader:
        plan = next(loader.plans())
        batch = next(iter(loader))
        names = [loader.dataset.name(int(i)) for i in batch.ids]
    for b, frame in ((b, frame) for b, video in enumerate(plan.videos) for frame in video.frames):
        _, t, c = frame.targets[0]
        crop = frame.geometry.crops[c]
        top, left, height, width = frame.geometry.region
        with Image.open(root / names[b] / f"img_{frame.number + 1:05d}.jpg") as file:
            expected = file.convert("RGB").crop((left, top, left + width, top + height)).resize((112, 112), 2)
        if crop.grey:
            expected = expected.convert("L").convert("RGB")
        if crop.flip:
            expected = expected.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        ours = batch.frames[b, 0, t].permute(1, 2, 0).numpy().astype(int)
        assert np.abs(ours - np.asarray(expected, dtype=int)).mean() < 4
