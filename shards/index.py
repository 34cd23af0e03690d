"""The index of one data set, opened and checked: which videos there are and where their bytes lie.

Opening costs O(videos). The member table, one row a frame, is mapped and only the rows in use are ever read, so its
rows are checked when they are used and not here. Of a far data set only the rows in use are ever fetched.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from isal import isal_zlib

from shards.format import (
    BLOCK_BYTES,
    LABELS_ROLE,
    MANIFEST,
    PACKETS_ROLE,
    STREAMS_ROLE,
    Manifest,
    SampleError,
    ShardError,
    fingerprint,
    rows_crc32,
    video_crc32,
)
from shards.local import MountedFile

# Far above any real manifest (1,400 shards take 150 kB); a hostile server cannot fill the memory.
MAX_MANIFEST_BYTES = 256 << 20
_REBUILD = "copy the data set again or rebuild it with build_shards"
# numpy parses headers with `ast`, which raises SystemError in Python 3.11.0 to 3.11.7 and 3.12.0 to 3.12.1 where two
# threads use it at the same time (python/cpython#106905); data sets are opened in several.
one_header_at_a_time = threading.Lock()


class RowFetcher(Protocol):
    """Brings rows of a large table of a far data set into the local one."""

    def want(self, videos: np.ndarray) -> None:
        """Starts to fetch the rows of these (k,) videos, as far as they are not here. Waits for nothing."""

    def wait(self, video: int) -> None:
        """Waits until the rows of a video are here. Raises ShardError, SampleError."""

    def renew(self) -> None:
        """Drops what does not survive a fork. Called in the child."""

    def close(self) -> None:
        """Closes the local file. Called when the loop that writes to it has ended."""


@dataclass(frozen=True)
class LargeTable:
    """A table with some rows a video.

    rows (R,): all of them, mapped. file: where those of a video are read, for looking at mapped rows kills the process
    if the file was cut or the disk fails. start: the first row's byte there. first (N,), count (N,): which rows are
    those of a video. crc32 (N,): what `checksum` of them must be. far: fetches rows; None where all are here.
    """

    rows: np.ndarray
    file: MountedFile
    start: int
    first: np.ndarray
    count: np.ndarray
    crc32: np.ndarray
    checksum: Callable[[np.ndarray], int]
    far: RowFetcher | None = None

    def span(self, video: int) -> tuple[int, int]:
        """The first row of a video, and one past its last."""
        first = int(self.first[video])
        return first, first + int(self.count[video])

    def of(self, video: int) -> np.ndarray:
        """Rows of a video; waits for those of a far data set.

        Raises ShardError if they cannot be had, SampleError if they are damaged.
        """
        if self.far is not None:
            self.far.wait(video)
        rows = self.read(video)
        if len(rows) < self.count[video]:
            raise ShardError(f"{self.file.path}: ends before the rows of video {video}; it was cut in use: {_REBUILD}")
        if self.file.was_reopened and self.checksum(rows) != self.crc32[video]:
            raise ShardError(f"{self.file.path}: was replaced while it was in use; start again")
        return rows

    def read(self, video: int) -> np.ndarray:
        """Rows of a video as the file holds them now, fewer where it ends. Raises ShardError if it cannot be read."""
        first, stop = (self.start + row * self.rows.itemsize for row in self.span(video))
        try:
            data = self.file.read(first, stop)
        except OSError as error:
            raise _unreadable(self.file.path, error) from error
        return np.frombuffer(data, self.rows.dtype, len(data) // self.rows.itemsize)

    def is_sound(self, video: int) -> bool:
        """Whether the rows that are here are as they should be."""
        return self.checksum(self.read(video)) == self.crc32[video]


@dataclass(frozen=True)
class Index:
    """Tables of one data set. where: its address as it may be shown.

    videos (N,) VIDEO_DTYPE and names (bytes,) uint8 are checked; member_table (M rows of MEMBER_DTYPE) is mapped and
    not. labels: (L,) int32, the labels of video 0, then those of video 1, and so on, ascending within a video. streams
    (N,) STREAM_DTYPE and packet_table (P rows of PACKET_DTYPE): None unless stored videos can be read in parts.
    """

    where: str
    manifest: Manifest
    videos: np.ndarray
    member_table: LargeTable
    names: np.ndarray
    labels: np.ndarray
    streams: np.ndarray | None = None
    packet_table: LargeTable | None = None

    @property
    def members(self) -> np.ndarray:
        """(M,) MEMBER_DTYPE. Of a far data set only the rows that were waited for."""
        return self.member_table.rows

    @property
    def large_tables(self) -> dict[str, LargeTable]:
        """The mapped tables by role."""
        packets = {} if self.packet_table is None else {PACKETS_ROLE: self.packet_table}
        return {"members": self.member_table, **packets}

    @property
    def far(self) -> list[RowFetcher]:
        """What fetches rows; empty where all are here."""
        return [table.far for table in self.large_tables.values() if table.far is not None]

    @property
    def label_counts(self) -> np.ndarray:
        """Labels of each video, (N,) int64: 1 each unless `manifest.multi_label`."""
        if self.manifest.multi_label:
            return self.videos["num_labels"].astype(np.int64)
        return np.ones(len(self.videos), np.int64)

    def name(self, video: int) -> str:
        """Original name. Bytes that are no UTF-8 become lone surrogates."""
        row = self.videos[video]
        start = int(row["name_start"])
        return self.names[start : start + int(row["name_size"])].tobytes().decode("utf-8", "surrogateescape")

    def member_rows(self, video: int, numbers: np.ndarray) -> np.ndarray:
        """Rows of the member table for the video's members with these numbers, each in [0, num_members).

        Waits for rows of a far data set. Raises ShardError if they cannot be had, SampleError if they are damaged.
        """
        return self.member_table.of(video)[numbers]

    def stream(self, video: int) -> np.void | None:
        """How a stored video is read in parts; None if it has to be read whole."""
        if self.streams is None or not self.streams["num_packets"][video]:
            return None
        return self.streams[video]

    def packet_rows(self, video: int) -> np.ndarray:
        """Rows (P,) of a stored video's packets. Raises as `member_rows`."""
        assert self.packet_table is not None
        return self.packet_table.of(video)

    def ranges(self, video: int, rows: np.ndarray | Mapping[str, np.ndarray]) -> list[tuple[int, int]]:
        """Byte ranges of these member rows in the video's shard: `block` and `size` of each.

        Raises SampleError if one lies outside the shard.
        """
        shard = self.manifest.shards[int(self.videos["shard"][video])]
        ranges = []
        for block, size in zip(rows["block"].tolist(), rows["size"].tolist(), strict=True):
            start, stop = block * BLOCK_BYTES, block * BLOCK_BYTES + size
            if size == 0 or block == 0 or stop > shard.bytes:
                raise SampleError(
                    f"{self.where}: the index places a member of video {video} at bytes {start} to {stop} of "
                    f"{shard.name}, which has {shard.bytes}; the index is damaged or belongs to another data set: "
                    f"{_REBUILD}"
                )
            ranges.append((start, stop))
        return ranges

    def json_ranges(self, video: int) -> list[tuple[int, int]]:
        """Where the video's JSON lies in its shard; none in tars that others wrote. Raises SampleError as `ranges`."""
        if self.manifest.tars is not None:
            return []
        row = self.videos[video : video + 1]
        return self.ranges(video, {"block": row["json_block"], "size": row["json_size"]})


def read_local_manifest(folder: Path) -> Manifest:
    """Manifest of the data set in a local folder. Raises ShardError."""
    path = folder / MANIFEST
    try:
        size = path.stat().st_size
        if size > MAX_MANIFEST_BYTES:
            raise ShardError(f"{path}: has {size} bytes, more than any manifest; {_REBUILD}")
        return Manifest.from_json(path.read_bytes(), str(path))
    except FileNotFoundError:
        raise ShardError(
            f"{path}: not found; name a folder that build_shards wrote, and finish the build if it was "
            "interrupted (the manifest is written last)"
        ) from None
    except OSError as error:
        raise ShardError(f"{path}: {error.strerror}; name a folder that build_shards wrote") from error


def open_index(where: str, manifest: Manifest, files: dict[str, Path], retries: int = 1) -> Index:
    """Opens and checks the index tables; `files` holds a local path for each role. Raises ShardError.

    retries: how often a table is opened again where its mount went stale or was away, once at least.
    """
    tables: dict[str, Any] = {
        role: _open_table(role, files[role], manifest.index[role], dtype) for role, dtype in manifest.dtypes.items()
    }
    videos, members, names = tables["videos"], tables["members"], np.asarray(tables["names"])
    if len(videos) != manifest.num_videos or len(members) != manifest.num_members or len(videos) == 0:
        raise ShardError(
            f"{where}: the index holds {len(videos)} videos with {len(members)} members, the manifest says "
            f"{manifest.num_videos} with {manifest.num_members}; {_REBUILD}"
        )
    # Columns lie together in memory afterwards, and nothing that another process does to the file changes them.
    videos = np.array(videos)
    labels = np.array(tables[LABELS_ROLE]) if manifest.multi_label else videos["label"]
    _check_videos(where, manifest, videos, len(members), len(names))
    _check_labels(where, manifest, videos, labels)
    try:
        several = labels if manifest.multi_label else None
        identity = fingerprint(videos, names, manifest.classes, manifest.content, several)
    except UnicodeEncodeError as error:
        raise ShardError(f"{where}: a class name is not valid text ({error}); {_REBUILD}") from None
    if identity != manifest.fingerprint:
        raise ShardError(
            f"{where}: the index has the fingerprint {identity[:16]}..., the manifest says "
            f"{manifest.fingerprint[:16]}...; they belong to different data sets: {_REBUILD}"
        )
    spans = videos["first_member"], videos["num_members"]
    member_table = _large_table(members, files["members"], retries, *spans, videos["crc32"], video_crc32)
    index = Index(where, manifest, videos, member_table, names, labels)
    if not manifest.has_packets:
        return index
    streams, packets = np.asarray(tables[STREAMS_ROLE]), tables[PACKETS_ROLE]
    counts = streams["num_packets"].astype(np.int64)
    if len(streams) != len(videos) or counts.sum() != len(packets):
        raise ShardError(
            f"{where}: the index tells how {len(streams)} of {len(videos)} videos are read, by {counts.sum()} of its "
            f"{len(packets)} packets; {_REBUILD}"
        )
    spans = np.cumsum(counts) - counts, counts
    table = _large_table(packets, files[PACKETS_ROLE], retries, *spans, streams["packets_crc32"], rows_crc32)
    return replace(index, streams=streams, packet_table=table)


def _large_table(rows: np.memmap, path: Path, retries: int, *columns: Any) -> LargeTable:
    """columns: `first`, `count`, `crc32` and `checksum`. Raises ShardError."""
    try:
        return LargeTable(np.asarray(rows), MountedFile(path, retries), rows.offset, *columns)
    except OSError as error:
        raise _unreadable(path, error) from error


def _open_table(role: str, path: Path, entry: dict[str, Any], dtype: np.dtype) -> np.memmap:
    try:
        size = path.stat().st_size
    except OSError as error:
        raise ShardError(f"{path}: {error.strerror}; the index is not complete: {_REBUILD}") from error
    if size != entry["bytes"]:
        raise ShardError(f"{path}: has {size} bytes, the manifest says {entry['bytes']}; {_REBUILD}")
    try:
        with one_header_at_a_time:
            table = np.lib.format.open_memmap(path, mode="r")
    except Exception as error:
        # A damaged header makes numpy's parser raise almost anything.
        raise ShardError(f"{path}: not an index table ({type(error).__name__}: {error}); {_REBUILD}") from error
    if table.dtype != dtype or table.ndim != 1:
        raise ShardError(f"{path}: holds {table.dtype} {table.shape}, not the table of {role}; {_REBUILD}")
    # The checksums of the mapped tables would cost O(frames); each row is checked against the bytes that it leads to.
    if role not in ("members", PACKETS_ROLE):
        check_crc32(path, entry["crc32"])
    return table


def check_crc32(path: Path, expected: int) -> None:
    """Raises ShardError if the file's CRC-32 is another."""
    actual = crc32_of(path)
    if actual != expected:
        raise ShardError(f"{path}: has the CRC-32 {actual:#010x}, the manifest says {expected:#010x}; {_REBUILD}")


def crc32_of(path: Path) -> int:
    """CRC-32 of a file. Raises ShardError if it cannot be read."""
    actual = 0
    try:
        with path.open("rb") as file:
            while chunk := file.read(1 << 20):
                actual = isal_zlib.crc32(chunk, actual)
    except OSError as error:
        raise _unreadable(path, error) from error
    return actual


def _unreadable(path: Path, error: OSError) -> ShardError:
    return ShardError(f"{path}: cannot be read: {error.strerror}; check the disk or mount")


def _check_videos(where: str, manifest: Manifest, videos: np.ndarray, num_members: int, names_bytes: int) -> None:
    """Raises ShardError, naming the first bad row, if one leads outside the tables, shards or classes."""
    members = videos["num_members"]
    expected = videos["num_frames"] if manifest.content == "frames" else np.ones_like(members)
    # Differences of unsigned numbers, not sums: a sum could wrap around.
    checks = {
        "no frames": videos["num_frames"] == 0,
        "num_members does not fit num_frames": members != expected,
        f"members end behind the table's {num_members}": (videos["first_member"] > num_members)
        | (members > num_members - np.minimum(videos["first_member"], num_members)),
        f"the name ends behind the {names_bytes} bytes of names": (videos["name_start"] > names_bytes)
        | (videos["name_size"] > names_bytes - np.minimum(videos["name_start"], names_bytes)),
        f"there are {len(manifest.shards)} shards": videos["shard"] >= len(manifest.shards),
    }
    if not manifest.multi_label:
        outside = (videos["label"] < 0) | (videos["label"] >= len(manifest.classes))
        checks[f"there are {len(manifest.classes)} classes"] = outside
    for complaint, bad in checks.items():
        if bad.any():
            row = int(np.flatnonzero(bad)[0])
            values = dict(zip(videos.dtype.names or (), videos[row].tolist(), strict=True))
            raise ShardError(f"{where}: row {row} of the video table is wrong ({complaint}): {values}; {_REBUILD}")


def _check_labels(where: str, manifest: Manifest, videos: np.ndarray, labels: np.ndarray) -> None:
    """Raises ShardError where the table of labels does not fit to the videos and classes."""
    if not manifest.multi_label:
        return
    counts = videos["num_labels"].astype(np.int64)
    if counts.sum() != len(labels):
        raise ShardError(f"{where}: {len(labels)} labels in the index for {counts.sum()} of its videos; {_REBUILD}")
    if len(labels) and not 0 <= labels.min() <= labels.max() < len(manifest.classes):
        raise ShardError(
            f"{where}: the index has the labels {labels.min()} to {labels.max()} for {len(manifest.classes)} classes; "
            f"{_REBUILD}"
        )
    same_video = np.diff(np.repeat(np.arange(len(videos)), counts)) == 0
    if (np.diff(labels)[same_video] <= 0).any():
        raise ShardError(f"{where}: the labels of a video in the index are not in ascending order; {_REBUILD}")
