"""Rows of a large index table of a far data set, of members or packets, fetched where they are used.

They are kept in a sparse local file, a copy of the far one with holes, which all processes of the node share. A row
that was never fetched reads as zeros, and nothing that has a row is of size 0: so the file itself tells what it holds,
whichever process died while it wrote.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from shards.answers import RangesIgnoredError, WriteError
from shards.format import SampleError, ShardError, table_header
from shards.index import LargeTable
from shards.local import join_ranges
from shards.remote import RemoteFiles
from shards.transfer import Request, Transfer

# A table up to this size costs less as one request at the start than as one for each video.
WHOLE_TABLE_BYTES = 8 << 20
_MAX_GAP_ROWS = 4096  # 64 or 96 kB: about as much as between two ranges of a shard that are fetched as one


def prepare_rows(where: str, size: int, dtype: np.dtype, path: Path) -> None:
    """Makes sure that the local file of a table of `size` bytes is there, with its header and holes for rows.

    where: the far table, as it may be shown. Raises ShardError if no table of this dtype is so large, OSError.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        os.ftruncate(descriptor, size)
        os.pwrite(descriptor, _header(where, size, dtype), 0)
    finally:
        os.close(descriptor)


def _header(where: str, size: int, dtype: np.dtype) -> bytes:
    for length in range(64, min(size, 1024) + 1, 64):
        header = table_header(dtype, (size - length) // dtype.itemsize)
        if len(header) == length and (size - length) % dtype.itemsize == 0:
            return header
    raise ShardError(
        f"{where}: no index table has {size} bytes; upload the data set again or rebuild it with build_shards"
    )


def _take(remote: RemoteFiles, name: str, size: int, descriptor: int, transfer: Transfer) -> None:
    """Waits until parts of the table are in the local file. Raises ShardError, OSError."""
    try:
        transfer.result()
    except RangesIgnoredError:
        remote.download(name, size, descriptor)
    except WriteError as error:
        raise error.cause from None
    finally:
        transfer.wait()


class FarRows:
    """Fetches rows of one large table of a far data set. Implements RowFetcher.

    entry: of the table in the manifest. path: of the local file, from which the table is mapped and where rows appear
    as they come. shards (N,): of the videos. shard_ends (S + 1,) int64: with a video come the rows of its whole shard,
    for who reads whole shards; None: only its own.
    """

    def __init__(
        self,
        remote: RemoteFiles,
        entry: Mapping[str, Any],
        path: Path,
        table: LargeTable,
        *,
        shards: np.ndarray,
        shard_ends: np.ndarray | None,
    ) -> None:
        self._remote, self._table, self._shards, self._shard_ends = remote, table, shards, shard_ends
        self._name, self._bytes = str(entry["file"]), int(entry["bytes"])
        self._checked = np.zeros(len(shards), bool)  # here, and as they should be
        self._folder, self._descriptor = path.parent, os.open(path, os.O_RDWR)
        self.renew()

    def renew(self) -> None:
        """Forgets what is under way. For the child after a fork."""
        self._lock = threading.Lock()
        self._coming: dict[tuple[int, int], Transfer] = {}

    def close(self) -> None:
        """Closes the local file. Call it when the loop that writes to it has ended."""
        descriptor, self._descriptor = self._descriptor, -1
        if descriptor >= 0:
            os.close(descriptor)

    def want(self, videos: np.ndarray) -> None:
        """Starts to fetch the rows of these (k,) videos, as far as they are not here. Waits for nothing."""
        unknown = videos[~self._checked[videos]]
        self._start({self._span(video) for video in unknown.tolist() if not self._has(video)})

    def wait(self, video: int) -> None:
        """Waits until the rows of a video are in the table, and fetches them if nobody has wanted them.

        Raises ShardError if they cannot be had, SampleError if they are not as they should be.
        """
        if self._checked[video] and self._has(video):  # a mount may undo what another host has written
            return
        self._checked[video] = False
        span = self._span(video)
        for is_again in (False, True):
            if is_again or not self._has(video):
                self._start({span})
            self._end(span)
            if self._table.is_sound(video):
                self._checked[video] = True
                return
        first, stop = self._table.span(video)
        raise SampleError(
            f"{self._remote.place(self._name)}: the rows {first} to {stop - 1} are damaged; upload the data set again "
            "or rebuild it with build_shards"
        )

    def _start(self, spans: set[tuple[int, int]]) -> None:
        with self._lock:
            missing = spans - self._coming.keys()
            if missing:
                joined = join_ranges(list(missing), _MAX_GAP_ROWS)
                transfer = self._remote.submit([self._request(first, stop) for first, stop in joined], first=True)
                self._coming |= dict.fromkeys(missing, transfer)

    def _end(self, span: tuple[int, int]) -> None:
        """Waits for rows that are on their way."""
        with self._lock:
            transfer = self._coming.get(span)
        if transfer is None:
            return
        try:
            _take(self._remote, self._name, self._bytes, self._descriptor, transfer)
        except OSError as error:
            raise cannot_keep(self._folder, self._remote, error) from error
        finally:
            with self._lock:
                self._coming.pop(span, None)

    def _request(self, first: int, stop: int) -> Request:
        rows = self._table.rows
        start, end = (self._bytes - (len(rows) - row) * rows.dtype.itemsize for row in (first, stop))
        return self._remote.part(self._name, start, end, self._bytes, self._descriptor)

    def _span(self, video: int) -> tuple[int, int]:
        """The rows that are fetched with those of a video."""
        first, stop = self._table.span(video)
        if self._shard_ends is not None:
            shard = int(self._shards[video])
            start, end = int(self._shard_ends[shard]), int(self._shard_ends[shard + 1])
            if start <= first and stop <= end:
                return start, end
        return first, stop

    def _has(self, video: int) -> bool:
        rows = self._table.read(video)
        return len(rows) == self._table.count[video] and bool(rows["size"].all())


def cannot_keep(folder: Path, remote: RemoteFiles, error: OSError) -> ShardError:
    """The error that tells of a full or read-only folder for the index."""
    return ShardError(
        f"{folder}: the index of {remote.where} cannot be kept here: {error.strerror or error}; free some space or "
        "name another cache_dir"
    )
