"""The benchmarks by name. Each takes a `Task` and returns its figures."""

from __future__ import annotations

import itertools
import os
import shutil
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path

import numpy as np
import webdataset as wds

from benchmarks import contenders, engine
from benchmarks.data import Workload, make_workload, multiplied
from benchmarks.engine import EngineSetup
from benchmarks.figures import (
    Figure,
    Processes,
    against,
    bytes_read_by_process,
    compared,
    forget_peak_memory,
    interleaved,
    run_fresh,
)
from benchmarks.gpu import gpu
from benchmarks.lock import lock
from benchmarks.peers import PEERS, installed, prepare
from benchmarks.prediction import predict
from benchmarks.recipe import Contender, Setup
from benchmarks.remote import remote
from benchmarks.scale import scale
from benchmarks.search import search
from benchmarks.speed import Speed, memory, speed
from benchmarks.stored import stored
from shards.plan import epoch_order
from shards.writer import build_shards
from text4vis.common.progress import track
from text4vis.config.schema import Config
from text4vis.data import augmentation
from text4vis.data.loader import build_loader
from text4vis.training.logs import resident_bytes


@dataclass(frozen=True)
class Task:
    """What to measure, and for how long.

    find_workload: makes or opens the data, for the benchmarks that read it. batch_size, workers: of the loaders. work:
    folder for temporary data. peers: names of loaders of others, see `benchmarks.PEERS`. rounds: repetitions of each
    contender. seconds: shortest duration of a throughput measurement. index_videos, index_frames: size of the index for
    `open` and `position`. order_samples: length of the permutation. model, step_videos, precision: see `EngineSetup`.
    ranks: numbers of ranks for `memory`. scale_videos, world_sizes: sizes of data sets and jobs for `scale`. clips:
    videos for `predict`, or None. predict_videos, predict_minutes: how many of them, and the length of its long file.
    search_windows: size of the index for `search`.
    """

    find_workload: Callable[[], Workload]
    batch_size: int
    workers: int
    processes: Processes
    work: Path
    peers: Sequence[str]
    rounds: int
    seconds: float
    index_videos: int
    index_frames: int
    order_samples: int
    model: str
    step_videos: int
    precision: str
    ranks: Sequence[int]
    scale_videos: Sequence[int]
    world_sizes: Sequence[int]
    clips: Path | None
    predict_videos: int
    predict_minutes: float
    search_windows: int

    @cached_property
    def setup(self) -> Setup:
        return Setup(self.find_workload(), self.batch_size, self.workers)

    @cached_property
    def engine_setup(self) -> EngineSetup:
        few = make_workload(self.work, num_videos=8, num_frames=16, clips=None)
        return EngineSetup(few.shards, self.model, self.step_videos, self.precision)

    @property
    def large_index(self) -> Path:
        shards = self.setup.workload.shards
        return multiplied(shards, self.work, num_videos=self.index_videos, num_frames=self.index_frames)


@dataclass(frozen=True)
class _Entry:
    """A loader that takes part: the helper process that it runs in, and the batches that it makes at the same time."""

    contender: Contender
    process: str
    producers: int = 1


def _speeds(task: Task, benchmark: str, entries: dict[str, _Entry]) -> dict[str, list[Speed]]:
    def run(entry: _Entry) -> Callable[[], Speed]:
        arguments = entry.contender, task.setup, task.seconds, entry.producers
        return lambda: task.processes.run(entry.process, speed, *arguments)

    return interleaved(benchmark, {name: run(entry) for name, entry in entries.items()}, task.rounds)


def _rates(speeds: dict[str, list[Speed]]) -> dict[str, list[float]]:
    return {name: [one.rate for one in series] for name, series in speeds.items()}


def loader(task: Task) -> list[Figure]:
    """Training loaders, 8 x 224 px, the released recipe: videos a second, processor time a video, and memory."""
    setup = task.setup
    peers = installed(PEERS[name] for name in task.peers)
    folder = prepare(peers, setup.workload, task.work)
    entries = {
        "ours": _Entry(contenders.ours_train, "threads"),
        "decode only (limit)": _Entry(contenders.decode_only, "threads"),
        "original recipe": _Entry(contenders.original_train, "workers", setup.workers),
        "torchvision v2 tensors": _Entry(contenders.tensor_train, "workers", setup.workers),
    }
    entries |= {peer.name: _Entry(peer.contender(folder), peer.name, peer.producers(setup)) for peer in peers}
    speeds = _speeds(task, "loader", entries)
    rates = _rates(speeds)
    targets = {"decode only (limit)": "at least 0.80", "original recipe": "at least 5", "WebDataset": "at least 1.3"}
    figures = compared("loader", "videos/s", rates, targets)
    if peers:
        best = [max(rates[peer.name][turn] for peer in peers) for turn in range(task.rounds)]
        name = f"the best of {', '.join(peer.name for peer in peers)}"
        figures.append(Figure("loader", name, "videos/s", best, against(rates["ours"], best), "at least 2.0"))
    for name, series in speeds.items():
        figures.append(Figure("loader", f"{name}: CPU", "ms/video", [one.cpu_milliseconds for one in series]))
    return figures + _memory(setup, entries)


def _memory(setup: Setup, entries: dict[str, _Entry]) -> list[Figure]:
    """Once each, in processes that share no libraries with others."""
    figures = []
    for name, entry in track(entries.items(), "loader: memory", len(entries), unit="run"):
        used = run_fresh(memory, entry.contender, setup, entry.producers, imported=False)
        target = "at most 700" if name == "ours" else ""
        figures.append(Figure("loader", f"{name}: memory", "MB", [used / 1e6], target=target))
    return figures


def views(task: Task) -> list[Figure]:
    """Evaluation loaders, 4 clips x 3 crops."""
    entries = {
        "ours, 12 views": _Entry(contenders.ours_views, "threads"),
        "original recipe, 12 views": _Entry(contenders.original_views, "workers", task.setup.workers),
    }
    rates = _rates(_speeds(task, "views", entries))
    return compared("views", "videos/s", rates, {"original recipe, 12 views": "at least 6"})


@dataclass(frozen=True)
class Reading:
    """Samples read in `seconds`, the bytes that the process read for them, and the bytes of the sampled frames."""

    samples: int
    seconds: float
    read_bytes: int
    sampled_bytes: int


def read_sampled_frames(config: Config, seconds: float) -> Reading:
    """Reads the samples of the training stream as the loader does."""
    with build_loader(config, "train") as running:
        requests = (plan.requests for plan in running.plans())
        running.dataset.read_many(next(requests))
        samples = sampled = 0
        before, started = bytes_read_by_process(), time.perf_counter()
        while (elapsed := time.perf_counter() - started) < seconds or not samples:
            chunks = running.dataset.read_many(next(requests))
            samples += len(chunks)
            sampled += sum(map(len, itertools.chain(*chunks)))
        return Reading(samples, elapsed, bytes_read_by_process() - before, sampled)


def read_whole_videos(config: Config, tars: list[str], seconds: float) -> Reading:
    """Reads the tars from end to end as WebDataset does, and picks the frames that the training recipe samples."""
    samples = sampled = 0
    before, started = bytes_read_by_process(), time.perf_counter()
    for sample in wds.WebDataset(tars, shardshuffle=False).repeat():
        names = sorted(name for name in sample if name.endswith((".jpg", ".png")))
        rng = augmentation.generator(config.seed, 0, int(sample["__key__"]))
        indices = augmentation.draw(config.data, len(names), rng).indices
        sampled += sum(len(sample[names[index]]) for index in set(indices.tolist()))
        samples += 1
        if (elapsed := time.perf_counter() - started) >= seconds:
            break
    return Reading(samples, elapsed, bytes_read_by_process() - before, sampled)


def read(task: Task) -> list[Figure]:
    """Bytes and samples of reading, without decoding."""
    config, tars = task.setup.train, task.setup.workload.tars
    runs: dict[str, Callable[[], Reading]] = {
        "pread of the sampled frames": lambda: task.processes.run("threads", read_sampled_frames, config, task.seconds),
        "WebDataset, whole videos": lambda: task.processes.run(
            "workers", read_whole_videos, config, tars, task.seconds
        ),
    }
    readings = interleaved("read", runs, task.rounds)
    rates = {name: [r.samples / r.seconds for r in series] for name, series in readings.items()}
    figures = compared("read", "samples/s", rates)
    for (name, series), target in zip(readings.items(), ("at most 1.05", ""), strict=True):
        kilobytes = [r.read_bytes / r.samples / 1e3 for r in series]
        overhead = [r.read_bytes / r.sampled_bytes for r in series]
        figures.append(
            Figure("read", f"bytes read / of sampled frames: {name}", "kB/sample", kilobytes, overhead, target)
        )
    return figures


def build_seconds(workload: Workload, output: Path) -> float:
    """Seconds to build shards from the workload's folders until they are on disk."""
    labels = [f"class {label}" for label in range(1 + max(label for _, _, label in workload.videos))]
    started = time.perf_counter()
    build_shards(
        workload.annotations, root=workload.root, labels=labels, output=output, image_template=workload.template
    )
    return time.perf_counter() - started


def tar_seconds(workload: Workload, output: Path, *, sync: bool) -> float:
    """Seconds of `tar cf` of the same folders. sync: include the time until the archive is on disk."""
    tar = shutil.which("tar")
    if tar is None:
        raise FileNotFoundError("tar: no such command; install it to compare with it")
    output.mkdir(parents=True)
    names = "\n".join(name for name, _, _ in workload.videos)
    command = [tar, "-c", "-f", str(output / "all.tar"), "-C", str(workload.root), "--verbatim-files-from", "-T", "-"]
    started = time.perf_counter()
    subprocess.run(command, input=names, text=True, check=True)
    if sync:
        with (output / "all.tar").open("rb") as stream:
            os.fsync(stream.fileno())
    return time.perf_counter() - started


def build(task: Task) -> list[Figure]:
    """Building shards from frame folders against `tar cf` of them: a warm page cache, the same output folder."""
    workload, output = task.setup.workload, task.work / "build"
    frames = [workload.frame(video, f) for video, (_, count, _) in enumerate(workload.videos) for f in range(count)]
    megabytes = sum(len(path.read_bytes()) for path in frames) / 1e6

    def rate(take_seconds: Callable[[Workload, Path], float]) -> float:
        shutil.rmtree(output, ignore_errors=True)
        os.sync()
        seconds = take_seconds(workload, output)
        shutil.rmtree(output)
        return megabytes / seconds

    runs = {
        "build_shards": partial(rate, build_seconds),
        "tar cf": partial(rate, partial(tar_seconds, sync=False)),
        "tar cf, then fsync as build_shards does": partial(rate, partial(tar_seconds, sync=True)),
    }
    return compared("build", "MB/s", interleaved("build", runs, task.rounds), {"tar cf": "at least 0.8"})


def opening(config: Config) -> tuple[float, float]:
    """Seconds to open the data set and plan a batch, and the peak memory of it in MB. Call it in a fresh process."""
    forget_peak_memory()
    before, started = resident_bytes("VmRSS"), time.perf_counter()
    with build_loader(config, "train") as running:
        next(running.plans())
        elapsed = time.perf_counter() - started
        return elapsed, (resident_bytes("VmHWM") - before) / 1e6


def open_(task: Task) -> list[Figure]:
    """Opening a data set as large as Kinetics-400."""
    config = task.setup.config(train=str(task.large_index))
    runs = {"opening": lambda: run_fresh(opening, config)}
    seconds, megabytes = zip(*interleaved("open", runs, task.rounds)["opening"], strict=True)
    size = f"{task.index_videos:,} videos x {task.index_frames} frames"
    return [
        Figure("open", f"{size}: to the first planned batch", "s", list(seconds), target="at most 2"),
        Figure("open", f"{size}: memory above import", "MB", list(megabytes), target="at most 300"),
    ]


def _seconds(function: Callable[[], object]) -> float:
    started = time.perf_counter()
    function()
    return time.perf_counter() - started


def our_order_seconds(num_samples: int, epoch: int) -> float:
    return _seconds(lambda: epoch_order(num_samples, 0, epoch))


def numpy_order_seconds(num_samples: int, epoch: int) -> float:
    return _seconds(lambda: np.random.default_rng(epoch).permutation(num_samples))


def order(task: Task) -> list[Figure]:
    """The permutation of an epoch."""
    count, epochs = task.order_samples, itertools.count()
    runs: dict[str, Callable[[], float]] = {
        f"order of {count:,} samples": lambda: task.processes.run("threads", our_order_seconds, count, next(epochs)),
        "numpy's permutation": lambda: task.processes.run("threads", numpy_order_seconds, count, next(epochs)),
    }
    first, other = compared("order", "s", interleaved("order", runs, task.rounds))
    return [Figure("order", first.what, "s", first.values, target="at most 1"), other]


def first_batch_seconds(config: Config, consumed: int) -> float:
    """Seconds from `build_loader` to the first batch: what a job that starts or resumes waits for."""
    started = time.perf_counter()
    with build_loader(config, "train", consumed=consumed) as running:
        next(iter(running))
        return time.perf_counter() - started


def position(task: Task) -> list[Figure]:
    """The first batch from mid-epoch on against the first from position 0, on an index as large as Kinetics-400's."""
    config = task.setup.config(train=str(task.large_index))
    middle = task.index_videos * 5 // 2

    def run(consumed: int) -> Callable[[], float]:
        return lambda: task.processes.run("threads", first_batch_seconds, config, consumed)

    run(0)()  # once per process: DALI's libraries
    names = ("first batch at position 0", f"first batch at position {middle:,}, mid-epoch")
    values = interleaved("position", dict(zip(names, map(run, (0, middle)), strict=True)), task.rounds)
    start, mid = (values[name] for name in names)
    return [
        Figure("position", names[0], "s", start),
        Figure("position", names[1], "s", mid, against(mid, start), "at most 1.1"),
    ]


SUITES: dict[str, Callable[[Task], list[Figure]]] = {
    "loader": loader,
    "views": views,
    "read": read,
    "build": build,
    "open": open_,
    "order": order,
    "position": position,
    "remote": lambda task: remote(
        task.setup,
        task.processes,
        task.work,
        peers=[PEERS[name] for name in task.peers],
        rounds=task.rounds,
        seconds=task.seconds,
        large_index=task.large_index,
    ),
    "step": lambda task: engine.step(task.engine_setup, task.rounds),
    "memory": lambda task: engine.memory(task.model, task.ranks),
    "resume": lambda task: engine.resume(task.engine_setup, task.work, task.rounds),
    "scale": lambda task: scale(task.scale_videos, task.world_sizes, task.batch_size, task.rounds),
    "predict": lambda task: predict(
        task.work,
        task.clips,
        videos=task.predict_videos,
        minutes=task.predict_minutes,
        threads=task.workers,
        rounds=task.rounds,
    ),
    "stored": lambda task: stored(task.work, task.clips, task.processes, threads=task.workers, rounds=task.rounds),
    "gpu": lambda task: gpu(lambda: task.setup, task.work, task.rounds, task.seconds),
    "search": lambda task: search(task.work, task.search_windows, task.processes, task.rounds),
    "lock": lambda task: lock(task.setup, task.work, rounds=task.rounds, seconds=task.seconds),
}
