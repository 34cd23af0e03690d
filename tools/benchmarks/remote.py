"""Benchmarks of training from a far store, by ranges and by whole shards, at several latencies: against local files,
against the same client that only fetches, and against loaders that others made."""

from __future__ import annotations

import importlib
import itertools
import os
import shutil
import statistics
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from benchmarks.figures import Figure, Processes, against, interleaved
from benchmarks.peers import LITDATA, FarData, Peer, installed, prepare
from benchmarks.recipe import Setup
from benchmarks.speed import cpu_seconds
from benchmarks.store import FarStore, far_store
from shards.index import read_local_manifest
from text4vis.common.console import console
from text4vis.config.schema import Config
from text4vis.data.loader import build_loader
from text4vis.data.prefetch import pipelined, settled
from text4vis.data.reading import PlanReader

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


_S3_VARIABLES = {"AWS_ACCESS_KEY_ID": "key", "AWS_SECRET_ACCESS_KEY": "secret", "AWS_DEFAULT_REGION": "us-east-1"}
_ALONE = "the client alone"
_WITH_STEPS = "with steps"

# Opens a loader and gives the number of videos of each of its batches.
OpenBatches = Callable[[], AbstractContextManager[Iterator[int]]]
Open = Callable[[Config], AbstractContextManager[Iterator[int]]]


@dataclass(frozen=True)
class Run:
    """One measurement of a loader.

    cpu_seconds: processor time of the process and its workers. loop_seconds: that of the thread that talks to the
    store, an upper bound of its time under Python's lock. stall_seconds: sum of the waits for a batch that were a tenth
    of a second longer than the median wait. first_seconds: time to the first batch, opening included. requests,
    sent_bytes: what the store served during the measurement.
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


@contextmanager
def our_batches(config: Config) -> Iterator[Iterator[int]]:
    with build_loader(config, "train") as loader:
        yield (len(batch.ids) for batch in loader)


@contextmanager
def client_batches(config: Config) -> Iterator[Iterator[int]]:
    """Plans what our loader does, fetches it in the same way, compares the checksums, and drops it."""
    with build_loader(config, "train") as loader, ThreadPoolExecutor(1) as thread:
        dataset, reader = loader.dataset, PlanReader(loader.dataset, loader.planner, thread)
        picked = dataset.ahead(loader.planner.batches(0), lambda batch: batch[0])
        begun = pipelined(picked, reader.begin, lambda batch: batch, reader.batches_ahead)
        yield (len(batch.fetched.result()[1].result()) for batch in begun)


@contextmanager
def peer_batches(peer: Peer, setup: Setup, far: FarData) -> Iterator[Iterator[int]]:
    assert peer.epoch is not None
    yield map(len, peer.epoch(setup, far))


def _loop_seconds() -> float:
    """CPU time of the threads that talk to stores."""
    threads = [thread.native_id for thread in threading.enumerate() if thread.name == "shards-loop"]
    return sum(float(Path(f"/proc/self/task/{thread}/schedstat").read_text().split()[0]) for thread in threads) / 1e9


def _wait_times(
    batches: Iterable[int], seconds: float | None, videos: int | None, step_seconds: float = 0.0
) -> tuple[int, list[float]]:
    waits, count, started = [], 0, time.perf_counter()
    last = started
    for size in batches:
        now = time.perf_counter()
        waits.append(now - last)
        time.sleep(step_seconds)
        last, count = time.perf_counter(), count + size
        if (seconds is not None and now - started >= seconds) or (videos is not None and count >= videos):
            break
    return count, waits


def measure(
    open_batches: OpenBatches,
    store: FarStore,
    seconds: float | None,
    videos: int | None,
    variables: dict[str, str],
    *,
    step_seconds: float = 0.0,
) -> Run:
    """Measures `seconds` after a warm-up, or the first `videos` with the opening. variables: of the environment.

    step_seconds: what the training of a batch would take; then no batch is taken.
    """
    served = store.counts()
    os.environ |= variables
    opened, cpu = time.perf_counter(), cpu_seconds()
    with open_batches() as coming, settled():
        batches = iter(coming)
        first = next(batches)
        first_seconds = time.perf_counter() - opened
        if seconds is None:
            loop = 0.0
            count, waits = _wait_times(batches, None, (videos or 0) - first, step_seconds)
            count += first
        else:
            for _ in range(_WARM_UP_BATCHES):
                next(batches)
            served = store.counts()
            opened, cpu, loop = time.perf_counter(), cpu_seconds(), _loop_seconds()
            count, waits = _wait_times(batches, seconds, None)
        elapsed, usual = time.perf_counter() - opened, statistics.median(waits or [0.0])
        stalls = sum(wait for wait in waits if wait > usual + _STALL_SECONDS)
        used = cpu_seconds() - cpu, _loop_seconds() - loop
        requests, sent = (after - before for after, before in zip(store.counts(), served, strict=True))
        return Run(count, elapsed, *used, stalls, first_seconds, requests, sent)


def measure_peer(peer: Peer, setup: Setup, far: FarData, store: FarStore) -> Run:
    """Measures a cold epoch of a peer, whose library is imported before."""
    importlib.import_module(peer.module)
    shutil.rmtree(far.cache, ignore_errors=True)
    return measure(partial(peer_batches, peer, setup, far), store, None, len(setup.workload.videos), {})


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
    setup: Setup,
    processes: Processes,
    work: Path,
    *,
    peers: Iterable[Peer],
    rounds: int,
    seconds: float,
    large_index: Path,
) -> list[Figure]:
    """Ranges against the local loader, cold and warm epochs of whole shards, and the first batch of a large data set.

    peers: whose cold epochs are measured too, if they read far stores. large_index: a folder that `multiplied` has
    written.
    """
    found = installed(peer for peer in peers if peer.epoch is not None)
    folder = prepare(found, setup.workload, work)
    with far_store(setup.workload.shards.parent, work / "store", PAUSES_MS) as store:
        console().print(f"remote: the store is {store.kind}, on the same cores as the loader")
        bench = _Bench(setup, processes, work, rounds, store)
        figures = _ranges(bench, seconds)
        with far_store(work, work / "peers-store", PAUSES_MS[1:]) as peers_store:
            figures += _windows(bench, _peer_epochs(bench, found, folder, peers_store))
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

    def run(
        address: str, store: FarStore = bench.store, endpoint: str | None = None, batches: Open = our_batches
    ) -> Callable[[float], Run]:
        open_batches = partial(batches, bench.setup.config(train=address, cache_dir=cache))
        variables = {"AWS_ENDPOINT_URL": endpoint, **_S3_VARIABLES} if endpoint else {}
        process = "s3" if endpoint else "threads"
        return lambda lasting: bench.processes.run(process, measure, open_batches, store, lasting, None, variables)

    runs = {"local": run(str(folder))} | {f"HTTP, {pause} ms": run(bench.served(pause)) for pause in PAUSES_MS}
    alone = f"{_HTTP}, {_ALONE}"
    runs[alone] = run(bench.served(PAUSES_MS[0]), batches=client_batches)
    bucket = folder.parent  # nginx answers as S3 does, and doesn't look at signatures
    with far_store(bucket.parent, bench.work / "s3-store", [_S3_PAUSE_MS]) as store:
        runs[_S3] = run(f"s3://{bucket.name}/{folder.name}", store, store.addresses[_S3_PAUSE_MS])
        for each in runs.values():
            each(0.0)  # warms up: imports libraries, fetches the index
        results = interleaved("remote", {name: partial(each, seconds) for name, each in runs.items()}, bench.rounds)
    rates = {name: [one.rate for one in series] for name, series in results.items()}
    figures = [Figure("remote", f"ranges, {name}", "videos/s", rates[name]) for name in ("local", alone)]
    for name, (base, target) in _TARGETS.items():
        ratios = against(rates[name], rates[base])
        figures.append(Figure("remote", f"ranges, {name} (to {base})", "videos/s", rates[name], ratios, target))
    for name, series in results.items():
        figures.append(_per_video(f"ranges, {name}: CPU", series, lambda one: 1e3 * one.cpu_seconds, "ms", "at most 5"))
        if name != "local":
            figures.append(_per_video(f"ranges, {name}: requests", series, lambda one: one.requests, "requests"))
    series = results[_HTTP]
    return [
        *figures,
        _per_video(f"ranges, {_HTTP}: CPU of the loop's thread", series, lambda one: 1e3 * one.loop_seconds, "ms"),
        _per_video(f"ranges, {_HTTP}: fetched", series, lambda one: one.sent_bytes / 1e3, "kB"),
    ]


def _per_video(what: str, series: list[Run], of: Callable[[Run], float], unit: str, target: str = "") -> Figure:
    return Figure("remote", what, f"{unit}/video", [of(one) / one.videos for one in series], target=target)


def _peer_epochs(
    bench: _Bench, peers: Iterable[Peer], folder: Path, peers_store: FarStore
) -> dict[str, Callable[[], Run]]:
    """Cold epochs of the peers. folder: their data, which lie in `peers_store`; those that read ours use that store."""
    setup = replace(bench.setup, batch_size=_WINDOW_BATCH)
    epochs: dict[str, Callable[[], Run]] = {}
    for pause, peer in itertools.product(PAUSES_MS[1:], peers):
        store = bench.store if peer.prepare is None else peers_store
        path = peer.far_path(setup.workload, folder)
        far = FarData(store.addresses[pause], path, (bench.work / "peers-cache" / peer.module).resolve())
        run = partial(bench.processes.run, peer.name, measure_peer, peer, setup, far, store)
        epochs[f"{pause} ms, cold, {peer.name}"] = run
    return epochs


def _windows(bench: _Bench, peer_epochs: dict[str, Callable[[], Run]]) -> list[Figure]:
    """Cold epochs with an empty cache, warm ones from the cache; cold ones of the client alone and of the peers; and
    cold ones with a step after each batch that takes twice as long as a batch of a free one: does fetching ahead bridge
    what a window begins with?"""
    cache, num_videos = bench.work / "shard-cache", len(bench.setup.workload.videos)

    def epoch(pause_ms: int, *, is_cold: bool, batches: Open = our_batches, step_seconds: float = 0.0) -> Run:
        if is_cold:
            shutil.rmtree(cache, ignore_errors=True)
        whole = {"cache_dir": str(cache), "cache_bytes": 10**12, "shuffle": "shards:8", "batch_size": _WINDOW_BATCH}
        open_batches = partial(batches, bench.setup.config(train=bench.served(pause_ms), **whole))
        measured = partial(measure, step_seconds=step_seconds)
        return bench.processes.run("threads", measured, open_batches, bench.store, None, num_videos, {})

    def with_steps(pause_ms: int) -> Run:
        free = epoch(pause_ms, is_cold=True)
        return epoch(pause_ms, is_cold=True, step_seconds=2 * _WINDOW_BATCH / free.rate)

    runs: dict[str, Callable[[], Run]] = {}
    for pause in PAUSES_MS[1:]:
        runs[f"{pause} ms, cold"] = partial(epoch, pause, is_cold=True)
        runs[f"{pause} ms, warm"] = partial(epoch, pause, is_cold=False)
        runs[f"{pause} ms, cold, {_ALONE}"] = partial(epoch, pause, is_cold=True, batches=client_batches)
        runs[f"{pause} ms, cold, {_WITH_STEPS}"] = partial(with_steps, pause)
    results = interleaved("remote: whole shards", runs | peer_epochs, bench.rounds)
    shutil.rmtree(cache, ignore_errors=True)
    shutil.rmtree(bench.work / "peers-cache", ignore_errors=True)
    rates = {name: [one.rate for one in series] for name, series in results.items()}
    return list(itertools.chain.from_iterable(_epoch_figures(name, series, rates) for name, series in results.items()))


def _epoch_figures(name: str, series: list[Run], rates: dict[str, list[float]]) -> list[Figure]:
    """Those of one kind of epoch over whole shards. rates: videos a second of all of them."""
    pause, kind, *others = name.split(", ")
    are_ours = others in ([], [_WITH_STEPS])
    ratios = None if are_ours else against(rates[f"{pause}, cold"], rates[name])
    target = "at least 1.8" if others == [LITDATA.name] else ""
    figures = [Figure("remote", f"whole shards, {name}", "videos/s", rates[name], ratios, target)]
    if kind == "warm":
        return figures
    if are_ours:
        stalls = [one.stall_seconds / one.seconds for one in series]
        figures.append(Figure("remote", f"whole shards, {name}: share of stalls", "", stalls, target="at most 0.05"))
    if others == [_WITH_STEPS]:
        return figures
    first = [one.first_seconds for one in series]
    return [
        *figures,
        Figure("remote", f"whole shards, {name}: first batch", "s", first),
        _per_video(f"whole shards, {name}: CPU", series, lambda one: 1e3 * one.cpu_seconds, "ms"),
        _per_video(f"whole shards, {name}: requests", series, lambda one: one.requests, "requests"),
        _per_video(f"whole shards, {name}: fetched", series, lambda one: one.sent_bytes / 1e3, "kB"),
    ]
