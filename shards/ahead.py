"""Which shards are needed when, as far as the order of the samples is known."""

from __future__ import annotations

import itertools
import math
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Protocol, TypeVar

import numpy as np

Batch = TypeVar("Batch")

# Uses of a shard that lie no more batches apart than this are one use: in a window it is used again and again.
_JOINED_BATCHES = 2
# A batch is begun a little after it was given out; until then its shards count as needed.
_LAG_BATCHES = 2
# So many more batches become known with each that is given out: what lies far ahead is not urgent.
_BATCHES_AT_ONCE = 64
_MAX_KNOWN_SAMPLES = 1 << 20


class Plan:
    """The shards of one data set that the batches to come need. Batches count from 0; threads may share it."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._uses: dict[int, deque[list[int]]] = {}  # for each shard (first batch, last batch), in order
        self._added = 0
        self._given = 0

    @property
    def num_shards(self) -> int:
        """Shards of which a use is known."""
        return len(self._uses)

    def add(self, shards: Iterable[int]) -> None:
        """The next batch that becomes known needs these."""
        with self._lock:
            for shard in shards:
                uses = self._uses.setdefault(shard, deque())
                if uses and self._added - uses[-1][1] <= _JOINED_BATCHES:
                    uses[-1][1] = self._added
                else:
                    uses.append([self._added, self._added])
            self._added += 1

    def advance(self) -> None:
        """The first batch that was not given out yet is being read now."""
        with self._lock:
            self._given += 1
            now = self._given - _LAG_BATCHES
            for shard in [shard for shard, uses in self._uses.items() if uses[0][1] < now]:
                uses = self._uses[shard]
                uses.popleft()
                if not uses:
                    del self._uses[shard]

    def next_use(self, shard: int) -> float:
        """The batch that needs the shard next, infinite if none is known that does."""
        with self._lock:
            uses = self._uses.get(shard)
            return uses[0][0] if uses else math.inf

    def in_order(self) -> list[int]:
        """All shards of which a use is known, the one that is needed first in front."""
        with self._lock:
            return sorted(self._uses, key=lambda shard: self._uses[shard][0][0])


class Follower(Protocol):
    """A source of whole shards that fetches them ahead."""

    @property
    def num_shards(self) -> int:
        """Shards of the data set."""

    def follow(self, plan: Plan) -> None:
        """From now on shards are fetched and kept by this plan."""

    def advanced(self) -> None:
        """Something of the plan has changed."""


def look_ahead(
    batches: Iterable[Batch],
    shards_of: Callable[[Batch], np.ndarray],
    followers: Sequence[tuple[Follower, int]],
    *,
    most_samples: int,
) -> Iterator[Batch]:
    """The same batches, of which up to `most_samples` samples are known to the followers before they are given out.

    shards_of(batch): the shard of each sample, counted over all data sets that are joined. followers: with the number
    of their first shard.
    """
    plans = [Plan() for _ in followers]
    for (follower, _), plan in zip(followers, plans, strict=True):
        follower.follow(plan)
    known: deque[tuple[int, Batch]] = deque()
    num_known, coming = 0, iter(batches)
    while True:
        for batch in itertools.islice(coming, _BATCHES_AT_ONCE):
            shards = shards_of(batch)
            known.append((len(shards), batch))
            num_known += len(shards)
            distinct = np.unique(shards)
            for (follower, first), plan in zip(followers, plans, strict=True):
                plan.add((distinct[(first <= distinct) & (distinct < first + follower.num_shards)] - first).tolist())
            if num_known >= min(most_samples, _MAX_KNOWN_SAMPLES):
                break
        if not known:
            return
        for (follower, _), plan in zip(followers, plans, strict=True):
            plan.advance()
            follower.advanced()
        count, batch = known.popleft()
        num_known -= count
        yield batch
