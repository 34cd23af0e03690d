"""Rows of the member table of a far data set, fetched where they are used.

They are kept in a sparse local file, a copy of the far one with holes, which all processes of the node share. A row
that was never fetched reads as zeros, and no member lies at block 0: so the file itself tells what it holds, whichever
process died while it wrote.
"""

from __future__ import annotations

import os
import threading
from pathlib import Path

import numpy as np

from shards.format import MEMBER_DTYPE, Manifest, SampleError, ShardError, video_crc32
from shards.remote import RemoteFiles, join_ranges
from shards.stores import RangesIgnoredError, WriteError
from shards.transfer import Request, Transfer

# A table up to this size costs less as one request at the start than as one for each video.
WHOLE_TABLE_BYTES = 8 << 20
_MAX_GAP_ROWS = 4096  # as many bytes as between two ranges of a shard that are fetched as one


def prepare_rows(remote: RemoteFiles, manifest: Manifest, path: Path) -> None:
    """Makes sure that the local file is there, with the header of the table. Raises ShardError, OSError."""
    name, size = manifest.index["members"]["file"], int(manifest.index["members"]["bytes"])
    header_bytes = size - manifest.num_members * MEMBER_DTYPE.itemsize
    if not 0 < header_bytes < 4096:
        raise ShardError(
            f"{remote.place(name)}: {size} bytes cannot hold {manifest.num_members} members; upload the data set again "
            "or rebuild it with build_shards"
        )
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    try:
        os.ftruncate(descriptor, size)
        if not any(os.pread(descriptor, header_bytes, 0)):
            _take(remote, manifest, descriptor, remote.submit([remote.part(name, 0, header_bytes, size, descriptor)]))
    finally:
        os.close(descriptor)


def _take(remote: RemoteFiles, manifest: Manifest, descriptor: int, transfer: Transfer) -> None:
    """Waits until parts of the table are in the local file. Raises ShardError, OSError."""
    try:
        transfer.result()
    except RangesIgnoredError:
        remote.download(manifest.index["members"]["file"], int(manifest.index["members"]["bytes"]), descriptor)
    except WriteError as error:
        raise error.cause from None
    finally:
        transfer.wait()


class FarRows:
    """Fetches rows of the member table of one far data set.

    videos (N,) VIDEO_DTYPE: the table of videos. members (M,) MEMBER_DTYPE: mapped from the local file at `path`, where
    rows appear as they come. by_shard: with a video come the rows of its whole shard, for who reads whole shards.
    """

    def __init__(
        self,
        remote: RemoteFiles,
        manifest: Manifest,
        path: Path,
        videos: np.ndarray,
        members: np.ndarray,
        *,
        by_shard: bool,
    ) -> None:
        self._remote, self._manifest, self._videos, self._members = remote, manifest, videos, members
        self._shard_ends = np.cumsum([0, *(shard.members for shard in manifest.shards)]) if by_shard else None
        self._checked = np.zeros(len(videos), bool)  # here, and those that the table of videos describes
        self._folder, self._descriptor = path.parent, os.open(path, os.O_RDWR | os.O_CLOEXEC)
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
        """Waits until the rows of a video are in `members`, and fetches them if nobody has wanted them.

        Raises ShardError if they cannot be had, SampleError if they are not those that the table of videos describes.
        """
        if self._checked[video] and self._has(video):  # a mount may undo what another host has written
            return
        self._checked[video] = False
        span = self._span(video)
        for is_again in (False, True):
            if is_again or not self._has(video):
                self._start({span})
            self._end(span)
            first, stop = self._own_span(video)
            if video_crc32(self._members[first:stop]) == self._videos["crc32"][video]:
                self._checked[video] = True
                return
        raise SampleError(
            f"{self._remote.place(self._manifest.index['members']['file'])}: the rows {first} to {stop - 1} are "
            "damaged; upload the data set again or rebuild it with build_shards"
        )

    def _start(self, spans: set[tuple[int, int]]) -> None:
        with self._lock:
            missing = spans - self._coming.keys()
            if missing:
                joined = join_ranges(sorted(missing), _MAX_GAP_ROWS)
                transfer = self._remote.submit([self._request(first, stop) for first, stop in joined], first=True)
                self._coming |= dict.fromkeys(missing, transfer)

    def _end(self, span: tuple[int, int]) -> None:
        """Waits for rows that are on their way."""
        with self._lock:
            transfer = self._coming.get(span)
        if transfer is None:
            return
        try:
            _take(self._remote, self._manifest, self._descriptor, transfer)
        except OSError as error:
            raise cannot_keep(self._folder, self._remote, error) from error
        finally:
            with self._lock:
                self._coming.pop(span, None)

    def _offset(self, row: int) -> int:
        """Its place in the file."""
        return int(self._manifest.index["members"]["bytes"]) - (len(self._members) - row) * MEMBER_DTYPE.itemsize

    def _request(self, first: int, stop: int) -> Request:
        entry = self._manifest.index["members"]
        return self._remote.part(
            entry["file"], self._offset(first), self._offset(stop), int(entry["bytes"]), self._descriptor
        )

    def _own_span(self, video: int) -> tuple[int, int]:
        first = int(self._videos["first_member"][video])
        return first, first + int(self._videos["num_members"][video])

    def _span(self, video: int) -> tuple[int, int]:
        """The rows that are fetched with those of a video."""
        first, stop = self._own_span(video)
        if self._shard_ends is not None:
            shard = int(self._videos["shard"][video])
            start, end = int(self._shard_ends[shard]), int(self._shard_ends[shard + 1])
            if start <= first and stop <= end:
                return start, end
        return first, stop

    def _has(self, video: int) -> bool:
        first, stop = self._own_span(video)
        return bool(self._members["block"][first:stop].all())


def cannot_keep(folder: Path, remote: RemoteFiles, error: OSError) -> ShardError:
    """The error that tells of a full or read-only folder for the index."""
    return ShardError(
        f"{folder}: the index of {remote.where} cannot be kept here: {error.strerror or error}; free some space or "
        "name another cache_dir"
    )
