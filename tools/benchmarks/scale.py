"""The planner at sizes that no machine here could train on: the order of an epoch, and a rank's share of a batch."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

from benchmarks.figures import Figure, forget_peak_memory, interleaved, run_fresh
from shards.plan import Stream, rank_slice
from text4vis.training.logs import resident_bytes

_RANKS_TIMED = 200


@dataclass(frozen=True)
class Planning:
    """What planning took one rank. start: seconds from nothing to the first batch. megabytes: most memory meanwhile.
    batch: microseconds for each further batch, one figure a world size."""

    start: float
    megabytes: float
    batch: list[float]


def planning(num_videos: int, world_sizes: Sequence[int], batch_size: int) -> Planning:
    """Plans batches of `batch_size` videos a rank in the middle of the third epoch. Run it fresh."""
    middle = num_videos * 5 // 2
    forget_peak_memory()
    before, started = resident_bytes("VmRSS"), time.perf_counter()
    stream = Stream(num_videos, seed=0)
    stream.take(middle, middle + batch_size)
    elapsed, peak = time.perf_counter() - started, resident_bytes("VmHWM")
    return Planning(
        elapsed,
        (peak - before) / 1e6,
        [_batch_microseconds(stream, middle, world, batch_size) for world in world_sizes],
    )


def _batch_microseconds(stream: Stream, position: int, world_size: int, batch_size: int) -> float:
    """Mean over ranks that are spread over the job. All lie in one epoch, so that no order is computed meanwhile."""
    global_batch = world_size * batch_size
    position = min(position, (position // stream.num_samples + 1) * stream.num_samples - global_batch)
    ranks = range(0, world_size, max(1, world_size // _RANKS_TIMED))
    started = time.perf_counter()
    for rank in ranks:
        stream.take(*rank_slice(position, global_batch, rank, world_size))
    return (time.perf_counter() - started) / len(ranks) * 1e6


def scale(counts: Sequence[int], world_sizes: Sequence[int], batch_size: int, rounds: int) -> list[Figure]:
    """Planning for data sets of `counts` videos. World sizes whose global batch is more than an epoch are left out."""
    fitting = {count: [size for size in world_sizes if size * batch_size <= count] for count in counts}
    runs = {count: partial(run_fresh, planning, count, sizes, batch_size) for count, sizes in fitting.items()}
    taken = interleaved("scale", {f"{count:,} videos": run for count, run in runs.items()}, rounds)
    figures = []
    for sizes, (what, values) in zip(fitting.values(), taken.items(), strict=True):
        figures.append(Figure("scale", f"{what}: from nothing to a batch in mid-epoch", "s", [v.start for v in values]))
        figures.append(Figure("scale", f"{what}: memory of that", "MB", [v.megabytes for v in values]))
        figures += [
            Figure("scale", f"{what}, {size:,} ranks: each further batch", "us", [v.batch[place] for v in values])
            for place, size in enumerate(sizes)
        ]
    return figures
