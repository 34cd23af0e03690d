"""How much memory the header of an MP4 or MOV makes FFmpeg take: a row for each sample that it promises.

FFmpeg believes a header before it reads a sample, so 22 kB can take 12 GB. Other containers have no such tables: a row
of theirs is there for bytes of the file. Uses the standard library only, like `shards.video` no more than PyAV.
"""

from __future__ import annotations

import io
import zlib
from dataclasses import dataclass, field
from typing import BinaryIO

_MOST_SAMPLES, _MOST_BOXES, _DEEPEST = 1 << 24, 1 << 22, 32  # all tracks together
_UNCOMPRESSED = 64 << 20  # bytes of a header that is stored compressed
_CONTAINING = frozenset((
    b"moov", b"hoov", b"trak", b"mdia", b"minf", b"stbl", b"edts", b"mvex", b"moof", b"traf", b"udta", b"dinf", b"meta",
    b"tref", b"sinf", b"schi", b"wave",
))  # fmt: skip
_SPARE = (b"free", b"skip")


class HeaderError(ValueError):
    """A header that promises more than there can be."""


def refuse_promises(file: BinaryIO) -> None:
    """Raises HeaderError where the header of an MP4 promises more samples than a file of its size can have, OSError."""
    size = file.seek(0, io.SEEK_END)
    header = _Header(file, size)
    samples = header.rows * header.edits
    if header.rows > size or samples > _MOST_SAMPLES:
        raise HeaderError(f"its header promises {samples} samples, too many for a file of {size} bytes")


@dataclass
class _Track:
    """What the header of an MP4 says of a track. samples: promised. rows: that FFmpeg makes of them at most."""

    samples: int = 0
    kinds: set[bytes] = field(default_factory=set)
    steps: set[tuple[int, int]] = field(default_factory=set)

    @property
    def rows(self) -> int:
        in_runs = b"soun" in self.kinds and b"vide" not in self.kinds and self.steps == {(1, 1)}
        return self.samples // 160 if in_runs else self.samples  # PCM and the like: a row has at least so many


class _Header:
    """Walks through the header of an MP4, as far as it tells how much memory FFmpeg will need. Others have none.

    rows: of samples. edits: the most of a track, each of which may show all of its samples again. Raises HeaderError.
    """

    def __init__(self, file: BinaryIO, size: int) -> None:
        self._file, self._boxes = file, 0
        self.rows, self.edits = 0, 1
        rest = _Track()
        self._walk(0, size, rest, 0)
        self.rows += rest.rows

    def _walk(self, start: int, stop: int, track: _Track, depth: int) -> None:
        while start + 8 <= stop:
            self._boxes += 1
            if self._boxes > _MOST_BOXES or depth > _DEEPEST:
                raise HeaderError(f"its header has more than {_MOST_BOXES} parts, or {_DEEPEST} within one another")
            self._file.seek(start)
            head = self._file.read(40)
            length, kind, body = int.from_bytes(head[:4], "big"), head[4:8], 8
            if length == 1:
                length, body = int.from_bytes(head[8:16], "big"), 16
            end = min(stop, start + length) if length else stop
            if end < start + body:
                break
            if kind in _CONTAINING or (kind in _SPARE and head[12:16] in (b"mvhd", b"cmov")):
                inner = _Track() if kind == b"trak" else track
                self._walk(start + body, end, inner, depth + 1)
                self.rows += inner.rows if inner is not track else 0
            else:
                self._note(kind, head[body:], track)
                if kind == b"cmov":
                    self._walk_compressed(start + body, end)
            start = end

    def _note(self, kind: bytes, content: bytes, track: _Track) -> None:
        first, second, third = (int.from_bytes(content[at : at + 4], "big") for at in (4, 8, 12))
        if kind in (b"stsz", b"stz2"):
            track.samples += second
        elif kind == b"trun":
            track.samples += first
        elif kind == b"elst":
            self.edits = max(self.edits, first)
        elif kind == b"hdlr":
            track.kinds.add(content[8:12])
        elif kind == b"stts":
            track.steps.add((first, third))

    def _walk_compressed(self, start: int, stop: int) -> None:
        self._file.seek(start)
        data = self._file.read(min(stop - start, _UNCOMPRESSED))
        begin = data.find(b"cmvd")
        try:
            unpacked = zlib.decompressobj().decompress(data[begin + 8 :], _UNCOMPRESSED) if begin >= 0 else b""
        except zlib.error:
            return  # FFmpeg says so
        if len(unpacked) >= _UNCOMPRESSED:
            raise HeaderError(f"its header has more than {_UNCOMPRESSED} bytes")
        inner = _Header(io.BytesIO(unpacked), len(unpacked))
        self.rows, self.edits = self.rows + inner.rows, max(self.edits, inner.edits)
