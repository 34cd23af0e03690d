"""The loader: every sample once, and the same pixels whatever the ranks, batches and threads."""

import contextlib
import dataclasses
import itertools
import json
import subprocess
import sys
import threading
from types import SimpleNamespace

import launch
import numpy as np
import pytest
import torch
from batches import settings, take
from read_stream import identify

from text4vis.config.schema import Config, ConfigError
from text4vis.data.decoding import CpuDecoder
from text4vis.data.loader import build_loader
from text4vis.data.reading import PlanReader

NUM_VIDEOS = 23


@pytest.mark.slow
@pytest.mark.parametrize("shuffle", ["global", "shards:2"])
def test_the_global_batches_are_the_same_at_every_world_size(shards, shuffle):
    """24 videos a step by 1, 2, 3, 4 or 8 ranks: same videos, same labels, same pixels, each once an epoch."""
    steps = 2 * NUM_VIDEOS // 24 + 1
    alone = take(settings(shards, batch_size=24, shuffle=shuffle), "train", steps)
    for world_size in (2, 3, 4, 8):
        config = settings(shards, batch_size=24 // world_size, shuffle=shuffle)
        by_rank = [take(config, "train", steps, rank=r, world_size=world_size) for r in range(world_size)]
        assert [list(itertools.chain(*step)) for step in zip(*by_rank, strict=True)] == alone
    ids = [i for batch in alone for i, _, _ in batch]
    assert sorted(ids[:NUM_VIDEOS]) == sorted(ids[NUM_VIDEOS : 2 * NUM_VIDEOS]) == list(range(NUM_VIDEOS))
    assert ids[:NUM_VIDEOS] != ids[NUM_VIDEOS : 2 * NUM_VIDEOS]


@pytest.mark.slow
def test_real_processes_see_what_one_sees(shards, tmp_path):
    """One, two and three processes at once, each with its own interpreter and threads, and one that starts later."""
    alone = take(settings(shards, batch_size=6), "train", 10)
    for world_size in (1, 2, 3):
        (tmp_path / "c.yaml").write_text(settings(shards, batch_size=6 // world_size).to_yaml())
        started = launch.start("tests/support/read_stream.py", tmp_path / "c.yaml", 10, 0, ranks=world_size)
        by_rank = [json.loads(output.splitlines()[-1]) for code, output in launch.finish(started) if code == 0]
        assert len(by_rank) == world_size
        union = [list(itertools.chain(*step)) for step in zip(*by_rank, strict=True)]
        assert union == [[list(video) for video in batch] for batch in alone]
    output = launch.run("tests/support/read_stream.py", tmp_path / "c.yaml", 14, 18)  # the last ran with batches of two
    rest = list(itertools.chain(*json.loads(output.splitlines()[-1])))
    assert rest == list(itertools.chain(*union))[18 : 18 + 28]


def test_gradient_accumulation_cuts_the_same_global_batch(shards):
    whole = take(settings(shards, batch_size=6), "train", 4)
    config = dataclasses.replace(
        settings(shards, batch_size=3), solver=dataclasses.replace(Config().solver, grad_accumulation_steps=2)
    )
    assert list(itertools.chain(*take(config, "train", 8))) == list(itertools.chain(*whole))


def test_content_does_not_depend_on_batch_size_or_threads(shards):
    first = list(itertools.chain(*take(settings(shards, batch_size=1, workers=1), "train", 12)))
    for batch_size, workers in [(4, 1), (12, 3)]:
        config = settings(shards, batch_size=batch_size, workers=workers)
        assert list(itertools.chain(*take(config, "train", 12 // batch_size))) == first


def test_an_epoch_shows_a_video_in_another_way(shards):
    batches = take(settings(shards, batch_size=NUM_VIDEOS), "train", 2)
    first, second = ({i: pixels for i, _, pixels in batch} for batch in batches)
    assert sum(first[i] != second[i] for i in first) > NUM_VIDEOS // 2


@pytest.mark.parametrize("consumed", [2, 7, 22, 23, 40])
def test_a_stream_started_anywhere_is_the_tail_of_the_whole(shards, consumed):
    whole = list(itertools.chain(*take(settings(shards, batch_size=1), "train", 46)))
    tail = list(itertools.chain(*take(settings(shards, batch_size=2), "train", 3, consumed=consumed)))
    assert tail == whole[consumed : consumed + 6]


@pytest.mark.parametrize("dense", [False, True])
def test_without_augmentation_training_sees_what_an_evaluation_of_one_view_sees(shards, dense):
    config = settings(shards, augmentation="none", dense=dense, batch_size=1)
    shown = [sorted(itertools.chain(*take(config, split, NUM_VIDEOS))) for split in ("train", "val")]
    assert len(shown[0]) == NUM_VIDEOS and shown[0] == shown[1]


@pytest.mark.parametrize("world_size", [1, 2, 3, 40])
def test_evaluation_sees_every_video_once(shards, world_size):
    seen = [
        video
        for rank in range(world_size)
        for batch in take(settings(shards), "val", rank=rank, world_size=world_size)
        for video in batch
    ]
    assert [i for i, _, _ in seen] == list(range(NUM_VIDEOS))
    assert seen == list(itertools.chain(*take(settings(shards, batch_size=5), "val")))


def test_synthetic_data_keeps_plan_and_labels(shards):
    real = take(settings(shards, batch_size=4), "train", 3)
    made_up = take(settings(shards, batch_size=4, synthetic=True), "train", 3)
    assert [[v[:2] for v in batch] for batch in made_up] == [[v[:2] for v in batch] for batch in real]
    assert len({pixels for batch in made_up for _, _, pixels in batch}) == 4


def test_the_loader_stops_when_asked(shards):
    loader = build_loader(settings(shards), "train")
    batches = iter(loader)
    next(batches)
    loader.close()
    assert list(batches) == []
    with pytest.raises(ValueError, match="closed"):
        loader.dataset.read(0, np.zeros(1, np.int64))


def test_a_pass_that_is_closed_leaves_the_loader_usable(shards):
    with build_loader(settings(shards), "val") as loader:
        batches = iter(loader)
        next(batches)
        batches.close()
        assert sum(len(batch.ids) for batch in loader) == NUM_VIDEOS


@pytest.mark.parametrize(
    ("data", "message"),
    [({"train": []}, "data.train: no shards named"), ({"decode": "gpu"}, "no GPU is visible")],
)
def test_settings_that_cannot_work_are_refused(shards, data, message):
    if "decode" in data and torch.cuda.is_available():
        pytest.skip("there is a GPU")
    with pytest.raises(ConfigError, match=message):
        build_loader(settings(shards, **data), "train")


def test_a_subset_is_what_an_evaluation_shows_of_these_videos(shards):
    """In any order, shared by ranks, with other settings; closing it leaves the data set to its owner."""
    whole = {video[0]: video for batch in take(settings(shards), "val") for video in batch}
    ids = np.array([20, 3, 11, 5])
    with build_loader(settings(shards), "train", consumed=7) as loader:
        with loader.subset(ids) as subset:
            assert [video for batch in subset for video in identify(batch)] == [whole[i] for i in ids]
        shares = []
        for rank in range(3):
            with loader.subset(ids, rank=rank, world_size=3) as subset:
                shares += [i for batch in subset for i in batch.ids.tolist()]
        assert shares == ids.tolist()
        with loader.subset(ids, config=settings(shards, num_segments=2, batch_size=4)) as subset:
            assert next(iter(subset)).frames.shape == (4, 1, 2, 3, 24, 24)
        assert len(next(iter(loader)).ids) == 2
    with pytest.raises(ValueError, match="closed"):
        loader.dataset.read(0, np.zeros(1, np.int64))


def test_every_pass_starts_where_the_loader_was_told_to(shards):
    with build_loader(settings(shards), "train", consumed=7) as loader:
        first = identify(next(iter(loader)))
        assert identify(next(iter(loader))) == first == take(settings(shards, batch_size=9), "train", 1)[0][7:]
        assert [i for i, _, _ in first] == next(loader.plans()).ids.tolist()


class RecordedGpu:
    """Stands for a GPU whose streams do everything at once; notes what happens, and in which thread."""

    loading = "the loaders' stream"

    def __init__(self, events: list[str]) -> None:
        self.events = events

    def note(self, what: str) -> None:
        self.events.append(f"{threading.current_thread().name}: {what}")

    def new_event(self):
        return SimpleNamespace(record=lambda stream: self.note(f"record on {stream}"), query=lambda: True)

    @contextlib.contextmanager
    def on(self, stream):
        self.note(f"on {stream}")
        yield

    def current_stream(self):
        return SimpleNamespace(wait_event=lambda event: self.note("wait"))


@pytest.mark.parametrize("data", [{}, {"synthetic": True}, {"augmentation": "paper"}])
def test_batches_of_the_cpu_are_pinned_and_copied_to_the_gpu_by_the_loaders_thread(shards, data, monkeypatch):
    """The loader's own code with a stand-in for the GPU; the copy itself is left out."""
    events: list[str] = []
    gpu, empty = RecordedGpu(events), torch.empty

    def allocated(*size, pin_memory=False, **options):
        gpu.note(f"allocate, pinned {pin_memory}")
        return empty(*size, **options)

    def copied(self, device, non_blocking=False):
        gpu.note(f"to {device}")
        return self

    monkeypatch.setattr("text4vis.data.loader.CudaGpu", lambda device: gpu)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: gpu.note(f"set {device}"))
    monkeypatch.setattr(torch.Tensor, "record_stream", lambda self, stream: gpu.note("record the stream"))
    monkeypatch.setattr(torch.Tensor, "to", copied)
    monkeypatch.setattr(torch, "empty", allocated)
    with build_loader(settings(shards, **data), "train") as loader:
        loader._target = torch.device("cuda", 1)
        batches = iter(loader)
        assert {next(batches).frames.shape for _ in range(3)} == {(2, 1, 4, 3, 24, 24)}
    assert events[0] == "train-loader: set cuda:1"
    sent = events.index("train-loader: on the loaders' stream")
    assert [event for event in events[sent + 1 :] if event.startswith("train-loader")][:2] == [
        "train-loader: to cuda:1",
        "train-loader: record on the loaders' stream",
    ]
    assert ("train-loader: allocate, pinned True" in events) != bool(data.get("synthetic"))
    assert [event for event in events if event.startswith("MainThread")] == [
        "MainThread: wait",
        "MainThread: record the stream",
    ] * 3


def test_only_randaugment_loads_torchvision():
    """It takes 90 MB."""
    code = "import sys, text4vis.data.loader as _; print('torchvision' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False"]


def test_the_first_batch_is_read_and_decoded_alone(shards, monkeypatch):
    events = []
    begin, finish = PlanReader.begin, CpuDecoder.finish
    monkeypatch.setattr(PlanReader, "begin", lambda self, picked: events.append("begun") or begin(self, picked))
    monkeypatch.setattr(CpuDecoder, "finish", lambda self, run: events.append("decoded") or finish(self, run))
    with build_loader(settings(shards), "train") as loader:
        next(iter(loader))
    assert events[:2] == ["begun", "decoded"]
