"""The whole way of a GPU's loader, run on the CPU by the same graphs: its batches beside those of the CPU's way."""

import io
import itertools
import logging
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from batches import build, build_graph_loader, settings
from frame_folders import make_frame_folders
from PIL import Image
from torch.utils._python_dispatch import TorchDispatchMode
from videos import encode, pictures

from shards.annotations import parse_annotations
from shards.format import ShardError
from shards.writer import build_shards
from text4vis.config.schema import ConfigError
from text4vis.data import dali
from text4vis.data import loader as loading
from text4vis.data.gpu_decoding import GpuDecoder, VideoChoice
from text4vis.data.loader import build_loader
from text4vis.data.reading import PlanReader

LARGE = {"input_size": 112, "scale_size": 128, "num_segments": 4, "batch_size": 3}


def frames_of(loader, count=None) -> tuple[list[int], np.ndarray]:
    """The ids, and all frames (N, V, T, 3, S, S), of the first `count` batches."""
    with loader:
        batches = list(itertools.islice(loader, count))
    assert all(batch.frames.permute(0, 1, 2, 4, 5, 3).is_contiguous() for batch in batches), (
        "channels last, in one piece"
    )
    return [i for batch in batches for i in batch.ids.tolist()], np.concatenate([b.frames.numpy() for b in batches])


# Mean and largest difference of 255 that a preset may have; blur is Pillow's three boxes against a Gaussian.
PRESETS = {
    "released": ({}, 0.6, 40),
    "published colours": ({"blur": 0.5, "solarize": 0.5}, 0.8, 255),
    "something": ({"augmentation": "something", "flip_swaps": []}, 0.6, 40),
    "none": ({"augmentation": "none"}, 0.3, 16),
}


@pytest.mark.parametrize("preset", PRESETS)
def test_training_batches_are_the_cpus(photographs, preset):
    data, mean, largest = PRESETS[preset]
    config = settings(photographs[0], **LARGE | data)
    ids, ours = frames_of(build_graph_loader(config, "train"), 4)
    expected_ids, expected = frames_of(build_loader(config, "train"), 4)
    off = np.abs(ours.astype(int) - expected)
    assert ids == expected_ids and off.mean() <= mean and off.max() <= largest


@pytest.mark.parametrize("data", [
    {"test_clips": 4, "test_crops": 3}, {"test_clips": 3, "test_crops": 5, "dense": True}, {"test_crops": 10},
    {"resize": "squash", "interpolation": "bilinear", "scale_size": None, "test_clips": 2},
    {"resize": "longest", "scale_size": None},
])  # fmt: skip
def test_views_of_an_evaluation_are_the_cpus(photographs, data):
    """Frames that several clips show are decoded once, and put into every place."""
    config = settings(photographs[0], **LARGE | {"batch_size": 36, "num_segments": 12} | data)
    ids, ours = frames_of(build_graph_loader(config, "val"))
    expected_ids, expected = frames_of(build_loader(config, "val"))
    off = np.abs(ours.astype(int) - expected)
    assert ids == expected_ids == [0, 1, 2] and off.mean() <= 0.3 and off.max() <= 16


@pytest.fixture(scope="module")
def mixed(tmp_path_factory):
    """A data set of stored frames, and one of stored videos: two that DALI decodes, one turned, one H.264 in BT.709."""
    base = tmp_path_factory.mktemp("mixed")
    folders = make_frame_folders(base, [4, 5])
    labels = base / "abc.csv"
    labels.write_text("id,name\n0,a\n1,b\n2,c\n")
    frames = build(folders.annotations, folders.root, labels, base / "stored")
    for number in range(2):
        encode(base / f"v{number}.webm", "libvpx-vp9", images=pictures(12 + number, 48, 32))
    encode(base / "turned.mp4", images=pictures(9, 48, 32), matrix=(0, 1, -1, 0))
    encode(base / "bt709.mp4", images=pictures(9, 48, 32), colorspace=1, color_range=1)
    names = ["bt709.mp4", "turned.mp4", "v0.webm", "v1.webm"]
    (base / "list.txt").write_text("".join(f"{name} {n % 3}\n" for n, name in enumerate(names)))
    listed = parse_annotations(base / "list.txt")
    build_shards(listed, root=base, labels=["a", "b", "c"], output=base / "videos", store="video")
    return [str(frames), str(base / "videos")]


@pytest.mark.parametrize(("split", "data"), [
    ("val", {"batch_size": 6, "test_clips": 2, "test_crops": 3}), ("val", {}), ("train", {}),
])  # fmt: skip
def test_frames_and_videos_of_every_kind_share_a_batch(mixed, split, data, caplog):
    config = settings("none", train=mixed, val=mixed, **{"batch_size": 6, "on_error": "fail"} | data)
    loader = build_graph_loader(config, split)
    on_cpu = {i for i in range(6) if loader.dataset.name(i).endswith(".mp4")}
    with caplog.at_level(logging.WARNING, "text4vis"):
        ids, ours = frames_of(loader, 2 if split == "train" else None)
    expected_ids, expected = frames_of(build_loader(config, split), 2 if split == "train" else None)
    off = np.abs(ours.astype(int) - expected).mean((1, 2, 3, 4, 5))
    assert ids == expected_ids and set(ids) == set(range(6))
    for i, mean in zip(ids, off, strict=True):
        assert mean == 0 if i in on_cpu else mean < 2, i
    assert len(on_cpu) == 2
    (said,) = [record.getMessage() for record in caplog.records]
    loader._choice.say()  # says it once
    assert len(caplog.records) == 1
    assert said.startswith("2 of the first 4 stored videos are decoded on the CPU")
    assert "1 that are turned or mirrored" in said and "1 in other colours than BT.601" in said


def test_a_bad_frame_leaves_the_next_batch_its_own(mixed, tmp_path):
    """DALI ends a graph at its first error: it is built again, and no batch gets the videos of another."""
    folders = make_frame_folders(tmp_path, [2] * 8)
    stream = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (32, 48, 3), dtype=np.uint8)).save(stream, "PNG")
    spoilt = bytearray(stream.getvalue())
    spoilt[200:260] = bytes(60)
    for number in (2, 3):
        (folders.root / folders.names[number] / "img_00002.jpg").write_bytes(spoilt)
    labels = tmp_path / "abc.csv"
    labels.write_text("id,name\n0,a\n1,b\n2,c\n")
    frames = build(folders.annotations, folders.root, labels, tmp_path / "shards")
    config = settings("none", train=[], val=[mixed[1], str(frames)], batch_size=5, on_error="skip", max_bad_share=0.5)
    loader = build_graph_loader(config, "val")
    ids, ours = frames_of(loader)
    expected_ids, expected = frames_of(build_loader(config, "val"))
    assert (
        ids == expected_ids
        and len(ids) == 10
        and [entry["id"] for entry in loader.bad.entries()] == sorted(set(range(12)) - set(ids))
    )
    assert np.abs(ours.astype(int) - expected).mean((1, 2, 3, 4, 5)).max() < 2
    strict = build_graph_loader(settings("none", train=[], val=[str(frames)], batch_size=3), "val")
    with strict, pytest.raises(ShardError, match="frame 1 does not decode"):
        list(strict)


def test_sound_videos_on_which_the_decoder_fails_are_decoded_on_the_cpu(mixed, monkeypatch, caplog):
    """As AV1 on a GPU that does not know it; here H.264, which DALI's decoder for CPUs refuses."""
    monkeypatch.setattr("text4vis.data.gpu_decoding.why_not_nvdec", lambda *_: None)
    config = settings("none", train=[], val=mixed[1:], batch_size=2)
    ids, ours = frames_of(build_graph_loader(config, "val"))
    expected_ids, expected = frames_of(build_loader(config, "val"))
    assert ids == expected_ids and np.abs(ours.astype(int) - expected).mean((1, 2, 3, 4, 5)).max() < 2
    (said,) = [record.getMessage() for record in caplog.records]
    assert said.startswith("NVIDIA's decoder failed on sound stored videos, so all are decoded on the CPU from here on")


def test_a_damaged_video_is_named_and_want_of_memory_is_no_damage(mixed, monkeypatch):
    monkeypatch.setattr("text4vis.data.gpu_decoding.why_not_nvdec", lambda *_: None)
    config = settings("none", train=[], val=mixed[1:], batch_size=2)
    with build_graph_loader(config, "val") as loader, ThreadPoolExecutor(2) as threads:
        planner = loader.planner
        videos = PlanReader(loader.dataset, planner, threads).read(next(planner.batches()))
        choice = VideoChoice(loader.dataset)
        decoder = GpuDecoder(planner, threads, choice, device_id=None, num_threads=1)
        damaged = [video._replace(files=[video.files[0][:300]]) for video in videos]
        with pytest.raises(ShardError, match="does not decode"):
            decoder.finish(decoder.start(damaged))
        assert choice.by_nvdec(videos[0])

        def fails(_):
            raise RuntimeError(
                "in an operator\nencountered: CUDA error cudaErrorMemoryAllocation. Current pipeline is …"
            )

        monkeypatch.setattr("text4vis.data.dali.dense_outputs", fails)
        with pytest.raises(RuntimeError, match="cudaErrorMemoryAllocation"):
            decoder.finish(decoder.start(videos))


def test_a_graph_is_built_when_it_is_needed_and_again_after_an_error(shards, monkeypatch):
    built = []
    make = dali.view_graph
    monkeypatch.setattr(
        "text4vis.data.dali.view_graph", lambda *args, **kw: built.append("frames") or make(*args, **kw)
    )
    monkeypatch.setattr("text4vis.data.dali.video_graph", lambda *args, **kw: built.append("videos"))
    with build_loader(settings(shards), "val") as loader, ThreadPoolExecutor(2) as threads:
        reader, planner = PlanReader(loader.dataset, loader.planner, threads), loader.planner
        batches = [reader.read(picked) for picked in itertools.islice(planner.batches(), 4)]
        decoder = GpuDecoder(planner, threads, VideoChoice(loader.dataset), device_id=None, num_threads=1)
        assert built == []
        expected = [decoder.finish(decoder.start(videos)).frames(torch.device("cpu")) for videos in batches]
        assert built == ["frames"]
        bad = [video._replace(files=[b"no image"] * len(video.files)) for video in batches[0]]
        first, under_way = decoder.start(bad), decoder.start(batches[1])
        with pytest.raises(ShardError, match="does not decode"):
            decoder.finish(first)
        assert decoder.finish(under_way).frames(torch.device("cpu")).equal(expected[1]) and built == ["frames"]
        for videos, frames in zip(batches, expected, strict=True):
            assert decoder.finish(decoder.start(videos)).frames(torch.device("cpu")).equal(frames)
        assert built == ["frames"] * 2


class Counted(TorchDispatchMode):
    """Notes the operations that PyTorch carries out, but for views, which cost a GPU nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if not func.is_view:
            self.names.append(func.__name__)
        return func(*args, **kwargs or {})


def test_a_batch_of_any_size_is_one_gather(photographs):
    for data in ({"batch_size": 1}, {"batch_size": 36, "test_clips": 4, "test_crops": 3}):
        loader = build_graph_loader(settings(photographs[0], **LARGE | data), "val")
        with loader, ThreadPoolExecutor(2) as threads:
            videos = PlanReader(loader.dataset, loader.planner, threads).read(next(loader.planner.batches()))
            choice = VideoChoice(loader.dataset)
            decoder = GpuDecoder(loader.planner, threads, choice, device_id=None, num_threads=1)
            batch = decoder.finish(decoder.start(videos))
            with Counted() as counted:
                batch.frames(torch.device("cpu"))
        assert counted.names == ["index_select.default"] and len(batch.parts) == 1


def test_randaugment_is_done_on_the_cpu_and_said(photographs, monkeypatch, caplog):
    folder = photographs[0]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(loading.distributed, "device", lambda: torch.device("cuda", 1))
    place = lambda split, **data: build_loader(settings(folder, **data), split).device  # noqa: E731
    paper = {"augmentation": "paper"}
    with caplog.at_level(logging.INFO, "text4vis"):
        assert place("train", decode="auto") == place("val", decode="auto", **paper) == torch.device("cuda", 1)
        assert place("train", decode="auto", augmentation="paper", randaug={"N": 0}).type == "cuda"
        assert place("train", decode="cpu").type == "cpu" and not caplog.records
        assert place("train", decode="auto", **paper).type == "cpu"
        assert place("train", decode="auto", randaug={"N": 1}).type == "cpu"
    assert [record.getMessage() for record in caplog.records] == [
        "data.decode: auto decodes data.train on the CPU, because RandAugment (data.augmentation: paper, or "
        "data.randaug.N) is done on the CPU"
    ] * 2
    with pytest.raises(ConfigError, match=r"data.decode: gpu asked for, but RandAugment .* use --set data.decode=auto"):
        place("train", decode="gpu", **paper)
