"""Benchmarks of training from a far store, by ranges and by whole shards, at several latencies, against local files."""

from __future__ import annotations

import os
import shutil
import statistics
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from benchmarks.figures import Figure, Processes, against, interleaved
from benchmarks.recipe import Setup
from benchmarks.store import FarStore, far_store
from shards.index import read_local_manifest
from text4vis.common.console import console
from text4vis.config.schema import Config
from text4vis.data.loader import Batch, build_loader
from text4vis.data.prefetch import settled

PAUSES_MS = (0, 30, 80)
_S3_PAUSE_MS = 30
_FIRST_PAUSE_MS = 30
_HTTP, _S3 = f"HTTP, {PAUSES_MS[0]} ms", f"S3, {_S3_PAUSE_MS} ms"
# What each is compared with, and the ratio that is promised.
_TARGETS = {
    _HTTP: ("local", "at least 0.65"),
    f"HTTP, {PAUSES_MS[1]} ms": (_HTTP, "at least 0.90"),
    f"HTTP, {PAUSES_MS[2]} ms": (_HTTP, "at least 0.85"),
    _S3: (f"HTTP, {_S3_PAUSE_MS} ms", "at least 0.90"),
}
_WARM_UP_BATCHES = 16
_STALL_SECONDS = 0.1
_WINDOW_BATCH = 8  # so that a batch takes far less than a stall


@dataclass(frozen=True)
class Run:
    """One measurement of a loader.

    cpu_seconds: CPU time of the whole process. loop_seconds: CPU time of the thread that talks to the store, an upper
    bound of its time under Python's lock. stall_seconds: sum of the waits for a batch that were a tenth of a second
    longer than the median wait. first_seconds: time to the first batch, opening included. requests, sent_bytes: what
    the store served during the measurement.
    """

    videos: int
    seconds: float
    cpu_seconds: float
    loop_seconds: float
    stall_seconds: float
    first_seconds: float
    requests: int
    sent_bytes: int

    @property
    def rate(self) -> float:
        return self.videos / self.seconds


def _loop_seconds() -> float:
    """CPU time of the threads that talk to stores."""
    threads = [thread.native_id for thread in threading.enumerate() if thread.name == "shards-loop"]
    return sum(float(Path(f"/proc/self/task/{thread}/schedstat").read_text().split()[0]) for thread in threads) / 1e9


def _wait_times(batches: Iterable[Batch], seconds: float | None, videos: int | None) -> tuple[int, list[float]]:
    waits, count, started = [], 0, time.perf_counter()
    last = started
    for batch in batches:
        now = time.perf_counter()
        waits.append(now - last)
        last, count = now, count + len(batch.ids)
        if (seconds is not None and now - started >= seconds) or (videos is not None and count >= videos):
            break
    return count, waits


def measure(config: Config, store: FarStore, seconds: float | None, videos: int | None, endpoint: str | None) -> Run:
    """Measures `seconds` after a warm-up, or the first `videos` with the opening. endpoint: of s3:// addresses."""
    served = store.counts()
    if endpoint is not None:
        os.environ |= {"AWS_ENDPOINT_URL": endpoint, "AWS_ACCESS_KEY_ID": "key", "AWS_SECRET_ACCESS_KEY": "secret"}
        os.environ["AWS_DEFAULT_REGION"] = "us-east-1"
    opened, cpu = time.perf_counter(), time.process_time()
    with build_loader(config, "train") as loader, settled():
        batches = iter(loader)
        first = next(batches)
        first_seconds = time.perf_counter() - opened
        if seconds is None:
            loop = 0.0
            count, waits = _wait_times(batches, None, (videos or 0) - len(first.ids))
            count += len(first.ids)
        else:
            for _ in range(_WARM_UP_BATCHES):
                next(batches)
            served = store.counts()
            opened, cpu, loop = time.perf_counter(), time.process_time(), _loop_seconds()
            count, waits = _wait_times(batches, seconds, None)
        elapsed, usual = time.perf_counter() - opened, statistics.median(waits)
        stalls = sum(wait for wait in waits if wait > usual + _STALL_SECONDS)
        used = time.process_time() - cpu, _loop_seconds() - loop
        requests, sent = (after - before for after, before in zip(store.counts(), served, strict=True))
        return Run(count, elapsed, *used, stalls, first_seconds, requests, sent)


@dataclass(frozen=True)
class _Bench:
    setup: Setup
    processes: Processes
    work: Path
    rounds: int
    store: FarStore

    def served(self, pause_ms: int) -> str:
        return f"{self.store.addresses[pause_ms]}/{self.setup.workload.shards.name}"


def remote(
    setup: Setup, processes: Processes, work: Path, *, rounds: int, seconds: float, large_index: Path
) -> list[Figure]:
    """Ranges against the local loader, cold and warm epochs of whole shards, and the first batch of a large data set.

    large_index: a folder that `multiplied` has written.
    """
    with far_store(setup.workload.shards.parent, work / "store", PAUSES_MS) as store:
        console().print(f"remote: the store is {store.kind}, on the same cores as the loader")
        bench = _Bench(setup, processes, work, rounds, store)
        figures = _ranges(bench, seconds) + _windows(bench)
    return figures + _first_batch(bench, large_index)


def first_batch(config: Config, store: FarStore) -> tuple[float, float]:
    """Seconds from nothing to the first batch, and the megabytes that were served until then."""
    _, served = store.counts()
    started = time.perf_counter()
    with build_loader(config, "train") as loader, settled():
        next(iter(loader))
        elapsed = time.perf_counter() - started
        return elapsed, (store.counts()[1] - served) / 1e6


def _first_batch(bench: _Bench, folder: Path) -> list[Figure]:
    cache = bench.work / "no-index"
    name = f"first batch of {read_local_manifest(folder).num_videos:,} videos, {_FIRST_PAUSE_MS} ms, no index kept"
    with far_store(folder.parent, bench.work / "large-store", [_FIRST_PAUSE_MS]) as store:
        config = bench.setup.config(train=f"{store.addresses[_FIRST_PAUSE_MS]}/{folder.name}", cache_dir=str(cache))

        def run() -> tuple[float, float]:
            shutil.rmtree(cache, ignore_errors=True)
            return bench.processes.run("threads", first_batch, config, store)

        seconds, megabytes = zip(*interleaved("remote", {name: run}, bench.rounds)[name], strict=True)
    shutil.rmtree(cache, ignore_errors=True)
    return [
        Figure("remote", name, "s", list(seconds), target="at most 3"),
        Figure("remote", f"{name}: fetched", "MB", list(megabytes), target="at most 50"),
    ]


def _ranges(bench: _Bench, seconds: float) -> list[Figure]:
    folder, cache = bench.setup.workload.shards, str(bench.work / "index-cache")

    def run(address: str, store: FarStore = bench.store, endpoint: str | None = None) -> Callable[[], Run]:
        config = bench.setup.config(train=address, cache_dir=cache)
        process = "s3" if endpoint else "threads"
        return lambda: bench.processes.run(process, measure, config, store, seconds, None, endpoint)

    runs = {"local": run(str(folder))} | {f"HTTP, {pause} ms": run(bench.served(pause)) for pause in PAUSES_MS}
    bucket = folder.parent  # nginx answers as S3 does, and doesn't look at signatures
    with far_store(bucket.parent, bench.work / "s3-store", [_S3_PAUSE_MS]) as store:
        runs[_S3] = run(f"s3://{bucket.name}/{folder.name}", store, store.addresses[_S3_PAUSE_MS])
        for each in runs.values():
            each()  # warms up: imports libraries, fetches the index
        results = interleaved("remote", runs, bench.rounds)
    rates = {name: [one.rate for one in series] for name, series in results.items()}
    figures = [Figure("remote", "ranges, local", "videos/s", rates["local"])]
    for name, (base, target) in _TARGETS.items():
        ratios = against(rates[name], rates[base])
        figures.append(Figure("remote", f"ranges, {name} (to {base})", "videos/s", rates[name], ratios, target))
    for name, series in results.items():
        figures.append(_per_video(f"ranges, {name}: CPU", series, lambda one: 1e3 * one.cpu_seconds, "ms", "at most 5"))
    series = results[_HTTP]
    return [
        *figures,
        _per_video(f"ranges, {_HTTP}: CPU of the loop's thread", series, lambda one: 1e3 * one.loop_seconds, "ms"),
        _per_video(f"ranges, {_HTTP}: requests", series, lambda one: one.requests, "requests"),
        _per_video(f"ranges, {_HTTP}: fetched", series, lambda one: one.sent_bytes / 1e3, "kB"),
    ]


def _per_video(what: str, series: list[Run], of: Callable[[Run], float], unit: str, target: str = "") -> Figure:
    return Figure("remote", what, f"{unit}/video", [of(one) / one.videos for one in series], target=target)


def _windows(bench: _Bench) -> list[Figure]:
    """A cold epoch with an empty cache, then a warm one from the cache."""
    cache, num_videos = bench.work / "shard-cache", len(bench.setup.workload.videos)

    def epoch(pause_ms: int, *, is_cold: bool) -> Run:
        if is_cold:
            shutil.rmtree(cache, ignore_errors=True)
        whole = {"cache_dir": str(cache), "cache_bytes": 10**12, "shuffle": "shards:8", "batch_size": _WINDOW_BATCH}
        config = bench.setup.config(train=bench.served(pause_ms), **whole)
        return bench.processes.run("threads", measure, config, bench.store, None, num_videos, None)

    runs = {
        f"{pause} ms, {'cold' if is_cold else 'warm'}": partial(epoch, pause, is_cold=is_cold)
        for pause in PAUSES_MS[1:]
        for is_cold in (True, False)
    }
    results = interleaved("remote: whole shards", runs, bench.rounds)
    shutil.rmtree(cache, ignore_errors=True)
    figures = []
    for name, series in results.items():
        figures.append(Figure("remote", f"whole shards, {name}", "videos/s", [one.rate for one in series]))
        if name.endswith("cold"):
            stalls = [one.stall_seconds / one.seconds for one in series]
            first = [one.first_seconds for one in series]
            figures += [
                Figure("remote", f"whole shards, {name}: share of stalls", "", stalls, target="at most 0.05"),
                Figure("remote", f"whole shards, {name}: first batch", "s", first),
                _per_video(f"whole shards, {name}: CPU", series, lambda one: 1e3 * one.cpu_seconds, "ms"),
                _per_video(f"whole shards, {name}: fetched", series, lambda one: one.sent_bytes / 1e3, "kB"),
            ]
    return figures
