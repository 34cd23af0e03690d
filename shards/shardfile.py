"""One shard while it is being written: a tar file and its index rows."""

from __future__ import annotations

import errno
import json
import os
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from shards.annotations import Annotation
from shards.format import (
    BLOCK_BYTES,
    LABEL_DTYPE,
    LABELS_ROLE,
    MEMBER_DTYPE,
    PACKETS_ROLE,
    STREAM_DTYPE,
    STREAMS_ROLE,
    frame_suffix,
    table_dtypes,
    tar_header,
    video_crc32,
)
from shards.packets import Packets
from shards.sources import Chunk

_PADDINGS = [bytes(size) for size in range(BLOCK_BYTES)]
_FLUSH_BYTES = 2 << 20
_MAX_VECTORS = 768  # IOV_MAX is 1024 on Linux
_SYNC_BYTES = 64 << 20
_MAX_SIDE = 65_535


class ShardFile:
    """A tar that is being written, and its index rows. position: bytes written so far.

    multi_label: whether the data set's videos may have several labels, or none.
    """

    def __init__(
        self, number: int, path: Path, content: str, first_member: int, first_name: int, *, multi_label: bool = False
    ) -> None:
        self.number = number
        self.path = path
        self.position = 0
        self._content = content
        self._multi_label = multi_label
        self.videos: list[tuple[int, ...]] = []
        self._members: list[np.ndarray] = []
        self._names: list[bytes] = []
        self._labels: list[int] = []
        self._packets: list[Packets] = []
        self._next_member = first_member
        self._next_name = first_name
        self._vectors: list[bytes] = []
        self._waiting_bytes = 0
        self._synced = 0
        self._sync: threading.Thread | None = None
        self._sync_error: OSError | None = None
        self._file: int | None = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)

    def add_video(self, key: str, chunks: Iterator[Chunk], annotation: Annotation, classes: Sequence[str]) -> int:
        """Writes a video and its rows; returns the number of members. Raises InputError: then `truncate`.

        classes: the names of all classes by label.
        """
        facts = label_facts(annotation.labels, classes, self._multi_label)
        rows: list[np.ndarray] = []
        members, json_block, json_size = 0, 0, 0
        for chunk in chunks:
            if not rows:
                # The JSON comes first in the tar and is known last: keep its place with the longest it can be.
                json_size = len(_json_member(annotation.name, facts, chunk, _MAX_SIDE, _MAX_SIDE))
                json_block = self.position // BLOCK_BYTES + 1
                self._write(tar_header(f"{key}.json", json_size), bytes(json_size))
            rows.append(self._add_members(key, members, chunk))
            members += len(chunk.members)
            last = chunk
        table = np.concatenate(rows)
        width, height = _common_size(table)
        text = _json_member(annotation.name, facts, last, width, height).ljust(json_size)
        self._flush()
        self._pwrite(text, json_block * BLOCK_BYTES)
        name = annotation.name.encode()
        self.videos.append(
            (
                self._next_member,
                self._next_name,
                len(name),
                members,
                last.num_frames,
                self.number,
                json_block,
                json_size,
                video_crc32(table),
                len(annotation.labels) if self._multi_label else annotation.labels[0],
            )
        )
        self._labels += annotation.labels
        self._packets.append(last.packets)
        self._members.append(table)
        self._names.append(name)
        self._next_member += members
        self._next_name += len(name)
        return members

    def truncate(self, position: int) -> None:
        """Takes back what was written since `position`."""
        self._flush()
        assert self._file is not None
        os.ftruncate(self._file, position)
        os.lseek(self._file, position, os.SEEK_SET)
        self.position = position

    def close(self) -> dict[str, np.ndarray]:
        """Ends the tar, with everything on disk, and returns its index rows by role."""
        self._write(bytes(2 * BLOCK_BYTES))
        self._flush()
        assert self._file is not None
        self._join_sync()
        if self._sync_error is not None:
            raise self._sync_error
        os.fsync(self._file)
        os.close(self._file)
        self._file = None
        tables = {
            "videos": np.array(self.videos, table_dtypes(self._multi_label)["videos"]),
            "members": np.concatenate(self._members),
            "names": np.frombuffer(b"".join(self._names), np.uint8),
        }
        if self._multi_label:
            tables[LABELS_ROLE] = np.array(self._labels, LABEL_DTYPE)
        if self._content == "video":
            tables[STREAMS_ROLE] = np.array([packets.stream for packets in self._packets], STREAM_DTYPE)
            tables[PACKETS_ROLE] = np.concatenate([packets.rows for packets in self._packets])
        return tables

    def discard(self) -> None:
        """Removes an unfinished tar."""
        if self._file is not None:
            self._join_sync()
            os.close(self._file)
            self._file = None
        self.path.unlink(missing_ok=True)

    def _add_members(self, key: str, first: int, chunk: Chunk) -> np.ndarray:
        table = np.empty(len(chunk.members), MEMBER_DTYPE)
        blocks = []
        for number, (data, extension, _, _, _) in enumerate(chunk.members, start=first):
            suffix = frame_suffix(number, extension) if self._content == "frames" else extension
            blocks.append(self.position // BLOCK_BYTES + 1)
            self._write(tar_header(f"{key}.{suffix}", len(data)), data)
        table["block"] = blocks
        for column, field in (("crc32", 2), ("width", 3), ("height", 4)):
            table[column] = [member[field] for member in chunk.members]
        table["size"] = [len(member.data) for member in chunk.members]
        return table

    def _write(self, *pieces: bytes) -> None:
        """Appends a header and its data, filled up to a block."""
        self._vectors += pieces
        size = sum(map(len, pieces))
        fill = -size % BLOCK_BYTES
        if fill:
            self._vectors.append(_PADDINGS[fill])
        self.position += size + fill
        self._waiting_bytes += size + fill
        if self._waiting_bytes >= _FLUSH_BYTES or len(self._vectors) >= _MAX_VECTORS:
            self._flush()

    def _flush(self) -> None:
        if not self._vectors:
            return
        assert self._file is not None
        written = os.writev(self._file, self._vectors)
        if written < self._waiting_bytes:
            # A nearly full disk takes a part; the next write says why.
            rest = memoryview(b"".join(self._vectors))[written:]
            while rest:
                rest = rest[os.write(self._file, rest) :]
        self._vectors = []
        self._waiting_bytes = 0
        if self.position - self._synced >= _SYNC_BYTES and (self._sync is None or not self._sync.is_alive()):
            # The disk works while the next videos are read, and little is left for the final sync.
            self._synced = self.position
            self._sync = threading.Thread(target=self._sync_data, args=(self._file,), daemon=True)
            self._sync.start()

    def _sync_data(self, file: int) -> None:
        # The system reports a failed write to one sync only: remember it for `close`.
        try:
            os.fdatasync(file)
        except OSError as error:
            self._sync_error = error

    def _pwrite(self, text: bytes, offset: int) -> None:
        assert self._file is not None
        if os.pwrite(self._file, text, offset) != len(text):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self.path))

    def _join_sync(self) -> None:
        if self._sync is not None:
            self._sync.join()


def label_facts(labels: Sequence[int], classes: Sequence[str], multi_label: bool) -> dict[str, Any]:
    """What a video's JSON says of its labels."""
    if multi_label:
        return {"labels": list(labels), "classes": [classes[label] for label in labels]}
    return {"label": labels[0], "class": classes[labels[0]]}


def _json_member(name: str, facts: dict[str, Any], chunk: Chunk, width: int | None, height: int | None) -> bytes:
    content = {
        "name": name,
        **facts,
        "num_frames": chunk.num_frames,
        "width": width,
        "height": height,
        **chunk.details,
    }
    return json.dumps(content, ensure_ascii=False, sort_keys=True).encode()


def _common_size(members: np.ndarray) -> tuple[int | None, int | None]:
    """Width and height that all members have; None for those that differ."""
    width, height = members["width"], members["height"]
    return (
        int(width[0]) if (width == width[0]).all() else None,
        int(height[0]) if (height == height[0]).all() else None,
    )
