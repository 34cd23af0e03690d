"""Stored videos whose packets the index lists: finds the packets when a data set is built, and decodes by them.

What `shards.video` and `shards.frames` decide stays true here. A video is listed only if decoding it whole has shown
that its packets tell the truth, and if frames that are decoded from a part of the file are the same.
"""

from __future__ import annotations

from collections.abc import Sequence

import av
import numpy as np
from isal import isal_zlib

from shards.format import HIDDEN_PACKET, KEY_PACKET, PACKET_DTYPE, STREAM_DTYPE, rows_crc32
from shards.frames import PacketTable, decode_by_table, decode_frames
from shards.packets import NO_PACKETS, Packets, SparseVideo, VideoParts
from shards.video import RgbConverter, VideoError, VideoInfo, opened_video, packets_of, probe_video

# Their packets lie in the file as a decoder takes them, and only a table tells where. In other containers a header
# comes before each packet, so that a demuxer has to read them all.
_FORMAT = "mov"
_CODECS = {"h264", "hevc", "vvc", "vp9", "av1", "libdav1d", "prores", "mjpeg"}
_OTHER_STREAMS_PACKETS = 2  # of sound and the like, which a demuxer may look at when it opens the file
# Beside its packets a file has little; one of which more would be read each time is read whole.
_MOST_OTHER_BYTES = 0.25


def probe_stored(data: bytes) -> tuple[VideoInfo, Packets]:
    """What `shards.video.probe_video` finds, and the packets; NO_PACKETS for a video that has to be read whole.

    Raises VideoError.
    """
    listed = _listed(data)
    samples: dict[int, np.ndarray] = {}
    stamps: list[int | None] = []
    last = -1 if listed is None else len(listed[0].pts) - 1
    convert = RgbConverter()

    def look(number: int, frame: av.VideoFrame) -> None:
        stamps.append(None if frame.is_corrupt or frame.interlaced_frame else frame.pts)
        if number in (0, last // 3, last):
            samples[number] = convert(frame)

    info = probe_video(data, look)
    if listed is None or listed[0].pts != stamps:
        return info, NO_PACKETS
    packets = listed[1]
    try:
        for number, image in samples.items():
            parts = VideoParts(packets, len(data), np.array([number]))
            sparse = parts.file([data[start:stop] for start, stop in parts.ranges])
            if not np.array_equal(decode_stored(sparse, [number], num_frames=info.num_frames)[0], image):
                return info, NO_PACKETS
    except VideoError:
        return info, NO_PACKETS
    return info, packets


def _listed(data: bytes) -> tuple[PacketTable, Packets] | None:
    """The packets of a file that could be read in parts."""
    with opened_video(data) as (container, stream):
        if _FORMAT not in container.format.name.split(",") or stream.codec_context.name not in _CODECS:
            return None
        table = PacketTable.read(container, stream)
        if table is None or table.timing is None:
            return None
    with opened_video(data) as (container, stream):
        rows: list[tuple[int, int, int, int, int]] = []
        pieces: list[tuple[int, int, bool]] = []  # first byte, one past the last, whether opening may read it
        seen: dict[int, int] = {}
        for packet in packets_of(container):
            if not packet.size:
                continue
            start = packet.pos
            stop = -1 if start is None else start + packet.size
            if start is None or start < 0 or data[start:stop] != bytes(packet):
                return None
            number = seen[packet.stream_index] = seen.get(packet.stream_index, 0) + 1
            is_played = packet.stream_index == stream.index
            pieces.append((start, stop, number <= (1 if is_played else _OTHER_STREAMS_PACKETS)))
            if is_played:
                if packet.pts is None:
                    return None
                flags = KEY_PACKET * packet.is_keyframe + HIDDEN_PACKET * packet.is_discard
                rows.append((start, packet.size, isal_zlib.crc32(bytes(packet)), flags, packet.pts))
    ends = _ends(pieces, len(data))
    if ends is None:
        return None
    head, tail = ends
    table_rows = np.array(rows, PACKET_DTYPE)
    checksums = isal_zlib.crc32(data[:head]), isal_zlib.crc32(data[tail:])
    described = np.array([(len(rows), rows_crc32(table_rows), head, tail, *checksums)], STREAM_DTYPE)[0]
    return table, Packets(described, table_rows)


def _ends(pieces: Sequence[tuple[int, int, bool]], size: int) -> tuple[int, int] | None:
    """(head, tail): opening the file reads bytes before `head` and from `tail` on alone. None if these are many."""
    head = covered = 0
    for start, stop, is_read in sorted(pieces):
        if start > covered:  # something that is no packet lies between
            head = max(head, start)
        if is_read:
            head = max(head, stop)
        covered = max(covered, stop)
    return (head, covered) if head + size - covered <= _MOST_OTHER_BYTES * size else None


def decode_stored(data: bytes, numbers: Sequence[int] | np.ndarray, *, num_frames: int) -> list[np.ndarray]:
    """The frames `numbers` (k,) of a stored video, each (H, W, 3) uint8 RGB: of a whole file, or of a SparseVideo that
    holds what they need. num_frames: by the index. Raises VideoError, IndexError."""
    if not isinstance(data, SparseVideo):
        return decode_frames(data, numbers, num_frames=num_frames)
    rows = data.rows
    shown = rows[~(rows["flags"] & HIDDEN_PACKET).astype(bool)]
    key_pts = np.sort(shown["pts"][(shown["flags"] & KEY_PACKET).astype(bool)])
    table = PacketTable(np.sort(shown["pts"]).tolist(), key_pts.tolist(), len(shown) < len(rows), verified=True)
    return decode_by_table(data, numbers, table)
