"""Whole files of remote data sets, kept on a local disk and shared by all processes of the node.

A file is downloaded to NAME.part, checked, synchronised and renamed, so NAME is complete whenever it exists. Whoever
holds the lock (flock) on NAME.part downloads; the others wait. The lock of a killed process vanishes with it, and its
leftover is used or removed by the next one. Nothing else is remembered: last use is the file's modification time, so
any number of jobs share a folder, and a user may delete from it at any time.

The limit counts finished files and the full size of those under way. Least recently used files go first. A file is
open only while its bytes are read, so what was removed is soon free, and a reader that finds it gone fetches it again.
"""

from __future__ import annotations

import hashlib
import logging
import math
import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from shards.files import is_at, try_lock
from shards.format import Manifest, SampleError
from shards.local import Check, Range, pread_exactly
from shards.remote import RemoteFiles, RemoteShards

_log = logging.getLogger(__name__)

# A process that was stopped may hold a lock for ever; after this long the others read ranges instead.
_LOCK_SECONDS = 900.0
_POLL_SECONDS = 0.05
# After a full disk or the like, downloads are tried again this much later.
_PAUSE_SECONDS = 300.0
_REFETCH_SECONDS = 3600.0
_MAX_FETCHES = 3


class CacheFullError(OSError):
    """A file does not fit into the cache beside the downloads under way."""


def default_cache_dir() -> Path:
    """`$XDG_CACHE_HOME/text4vis`, or `~/.cache/text4vis`."""
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "text4vis"


def entry_name(*identity: object) -> str:
    """File name for what has this identity: address, size, checksum ..."""
    return hashlib.sha256("\n".join(map(str, identity)).encode("utf-8", "surrogatepass")).hexdigest()


def _lock(descriptor: int, seconds: float) -> None:
    """Takes the exclusive lock; raises TimeoutError, an OSError, when `seconds` have passed."""
    deadline = time.monotonic() + seconds
    while True:
        if try_lock(descriptor):
            return
        if time.monotonic() > deadline:
            raise TimeoutError(f"another process has held a lock in the cache for {seconds:.0f} s")
        time.sleep(_POLL_SECONDS)


def _has_size(path: Path, size: int) -> bool:
    try:
        return path.stat().st_size == size
    except FileNotFoundError:
        return False


def fetch_once(
    entry: Path, size: int, download: Callable[[int], None], reserve: Callable[[int], None] | None = None
) -> None:
    """Makes `entry` a file of `size` bytes. Of all processes and threads that ask, one downloads and the others wait.

    reserve(descriptor) makes room and sets the size; download(descriptor) writes the bytes. What they raise passes
    through.
    """
    part = entry.with_name(entry.name + ".part")
    entry.parent.mkdir(parents=True, exist_ok=True)
    while not _has_size(entry, size):
        descriptor = os.open(part, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            _lock(descriptor, _LOCK_SECONDS)
            if not is_at(descriptor, part):
                continue  # its former holder finished or gave up: look again
            if _has_size(entry, size):
                part.unlink()
                return
            try:
                os.ftruncate(descriptor, 0)
                if reserve is not None:
                    reserve(descriptor)
                download(descriptor)
                os.fsync(descriptor)
            except BaseException:
                part.unlink(missing_ok=True)
                raise
            part.rename(entry)
        finally:
            os.close(descriptor)


class ShardCache:
    """A folder of whole shards under a limit in bytes. Each job obeys its own limit when it adds to the folder."""

    def __init__(self, folder: Path, limit_bytes: int) -> None:
        self.folder = folder
        self.limit_bytes = limit_bytes

    def open(self, name: str, size: int, download: Callable[[int], None]) -> int:
        """Descriptor of the entry, downloaded if needed; the caller closes it. Raises OSError, ShardError."""
        entry = self.folder / f"{name}.tar"
        for _ in range(_MAX_FETCHES):
            fetch_once(entry, size, download, lambda part: self._make_room(entry, part, size))
            descriptor = self.find(name)
            if descriptor is not None:
                return descriptor
        raise CacheFullError(f"{self.folder}: files are evicted faster than they are read; raise cache_bytes")

    def find(self, name: str) -> int | None:
        """Descriptor of the entry, None if it is not there; the caller closes it. Counts as a use."""
        try:
            descriptor = os.open(self.folder / f"{name}.tar", os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError:
            return None
        with suppress(OSError):
            os.utime(descriptor)  # impossible, and no matter, in another user's folder
        return descriptor

    def is_current(self, name: str, descriptor: int) -> bool:
        """Whether the open file is still the entry of that name."""
        return is_at(descriptor, self.folder / f"{name}.tar")

    def drop(self, name: str) -> None:
        """Removes an entry."""
        (self.folder / f"{name}.tar").unlink(missing_ok=True)

    @contextmanager
    def _locked(self) -> Iterator[None]:
        descriptor = os.open(self.folder / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            _lock(descriptor, _LOCK_SECONDS)
            yield
        finally:
            os.close(descriptor)

    def _make_room(self, entry: Path, part: int, size: int) -> None:
        """Evicts until `size` more bytes fit, and reserves them by giving the open .part of `entry` its full size."""
        with self._locked():
            kept: list[tuple[int, int, Path]] = []
            used = 0
            for path in self.folder.iterdir():
                with suppress(FileNotFoundError):
                    status = path.stat()
                    if path.suffix == ".tar":
                        kept.append((status.st_mtime_ns, status.st_size, path))
                        used += status.st_size
                    elif path.suffix == ".part" and path.stem != entry.name and not _remove_if_abandoned(path):
                        used += status.st_size
            for _, bytes_, path in sorted(kept):
                if used + size <= self.limit_bytes:
                    break
                path.unlink(missing_ok=True)
                used -= bytes_
            if used + size > self.limit_bytes:
                raise CacheFullError(
                    f"{self.folder}: {size} bytes do not fit beside {used} bytes of downloads under way into a limit "
                    f"of {self.limit_bytes} bytes; raise cache_bytes"
                )
            os.ftruncate(part, size)


def _remove_if_abandoned(part: Path) -> bool:
    """Removes the leftover of a killed download, known by its free lock. Returns whether it was one."""
    descriptor = os.open(part, os.O_RDWR | os.O_CLOEXEC)
    try:
        abandoned = try_lock(descriptor)
        if abandoned and is_at(descriptor, part):
            part.unlink()
        return abandoned
    finally:
        os.close(descriptor)


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
        self._warned = False
        self._paused_until = 0.0
        self._refetched_at: dict[int, float] = {}
        self.renew()

    def renew(self) -> None:
        self._warning_lock = threading.Lock()
        self._dropping_lock = threading.Lock()
        self._ranges.renew()

    def close(self) -> None:
        self._ranges.close()

    def expect(self, shard: int, ranges: Sequence[Range]) -> None:
        """Nothing to prepare: `io_threads` requests are on their way at the same time."""

    def read(self, shard: int, ranges: Sequence[Range], check: Check) -> list[bytes]:
        try:
            for _ in range(_MAX_FETCHES):
                descriptor = self._open(shard)
                if descriptor is None:
                    break
                chunks = self._read_checked(shard, descriptor, ranges, check)
                if chunks is not None:
                    return chunks
        except OSError as error:
            self._pause(error)
        return self._ranges.read(shard, ranges, check)

    def _open(self, shard: int) -> int | None:
        """Descriptor of the cached shard; None if it is not there and downloads are suspended."""
        info, name = self._shards[shard], self._names[shard]
        if time.monotonic() < self._paused_until:
            return self._cache.find(name)
        return self._cache.open(name, info.bytes, lambda part: self._files.download(info.name, info.bytes, part))

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
        with self._warning_lock:
            self._paused_until = time.monotonic() + _PAUSE_SECONDS
            if not self._warned:
                self._warned = True
                _log.warning(
                    "%s: cannot keep shards in the cache (%s); reading ranges of %s instead",
                    self._cache.folder,
                    error.strerror or error,
                    self._files.where,
                )
