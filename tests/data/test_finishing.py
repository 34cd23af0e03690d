"""Frames of a batch: the published recipe's pixels, and the same on a GPU's path as on the CPU's."""

import numpy as np
import pytest
import torch
from batches import settings
from open_clip.transform import image_transform
from PIL import Image
from sklearn.datasets import load_sample_image
from torchvision.transforms import v2

from text4vis.data import finishing
from text4vis.data.augmentation import Crop, Geometry, Operation, eval_geometry
from text4vis.data.finishing import GpuFinisher, place, place_on_device, used_here
from text4vis.data.loader import build_loader
from text4vis.data.plan import FramePlan, VideoPlan
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
def test_each_resize_is_open_clips_on_both_paths_and_in_the_exported_program(size, resize, interpolation):
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
    on_device = torch.full((1, 1, side, side, 3), 77, dtype=torch.uint8)
    decoded = torch.from_numpy(finishing.at_decoded_size(np.array(image), geometry))
    place_on_device([decoded], [FramePlan(0, (height, width), geometry, ((0, 0, 0),))], on_device)
    np.testing.assert_array_equal(on_device[0, 0].numpy(), expected_SS3)
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


def test_placing_on_the_device_equals_placing_on_the_cpu():
    image = np.random.default_rng(0).integers(0, 256, (40, 60, 3), dtype=np.uint8)
    crops = [Crop(3, 5), Crop(0, 36, flip=True), Crop(16, 0, grey=True), Crop(8, 20, flip=True, grey=True)]
    geometry = Geometry((0, 0, 40, 60), 40, 60, "bicubic", tuple(crops))
    frame = FramePlan(0, (40, 60), geometry, tuple((c, 0, c) for c in range(len(crops))))
    expected = np.zeros((4, 1, 24, 24, 3), np.uint8)
    place(image, geometry, frame.targets, expected)
    ours = torch.zeros(expected.shape, dtype=torch.uint8)
    place_on_device([torch.from_numpy(image)], [frame], ours)
    assert np.abs(ours.numpy().astype(int) - expected).max() <= 1  # grey may round the other way


def test_the_device_does_to_a_frame_what_the_cpu_does():
    """RandAugment on the whole frame, cut, resize, grey, flip, blur; frames of two videos with other operations."""
    image = np.array(Image.fromarray(load_sample_image("flower.jpg")).resize((340, 256)))
    videos = []
    for b, (name, crop) in enumerate([("translate_x", Crop(0, 0, True)), ("color", Crop(0, 0, False, True, 1.0))]):
        steps = (Operation(name, 30 if b == 0 else 0.64, 0, 0), Operation("rotate", -9, 0, 0))
        geometry = Geometry((0, 0, 256, 340), 96, 96, "fast", (crop,), steps, (20, 50, 80, 96))
        videos.append([FramePlan(t, (256, 340), geometry, ((0, t, 0),)) for t in range(2)])
    plain = Crop(0, 0, solarize=True)
    geometry = Geometry((0, 0, 96, 96), 96, 96, "fast", (plain,))
    videos.append([FramePlan(0, (96, 96), geometry, ((0, 0, 0), (0, 1, 0)))])
    images = [[image, image[::-1].copy()], [image, image[:, ::-1].copy()], [image[:96, :96].copy()]]
    expected = np.zeros((3, 1, 2, 96, 96, 3), np.uint8)
    ours = torch.zeros(expected.shape, dtype=torch.uint8)
    for b, (frames, of_video) in enumerate(zip(videos, images, strict=True)):
        for frame, pixels_HW3 in zip(frames, of_video, strict=True):
            place(pixels_HW3, frame.geometry, frame.targets, expected[b])
        place_on_device([torch.from_numpy(pixels_HW3) for pixels_HW3 in of_video], frames, ours[b])
    off = np.abs(ours.numpy().astype(int) - expected)
    assert off.mean() < 0.5 and (off > 8).mean() < 0.01
    assert all(frame.any() for frame in expected.reshape(6, -1))


class RecordedStream:
    """Stands for a CUDA stream: notes what happens, and when work is given to it."""

    def __init__(self, events: list[str]) -> None:
        self.events = events

    def __enter__(self) -> None:
        self.events.append("enter")

    def __exit__(self, *_: object) -> None:
        self.events.append("leave")

    def synchronize(self) -> None:
        self.events.append("wait")


def test_a_gpu_batch_is_allocated_written_and_complete_on_the_finishers_one_stream(monkeypatch):
    """Memory of another stream could be lent to the next batch while the trainer still reads this one."""
    events: list[str] = []
    made = []
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: made.append(device) or RecordedStream(events))
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: stream)
    monkeypatch.setattr(finishing, "place_on_device", lambda *_: events.append("write"))
    allocate = torch.empty

    def allocated(*shape, **options):
        events.append("allocate")
        return allocate(*shape, **options)

    monkeypatch.setattr(torch, "empty", allocated)
    finisher = GpuFinisher((1, 1, 4, 4, 3), torch.device("cpu"))
    plans = [VideoPlan(sample, 0, 0, ()) for sample in range(2)]
    for _ in range(2):
        videos, frames = finisher.start([(plan, []) for plan in plans]).result()
        assert videos == plans and frames.shape == (2, 1, 1, 4, 4, 3)
    assert made == [torch.device("cpu")]
    assert events == ["enter", "allocate", "write", "write", "leave", "wait"] * 2


def test_who_takes_a_batch_tells_the_allocator_of_the_stream_that_uses_it(monkeypatch):
    class Frames:
        device = "cuda:3"
        used_on = None

        def record_stream(self, stream):
            self.used_on = stream

    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: f"the present stream of {device}")
    frames = Frames()
    used_here(frames)
    assert frames.used_on == "the present stream of cuda:3"
