"""Stored videos in parts: which bytes of a file some of its frames need, by the packets that the index lists.

A decoder begins at the last key frame before a wanted frame and takes all packets up to it. Beside them a file needs
what its demuxer reads when it is opened. `shards.stored` finds these facts and decodes by them.

P packets of a video, N frames, k wanted ones.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np
from isal import isal_zlib

from shards.format import HIDDEN_PACKET, KEY_PACKET, PACKET_DTYPE, STREAM_DTYPE
from shards.local import MAX_GAP_BYTES, Range, join_ranges

# Of a small file nearly everything would lie within the usual gap.
_GAPS_IN_A_FILE = 64
# Where this share of a file is needed it is read whole.
_WHOLE_SHARE = 0.75


class Packets(NamedTuple):
    """A video's row of STREAM_DTYPE and its (P,) rows of PACKET_DTYPE."""

    stream: np.void
    rows: np.ndarray

    def can_be_of(self, size: int, num_frames: int) -> bool:
        """Whether they can be those of a file of `size` bytes that shows `num_frames` frames."""
        stream, rows = self
        shown = rows[~(rows["flags"] & HIDDEN_PACKET).astype(bool)]
        ends = rows["offset"].astype(np.int64) + rows["size"]
        begins_with_key = len(shown) > 0 and shown["flags"][np.argmin(shown["pts"])] & KEY_PACKET
        ends_fit = stream["head"] <= stream["tail"] <= size and ends.max(initial=0) <= size
        return bool(begins_with_key and ends_fit and len(shown) == num_frames == len(np.unique(shown["pts"])))


NO_PACKETS = Packets(np.zeros(1, STREAM_DTYPE)[0], np.zeros(0, PACKET_DTYPE))


class SparseVideo(bytes):
    """A video file of which only some packets were read: the others are zeros. rows: (P,) PACKET_DTYPE."""

    rows: np.ndarray

    @classmethod
    def of(cls, data: bytes | bytearray, rows: np.ndarray) -> SparseVideo:
        """The file `data` with the rows of its packets."""
        video = cls(data)
        video.rows = rows
        return video


@dataclass(frozen=True)
class VideoParts:
    """The bytes of a stored video of `size` bytes that its frames `frames` (k,) need."""

    packets: Packets
    size: int
    frames: np.ndarray

    @cached_property
    def needed(self) -> np.ndarray:
        """Which packets are needed, (P,) bool."""
        rows = self.packets.rows
        shown = np.flatnonzero(~(rows["flags"] & HIDDEN_PACKET).astype(bool))
        by_number = shown[np.argsort(rows["pts"][shown])]  # the packet of each frame, (N,)
        keys = by_number[(rows["flags"][by_number] & KEY_PACKET).astype(bool)]
        needed = np.zeros(len(rows), bool)
        for packet in by_number[self.frames]:
            key = keys[np.searchsorted(rows["pts"][keys], rows["pts"][packet], side="right") - 1]
            needed[key : packet + 1] = True
        return needed

    @cached_property
    def ranges(self) -> list[Range]:
        """What to read, in order."""
        pieces = [(start, stop) for start, stop, _ in self._pieces]
        ranges = join_ranges([piece for piece in pieces if piece[0] < piece[1]], self.max_gap)
        return [(0, self.size)] if sum(b - a for a, b in ranges) > _WHOLE_SHARE * self.size else ranges

    @property
    def max_gap(self) -> int:
        """See `Extent`."""
        return min(MAX_GAP_BYTES, self.size // _GAPS_IN_A_FILE)

    @property
    def _pieces(self) -> Iterator[tuple[int, int, int]]:
        """(first byte, one past the last, CRC-32) of all that is needed."""
        stream, rows = self.packets.stream, self.packets.rows[self.needed]
        yield 0, int(stream["head"]), int(stream["head_crc32"])
        starts = rows["offset"].astype(np.int64)
        yield from zip(starts.tolist(), (starts + rows["size"]).tolist(), rows["crc32"].tolist(), strict=True)
        yield int(stream["tail"]), self.size, int(stream["tail_crc32"])

    def damage(self, chunks: Sequence[bytes]) -> str | None:
        """Which bytes are not those that the index describes; chunks: of `ranges`."""
        numbers = (
            np.searchsorted([start for start, _ in self.ranges], [a for a, _, _ in self._pieces], side="right") - 1
        )
        for number, (start, stop, crc32) in zip(numbers.tolist(), self._pieces, strict=True):
            offset = self.ranges[number][0]
            if isal_zlib.crc32(memoryview(chunks[number])[start - offset : stop - offset]) != crc32:
                return f"bytes {start} to {stop} of the video have another CRC-32 than the index says"
        return None

    def file(self, chunks: Sequence[bytes]) -> SparseVideo:
        """The file with the chunks of `ranges` in their places."""
        if self.ranges == [(0, self.size)]:
            return SparseVideo.of(chunks[0], self.packets.rows)
        data = bytearray(self.size)
        for (start, stop), chunk in zip(self.ranges, chunks, strict=True):
            data[start:stop] = chunk
        return SparseVideo.of(data, self.packets.rows)
