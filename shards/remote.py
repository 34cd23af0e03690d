"""Files behind an address (HTTP(S), S3 and what else fsspec reaches): byte ranges and whole files, with retries.

Transient faults (connections, timeouts, 429, 5xx, short bodies) are tried again with exponential backoff; refusals
(401, 403, 404 ...) fail at once. Errors name the address without user names, passwords and query, and never carry the
original exception, whose text may hold them.
"""

from __future__ import annotations

import asyncio
import io
import logging
import os
import random
import tempfile
from collections import deque
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import aclosing
from functools import partial
from itertools import chain, islice
from typing import Any, TypeVar

from shards.address import shown_address
from shards.answers import RangesIgnoredError, Span, WriteError, explain, is_transient, is_wrong_clock
from shards.format import SampleError, ShardError, ShardInfo
from shards.local import Check, Extent, Range, join_ranges
from shards.ranges import MAX_RANGE_BYTES, RANGES_A_CALL
from shards.stores import Store, open_store
from shards.text import redact
from shards.transfer import Request, Transfer, Transfers

T = TypeVar("T")
_log = logging.getLogger(__name__)

_BACKOFF_SECONDS = 0.25
_MAX_BACKOFF_SECONDS = 10.0
PART_BYTES = 8 << 20
_PARTS_AHEAD = 2  # of a stream


class RemoteFiles:
    """The files below one address, fetched by `transfers`, which others may share.

    retries: attempts after the first. timeout_seconds: limit on connecting, on each wait for data, and, with time
    for the bytes at 64 KiB a second added, on a whole request. storage_options: passed to fsspec's file system.
    has_checksums: whether who reads ranges compares them with checksums.
    """

    def __init__(
        self,
        address: str,
        transfers: Transfers,
        *,
        retries: int,
        timeout_seconds: float,
        storage_options: Mapping[str, Any] | None,
        has_checksums: bool = True,
    ) -> None:
        self._address = address
        self._transfers = transfers
        self._retries = retries
        self._timeout_seconds = timeout_seconds
        self._storage_options = dict(storage_options or {})
        self._has_checksums = has_checksums
        self._met: set[str] = set()
        # One at a time where the bounds are narrower than a call may be.
        bounds = (RANGES_A_CALL, transfers.requests_in_flight, transfers.bytes_in_flight // MAX_RANGE_BYTES)
        self._ranges_a_call = max(1, min(bounds))
        self.where = redact(address)
        self.renew()

    def renew(self) -> None:
        """Forgets connections; new ones are made when needed. For the child after a fork."""
        self._store: Store | None = None

    def place(self, name: str) -> str:
        """Address of a file as it may be shown."""
        return shown_address(self._address, name)

    def read(self, name: str, start: int, stop: int, total: int) -> bytes:
        """The bytes start <= offset < stop of a file of `total` bytes. Raises ShardError."""
        return self._transfers.submit([self.request(name, start, stop, total)]).result()[0]

    def read_whole(self, name: str, limit: int) -> bytes:
        """A file of unknown size. Bytes beyond `limit` are an error or left out. Raises ShardError."""
        fetch = partial(self._fetch, name, Span(0, limit, None))
        return self._transfers.submit([Request(0, fetch)]).result()[0]

    def request(self, name: str, start: int, stop: int, total: int) -> Request:
        """A request for the bytes start <= offset < stop of a file of `total` bytes; it raises ShardError."""
        return Request(stop - start, partial(self._fetch, name, Span(start, stop, total)))

    def range_requests(self, name: str, ranges: Sequence[Range], total: int) -> list[Request]:
        """Requests for several ranges of a file of `total` bytes. Each is for a few of them, in their order, and its
        body is the list of their bytes. They raise ShardError."""
        requests = []
        for first in range(0, len(ranges), self._ranges_a_call):
            some = ranges[first : first + self._ranges_a_call]
            fetch = partial(self._fetch_ranges, name, some, total)
            requests.append(Request(sum(stop - start for start, stop in some), fetch, connections=len(some)))
        return requests

    def part(self, name: str, start: int, stop: int, total: int, descriptor: int) -> Request:
        """A request that writes these bytes of a file of `total` bytes to the same place of an open local file; it
        raises ShardError, WriteError. It never waits for others to be taken."""
        return Request(0, partial(self._store_part, name, start, stop, total, descriptor))

    def submit(self, requests: Sequence[Request], *, first: bool = False) -> Transfer:
        """Hands requests to the loop, all at once. first: before all that are not begun yet."""
        return self._transfers.submit(requests, first=first)

    def download(self, name: str, total: int, descriptor: int) -> None:
        """Writes the whole file of `total` bytes to an open local file, parts of it at the same time, each piece when
        it comes. Raises ShardError, OSError if writing fails."""
        parts = [(start, min(total, start + PART_BYTES)) for start in range(0, total, PART_BYTES)]
        try:
            try:
                self._write_parts(name, parts, total, descriptor)
            except RangesIgnoredError:
                self._write_parts(name, [(0, total)], total, descriptor)
        except WriteError as error:
            raise error.cause from None

    def stream(self, name: str, total: int) -> io.BufferedReader:
        """The file of `total` bytes, to be read once from its beginning; what comes next is fetched meanwhile. Reading
        raises ShardError, OSError if a local copy is needed and cannot be written."""
        return io.BufferedReader(_Stream(self._in_order(name, total)))

    def _in_order(self, name: str, total: int) -> Iterator[bytes]:
        parts = [(start, min(total, start + PART_BYTES)) for start in range(0, total, PART_BYTES)]
        submitted = (self.submit([self.request(name, *part, total)]) for part in parts)
        ahead = deque(islice(submitted, _PARTS_AHEAD))
        for number in range(len(parts)):
            ahead.extend(islice(submitted, 1))
            try:
                body = ahead.popleft().result()[0]
            except RangesIgnoredError:
                if number:
                    raise
                break
            yield body
        else:
            return
        with tempfile.TemporaryFile() as copy:
            self.download(name, total, copy.fileno())
            yield from iter(partial(copy.read, PART_BYTES), b"")

    def _write_parts(self, name: str, parts: Sequence[Range], total: int, descriptor: int) -> None:
        requests = [
            Request(stop - start, partial(self._store_part, name, start, stop, total, descriptor), is_kept=False)
            for start, stop in parts
        ]
        transfer = self._transfers.submit(requests)
        try:
            transfer.result()
        finally:
            transfer.wait()  # nothing must be written to the descriptor afterwards, even after a failure

    # What follows runs in the loop.

    async def _fetch(self, name: str, span: Span) -> bytes:
        try:
            return await self._opened().get(name, span)
        except Exception as error:
            first = error
        return await self._again(name, first, lambda: self._opened().get(name, span))

    async def _fetch_ranges(self, name: str, ranges: Sequence[Range], total: int) -> list[bytes]:
        # The first time each range is asked for by itself: then the file's size is compared. Later only checksums tell
        # that a file was replaced; who does without them compares the size each time.
        if len(ranges) > 1 and self._has_checksums and name in self._met:
            bodies = await (await self._opened().range_client(name)).get(name, ranges)
            if bodies is not None:
                return bodies
        each = [asyncio.ensure_future(self._fetch(name, Span(*one, total))) for one in ranges]
        try:
            bodies = await asyncio.gather(*each)
        finally:
            for fetch in each:  # the others, where one has failed
                fetch.cancel()
        self._met.add(name)
        return bodies

    async def _store_part(self, name: str, start: int, stop: int, total: int, descriptor: int) -> None:
        position = start

        def write(piece: bytes) -> None:
            nonlocal position
            try:
                _pwrite_all(descriptor, piece, position)
            except OSError as error:
                raise WriteError(error) from error
            position += len(piece)

        async def attempt() -> None:
            nonlocal position
            # What has come is kept, but for a server without ranges, which can only send the whole file again.
            position = start if stop - start == total else position
            if position < stop:
                await self._opened().get(name, Span(position, stop, total), write)

        try:
            client = await self._opened().range_client(name)
            async with aclosing(client.pieces(name, start, stop, total)) as pieces:
                async for piece in pieces:
                    write(piece)
            if position < stop:
                await attempt()
            return
        except Exception as error:
            first = error
        await self._again(name, first, attempt)

    def _opened(self) -> Store:
        if self._store is None:
            self._store = open_store(
                self._address, timeout_seconds=self._timeout_seconds, storage_options=self._storage_options
            )
            self._transfers.on_close(self._store.close)
        return self._store

    async def _again(self, name: str, error: BaseException, attempt: Callable[[], Awaitable[T]]) -> T:
        """More attempts after the first has failed. Raises ShardError, WriteError."""
        number = 1
        while is_transient(error) and number <= self._retries:
            _log.info("%s: %s; attempt %d failed, trying again", self.place(name), explain(error), number)
            pause = min(_MAX_BACKOFF_SECONDS, _BACKOFF_SECONDS * 2 ** (number - 1))
            await asyncio.sleep(pause + random.uniform(0, _BACKOFF_SECONDS))
            number += 1
            try:
                return await attempt()
            except Exception as latest:
                error = latest
        if isinstance(error, (ShardError, WriteError)):
            raise error
        if is_transient(error):
            fix = f"gave up after {number} attempts; check that the server is up and reachable, then start again"
        elif is_wrong_clock(error):
            fix = "the store takes no signature of another time: set this machine's clock (`date -u` shows it)"
        else:
            fix = "check the address, the credentials and the storage options"
        # The original exception, whose text may hold secrets, is not chained.
        raise ShardError(f"{self.place(name)}: {explain(error)}; {fix}")


def _pwrite_all(descriptor: int, data: bytes, offset: int) -> None:
    view = memoryview(data)
    while view:
        written = os.pwrite(descriptor, view, offset)
        offset += written
        view = view[written:]


class _Stream(io.RawIOBase):
    """Bytes that come in pieces, as a file."""

    def __init__(self, pieces: Iterator[bytes]) -> None:
        self._pieces = pieces
        self._left = memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        self._left = self._left or memoryview(next(self._pieces, b""))
        size = min(len(buffer), len(self._left))
        buffer[:size] = self._left[:size]
        self._left = self._left[size:]
        return size


class _RemoteFetch:
    """The ranges of several extents on their way. Implements Fetch."""

    def __init__(self, source: RemoteShards, wanted: Sequence[Extent], *, first: bool) -> None:
        self._source, self._wanted = source, wanted
        self._joined = [join_ranges(extent.ranges, extent.max_gap) for extent in wanted]
        self._first: list[int] = []
        requests: list[Request] = []
        for (shard, _, _), joined in zip(wanted, self._joined, strict=True):
            self._first.append(len(requests))
            requests += source.requests(shard, joined)
        self._first.append(len(requests))
        self._transfer = source.files.submit(requests, first=first)

    def read(self, number: int, check: Check) -> list[bytes]:
        shard, ranges, _ = self._wanted[number]
        joined = self._joined[number]
        bodies = self._transfer.result()[self._first[number] : self._first[number + 1]]
        chunks = _cut(ranges, joined, list(chain.from_iterable(bodies)))
        complaint = check(chunks)
        if complaint is not None:
            # Damage on the way is gone at the second attempt; damage in the store is not.
            # This time each range is asked for by itself, and what the file's size is now.
            again = self._source.files.submit(self._source.exact_requests(shard, joined))
            chunks = _cut(ranges, joined, again.result())
            complaint = check(chunks)
        if complaint is not None:
            raise SampleError(complaint)
        return chunks


def _cut(ranges: Sequence[Range], joined: Sequence[Range], bodies: Sequence[bytes]) -> list[bytes]:
    """The bytes of each range out of those of the joined ones."""
    if len(joined) == len(ranges):  # none was joined; then they are the same, sorted
        by_range = dict(zip(joined, bodies, strict=True))
        return [by_range[wanted] for wanted in ranges]
    chunks: dict[Range, bytes] = {}
    for (start, stop), body in zip(joined, bodies, strict=True):
        for first, last in ranges:
            if start <= first and last <= stop:
                chunks[first, last] = body[first - start : last - start]
    return [chunks[wanted] for wanted in ranges]


class RemoteShards:
    """Tars behind an address, read by ranges. Implements ShardSource."""

    def __init__(self, files: RemoteFiles, shards: Sequence[ShardInfo]) -> None:
        self.files = files
        self._shards = shards

    def renew(self) -> None:
        """Forgets connections, see `ShardSource`."""
        self.files.renew()

    def close(self) -> None:
        """Nothing is left open here: connections end with the loop."""

    def requests(self, shard: int, ranges: Sequence[Range]) -> list[Request]:
        """The requests for some ranges of a shard, see `RemoteFiles.range_requests`."""
        info = self._shards[shard]
        return self.files.range_requests(info.name, ranges, info.bytes)

    def exact_requests(self, shard: int, ranges: Sequence[Range]) -> list[Request]:
        """A request for each range of a shard."""
        info = self._shards[shard]
        return [self.files.request(info.name, start, stop, info.bytes) for start, stop in ranges]

    def start(self, wanted: Sequence[Extent], *, first: bool = False) -> _RemoteFetch:
        """Starts fetching, see `ShardSource`. first: before all that is not begun yet."""
        return _RemoteFetch(self, wanted, first=first)
