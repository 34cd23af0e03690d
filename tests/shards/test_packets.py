"""Which bytes of a stored video its frames need, for made-up packets: no video is encoded here."""

import zlib

import numpy as np
import pytest

import shards.packets
from shards.format import HIDDEN_PACKET, KEY_PACKET, PACKET_DTYPE, STREAM_DTYPE
from shards.packets import Packets, SparseVideo, VideoParts
from shards.stored import _ends

# In the order of the file: key frames at 0 and 4, one that is not shown, and frames shown in another order.
PTS = [0, 20, 10, 30, -1, 40, 60, 50]
FLAGS = [KEY_PACKET, 0, 0, 0, HIDDEN_PACKET, KEY_PACKET, 0, 0]
SIZES = [30, 5, 6, 7, 4, 40, 8, 9]
HEAD, SIZE = 100, 4000


def example(gap: int = 300) -> tuple[bytes, Packets]:
    """A file of packets `gap` bytes apart, and their table."""
    data = np.random.default_rng(0).integers(1, 256, SIZE, dtype=np.uint8).tobytes()
    offsets = HEAD + np.arange(len(SIZES)) * gap
    tail = int(offsets[-1]) + SIZES[-1]
    crcs = [zlib.crc32(data[start : start + size]) for start, size in zip(offsets.tolist(), SIZES, strict=True)]
    rows = np.array(list(zip(offsets, SIZES, crcs, FLAGS, PTS, strict=True)), PACKET_DTYPE)
    ends = zlib.crc32(data[:HEAD]), zlib.crc32(data[tail:])
    return data, Packets(np.array([(len(rows), 0, HEAD, tail, *ends)], STREAM_DTYPE)[0], rows)


@pytest.mark.parametrize(
    ("frames", "packets"),
    [([0], [0]), ([2], [0, 1]), ([1], [0, 1, 2]), ([3, 3], [0, 1, 2, 3]), ([4], [5]), ([6, 0], [0, 5, 6])],
)
def test_what_a_frame_needs(frames, packets):
    """All packets from the last key frame before it, in the order of the file."""
    data, table = example()
    parts = VideoParts(table, SIZE, np.array(frames))
    assert np.flatnonzero(parts.needed).tolist() == packets
    tail = int(table.stream["tail"])
    places = [(int(start), int(start) + size) for start, size in zip(table.rows["offset"], SIZES, strict=True)]
    expected = [(0, HEAD), *(places[packet] for packet in packets), (tail, SIZE)]
    if packets[0] == 0:
        expected[:2] = [(0, places[0][1])]  # the first packet lies behind the head
    assert parts.ranges == expected and parts.max_gap == SIZE // 64
    chunks = [data[start:stop] for start, stop in parts.ranges]
    file = parts.file(chunks)
    assert isinstance(file, SparseVideo) and file.rows is table.rows and len(file) == SIZE
    there = np.frombuffer(file, np.uint8) != 0
    assert there.sum() == sum(map(len, chunks)) and all(file[a:b] == data[a:b] for a, b in parts.ranges)
    assert parts.damage(chunks) is None
    for number, (start, _) in enumerate(parts.ranges):
        for place in (0, len(chunks[number]) - 1):
            damaged = list(chunks)
            damaged[number] = bytes(byte ^ (at == place) for at, byte in enumerate(chunks[number]))
            complaint = parts.damage(damaged)
            assert complaint and "CRC-32" in complaint, (start, place)


def test_a_file_of_which_most_is_needed_is_read_whole(monkeypatch):
    data, table = example(45)
    parts = VideoParts(table, SIZE, np.array([6]))  # the tail alone is nearly all
    assert parts.ranges == [(0, SIZE)] and parts.damage([data]) is None
    file = parts.file([data])
    assert file == data and isinstance(file, SparseVideo) and file.rows is table.rows
    assert str(parts.damage([bytes([data[0] ^ 1]) + data[1:]])).startswith("bytes 0 to 100 of the video")
    share = sum(stop - start for start, stop in VideoParts(example()[1], SIZE, np.array([0])).ranges) / SIZE
    for limit, is_whole in ((share, False), (share - 1e-9, True)):
        monkeypatch.setattr(shards.packets, "_WHOLE_SHARE", limit)
        assert (VideoParts(example()[1], SIZE, np.array([0])).ranges == [(0, SIZE)]) is is_whole


def changed(column: str, row: int, value: int) -> Packets:
    stream, rows = example()[1]
    rows[column][row] = value
    return Packets(stream, rows)


def test_packets_that_can_be_those_of_a_file():
    table = example()[1]
    tail = int(table.stream["tail"])
    assert table.can_be_of(SIZE, 7) is True and table.can_be_of(tail, 7) is True
    for size, num_frames in ((tail - 1, 7), (SIZE, 6), (SIZE, 8)):
        assert table.can_be_of(size, num_frames) is False
    for packets in (
        changed("pts", 1, 10),  # two frames at one time
        changed("flags", 0, 0),  # the first frame is no key frame
        changed("offset", 3, SIZE - 6),  # one byte more than there is
    ):
        assert packets.can_be_of(SIZE, 7) is False
    assert changed("offset", 3, SIZE - 7).can_be_of(SIZE, 7) is True
    stream = table.stream.copy()
    stream["head"] = tail + 1
    assert Packets(stream, table.rows).can_be_of(SIZE, 7) is False
    stream["head"] = tail
    assert Packets(stream, table.rows).can_be_of(SIZE, 7) is True
    assert Packets(table.stream, table.rows[4:5]).can_be_of(SIZE, 0) is False  # nothing is shown
    assert Packets(table.stream, table.rows[:1]).can_be_of(SIZE, 1) is True


@pytest.mark.parametrize(
    ("pieces", "size", "expected"),
    [
        ([(10, 50, True), (50, 90, False)], 100, None),  # 50 + 10 bytes of 100 are much
        ([(10, 20, True), (20, 95, False)], 100, (20, 95)),
        ([(20, 95, False), (10, 20, True)], 100, (20, 95)),  # in any order
        ([(10, 20, True), (20, 95, True)], 100, None),
        ([(5, 10, True), (15, 100, False)], 100, (15, 100)),  # what lies between packets is read
        ([(5, 10, True), (8, 60, False), (10, 30, False), (60, 99, False)], 100, (10, 99)),
        ([(15, 20, True), (20, 95, False)], 100, (20, 95)),
        ([(20, 95, False)], 100, (20, 95)),  # a quarter is not too much
        ([(20, 94, False)], 100, None),
        ([(0, 95, False)], 100, (0, 95)),
    ],
)
def test_what_opening_a_file_reads(pieces, size, expected):
    assert _ends(pieces, size) == expected
