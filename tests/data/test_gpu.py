"""What only a GPU can show: its pixels beside the CPU's, and the life of a batch's memory. `pytest -m gpu`."""

import itertools

import numpy as np
import pytest
import torch
from batches import settings

from text4vis.data.finishing import GpuFinisher, used_here
from text4vis.data.loader import build_loader

pytestmark = pytest.mark.gpu

LARGE = {"input_size": 224, "scale_size": 256, "num_segments": 8}


@pytest.mark.parametrize("preset", ["released", "paper", "something", "none"])
def test_training_frames_are_those_of_the_cpu(photographs, preset):
    """The same regions, flips and colours. The CPU resizes without antialias, so single values differ."""
    batches = {}
    for decode in ("cpu", "gpu"):
        config = settings(photographs[0], **LARGE, augmentation=preset, flip_swaps=[], decode=decode)
        with build_loader(config, "train") as loader:
            batches[decode] = [batch.frames.cpu().numpy().astype(int) for batch in itertools.islice(loader, 4)]
    for ours, theirs in zip(batches["gpu"], batches["cpu"], strict=True):
        assert np.abs(ours - theirs).mean() < 6


def test_evaluation_frames_are_those_of_the_cpu(photographs):
    frames = {}
    for decode in ("cpu", "gpu"):
        config = settings(photographs[0], **LARGE, test_clips=2, test_crops=3, batch_size=12, decode=decode)
        with build_loader(config, "val") as loader:
            frames[decode] = [batch.frames.cpu().numpy().astype(int) for batch in loader]
    for ours, theirs in zip(frames["gpu"], frames["cpu"], strict=True):
        assert np.abs(ours - theirs).mean() < 1.5


def test_stored_videos_are_those_of_the_cpu(stored_videos):
    frames = {}
    for decode in ("cpu", "gpu"):
        with build_loader(settings(stored_videos, **LARGE, decode=decode), "val") as loader:
            frames[decode] = [batch.frames.cpu().numpy().astype(int) for batch in loader]
    for ours, theirs in zip(frames["gpu"], frames["cpu"], strict=True):
        assert np.abs(ours - theirs).mean() < 3


def test_a_batch_that_is_let_go_of_is_not_written_while_it_is_read():
    """The trainer's stream sleeps, then reads a batch that Python has freed; the next batches must not reach it."""
    device = torch.device("cuda", torch.cuda.current_device())
    finisher = GpuFinisher((1, 8, 224, 224, 3), device)

    def make(value: int) -> torch.Tensor:
        """Memory as a batch has it, of the finisher's stream."""
        with torch.cuda.stream(finisher._stream):
            frames = torch.full((32, 1, 8, 224, 224, 3), value, dtype=torch.uint8, device=device)
        finisher._stream.synchronize()
        return frames

    sums = []
    for value in range(20):
        frames = make(value)
        used_here(frames)
        torch.cuda._sleep(20_000_000)
        sums.append(frames.float().mean())
        del frames
    assert [float(total) for total in sums] == list(range(20))
