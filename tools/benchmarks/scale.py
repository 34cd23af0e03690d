"""Benchmarks of planning for very large data sets and jobs: the order of an epoch, and a rank's share of a batch."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np

from benchmarks.figures import Figure, forget_peak_memory, interleaved, run_fresh
from shards.plan import Stream, share_positions
from text4vis.training.logs import resident_bytes

_RANKS_TIMED = 200
_STREAMS = 16
_FETCHED_VIDEOS, _FETCHING_HOSTS = 240_000, (2, 4, 16)


@dataclass(frozen=True)
class Planning:
    """The cost of planning on one rank.

    start: seconds to the first planned batch. megabytes: peak memory until then. batch: microseconds for each further
    batch, one value per world size.
    """

    start: float
    megabytes: float
    batch: list[float]


def planning(num_videos: int, world_sizes: Sequence[int], batch_size: int, num_streams: int) -> Planning:
    """Plans batches of `batch_size` videos a rank in the middle of the third epoch. Call it in a fresh process.

    num_streams: 0 for 'global', else the number of streams of 'shards:32'. The memory of the shard numbers is not
    counted: it belongs to the data set.
    """
    middle = num_videos * 5 // 2
    shard_of = shards_like(num_videos) if num_streams else None
    forget_peak_memory()
    before, started = resident_bytes("VmRSS"), time.perf_counter()
    stream = Stream(num_videos, 0, "shards:32" if num_streams else "global", shard_of, num_streams=num_streams or 1)
    stream.take(middle, middle + batch_size)
    elapsed, peak = time.perf_counter() - started, resident_bytes("VmHWM")
    return Planning(
        elapsed,
        (peak - before) / 1e6,
        [_batch_microseconds(stream, middle, world, batch_size) for world in world_sizes],
    )


def _batch_microseconds(stream: Stream, position: int, world_size: int, batch_size: int) -> float:
    """Mean over ranks that are spread over the job. All positions lie in one epoch, so no further order is computed."""
    global_batch = world_size * batch_size
    position = min(position, (position // stream.num_samples + 1) * stream.num_samples - global_batch)
    ranks = range(0, world_size, max(1, world_size // _RANKS_TIMED))
    started = time.perf_counter()
    for rank in ranks:
        stream.at(share_positions(position, global_batch, rank, world_size, stream.num_streams))
    return (time.perf_counter() - started) / len(ranks) * 1e6


def shards_like(num_videos: int) -> np.ndarray:
    """(N,) shard numbers. Shards hold unequal numbers of videos, as shards of equal bytes do."""
    sizes = np.random.default_rng(0).integers(150, 191, num_videos // 150 + 1)
    return np.repeat(np.arange(len(sizes)), sizes)[:num_videos]


def shards_fetched(num_videos: int, num_hosts: int, num_streams: int) -> float:
    """Sum over hosts of the shards that a host reads in an epoch, divided by the shards of the data set."""
    shard_of = shards_like(num_videos)
    stream = Stream(num_videos, 0, "shards:32", shard_of, num_streams=num_streams)
    global_batch = num_hosts * 16
    shards_read = 0
    for host in range(num_hosts):
        batches = range(0, num_videos // global_batch * global_batch, global_batch)
        positions = [share_positions(start, global_batch, host, num_hosts, num_streams) for start in batches]
        shards_read += len(np.unique(shard_of[stream.at(np.concatenate(positions))[0]]))
    return shards_read / len(np.unique(shard_of))


def scale(counts: Sequence[int], world_sizes: Sequence[int], batch_size: int, rounds: int) -> list[Figure]:
    """Planning for data sets of `counts` videos, and the shards that hosts fetch.

    World sizes whose global batch is larger than an epoch are left out.
    """
    orders = {"": 0, f", {_STREAMS} streams": _STREAMS}
    fitting = {
        (f"{count:,} videos{order}", count, num_streams): [size for size in world_sizes if size * batch_size <= count]
        for count in counts
        for order, num_streams in orders.items()
    }
    runs = {
        what: partial(run_fresh, planning, count, sizes, batch_size, num_streams)
        for (what, count, num_streams), sizes in fitting.items()
    }
    taken = interleaved("scale", runs, rounds)
    figures = [
        Figure(
            "scale", f"{_FETCHED_VIDEOS:,} videos, {hosts} hosts, {streams} streams: shards fetched / shards", "",
            [shards_fetched(_FETCHED_VIDEOS, hosts, streams)],
        )
        for hosts in _FETCHING_HOSTS
        for streams in (1, _STREAMS)
    ]  # fmt: skip
    for sizes, (what, values) in zip(fitting.values(), taken.items(), strict=True):
        figures.append(Figure("scale", f"{what}: from nothing to a batch in mid-epoch", "s", [v.start for v in values]))
        figures.append(Figure("scale", f"{what}: memory of that", "MB", [v.megabytes for v in values]))
        figures += [
            Figure("scale", f"{what}, {size:,} ranks: each further batch", "us", [v.batch[place] for v in values])
            for place, size in enumerate(sizes)
        ]
    return figures
