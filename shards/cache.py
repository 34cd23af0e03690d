"""A folder of whole files of remote data sets, on a local disk and shared by all processes of the node.

A file is downloaded to NAME.part, checked, synchronised and renamed, so NAME is complete whenever it exists. The
process that holds the lock (flock) on NAME.part downloads; the others wait. The lock of a killed process vanishes with
it, and its leftover is used or removed by the next one. Nothing else is stored: last use is the file's modification
time, so any number of jobs share a folder, and a user may delete from it at any time.

The limit counts finished files and the full size of downloads. A job that adds a file says when it needs which of the
others: those that it does not need leave first, least recently used first, then those that it needs last. A file is
open only while its bytes are read, so the space of a removed file is soon free; a reader that misses the file fetches
it again.
"""

from __future__ import annotations

import hashlib
import math
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from shards.files import is_at, try_lock

# When a file is needed next, by its name: the smaller, the sooner; infinite if not at all or not known.
Need = Callable[[str], float]

# A process that was stopped may hold a lock for ever; after this long the others read ranges instead.
_LOCK_SECONDS = 900.0
_POLL_SECONDS = 0.05


class CacheFullError(OSError):
    """A file does not fit into the cache beside the downloads under way, or beside what is needed before it."""


class GivenUpError(OSError):
    """Nobody waits for the file any more."""


def _never() -> bool:
    return False


def _unknown(_: str) -> float:
    return math.inf


def entry_name(*identity: object) -> str:
    """File name of the entry with this identity: address, size, checksum ..."""
    return hashlib.sha256("\n".join(map(str, identity)).encode("utf-8", "surrogatepass")).hexdigest()


def _lock(descriptor: int, seconds: float, is_given_up: Callable[[], bool] = _never) -> None:
    """Takes the exclusive lock; raises TimeoutError, an OSError, when `seconds` have passed, or GivenUpError."""
    deadline = time.monotonic() + seconds
    while True:
        if try_lock(descriptor):
            return
        if time.monotonic() > deadline:
            raise TimeoutError(f"another process has held a lock in the cache for {seconds:.0f} s")
        if is_given_up():
            raise GivenUpError("the data set was closed")
        time.sleep(_POLL_SECONDS)


def _has_size(path: Path, size: int) -> bool:
    try:
        return path.stat().st_size == size
    except FileNotFoundError:
        return False


def fetch_once(
    entry: Path,
    size: int,
    download: Callable[[int], None],
    reserve: Callable[[int], None] | None = None,
    is_given_up: Callable[[], bool] = _never,
) -> None:
    """Makes `entry` a file of `size` bytes. Of all processes and threads that ask, one downloads and the others wait.

    reserve(descriptor) makes room and sets the size; download(descriptor) writes the bytes. Their errors are passed on.
    is_given_up: called while waiting for another's download; raises GivenUpError once it returns True.
    """
    part = entry.with_name(entry.name + ".part")
    entry.parent.mkdir(parents=True, exist_ok=True)
    while not _has_size(entry, size):
        descriptor = os.open(part, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            _lock(descriptor, _LOCK_SECONDS, is_given_up)
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

    def fetch(
        self,
        name: str,
        size: int,
        download: Callable[[int], None],
        *,
        need: Need = _unknown,
        spare: float = -math.inf,
        is_given_up: Callable[[], bool] = _never,
    ) -> None:
        """Makes sure that the entry is there. Raises OSError, CacheFullError if it does not fit.

        need: when each entry is needed next, see the module's text. spare: entries needed at this time or earlier stay.
        """
        entry = self.folder / f"{name}.tar"
        fetch_once(entry, size, download, lambda part: self._make_room(entry, part, size, need, spare), is_given_up)

    def has(self, name: str, size: int) -> bool:
        """Whether the entry is there with this size. Does not count as a use."""
        return _has_size(self.folder / f"{name}.tar", size)

    def find(self, name: str, size: int) -> int | None:
        """Descriptor of the entry if it is there with this size; the caller closes it. Counts as a use."""
        try:
            descriptor = os.open(self.folder / f"{name}.tar", os.O_RDONLY)
        except FileNotFoundError:
            return None
        if os.fstat(descriptor).st_size != size:
            os.close(descriptor)
            return None
        with suppress(OSError):
            os.utime(descriptor)  # fails in another user's folder, which does no harm
        return descriptor

    def is_current(self, name: str, descriptor: int) -> bool:
        """Whether the open file is still the entry of that name."""
        return is_at(descriptor, self.folder / f"{name}.tar")

    def drop(self, name: str) -> None:
        """Removes an entry."""
        (self.folder / f"{name}.tar").unlink(missing_ok=True)

    @contextmanager
    def _locked(self) -> Iterator[None]:
        descriptor = os.open(self.folder / "lock", os.O_RDWR | os.O_CREAT, 0o666)
        try:
            _lock(descriptor, _LOCK_SECONDS)
            yield
        finally:
            os.close(descriptor)

    def _contents(self, entry: Path) -> tuple[dict[Path, os.stat_result], int]:
        """The entries, and the bytes of downloads of others than `entry`; removes what killed downloads have left.

        A file that goes meanwhile may have got another name, so all is looked at again then.
        """
        while True:
            paths = list(self.folder.iterdir())
            with suppress(FileNotFoundError):
                parts = [path for path in paths if path.suffix == ".part" and path.stem != entry.name]
                downloads = [part.stat().st_size for part in parts if not _remove_if_abandoned(part)]
                return {path: path.stat() for path in paths if path.suffix == ".tar"}, sum(downloads)

    def _make_room(self, entry: Path, part: int, size: int, need: Need, spare: float) -> None:
        """Evicts until `size` more bytes fit, and reserves them by giving the open .part of `entry` its full size."""
        with self._locked():
            entries, used = self._contents(entry)
            used += sum(status.st_size for status in entries.values())
            kept = [(-need(path.stem), status.st_mtime_ns, status.st_size, path) for path, status in entries.items()]
            going = [(bytes_, path) for needed, _, bytes_, path in sorted(kept) if -needed > spare]
            if used + size - sum(bytes_ for bytes_, _ in going) > self.limit_bytes:
                raise CacheFullError(
                    f"{self.folder}: {size} bytes do not fit beside {used} bytes of shards and downloads under way "
                    f"into a limit of {self.limit_bytes} bytes; raise cache_bytes"
                )
            for bytes_, path in going:
                if used + size <= self.limit_bytes:
                    break
                path.unlink(missing_ok=True)
                used -= bytes_
            os.ftruncate(part, size)


def _remove_if_abandoned(part: Path) -> bool:
    """Removes the leftover of a killed download, known by its free lock. Returns whether it was one.

    Raises FileNotFoundError where the download has ended.
    """
    descriptor = os.open(part, os.O_RDWR)
    try:
        if not try_lock(descriptor):
            return False
        if not is_at(descriptor, part):
            raise FileNotFoundError(part)
        part.unlink()
        return True
    finally:
        os.close(descriptor)
