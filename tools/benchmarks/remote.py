"""Training from a far store: ranges and whole shards, at several latencies, beside the same loader on local files."""

from __future__ import annotations

import os
import shutil
import statistics
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from benchmarks.contenders import Setup
from benchmarks.figures import Figure, Processes, against, interleaved
from benchmarks.store import FarStore, far_store
from text4vis.common.console import console
from text4vis.config.schema import Config
from text4vis.data.loader import build_loader
from text4vis.data.prefetch import settled

PAUSES_MS = (0, 30, 80)
_S3_PAUSE_MS = 30
_WARM_UP_BATCHES = 16
_STALL_SECONDS = 0.1
_WINDOW_BATCH = 8  # so that a batch takes far less than a stall


@dataclass(frozen=True)
class Run:
    """One measurement of a loader.

    cpu_seconds: of the whole process. loop_seconds: of the thread that talks to the store, an upper bound of its time
    under Python's lock. stall_seconds: in waits for a batch that took a tenth of a second more than the median one.
    first_seconds: until the first batch, opening included.
    """

    videos: int
    seconds: float
    cpu_seconds: float
    loop_seconds: float
    stall_seconds: float
    first_seconds: float

    @property
    def rate(self) -> float:
        return self.videos / self.seconds


def _loop_seconds() -> float:
    """CPU time of the threads that talk to stores."""
    threads = [thread.native_id for thread in threading.enumerate() if thread.name == "shards-loop"]
    return sum(float(Path(f"/proc/self/task/{thread}/schedstat").read_text().split()[0]) for thread in threads) / 1e9


def _wait_times(batches, seconds: float | None, videos: int | None) -> tuple[int, list[float]]:
    waits, count, started = [], 0, time.perf_counter()
    last = started
    for batch in batches:
        now = time.perf_counter()
        waits.append(now - last)
        last, count = now, count + len(batch.ids)
        if (seconds is not None and now - started >= seconds) or (videos is not None and count >= videos):
            break
    return count, waits


def measure(config: Config, seconds: float | None, videos: int | None, endpoint: str | None) -> Run:
    """Reads for `seconds` once the loader runs, or the first `videos` from nothing. endpoint: of an s3:// address."""
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
            opened, cpu, loop = time.perf_counter(), time.process_time(), _loop_seconds()
            count, waits = _wait_times(batches, seconds, None)
        elapsed, usual = time.perf_counter() - opened, statistics.median(waits)
        stalls = sum(wait for wait in waits if wait > usual + _STALL_SECONDS)
        return Run(count, elapsed, time.process_time() - cpu, _loop_seconds() - loop, stalls, first_seconds)


def remote(setup: Setup, processes: Processes, work: Path, rounds: int, seconds: float) -> list[Figure]:
    """Range mode against the local loader, then cold and warm epochs of whole shards."""
    folder = setup.workload.shards
    with far_store(folder.parent, work / "store", PAUSES_MS) as store:
        console().print(f"remote: the store is {store.kind}, on the same cores as the loader")
        return _ranges(setup, processes, work, store, rounds, seconds) + _windows(setup, processes, work, store, rounds)


def _ranges(
    setup: Setup, processes: Processes, work: Path, store: FarStore, rounds: int, seconds: float
) -> list[Figure]:
    folder, cache = setup.workload.shards, str(work / "index-cache")
    served: list[tuple[int, int]] = []

    def run(name: str, address: str, endpoint: str | None = None) -> Callable[[], Run]:
        config = setup.config(train=address, cache_dir=cache)
        return lambda: processes.run(name, measure, config, seconds, None, endpoint)

    runs = {"local": run("local", str(folder))}
    for pause, address in store.addresses.items():
        runs[f"HTTP, {pause} ms"] = run("http", f"{address}/{folder.name}")
    s3 = f"s3://{folder.parent.name}/{folder.name}"
    with far_store(folder.parent.parent, work / "s3-store", [_S3_PAUSE_MS]) as bucket:
        runs[f"S3, {_S3_PAUSE_MS} ms"] = run("s3", s3, bucket.addresses[_S3_PAUSE_MS])
        for each in runs.values():
            each()  # once: libraries, the index
        before = store.counts()
        results = interleaved("remote", runs, rounds)
        served.append(tuple(after - earlier for after, earlier in zip(store.counts(), before, strict=True)))  # type: ignore[arg-type]
    rates = {name: [one.rate for one in series] for name, series in results.items()}
    targets = {PAUSES_MS[0]: "at least 0.65", PAUSES_MS[1]: "at least 0.90", PAUSES_MS[2]: "at least 0.85"}
    first = f"HTTP, {PAUSES_MS[0]} ms"
    figures = [Figure("remote", "ranges, local", "videos/s", rates["local"])]
    for pause in PAUSES_MS:
        base = "local" if pause == PAUSES_MS[0] else first
        values = rates[f"HTTP, {pause} ms"]
        ratios = against(values, rates[base])
        figures.append(
            Figure("remote", f"ranges, HTTP, {pause} ms (to {base})", "videos/s", values, ratios, targets[pause])
        )
    name, http = f"S3, {_S3_PAUSE_MS} ms", f"HTTP, {_S3_PAUSE_MS} ms"
    figures.append(
        Figure(
            "remote",
            f"ranges, {name} (to HTTP)",
            "videos/s",
            rates[name],
            against(rates[name], rates[http]),
            "at least 0.90",
        )
    )
    for name, series in results.items():
        target = "" if name == "local" else "at most 5"
        cpu = [1000 * one.cpu_seconds / one.videos for one in series]
        figures.append(Figure("remote", f"ranges, {name}: CPU", "ms/video", cpu, target=target))
    loop = [1000 * one.loop_seconds / one.videos for one in results[first]]
    figures.append(Figure("remote", f"ranges, {first}: CPU of the loop's thread", "ms/video", loop))
    return figures


def _windows(setup: Setup, processes: Processes, work: Path, store: FarStore, rounds: int) -> list[Figure]:
    """One epoch from nothing, and the next one from the cache."""
    folder, cache = setup.workload.shards, work / "shard-cache"
    num_videos = len(setup.workload.videos)
    results: dict[str, list[Run]] = {}

    def epoch(address: str, cold: bool) -> Run:
        if cold:
            shutil.rmtree(cache, ignore_errors=True)
        config = setup.config(
            train=address, cache_dir=str(cache), cache_bytes=10**12, shuffle="shards:8", batch_size=_WINDOW_BATCH
        )
        return processes.run("windows", measure, config, None, num_videos, None)

    runs = {}
    for pause, address in list(store.addresses.items())[1:]:
        place = f"{address}/{folder.name}"
        runs[f"{pause} ms, cold"] = lambda place=place: epoch(place, True)
        runs[f"{pause} ms, warm"] = lambda place=place: epoch(place, False)
    next(iter(runs.values()))()  # once: libraries
    results = interleaved("remote: whole shards", runs, rounds)
    shutil.rmtree(cache, ignore_errors=True)
    figures = []
    for name, series in results.items():
        figures.append(Figure("remote", f"whole shards, {name}", "videos/s", [one.rate for one in series]))
        if name.endswith("cold"):
            stalls = [one.stall_seconds / one.seconds for one in series]
            first = [one.first_seconds for one in series]
            cpu = [1000 * one.cpu_seconds / one.videos for one in series]
            figures += [
                Figure("remote", f"whole shards, {name}: share of stalls", "", stalls, target="at most 0.05"),
                Figure("remote", f"whole shards, {name}: first batch", "s", first),
                Figure("remote", f"whole shards, {name}: CPU", "ms/video", cpu),
            ]
    return figures
