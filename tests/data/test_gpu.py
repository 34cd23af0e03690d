"""What only a GPU can show: its pixels beside the same graph's on the CPU, and the life of a batch's memory.

`pytest -m gpu`. What these tests compare with is compared with the CPU's way and with Pillow where there is no GPU.
"""

import io
import itertools

import numpy as np
import pytest
import torch
from batches import build, build_graph_loader, settings
from frame_folders import make_frame_folders
from PIL import Image
from sklearn.datasets import load_sample_image
from videos import encode, pictures

from shards.annotations import parse_annotations
from shards.writer import build_shards
from text4vis.data.augmentation import eval_geometry
from text4vis.data.dali import Steps, dense_outputs, start_views, view_graph
from text4vis.data.handover import CudaGpu, HandOver
from text4vis.data.loader import build_loader

pytestmark = pytest.mark.gpu


@pytest.fixture(autouse=True)
def gpu():
    if not torch.cuda.is_available():
        pytest.skip("needs a GPU")


LARGE = {"input_size": 224, "scale_size": 256, "num_segments": 8, "batch_size": 3}


def decoded(loader, count=None) -> np.ndarray:
    with loader:
        batches = [(batch.frames, batch.ids) for batch in itertools.islice(loader, count)]
        return np.concatenate([frames.cpu().numpy().astype(int) for frames, _ in batches])


def assert_as_on_the_cpu(config, split, count=None, mean=1.0) -> None:
    """Between decoders of JPEG single values differ by a few of 255."""
    on_gpu = build_loader(config, split)
    assert on_gpu.device.type == "cuda"
    theirs = build_graph_loader(config, split)
    theirs._target = torch.device("cpu")
    assert np.abs(decoded(on_gpu, count) - decoded(theirs, count)).mean() < mean


@pytest.mark.parametrize("data", [
    {}, {"blur": 0.5, "solarize": 0.5}, {"augmentation": "something", "flip_swaps": []}, {"augmentation": "none"},
])  # fmt: skip
def test_training_frames_are_those_of_the_cpu(photographs, data):
    assert_as_on_the_cpu(settings(photographs[0], **LARGE | {"decode": "gpu"} | data), "train", 4)


@pytest.mark.parametrize("data", [
    {"test_clips": 2, "test_crops": 3}, {"test_crops": 5}, {"test_crops": 10},
    {"resize": "squash", "interpolation": "bilinear", "scale_size": None}, {"resize": "longest", "scale_size": None},
])  # fmt: skip
def test_evaluation_frames_are_those_of_the_cpu(photographs, data):
    assert_as_on_the_cpu(settings(photographs[0], **LARGE | {"decode": "gpu", "batch_size": 30} | data), "val")


def test_randaugment_is_decoded_on_the_cpu_and_copied(photographs):
    config = settings(photographs[0], **LARGE, augmentation="paper", decode="auto")
    with build_loader(config, "train") as loader:
        batch = next(iter(loader))
        assert loader.device.type == "cpu" and batch.frames.is_cuda
    expected = build_loader(config, "train")
    expected._target = torch.device("cpu")
    np.testing.assert_array_equal(batch.frames.cpu().numpy(), decoded(expected, 1))


@pytest.mark.parametrize("kind", ["JPEG", "grey JPEG", "CMYK JPEG", "PNG", "WEBP", "BMP"])
def test_every_format_is_what_the_cpu_decodes(kind):
    image = Image.fromarray(load_sample_image("flower.jpg")).resize((341, 256))
    mode = {"grey JPEG": "L", "CMYK JPEG": "CMYK"}.get(kind, "RGB")
    stream = io.BytesIO()
    image.convert(mode).save(stream, kind.split()[-1])
    steps, geometry = Steps(224, 1, "bicubic"), eval_geometry(256, 341, 256, 224, 1)
    views = []
    for device_id in (None, torch.cuda.current_device()):
        graph = view_graph(steps, device_id=device_id, num_threads=1, batch_size=1)
        start_views(graph, steps, [stream.getvalue()], [geometry])
        views.append(torch.from_dlpack(dense_outputs(graph)[0]).cpu().numpy().astype(int))
    assert np.abs(views[0] - views[1]).mean() < 1


def test_stored_videos_are_those_of_the_cpu(tmp_path):
    """H.264, HEVC and VP9 by NVIDIA's decoder, a turned one and one in BT.709 on the CPU."""
    images = pictures(30, 320, 240)
    made = [
        ("h264.mp4", "libx264", {"options": {"bf": "2"}}),
        ("hevc.mp4", "libx265", {"options": {"x265-params": "log-level=none"}}),
        ("vp9.webm", "libvpx-vp9", {}),
        ("turned.mp4", "libx264", {"matrix": (0, 1, -1, 0)}),
        ("bt709.mp4", "libx264", {"colorspace": 1}),
    ]
    for name, codec, options in made:
        encode(tmp_path / name, codec, images=images, **options)
    (tmp_path / "list.txt").write_text("".join(f"{name} 0\n" for name, *_ in made))
    listed = parse_annotations(tmp_path / "list.txt")
    build_shards(listed, root=tmp_path, labels=["a"], output=tmp_path / "shards", store="video")
    for split, count in (("val", None), ("train", 4)):
        config = settings(tmp_path / "shards", **LARGE, decode="gpu")
        cpu = build_loader(settings(tmp_path / "shards", **LARGE, decode="cpu"), split)
        assert np.abs(decoded(build_loader(config, split), count) - decoded(cpu, count)).mean() < 3


def test_spoilt_frames_are_skipped_and_their_neighbours_kept(tmp_path):
    folders = make_frame_folders(tmp_path, [2] * 12)
    stream = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (32, 48, 3), dtype=np.uint8)).save(stream, "PNG")
    spoilt = bytearray(stream.getvalue())
    spoilt[200:260] = bytes(60)
    for number in (2, 3, 7):
        (folders.root / folders.names[number] / "img_00002.jpg").write_bytes(spoilt)
    folder = build(folders.annotations, folders.root, folders.labels, tmp_path / "shards")
    config = settings(folder, batch_size=3, decode="gpu", on_error="skip", max_bad_share=0.5)
    loader = build_loader(config, "val")
    frames = decoded(loader)
    assert len(loader.bad) == 3 and len(frames) == 9
    assert_as_on_the_cpu(config, "val", mean=2)


def test_a_batch_that_is_let_go_of_is_not_written_while_it_is_read():
    """The trainer's stream sleeps, then reads a batch that Python has freed; the next batches must not reach it."""
    device = torch.device("cuda", torch.cuda.current_device())
    hand_over, seen = HandOver(CudaGpu(device)), []
    for value in range(20):
        make = lambda value=value: torch.full((38_000_000,), value, dtype=torch.uint8, device=device)  # noqa: E731
        frames, ready = hand_over.send(make, None)
        hand_over.receive(frames, ready)
        torch.cuda._sleep(20_000_000)
        seen.append(torch.stack([frames.amin(), frames.amax()]))
        del frames
    assert [pair.tolist() for pair in seen] == [[value, value] for value in range(20)]


@pytest.mark.parametrize("decode", ["cpu", "gpu"])
def test_memory_stays_level_over_300_batches(photographs, decode):
    config, used = settings(photographs[0], **LARGE, decode=decode), []
    with build_loader(config, "train") as loader:
        for number, batch in enumerate(itertools.islice(loader, 300)):
            batch.frames.float().mean()
            if number in (49, 299):
                free, total = torch.cuda.mem_get_info()  # DALI's memory is not the allocator's
                used.append(total - free)
    assert used[1] - used[0] < 64 << 20
