"""Tars behind an address, fetched whole into the node's cache: first those that a reader waits for, then those that the
coming batches need. What cannot be kept is read by ranges."""

from __future__ import annotations

import logging
import math
import os
import threading
import time
import weakref
from collections import Counter, deque
from collections.abc import Sequence
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from shards.ahead import UpcomingShards
from shards.answers import RangesIgnoredError
from shards.cache import CacheFullError, ShardCache, entry_name
from shards.format import Manifest, SampleError
from shards.local import Check, Extent, Fetch, OpenFile, Range, pread_exactly
from shards.remote import PART_BYTES, RemoteFiles, RemoteShards

_log = logging.getLogger(__name__)

# After a full disk or the like, downloads are tried again this much later.
_PAUSE_SECONDS = 300.0
_REFETCH_SECONDS = 3600.0
_MAX_FETCHES = 3
# A thread for each; their parts are fetched by the one loop.
_SHARDS_AT_ONCE = 8
# A shard that is not needed yet may displace others only if all that is needed before it fills at most this share of
# the cache: a shard that is fetched too early would displace one that is needed sooner.
_NEAR_SHARE = 0.5
# Of a shard that is still on its way at most this share is also fetched by ranges, for readers that need it already.
_MEANWHILE_SHARE = 0.02
# Until the upcoming uses are looked at again after all of their shards are here, or nothing more fits.
_LOOK_SECONDS = 0.2


@dataclass
class _Download:
    """A shard that is on its way, or waits to be.

    is_wanted: a reader waits for it. spare: see ShardCache.fetch. written: done when all bytes are in `file`, which is
    not synced yet. began: how many downloads had ended when it was begun.
    """

    shard: int
    is_wanted: bool
    spare: float = -math.inf
    began: int = 0
    written: Future[None] = field(default_factory=Future)
    file: OpenFile | None = None


class CachedShards:
    """Tars behind an address, kept whole in a ShardCache. Implements ShardSource.

    When a shard cannot be kept (disk full, folder not writable, limit too small), its ranges are read from the address
    instead: slower, but the run goes on. One warning says so. A copy whose bytes fail the check is dropped and fetched
    again, once an hour at most: after that the damage is in the store itself.
    """

    def __init__(self, files: RemoteFiles, manifest: Manifest, cache: ShardCache) -> None:
        self._files = files
        self._ranges = RemoteShards(files, manifest.shards)
        self._shards = manifest.shards
        self._cache = cache
        # The checksum of the member table changes when anything in any shard changes or moves.
        layout = manifest.index["members"]["crc32"]
        self._names = [entry_name(files.place(shard.name), shard.bytes, layout) for shard in manifest.shards]
        self._numbers = {name: shard for shard, name in enumerate(self._names)}
        self._warned = False
        self._paused_until = 0.0
        self._refetched_at: dict[int, float] = {}
        self._upcoming = UpcomingShards()
        self.renew()

    def renew(self) -> None:
        """Forgets threads and downloads, see `ShardSource`."""
        self._lock = threading.Lock()
        self._ended = threading.Condition(self._lock)  # a download is over
        self._dropping_lock = threading.Lock()
        self._closed = False
        self._threads: set[threading.Thread] = set()
        self._waiting: list[_Download] = []
        self._no_room: list[_Download] = []  # until one that is under way has ended
        self._under_way: dict[int, _Download] = {}
        self._num_ended = 0  # downloads
        self._not_ahead: set[int] = set()  # it has failed; a reader will see why
        self._in_use: Counter[int] = Counter()  # shards of fetches that are not done with
        self._done_with: deque[tuple[int, ...]] = deque()  # appended to without a lock: by finalisers
        self._meanwhile_bytes: Counter[int] = Counter()  # that were fetched by ranges, by shard
        self._next_look = 0.0  # when the upcoming uses are looked at again
        self._ranges.renew()

    def close(self) -> None:
        """Ends the downloads; the loop that serves them has ended before."""
        with self._lock:
            self._closed = True
            waiting, self._waiting, self._no_room = self._waiting + self._no_room, [], []
            threads = list(self._threads)
        for download in waiting:
            download.written.set_exception(ValueError("the data set was closed while it was being read"))
        for thread in threads:
            thread.join()

    @property
    def num_shards(self) -> int:
        """Shards of the data set."""
        return len(self._shards)

    def follow(self, upcoming: UpcomingShards) -> None:
        """From now on fetches shards ahead, and keeps them, by their upcoming uses."""
        self._upcoming = upcoming
        self.advanced()

    def advanced(self) -> None:
        """Starts the downloads that the upcoming uses ask for now."""
        with self._lock:
            self._start_threads()

    def start(self, wanted: Sequence[Extent]) -> _CachedFetch:
        """Starts fetching, see `ShardSource`."""
        shards = tuple(dict.fromkeys(extent.shard for extent in wanted if extent.ranges))
        fetch = _CachedFetch(self, wanted, self.start_meanwhile(wanted))
        with self._lock:
            self._in_use.update(shards)
        weakref.finalize(fetch, self._done_with.append, shards).atexit = False
        for shard in shards:
            if not self._is_paused and not self._has(shard):
                self._want(shard)
        return fetch

    def start_meanwhile(self, wanted: Sequence[Extent]) -> dict[int, tuple[Fetch, int]]:
        """Starts to fetch ranges of shards whose downloads take long and have not ended: by extent, the fetch and its
        number there. A few frames come much sooner than a whole shard; how many bytes may is bounded."""
        late = []
        for number, extent in enumerate(wanted):
            size = sum(stop - start for start, stop in extent.ranges)
            budget = self._shards[extent.shard].bytes * _MEANWHILE_SHARE
            if size and self._takes_long(extent.shard) and self._meanwhile_bytes[extent.shard] + size <= budget:
                self._meanwhile_bytes[extent.shard] += size
                late.append(number)
        if not late:
            return {}
        fetch = self._ranges.start([wanted[number] for number in late], first=True)
        return {number: (fetch, place) for place, number in enumerate(late)}

    def _takes_long(self, shard: int) -> bool:
        with self._lock:
            download = self._under_way.get(shard)
        is_written = download is not None and download.written.done()
        return self._shards[shard].bytes > PART_BYTES and not is_written and not self._has(shard)

    def _has(self, shard: int) -> bool:
        return self._cache.has(self._names[shard], self._shards[shard].bytes)

    @property
    def _is_paused(self) -> bool:
        return time.monotonic() < self._paused_until

    def _want(self, shard: int) -> _Download:
        """The download of a shard for which a reader waits."""
        with self._lock:
            if self._closed:
                raise ValueError("the data set is closed")
            download = self._under_way.get(shard)
            if download is None:
                download = next((one for one in self._waiting + self._no_room if one.shard == shard), None)
            if download is None:
                download = _Download(shard, is_wanted=True)
                self._waiting.append(download)
                self._start_threads()
            download.is_wanted = True
            return download

    # Downloads

    def _start_threads(self) -> None:
        """Starts as many threads as there is work for. The caller holds the lock."""
        while len(self._threads) < _SHARDS_AT_ONCE and (download := self._next()) is not None:
            thread = threading.Thread(target=self._work, args=(download,), name="shards-fetch", daemon=True)
            self._threads.add(thread)
            thread.start()

    def _next(self) -> _Download | None:
        """Takes the next download, if there is one, and marks it as under way. The caller holds the lock."""
        if self._closed:
            return None
        download = self._waiting.pop(0) if self._waiting else self._next_ahead()
        if download is not None:
            self._under_way[download.shard] = download
            download.began = self._num_ended
        return download

    def _next_ahead(self) -> _Download | None:
        if time.monotonic() < max(self._next_look, self._paused_until):
            return None
        needed_before, left_out = 0, self._not_ahead | {one.shard for one in self._no_room}
        for shard in self._upcoming.in_order():
            needed_before += self._shards[shard].bytes
            if shard not in self._under_way and shard not in left_out and not self._has(shard):
                is_near = needed_before <= self._cache.limit_bytes * _NEAR_SHARE
                return _Download(shard, is_wanted=False, spare=self._upcoming.next_use(shard) if is_near else math.inf)
        self._next_look = time.monotonic() + _LOOK_SECONDS
        return None

    def _work(self, download: _Download | None) -> None:
        """Runs in a thread: one download after another, until there is none."""
        while download is not None:
            try:
                self._fetch(download)
                error = None
            except Exception as raised:
                error = raised
            with self._lock:
                self._end(download, error)
                download = self._next()
                if download is None:
                    self._threads.discard(threading.current_thread())

    def _fetch(self, download: _Download) -> None:
        shard = download.shard
        info = self._shards[shard]

        def fill(descriptor: int) -> None:
            self._files.download(info.name, info.bytes, descriptor)
            download.file = OpenFile(Path(f"/proc/self/fd/{descriptor}"))
            download.written.set_result(None)  # readers need not wait until the disk has it

        self._cache.fetch(
            self._names[shard],
            info.bytes,
            fill,
            need=self._need,
            spare=-math.inf if download.is_wanted else download.spare,
            is_given_up=lambda: self._closed,
        )

    def _need(self, name: str) -> float:
        """When the entry of that name is needed next; entries of readings that have begun come before all others."""
        shard = self._numbers.get(name)
        if shard is None:
            return math.inf
        with self._lock:
            while self._done_with:
                self._in_use.subtract(self._done_with.popleft())
            return -1 if self._in_use[shard] > 0 else self._upcoming.next_use(shard)

    def _end(self, download: _Download, error: Exception | None) -> None:
        """Settles a download that is over. The caller holds the lock."""
        was_alone = download.began == self._num_ended
        self._num_ended += 1
        del self._under_way[download.shard]
        self._meanwhile_bytes.pop(download.shard, None)
        download.file = None
        over = [download]
        if self._closed or not isinstance(error, CacheFullError):
            self._waiting += self._no_room
            self._no_room = []
            if isinstance(error, OSError):
                self._pause(error)
            elif error is not None:
                self._not_ahead.add(download.shard)
        elif not download.is_wanted:
            self._next_look = time.monotonic() + _LOOK_SECONDS
        elif download.spare >= 0:  # begun ahead; now that a reader waits, more may go for it
            download.spare = -math.inf
            self._waiting.append(download)
            over = []
        else:
            self._no_room.append(download)  # those under way may leave room when they are finished
            over = []
        if not self._under_way and not self._waiting:  # none is left that could, whatever became of the last one
            if was_alone:
                over = over + self._no_room
            else:  # others have ended since it looked for room
                self._waiting += self._no_room
            self._no_room = []
        for one in over:
            if not one.written.done():  # without an error another process has fetched it
                one.written.set_result(None) if error is None else one.written.set_exception(error)
        self._ended.notify_all()

    # Reading

    def read(self, extent: Extent, check: Check) -> list[bytes]:
        """See `Fetch.read`."""
        shard, ranges, _ = extent
        try:
            for _ in range(_MAX_FETCHES):
                descriptor = self._open(shard)
                if descriptor is None:
                    break
                chunks = self._read_checked(shard, descriptor, ranges, check)
                if chunks is not None:
                    return chunks
        except OSError as error:
            with self._lock:
                self._pause(error)
        return self._ranges.start([extent]).read(0, check)

    def _open(self, shard: int) -> int | None:
        """Descriptor of the shard's copy, the caller closes it; None if it is not there and downloads are suspended.
        Raises OSError, ShardError."""
        for _ in range(_MAX_FETCHES):
            descriptor = self._cache.find(self._names[shard], self._shards[shard].bytes)
            if descriptor is not None or self._is_paused:
                return descriptor
            download = self._want(shard)
            download.written.result()
            file = download.file
            if file is not None:
                return os.dup(file.descriptor)
        raise CacheFullError(f"{self._cache.folder}: shards are evicted faster than they are read; raise cache_bytes")

    def _read_checked(self, shard: int, descriptor: int, ranges: Sequence[Range], check: Check) -> list[bytes] | None:
        """Bytes of the ranges; None if the copy was bad and is gone. Closes the descriptor."""
        try:
            chunks = [pread_exactly(descriptor, start, stop) for start, stop in ranges]
            if all(len(chunk) == stop - start for chunk, (start, stop) in zip(chunks, ranges, strict=True)):
                complaint = check(chunks)
            else:
                complaint = f"{self._files.place(self._shards[shard].name)}: its copy in the cache is truncated"
            if complaint is None:
                return chunks
            with self._lock:  # a copy that is being kept is not at its place yet
                while shard in self._under_way:
                    self._ended.wait()
            # Threads that read the same bad copy must not take its successor for bad: one at a time, and whoever
            # finds the copy gone just reads again.
            with self._dropping_lock:
                if self._cache.is_current(self._names[shard], descriptor):
                    if time.monotonic() - self._refetched_at.get(shard, -math.inf) < _REFETCH_SECONDS:
                        raise SampleError(complaint)
                    self._cache.drop(self._names[shard])
                    self._refetched_at[shard] = time.monotonic()
            return None
        finally:
            os.close(descriptor)

    def _pause(self, error: OSError) -> None:
        """Suspends downloads for a while. The caller holds the lock."""
        if self._closed:
            return
        self._paused_until = time.monotonic() + _PAUSE_SECONDS
        if not self._warned:
            self._warned = True
            _log.warning(
                "%s: cannot keep shards in the cache (%s); reading ranges of %s instead",
                self._cache.folder,
                error.strerror or error,
                self._files.where,
            )


@dataclass(frozen=True, eq=False)
class _CachedFetch:
    """Shards that are cached, or on their way into the cache. Implements Fetch."""

    source: CachedShards
    wanted: Sequence[Extent]
    meanwhile: dict[int, tuple[Fetch, int]]

    def read(self, number: int, check: Check) -> list[bytes]:
        if number in self.meanwhile:
            fetch, place = self.meanwhile[number]
            with suppress(RangesIgnoredError):
                return fetch.read(place, check)
        return self.source.read(self.wanted[number], check)
