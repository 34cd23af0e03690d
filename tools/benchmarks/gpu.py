"""The benchmark of one GPU: decoding, the loader, training steps of three models, and a hundred steps on real data.

`measure` runs on a CPU too, where a test calls it with a tiny model: there launches and synchronisations are 0, and
there is no share of a peak.

B videos, T frames, C classes, D embedding width.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.contenders import decode_only
from benchmarks.data import make_workload
from benchmarks.engine import EngineSetup
from benchmarks.figures import Figure, interleaved, run_fresh
from benchmarks.recipe import Batches, Contender, Setup
from benchmarks.speed import throughput
from text4vis.cluster import distributed
from text4vis.cluster.stop import StopRequest
from text4vis.config.loading import config_from_dict
from text4vis.data.loader import build_loader
from text4vis.data.prefetch import settled
from text4vis.model.video_clip import build_model
from text4vis.training.logs import Meter, memory_bytes
from text4vis.training.trainer import Trainer

# Models, and how many videos of 8 frames are in a step: what 24 GB hold without activation checkpointing.
MODELS = {"ViT-B-32": 64, "ViT-B-16": 32, "ViT-L-14": 8}
PRESETS = ("released", "paper")
REAL_STEPS = 100
# Dense bf16 operations a second by a part of the card's name, longer names first. Source: NVIDIA's data sheets.
PEAKS = {"H100 PCIe": 756e12, "H100": 989e12, "H200": 989e12, "A100": 312e12, "L40S": 362e12, "RTX 4090": 165e12}
_WARM_UP_STEPS, _TIMED_STEPS = 5, 20
_CLASSES = 400
# Names of the CUDA runtime's calls begin so.
_LAUNCHES = ("cudaLaunchKernel", "cuLaunchKernel", "cudaGraphLaunch")
_SYNCHRONISATIONS = ("cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize")


def peak_of(card: str) -> float | None:
    """Dense bf16 operations a second of a card by its name; None if it is not in the table."""
    return next((peak for name, peak in PEAKS.items() if name in card), None)


def training_flops(arch: str) -> float:
    """Operations of a forward and a backward pass for one video of 8 frames at 224 px, with the default head.

    Matrix products, convolutions and attention, counted by torch's FlopCounterMode on tensors without memory. A
    multiplication and an addition are two operations.
    """
    config = config_from_dict({"network": {"arch": arch, "init": False}}, "benchmark")
    segments, side = config.data.num_segments, config.data.input_size
    model = build_model(config.network, segments, image_size=side).to("meta")
    frames_BTCHW = torch.empty(1, segments, 3, side, side, dtype=torch.uint8, device="meta")
    with FlopCounterMode(display=False) as counter:
        model(frames_BTCHW, torch.empty(_CLASSES, model.embed_dim, device="meta")).sum().backward()
    return float(counter.get_total_flops())


@dataclass(frozen=True)
class Steps:
    """What training steps of one rank took.

    videos_per_second, waiting: share of the time in which the step waited for data, both over all timed steps. memory:
    peak bytes of the rank. launches, synchronisations: calls in one further step, counted by torch's profiler.
    """

    videos_per_second: float
    waiting: float
    memory: float
    launches: int
    synchronisations: int


def train(setup: EngineSetup, num_steps: int, workers: int = 0) -> Steps:
    """Times `num_steps` steps of the trainer at ZeRO 1. Call it in a fresh process.

    workers: threads that load the frames; 0: noise that costs nothing.
    """
    config = setup.config(1)
    data = replace(config.data, synthetic=not workers, workers=workers)  # type: ignore[type-var]
    config = replace(config, data=data)  # type: ignore[type-var]
    distributed.start()
    with Trainer(config, Path("unused"), StopRequest(), "never") as trainer, settled():
        batches = iter(trainer.train_loader)
        for _ in range(_WARM_UP_STEPS):
            trainer.train_step(batches, Meter.new(trainer.device))
        _wait_for_gpu()
        meter, started = Meter.new(trainer.device), time.perf_counter()
        for _ in range(num_steps):
            trainer.train_step(batches, meter)
        _wait_for_gpu()
        seconds = time.perf_counter() - started
        with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
            trainer.train_step(batches, Meter.new(trainer.device))
            _wait_for_gpu()
    counts = {event.key: event.count for event in profiler.key_averages()}

    def calls(beginnings: tuple[str, ...]) -> int:
        return sum(count for name, count in counts.items() if name.startswith(beginnings))

    distributed.stop()
    return Steps(
        videos_per_second=num_steps * setup.videos / seconds,
        waiting=meter.wait_seconds() / seconds,
        memory=memory_bytes(),
        launches=calls(_LAUNCHES),
        synchronisations=calls(_SYNCHRONISATIONS),
    )


def _wait_for_gpu() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


@contextmanager
def _loader(setup: Setup, decode: str, preset: str) -> Iterator[Batches]:
    with build_loader(setup.config(decode=decode, augmentation=preset), "train") as loader:
        yield (batch.frames for batch in loader)


def loaders(devices: Sequence[str]) -> dict[str, Contender]:
    """Decoding alone, and our loader with each preset, on each of the devices ("cpu", "gpu")."""
    found: dict[str, Contender] = {
        f"decode only, {device}": partial(decode_only, device_id=None if device == "cpu" else 0) for device in devices
    }
    for device, preset in itertools.product(devices, PRESETS):
        if (device, preset) == ("gpu", "paper"):  # RandAugment is done on the CPU
            continue
        found[f"loader, {device}, {preset}"] = partial(_loader, decode=device, preset=preset)
    return found


def gpu(find_setup: Callable[[], Setup], work: Path, rounds: int, seconds: float) -> list[Figure]:
    """What one GPU does. Without a GPU nothing is run, and a line says so."""
    if not torch.cuda.is_available():
        print("gpu: no GPU is visible, so nothing was run")
        return []
    few = make_workload(work, num_videos=8, num_frames=16, clips=None)
    return measure(find_setup(), few.shards, rounds, seconds, MODELS)


def measure(setup: Setup, engine: Path, rounds: int, seconds: float, models: Mapping[str, int]) -> list[Figure]:
    """All figures of the visible GPU, or of the CPU where none is.

    engine: shards for the steps on noise. rounds, seconds: repetitions and shortest duration of each loader's
    measurement. models: how many videos a step of each model has.
    """
    has_gpu = torch.cuda.is_available()
    contenders = loaders(("cpu", "gpu") if has_gpu else ("cpu",))
    runs = {name: partial(run_fresh, throughput, found, setup, seconds, 1) for name, found in contenders.items()}
    figures = [
        Figure("gpu", name, "videos/s", values) for name, values in interleaved("gpu: loaders", runs, rounds).items()
    ]
    peak = peak_of(torch.cuda.get_device_name()) if has_gpu else None
    for arch, videos in models.items():
        steps = run_fresh(train, EngineSetup(engine, arch, videos, "bf16"), _TIMED_STEPS)
        figures += _of_steps(f"step, {arch}, {videos} videos", steps)
        if peak:
            share = steps.videos_per_second * training_flops(arch) / peak
            figures.append(Figure("gpu", f"step, {arch}: share of the peak", "", [share]))
    arch, videos = next(iter(models.items()))
    real = EngineSetup(setup.workload.shards, arch, videos, "bf16")
    steps = run_fresh(train, real, REAL_STEPS, setup.workers)
    return figures + _of_steps(f"{REAL_STEPS} steps on real data, {arch}, {videos} videos", steps)


def _of_steps(what: str, steps: Steps) -> list[Figure]:
    values = {
        "": (steps.videos_per_second, "videos/s"),
        ": waiting for data": (steps.waiting, "of the time"),
        ": memory": (steps.memory / 1e9, "GB"),
        ": launches": (steps.launches, "a step"),
        ": synchronisations": (steps.synchronisations, "a step"),
    }
    return [Figure("gpu", what + part, unit, [value]) for part, (value, unit) in values.items()]
