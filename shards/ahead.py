"""What the coming batches need, as far as the order is known: which shards, and which rows of the index."""

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
# At most this many more batches become known whenever one is given out: those far ahead are not urgent.
_BATCHES_AT_ONCE = 64
_MAX_KNOWN_SAMPLES = 1 << 20
# Rows of the index are fetched for this many samples before they are given out, a few batches more each time: those of
# the first batch must not share the way with all of them.
_ROWS_AHEAD_SAMPLES = 512
_ROWS_AHEAD_BATCHES = 4


class UpcomingShards:
    """The shards of one data set that the coming batches need. Batches count from 0; threads may share it."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._uses: dict[int, deque[list[int]]] = {}  # for each shard (first batch, last batch), in order
        self._added = 0
        self._given = 0

    def add(self, shards: Iterable[int]) -> None:
        """Adds the shards of the next batch that becomes known."""
        with self._lock:
            for shard in shards:
                uses = self._uses.setdefault(shard, deque())
                if uses and self._added - uses[-1][1] <= _JOINED_BATCHES:
                    uses[-1][1] = self._added
                else:
                    uses.append([self._added, self._added])
            self._added += 1

    def advance(self) -> None:
        """Moves on by a batch: the first that was not given out yet is being read now."""
        with self._lock:
            self._given += 1
            now = self._given - _LAG_BATCHES
            for shard in [shard for shard, uses in self._uses.items() if uses[0][1] < now]:
                uses = self._uses[shard]
                uses.popleft()
                if not uses:
                    del self._uses[shard]

    def next_use(self, shard: int) -> float:
        """The next batch that needs the shard, infinite if none is known."""
        with self._lock:
            uses = self._uses.get(shard)
            return uses[0][0] if uses else math.inf

    def in_order(self) -> list[int]:
        """All shards with a known use, in the order of their next uses."""
        with self._lock:
            return sorted(self._uses, key=lambda shard: self._uses[shard][0][0])


class Follower(Protocol):
    """A source of whole shards that fetches them ahead."""

    @property
    def num_shards(self) -> int:
        """Shards of the data set."""

    def follow(self, upcoming: UpcomingShards) -> None:
        """From now on fetches and keeps shards by their upcoming uses."""

    def advanced(self) -> None:
        """Called when the upcoming uses have changed."""


def look_ahead(
    batches: Iterable[Batch],
    shards_of: Callable[[Batch], np.ndarray],
    followers: Sequence[tuple[Follower, int]],
    *,
    most_samples: int,
) -> Iterator[Batch]:
    """Yields the batches; the followers know up to `most_samples` samples of them before they are given out.

    shards_of(batch): the shard of each sample, counted over all data sets that are joined. followers: with the number
    of their first shard.
    """
    all_upcoming = [UpcomingShards() for _ in followers]
    for (follower, _), upcoming in zip(followers, all_upcoming, strict=True):
        follower.follow(upcoming)
    known: deque[tuple[int, Batch]] = deque()
    num_known, coming = 0, iter(batches)
    while True:
        for batch in itertools.islice(coming, _BATCHES_AT_ONCE):
            shards = shards_of(batch)
            known.append((len(shards), batch))
            num_known += len(shards)
            distinct = np.unique(shards)
            for (follower, first), upcoming in zip(followers, all_upcoming, strict=True):
                own = (first <= distinct) & (distinct < first + follower.num_shards)
                upcoming.add((distinct[own] - first).tolist())
            if num_known >= min(most_samples, _MAX_KNOWN_SAMPLES):
                break
        if not known:
            return
        for (follower, _), upcoming in zip(followers, all_upcoming, strict=True):
            upcoming.advance()
            follower.advanced()
        count, batch = known.popleft()
        num_known -= count
        yield batch


def rows_ahead(batches: Iterable[Batch], want: Callable[[Batch], int]) -> Iterator[Batch]:
    """Yields the batches, each some time after `want(batch)`, which begins to fetch the rows of the index that it
    needs, and returns its number of samples."""
    known: deque[tuple[int, Batch]] = deque()
    num_known, coming = 0, iter(batches)
    while True:
        for batch in itertools.islice(coming, _ROWS_AHEAD_BATCHES):
            known.append((want(batch), batch))
            num_known += known[-1][0]
            if num_known >= _ROWS_AHEAD_SAMPLES:
                break
        if not known:
            return
        count, batch = known.popleft()
        num_known -= count
        yield batch
