"""Shards on a local disk or a network mount: exactly the bytes asked for, with pread, from any number of threads."""

from __future__ import annotations

import contextlib
import errno
import os
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, Protocol, TypeVar

from tenacity import Retrying, retry_if_exception, stop_after_attempt, wait_exponential_jitter

from shards.format import SampleError, ShardError, ShardInfo

# Says what is wrong with the bytes of the ranges that were read, or None.
Check = Callable[[Sequence[bytes]], str | None]
Range = tuple[int, int]  # first byte and one past the last
Done = TypeVar("Done")
# Two ranges closer than this are fetched as one: on a store with 10 ms to the first byte and 100 MB/s a connection,
# a request costs as much as a megabyte; this stays well below and so never fetches much that nobody asked for.
MAX_GAP_BYTES = 64 << 10

_MAX_OPEN_FILES = 128
_BACKOFF_SECONDS = 0.1
_MAX_BACKOFF_SECONDS = 10.0
# A network mount answers ESTALE when a file was replaced on its server and EIO when the server was away for a while:
# opening the file again helps, or tells what happened.
_REOPEN_ERRORS = (errno.ESTALE, errno.EIO)


def join_ranges(ranges: Sequence[Range], max_gap: int = MAX_GAP_BYTES) -> list[Range]:
    """The ranges sorted, those that overlap or lie within `max_gap` bytes of each other joined into one."""
    joined: list[Range] = []
    for start, stop in sorted(ranges):
        if joined and start - joined[-1][1] <= max_gap:
            joined[-1] = (joined[-1][0], max(stop, joined[-1][1]))
        else:
            joined.append((start, stop))
    return joined


class Extent(NamedTuple):
    """Ranges of one shard. max_gap: bytes between two of them up to which a far store is asked for both at once."""

    shard: int
    ranges: Sequence[Range]
    max_gap: int = MAX_GAP_BYTES


class Fetch(Protocol):
    """Several extents on their way."""

    def read(self, number: int, check: Check) -> list[bytes]:
        """Bytes of each range of an extent, counted as they were given; waits for them. Raises ShardError if they
        cannot be had, SampleError if `check` finds a fault in them."""


class ShardSource(Protocol):
    """Where the bytes of one data set's tars come from."""

    def start(self, wanted: Sequence[Extent]) -> Fetch:
        """Begins to fetch all extents, at the same time. Never waits for data."""

    def renew(self) -> None:
        """Drops locks, connections and threads, which do not survive a fork. Called in the child."""

    def close(self) -> None:
        """Ends threads and connections, and closes files."""


class OpenFile:
    """A descriptor that is closed when its last user releases it, so that no thread reads from a reused number."""

    def __init__(self, path: Path) -> None:
        self.descriptor = os.open(path, os.O_RDONLY)
        os.posix_fadvise(self.descriptor, 0, 0, os.POSIX_FADV_RANDOM)

    def __del__(self) -> None:
        # __init__ may have failed before there was a descriptor.
        if hasattr(self, "descriptor"):
            os.close(self.descriptor)


class MountedFile:
    """A file that is opened again where its mount went stale or was away for a while. Raises OSError.

    was_reopened: then another file may have taken its place.
    """

    def __init__(self, path: Path, retries: int) -> None:
        self.path, self._retries = path, retries
        self.was_reopened = False
        self._file = OpenFile(path)

    def read(self, start: int, stop: int) -> bytes:
        """The bytes start <= offset < stop, fewer only where the file ends. Raises OSError."""
        try:
            return pread_exactly(self._file.descriptor, start, stop)
        except OSError as error:
            if error.errno not in _REOPEN_ERRORS:
                raise
        return _again(self._retries, lambda: self._read_reopened(start, stop))

    def _read_reopened(self, start: int, stop: int) -> bytes:
        self._file, self.was_reopened = OpenFile(self.path), True
        return pread_exactly(self._file.descriptor, start, stop)


def _again(retries: int, read: Callable[[], Done]) -> Done:
    """After a failure that reopening may mend. Apart from the first try: the retry machinery costs as much as it."""
    retrying = Retrying(
        stop=stop_after_attempt(max(1, retries)),
        wait=wait_exponential_jitter(initial=_BACKOFF_SECONDS, max=_MAX_BACKOFF_SECONDS, jitter=_BACKOFF_SECONDS),
        retry=retry_if_exception(lambda error: isinstance(error, OSError) and error.errno in _REOPEN_ERRORS),
        reraise=True,
    )
    time.sleep(_BACKOFF_SECONDS)
    return retrying(read)


def pread_exactly(descriptor: int, start: int, stop: int) -> bytes:
    """The bytes start <= offset < stop, fewer only where the file ends. Raises OSError."""
    data = os.pread(descriptor, stop - start, start)
    while len(data) < stop - start:
        more = os.pread(descriptor, stop - start - len(data), start + len(data))
        if not more:
            break
        data += more
    return data


@dataclass(frozen=True)
class LocalFetch:
    """Extents that the kernel was asked to fetch. Implements Fetch."""

    source: LocalShards
    wanted: Sequence[Extent]

    def read(self, number: int, check: Check) -> list[bytes]:
        """See `Fetch`."""
        extent = self.wanted[number]
        return self.source.read(extent.shard, extent.ranges, check)


class LocalShards:
    """The tars of one folder. Implements ShardSource.

    Sizes are compared with the manifest at once; raises ShardError for a missing or truncated tar.
    """

    def __init__(self, folder: Path, shards: Sequence[ShardInfo], retries: int) -> None:
        self._paths = [folder / shard.name for shard in shards]
        self._retries = retries
        # Size and modification time. Not the inode: some user-space mounts number their files anew now and then.
        self._states = [self._check_size(path, shard) for path, shard in zip(self._paths, shards, strict=True)]
        self.renew()

    @staticmethod
    def _check_size(path: Path, shard: ShardInfo) -> tuple[int, int]:
        try:
            status = path.stat()
        except OSError as error:
            raise ShardError(f"{path}: {error.strerror}; copy the shard again or rebuild the data set") from error
        if status.st_size != shard.bytes:
            raise ShardError(
                f"{path}: has {status.st_size} bytes, the manifest says {shard.bytes}; the shard is truncated or "
                "belongs to another data set: copy it again or rebuild with build_shards"
            )
        return status.st_size, status.st_mtime_ns

    def renew(self) -> None:
        """Forgets open files; they are opened again when needed."""
        self._lock = threading.Lock()
        self._open_files: OrderedDict[int, OpenFile] = OrderedDict()

    def close(self) -> None:
        """Closes the open files, each when its last reader is done."""
        with self._lock:
            self._open_files.clear()

    def _file(self, shard: int) -> OpenFile:
        with self._lock:
            file = self._open_files.get(shard)
            if file is not None:
                self._open_files.move_to_end(shard)
                return file
        file = OpenFile(self._paths[shard])
        with self._lock:
            file = self._open_files.setdefault(shard, file)
            while len(self._open_files) > _MAX_OPEN_FILES:
                self._open_files.popitem(last=False)
        return file

    def _read_once(self, shard: int, ranges: Sequence[Range]) -> list[bytes]:
        try:
            file = self._file(shard)
            status = os.fstat(file.descriptor)
            if (status.st_size, status.st_mtime_ns) != self._states[shard]:
                raise ShardError(
                    f"{self._paths[shard]}: the file was changed or replaced while it was in use; leave the "
                    "data set alone while it is read, and check it with check_shards"
                )
            return [pread_exactly(file.descriptor, start, stop) for start, stop in ranges]
        except OSError:
            with self._lock:
                self._open_files.pop(shard, None)
            raise

    def start(self, wanted: Sequence[Extent]) -> LocalFetch:
        """The kernel fetches what it does not hold yet, many ranges at once: on a cold disk one thread that reads after
        this is as fast as 16 that read without it, at a fifth of their CPU time."""
        for shard, ranges, _ in wanted:
            with contextlib.suppress(OSError):  # `read` meets the same trouble and explains it
                descriptor = self._file(shard).descriptor
                for start, stop in ranges:
                    os.posix_fadvise(descriptor, start, stop - start, os.POSIX_FADV_WILLNEED)
        return LocalFetch(self, wanted)

    def read(self, shard: int, ranges: Sequence[Range], check: Check) -> list[bytes]:
        """See `ShardSource`. A file whose size or time has changed is an error; a stale mount is tried again."""
        try:
            try:
                chunks = self._read_once(shard, ranges)
            except OSError as error:
                if error.errno not in _REOPEN_ERRORS:
                    raise
                chunks = _again(self._retries, lambda: self._read_once(shard, ranges))
        except OSError as error:
            raise ShardError(
                f"{self._paths[shard]}: cannot be read: {error.strerror}; check the disk or mount, then start again"
            ) from error
        for (start, stop), chunk in zip(ranges, chunks, strict=True):
            if len(chunk) != stop - start:
                raise ShardError(
                    f"{self._paths[shard]}: ends at byte {start + len(chunk)} while {stop} are needed; the file was "
                    "truncated while it was in use: copy it again and restart"
                )
        complaint = check(chunks)
        if complaint is not None:
            raise SampleError(complaint)
        return chunks
