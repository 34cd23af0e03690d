"""The book-keeping of long work on a list of items by any number of processes, on one host or many.

All processes write to one file of JSON Lines. Its first line holds the settings, each other line the record of one
item. A process claims an item before it works on it, with a lock on a byte of the file that stands for the item. The
kernel frees the locks of a killed process, so its items are free at once, and the processes need no other connection.

    with WorkList("answers.jsonl", videos, {"model": digest}, key="video") as work:
        while work.is_unfinished():
            for video in work.claim(rank, world_size):
                work.append([{"video": video, "answer": compute(video)}])

A record is on the file as a whole or not at all, and an item has at most one. Uses the standard library alone.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import struct
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from shards.text import json_text

Record = dict[str, Any]

SYNC_SECONDS = 5.0
"""What was appended survives a kill at once, and a power cut after this time at the latest."""

# Bytes far behind the end of the file, which nobody reads or writes: one for the right to append, the others for items.
_APPENDING, _ITEMS = 1 << 60, 1 << 61
_PIECE = 1 << 20
_PAUSE_SECONDS = 1.0
_BEGIN = b'{"settings": '


class WorkListError(Exception):
    """A file that is no work list, belongs to other settings, or cannot be locked, read or written. The message names
    the fix."""


@contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Names the file in errors of calls that know only its descriptor. Raises WorkListError."""
    try:
        yield
    except OSError as error:
        raise WorkListError(
            f"{path}: {error.strerror}; what was written stays: look after the disk (df, dmesg), then give the same "
            "command again"
        ) from error


class WorkList:
    """Items that processes share, and the file with the records of those that are done. A context manager.

    items: names, each of which is worked on once; repeated ones count once. settings: whatever changes the records, as
    JSON; a file of other settings is refused. key: the field of a record that names its item. Not for several threads
    at a time. Raises WorkListError, and OSError for a path that cannot be written.
    """

    def __init__(self, path: str | Path, items: Iterable[str], settings: Mapping[str, Any], *, key: str) -> None:
        self.path, self.key = Path(path), key
        self.items = list(dict.fromkeys(items))
        self._listed = frozenset(self.items)
        self._done: set[str] = set()
        self._num_done = self._num_failed = 0
        self._end = 0  # of the complete lines that were read
        self._lines = 0
        self._looked_at = -1
        self._last_sync = time.monotonic()
        self._file = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            self._open(json.loads(json.dumps(settings)))
        except BaseException:
            os.close(self._file)
            raise

    def _open(self, settings: Mapping[str, Any]) -> None:
        self._lock(_APPENDING)
        try:
            header = next(self._new_lines(), None)
            if header is None:
                begun = os.pread(self._file, len(_BEGIN), 0)
                if not _BEGIN.startswith(begun):
                    raise WorkListError(f"{self.path}: no work list; name another file")
                self._write([{"settings": settings}])
                header = next(self._new_lines())
            self._compare(header, settings)
        finally:
            self._unlock(_APPENDING)
        self.refresh()

    def _compare(self, header: Record, settings: Mapping[str, Any]) -> None:
        known = header.get("settings")
        if not isinstance(known, dict):
            raise WorkListError(f"{self.path}:1: no settings, so this is no work list; name another file")
        different = [name for name in sorted({*known, *settings}) if known.get(name) != settings.get(name)]
        if different:
            changes = "; ".join(f"{name}: {_short(known, name)}, now {_short(settings, name)}" for name in different)
            raise WorkListError(f"{self.path}: holds records of other settings ({changes}); name another file")

    @property
    def num_done(self) -> int:
        """Items of the list that have a record, as far as the file was read."""
        return self._num_done

    @property
    def num_failed(self) -> int:
        """Those of them whose record has a field "error"."""
        return self._num_failed

    def claim(self, rank: int = 0, world_size: int = 1) -> Iterator[str]:
        """Yields items that are neither done nor worked on by another process. Each stays claimed until `append` gets
        its record, or the process ends.

        Starts with this rank's part of the list and goes on with what the others have left, so processes of any
        number and speed end together. Take the next item only when there is room for it.
        """
        begin = len(self.items) * rank // world_size
        for item in self.items[begin:] + self.items[:begin]:
            if item in self._done or not self._lock(_byte(item), wait=False):
                continue
            self.refresh()
            if item in self._done:
                self._unlock(_byte(item))
            else:
                yield item

    def is_unfinished(self) -> bool:
        """Whether an item has no record yet. From the second call on it waits a moment first if nothing was appended
        since the last one: others are working on the rest, and `claim` takes over what a killed process leaves.

        So all processes of a job end together; launchers stop the others when one ends with an error.
        """
        self.refresh()
        if self._end == self._looked_at and self._num_done < len(self.items):
            time.sleep(_PAUSE_SECONDS)
            self.refresh()
        self._looked_at = self._end
        return self._num_done < len(self.items)

    def append(self, records: Sequence[Record]) -> None:
        """Writes the records of claimed items and ends their claims. An item that has a record keeps it."""
        self._lock(_APPENDING)
        try:
            self.refresh()
            self._write([record for record in records if record[self.key] not in self._done])
            self.refresh()
        finally:
            self._unlock(_APPENDING)
        for record in records:
            self._unlock(_byte(record[self.key]))
        if time.monotonic() - self._last_sync >= SYNC_SECONDS:
            self._sync()

    def refresh(self) -> None:
        """Reads what other processes have appended."""
        for record in self._new_lines():
            item = record.get(self.key)
            if not isinstance(item, str):
                raise WorkListError(f"{self.path}:{self._lines}: no field {self.key!r}; delete the line")
            if item in self._listed and item not in self._done:
                self._num_done += 1
                self._num_failed += "error" in record
            self._done.add(item)

    def close(self) -> None:
        """Writes all to disk and frees the claims."""
        if self._file >= 0:
            self._sync()
            os.close(self._file)
            self._file = -1

    def __enter__(self) -> WorkList:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _new_lines(self) -> Iterator[Record]:
        """Parses the complete lines behind those that were read."""
        rest = b""
        while piece := self._piece(self._end + len(rest)):
            *lines, rest = (rest + piece).split(b"\n")
            for line in lines:
                self._end += len(line) + 1
                self._lines += 1
                yield self._parse(line)

    def _piece(self, offset: int) -> bytes:
        with disk_errors(self.path):
            return os.pread(self._file, _PIECE, offset)

    def _parse(self, line: bytes) -> Record:
        try:
            record = json.loads(line)
            if isinstance(record, dict):
                return record
        except (ValueError, RecursionError):
            pass
        raise WorkListError(f"{self.path}:{self._lines}: not a JSON object; delete the line, and its item is done anew")

    def _write(self, records: Sequence[Record]) -> None:
        """Appends lines. Cuts away the half line of a killed process: nobody else writes while we hold the lock."""
        data = "".join(f"{json_text(record)}\n" for record in records).encode()
        at = self._end
        with disk_errors(self.path):
            os.ftruncate(self._file, at)
            while data:
                written = os.pwrite(self._file, data, at)
                at, data = at + written, data[written:]

    def _sync(self) -> None:
        with disk_errors(self.path):
            os.fsync(self._file)
        self._last_sync = time.monotonic()

    def _lock(self, byte: int, *, wait: bool = True) -> bool:
        """Whether the byte is locked for us now. Locks belong to the open file, not to the process as with `lockf`."""
        try:
            fcntl.fcntl(self._file, fcntl.F_OFD_SETLKW if wait else fcntl.F_OFD_SETLK, _flock(fcntl.F_WRLCK, byte))
        except OSError as error:
            if not wait and error.errno in (errno.EAGAIN, errno.EACCES):
                return False
            raise WorkListError(
                f"{self.path}: cannot be locked ({error.strerror}); processes can share only a file on a file system "
                "with locks (Lustre: mounted with -o flock)"
            ) from None
        return True

    def _unlock(self, byte: int) -> None:
        fcntl.fcntl(self._file, fcntl.F_OFD_SETLK, _flock(fcntl.F_UNLCK, byte))


def _flock(kind: int, byte: int) -> bytes:
    """Linux's `struct flock` for one byte."""
    return struct.pack("hhqqi0q", kind, os.SEEK_SET, byte, 1, 0)


def _byte(item: str) -> int:
    """The byte that stands for an item, whatever list it is in."""
    digest = hashlib.sha256(item.encode("utf-8", "surrogatepass")).digest()
    return _ITEMS + int.from_bytes(digest[:8], "big") % _ITEMS


def _short(settings: Mapping[str, Any], name: str) -> str:
    text = json.dumps(settings.get(name), ensure_ascii=False)
    return text if len(text) <= 60 else f"{text[:57]}..."
