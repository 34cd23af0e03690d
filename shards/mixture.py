"""The training stream of several sources of which each has a share. Pure functions of numbers, as `shards.plan`.

An epoch has a fixed number of samples; each source has its exact share of them, spread as evenly as can be. A source
goes through its own endless stream: none of its samples comes again before all of them came. Where a position leads
follows from the position alone, in closed form.

Letters: L samples of an epoch, M sources.
"""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from functools import partial
from itertools import accumulate

import numpy as np

from shards.plan import Stream, mix64

_MAX_EPOCH = 1 << 31  # squares of it fit into 64 bits


def exact_shares(weights: Sequence[float], total: int) -> list[int]:
    """`total` samples divided by weight: (M,) counts that sum to it, each less than one away from its exact share.

    Largest remainders are rounded up, the first of equal ones. Raises ValueError if a source would get nothing.
    """
    exact = [Fraction(repr(weight)) for weight in weights]  # 0.1 as it is written, not as it is stored
    if min(exact) <= 0:
        raise ValueError(f"weights: expected numbers above 0, got {list(weights)}")
    wanted = [weight * total / sum(exact) for weight in exact]
    counts = [int(share) for share in wanted]
    by_remainder = sorted(range(len(counts)), key=lambda source: counts[source] - wanted[source])
    for source in by_remainder[: total - sum(counts)]:
        counts[source] += 1
    if 0 in counts:
        source = counts.index(0)
        raise ValueError(
            f"the weight {weights[source]:g} of {sum(weights):g} is none of an epoch's {total} samples; raise it"
        )
    return counts


class Mixture:
    """The endless stream of M sources. Sample ids go on from source to source.

    sizes: samples of each source. counts: samples of each in an epoch, L together. The other arguments are those of
    `shards.plan.Stream`, `shard_of` for all samples. Raises ValueError.
    """

    def __init__(
        self,
        sizes: Sequence[int],
        counts: Sequence[int],
        seed: int,
        shuffle: str = "global",
        shard_of: np.ndarray | None = None,
        *,
        num_streams: int = 1,
    ) -> None:
        if len(sizes) != len(counts) or min(counts, default=0) < 1 or sum(counts) > _MAX_EPOCH:
            raise ValueError(
                f"counts: expected 1 to {_MAX_EPOCH} samples of each of {len(sizes)} sources, got {list(counts)}"
            )
        self.epoch_samples = sum(counts)
        self.num_streams = num_streams
        self._counts_M = np.array(counts, np.int64)
        self._starts = [0, *accumulate(sizes)]
        self._streams = [
            Stream(
                size,
                mix64(seed + mix64(source + 1)),
                shuffle,
                None if shard_of is None else shard_of[start : start + size],
                num_streams=num_streams,
                stream_of=partial(self._stream_of, source),
            )
            for source, (size, start) in enumerate(zip(sizes, self._starts, strict=False))
        ]

    def at(self, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Sample ids, and how often their source had been gone through before, both (n,) int64, at (n,) positions."""
        ids, passes = np.empty_like(positions), np.empty_like(positions)
        sources, uses = self._sources_and_uses(positions)
        for source in np.unique(sources).tolist():
            here = sources == source
            ids[here], passes[here] = self._streams[source].at(uses[here])
            ids[here] += self._starts[source]
        return ids, passes

    def consumed(self, position: int) -> list[int]:
        """Samples of each source, (M,), before a position."""
        epoch, offset = divmod(position, self.epoch_samples)
        done = [epoch * count for count in self._counts_M.tolist()]
        for source in range(len(done)):
            low, numbers = self._near(source, offset, offset)
            done[source] += low + int((self._offsets(source, numbers) < offset).sum())
        return done

    def _offsets(self, source: int, numbers: np.ndarray) -> np.ndarray:
        """Places in an epoch of the source's samples with these (n,) numbers, of its k in an epoch.

        Sample j is due at the time (2 j + 1) / (2 k) of the epoch. Its place is the number of samples of all sources
        that are due earlier; of those due at the same time the lower source comes first.
        """
        own = int(self._counts_M[source])
        first = np.arange(len(self._counts_M)) < source
        due_nM = (2 * numbers[:, None] + 1) * self._counts_M
        return ((due_nM + own - 1 + first) // (2 * own)).sum(axis=1)

    def _near(self, source: int, first: int, last: int) -> tuple[int, np.ndarray]:
        """Numbers of the source's samples whose places may lie in first ... last: (the lowest, all of them)."""
        own, reach = int(self._counts_M[source]), len(self._counts_M)
        # Each source's count of earlier samples is less than one away from its share at that time.
        low = max(0, (first - reach) * own // self.epoch_samples - 1)
        high = min(own, (last + reach) * own // self.epoch_samples + 2)
        return low, np.arange(low, high)

    def _sources_and_uses(self, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The source of each of the (n,) positions, and the position in that source's own stream."""
        epochs, offsets = np.divmod(positions, self.epoch_samples)
        sources, uses = np.empty_like(positions), np.empty_like(positions)
        for epoch in np.unique(epochs).tolist():
            in_epoch = epochs == epoch
            wanted = offsets[in_epoch]
            first, last = int(wanted.min()), int(wanted.max())
            source_at, number_at = np.empty((2, last - first + 1), np.int64)
            for source in range(len(self._counts_M)):
                _, numbers = self._near(source, first, last)
                places = self._offsets(source, numbers)
                inside = (first <= places) & (places <= last)
                source_at[places[inside] - first] = source
                number_at[places[inside] - first] = numbers[inside]
            sources[in_epoch] = source_at[wanted - first]
            uses[in_epoch] = epoch * self._counts_M[sources[in_epoch]] + number_at[wanted - first]
        return sources, uses

    def _stream_of(self, source: int, uses: np.ndarray) -> np.ndarray:
        """The stream, 0 ... S-1, of the positions at which a source's samples come."""
        epochs, numbers = np.divmod(uses, self._counts_M[source])
        return (epochs * self.epoch_samples + self._offsets(source, numbers)) % self.num_streams
