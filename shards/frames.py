"""A video's frames by their numbers, with no more decoding than these frames need.

Packets tell the times and the order of most videos' frames without decoding. Decoding begins at the last key frame
before a wanted frame, and leaves out packets that no other frame refers to. Each decoded frame must be the one that the
packets announce; where one is not, or packets tell too little, the file is decoded from its beginning, so the frames
and their numbers are always those of `shards.video.iter_frames`. Uses PyAV and numpy only, like `shards.video`.

N frames of a video, K of them.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

import av
import av.error
import numpy as np
from av.container import InputContainer

from shards.video import (
    MOST_FRAMES,
    RgbConverter,
    Source,
    Timing,
    VideoError,
    decoded_frames,
    is_timed,
    opened_video,
    packets_of,
    probe_video,
    refuse_more_frames,
    timing_of,
)

# Of these a decoder that begins at a key frame shows what one does that begins with the file. Others lack a palette
# then, or their containers take every frame for a key frame.
_SEEKABLE_CODECS = {
    "h264", "hevc", "vvc", "vp8", "vp9", "av1", "libdav1d", "mpeg4", "mpeg2video", "mpeg1video", "msmpeg4", "wmv2",
    "mjpeg", "prores", "dnxhd", "ffv1", "huffyuv", "ffvhuff", "utvideo",
}  # fmt: skip
# Of these a decoder leaves out exactly the frames to which no other refers, if it is told to.
_SKIPPING_CODECS = {"h264", "mpeg4", "mpeg2video", "mpeg1video"}
_CHECKED_FRAMES = 24  # decoded without leaving any out: do they come as the packets say?
_FAR = 300  # packets, of which more cost more to read and drop than a seek
_EARLY_SECONDS = 2  # MPEG-TS is sought by decoding times, which may end behind the key frame
_PART_FRAMES = 1000  # to decode in one part: opening a file again for each must not count
_LARGEST_EMPTY_MPEG4 = 19  # bytes of a packet that may repeat a frame without giving one

Use = Callable[[np.ndarray], np.ndarray]


class PacketsError(Exception):
    """The decoder's frames are not those that the packets announce."""


@dataclass(frozen=True)
class PacketTable:
    """Presentation times of all frames in order, and of the key frames, in the stream's time base.

    discards: whether there are packets that are decoded and not shown, as edit lists want it. timing: None where
    packets do not tell the frames' times. verified: whether decoding the whole file has shown that it is right.
    """

    pts: list[int]
    key_pts: list[int]
    discards: bool
    timing: Timing | None = None
    verified: bool = False

    @classmethod
    def read(cls, container: InputContainer, stream: av.VideoStream) -> PacketTable | None:
        """None where packets do not tell the frames' order: without times, with equal ones, or a clock that jumps; and
        where decoding has to begin with the file."""
        codec = stream.codec_context.name
        if codec not in _SEEKABLE_CODECS:
            return None
        pts: list[int] = []
        key_pts: list[int] = []
        discards = certain = False
        last_pts = last_duration = 0
        for packet in packets_of(container, stream):
            discards |= packet.is_discard
            if packet.size == 0 or packet.is_discard:
                continue
            if packet.pts is None:
                return None
            refuse_more_frames(len(pts))
            certain = (certain or not pts) and not packet.is_corrupt and _gives_a_frame(packet, codec)
            pts.append(packet.pts)
            if packet.is_keyframe:
                key_pts.append(packet.pts)
            if packet.pts >= last_pts:
                last_pts, last_duration = packet.pts, packet.duration or 0
        pts.sort()
        in_order = all(a < b for a, b in pairwise(key_pts)) and all(a < b for a, b in pairwise(pts))
        if not pts or not key_pts or key_pts[0] != pts[0] or not in_order:
            return None
        timing = None
        if certain and is_timed(container) and container.format.name != "avi":  # AVI knows no order but the decoder's
            base, rate = stream.time_base or 1, stream.average_rate
            stamps = [float(one * base) for one in pts]
            stated = float(rate) if rate else None
            timing = timing_of(stamps, float(last_duration * base), stated, container.format.name)
        return cls(pts, key_pts, discards, timing)

    def key_before(self, number: int) -> int:
        """Time of the key frame at which decoding has to begin for a frame."""
        return self.key_pts[bisect_right(self.key_pts, self.pts[number]) - 1]

    def number_of(self, pts: int) -> int | None:
        """The frame that is shown at exactly this time."""
        number = bisect_right(self.pts, pts) - 1
        return number if number >= 0 and self.pts[number] == pts else None


def _gives_a_frame(packet: av.Packet, codec: str) -> bool:
    """False for packets that may hold no frame to show: VP8's hidden ones, MPEG-4's repetitions."""
    if codec == "vp8":
        return bool(memoryview(packet)[0] & 0x10)  # show_frame, RFC 6386, 9.1
    return codec != "mpeg4" or packet.size > _LARGEST_EMPTY_MPEG4


def decode_frames(
    source: Source, indices: Sequence[int] | np.ndarray, *, num_frames: int | None = None, threads: int = 1
) -> list[np.ndarray]:
    """`FrameReader.read` of a video that is read once."""
    return FrameReader(source, num_frames=num_frames, threads=threads).read(indices)


def decode_by_table(source: Source, indices: Sequence[int] | np.ndarray, table: PacketTable) -> list[np.ndarray]:
    """`decode_frames` by a verified table. Of the file it uses what opening reads, and these frames' packets."""
    wanted = _numbers(indices, len(table.pts))
    try:
        with opened_video(source) as (container, stream):
            found = dict(_converted(_by_packets(container, stream, table, wanted, verified=True), None))
    except PacketsError:
        raise VideoError("its packets are not those that the index describes") from None
    return [found[int(index)] for index in indices]


def sample_frames(
    source: Source, choose: Callable[[Timing], np.ndarray], use: Use | None = None
) -> tuple[np.ndarray, list[np.ndarray]]:
    """Numbers (K,) of the frames that `choose` takes when it knows the video's times, and these frames.

    For a video that is read once. Damage is noticed in what these frames need, not in the rest of the file. use: see
    `FrameReader.read`. Raises VideoError.
    """
    with opened_video(source) as (container, stream):
        table = PacketTable.read(container, stream)
        if table is not None and table.timing is not None:
            chosen = choose(table.timing)
            try:
                wanted = _numbers(chosen, len(table.pts))
                found = dict(_converted(_by_packets(container, stream, table, wanted, verified=False), use))
                return chosen, [found[int(number)] for number in chosen]
            except PacketsError:
                pass
        guess = len(table.pts) if table is not None else stream.frames
    return _sample_decoding_all(source, choose, use, guess)


def _sample_decoding_all(
    source: Source, choose: Callable[[Timing], np.ndarray], use: Use | None, guess: int
) -> tuple[np.ndarray, list[np.ndarray]]:
    """`sample_frames` that decodes all frames; twice if there are not as many as `guess`."""
    guess = guess if 0 < guess <= MOST_FRAMES else 0  # a header may say anything
    likely = set(choose(Timing(float(guess), np.arange(guess, dtype=float))).tolist()) if guess else set()
    found: dict[int, np.ndarray] = {}
    convert = RgbConverter()

    def look(number: int, frame: av.VideoFrame) -> None:
        if number in likely or number == 0:  # the first one decides the size of all
            image = convert(frame)
            found[number] = image if use is None else use(image)

    chosen = choose(probe_video(source, look))
    if missing := set(chosen.tolist()) - found.keys():
        found |= dict(_from_start(source, sorted(missing), use))
    return chosen, [found[int(number)] for number in chosen]


class FrameReader:
    """A video's frames by their numbers.

    num_frames: the video's number of frames if known; a file whose packets do not add up to it is decoded from the
    beginning, so that damage never shifts the numbers.
    """

    def __init__(self, source: Source, *, num_frames: int | None = None, threads: int = 1) -> None:
        if hasattr(source, "rows"):  # a SparseVideo, whose module is not among those that an export copies
            raise TypeError("only parts of this video were read: use shards.stored.decode_stored")
        self._source, self._num_frames, self._threads = source, num_frames, threads
        self._table: PacketTable | None = None
        self._looked = False

    def read(self, indices: Sequence[int] | np.ndarray, use: Use | None = None) -> list[np.ndarray]:
        """Exactly the frames with the numbers `indices` (any order, repeats allowed), each (H, W, 3) uint8 RGB.

        use: called with each frame as soon as it is decoded; its result is returned in place of the frame, to save
        memory. Raises VideoError; IndexError for a number that the video does not have.
        """
        wanted = _numbers(indices)
        found: dict[int, np.ndarray] | None = None
        with opened_video(self._source, self._threads) as (container, stream):
            table = self._packets(container, stream) if wanted else None
            if table is not None and wanted[-1] < len(table.pts):
                try:
                    verified = self._num_frames is not None
                    found = dict(_converted(_by_packets(container, stream, table, wanted, verified=verified), use))
                except PacketsError:
                    pass
        if found is None:
            found = dict(_from_start(self._source, wanted, use, self._threads))
        return [found[int(index)] for index in indices]

    def _packets(self, container: InputContainer, stream: av.VideoStream) -> PacketTable | None:
        """Read once; None where packets do not tell the frames' numbers."""
        if not self._looked:
            table = PacketTable.read(container, stream)
            self._table = table if table is not None and self._num_frames in (None, len(table.pts)) else None
            self._looked = True
        return self._table


class LongVideo:
    """A video's times, and its frames in order, in parts that can be decoded beside each other.

    by_packets: False decodes the whole file first, for one whose parts have raised PacketsError. Raises VideoError.
    """

    def __init__(self, source: Source, *, by_packets: bool = True) -> None:
        self._source = source
        self._table: PacketTable | None = None
        if by_packets:
            with opened_video(source) as (container, stream):
                self._table = PacketTable.read(container, stream)
        if self._table is not None and self._table.timing is not None:
            self.timing = self._table.timing
        else:
            self._table, self.timing = None, probe_video(source)

    def parts(self, wanted: Sequence[int]) -> list[list[int]]:
        """The numbers, increasing, in parts that begin with a key frame; one part where decoding begins with the file.

        No frame is decoded for two parts.
        """
        if self._table is None or not wanted:
            return [list(wanted)] if wanted else []
        parts: list[list[int]] = [[]]
        last_key, begin = self._table.key_before(wanted[0]), wanted[0]
        for number in wanted:
            key = self._table.key_before(number)
            if key != last_key and number - begin >= _PART_FRAMES:
                parts.append([])
                begin = number
            last_key = key
            parts[-1].append(number)
        return parts

    def read(self, part: Sequence[int], use: Use | None = None) -> Iterator[tuple[int, np.ndarray]]:
        """Yields the numbers of a part and their frames. Raises VideoError, and PacketsError where the times are not
        to be trusted."""
        if self._table is None:
            yield from _from_start(self._source, part, use)
            return
        with opened_video(self._source) as (container, stream):
            yield from _converted(_by_packets(container, stream, self._table, part, verified=False), use)


def _numbers(indices: Sequence[int] | np.ndarray, count: int | None = None) -> list[int]:
    """Each number once, increasing. Raises IndexError for one that no video has."""
    wanted = sorted(set(map(int, indices)))
    if wanted and (wanted[0] < 0 or (count is not None and wanted[-1] >= count)):
        raise IndexError(f"frame {wanted[0] if wanted[0] < 0 else wanted[-1]} of a video")
    return wanted


def _converted(frames: Iterator[tuple[int, av.VideoFrame]], use: Use | None) -> Iterator[tuple[int, np.ndarray]]:
    convert = RgbConverter()
    yield from ((number, convert(frame) if use is None else use(convert(frame))) for number, frame in frames)


def _by_packets(
    container: InputContainer, stream: av.VideoStream, table: PacketTable, wanted: Sequence[int], *, verified: bool
) -> Iterator[tuple[int, av.VideoFrame]]:
    """The wanted frames, in increasing order. verified: whether the number of frames is known to be right, so that it
    need not be checked by decoding. Raises PacketsError."""
    size = stream.codec_context.width, stream.codec_context.height
    feed = _Feed(container, stream, table, wanted)
    for wanted_number in wanted:
        key = table.key_before(wanted_number)
        if key > feed.newest_key:
            feed.go_to(key)
        yield wanted_number, _take(feed, wanted_number, size, verified=verified)


def _take(feed: _Feed, wanted: int, size: tuple[int, int], *, verified: bool) -> av.VideoFrame:
    """The frame with the number `wanted`. Raises PacketsError."""
    for frame in feed:
        if frame.pts is None or (frame.width, frame.height) != size:
            raise PacketsError
        if frame.pts < feed.begin:  # of the group before, which it refers to
            continue
        if frame.is_corrupt or (frame.interlaced_frame and not verified):  # fields may have packets of their own
            raise PacketsError
        number = feed.received(frame.pts)
        if number == wanted:
            return frame
        if number > wanted:
            break
    raise PacketsError


class _Feed(Iterator[av.VideoFrame]):
    """The decoder's frames from a key frame on, without those that are neither wanted nor referred to.

    begin: time of the key frame at which it began. newest_key: time of the last key frame that the decoder has got.
    is_at_its_end: whether the decoder takes no more packets before it goes to a key frame.
    """

    def __init__(
        self, container: InputContainer, stream: av.VideoStream, table: PacketTable, wanted: Sequence[int]
    ) -> None:
        self._container, self._stream, self._table = container, stream, table
        self._wanted_pts = {table.pts[number] for number in wanted}
        context = stream.codec_context
        is_sure = table.verified or table.timing is not None
        self._may_skip = is_sure and context.name in _SKIPPING_CODECS and context.thread_count == 1
        self._checked = 0 if table.verified else _CHECKED_FRAMES  # still to be decoded before any is left out
        self._skipping = False
        self._packets: Iterator[av.Packet] | None = None
        self._frames: Iterator[av.VideoFrame] = iter(())
        self._skipped: set[int] = set()
        self._due: set[int] = set()  # times of frames that the decoder has got and not given
        self._expected = 0  # number of the next frame, if none is left out
        # Key frames of the wanted frames that the decoder has not got, by their times.
        self._lacking = {table.pts[number]: table.key_before(number) for number in wanted}
        self.is_at_its_end = False
        self.begin = self.newest_key = -(1 << 64)  # before any time

    def go_to(self, key: int) -> None:
        """Begins anew at a key frame behind all that was decoded."""
        expected = self._table.number_of(key)
        if expected is None or abs(key) > 1 << 62:  # a table from a stranger; beyond it sums overflow
            raise PacketsError
        packet = None
        if self._packets is not None and expected - self._expected <= _FAR:
            self._stream.codec_context.flush_buffers()
            packet = self._packet_of(key)
        else:
            early = round(_EARLY_SECONDS / (self._stream.time_base or 1))
            for target in (key, key - early):
                self._container.seek(target, stream=self._stream, backward=True)
                self._packets = packets_of(self._container, self._stream)
                if packet := self._packet_of(key):
                    break
        if packet is None:
            raise PacketsError
        self.begin, self._expected, self.is_at_its_end = key, expected, False
        self._skipped, self._due = set(), set()
        self._frames = iter(self._decode(packet))

    def _packet_of(self, key: int) -> av.Packet | None:
        """The packet of a key frame; None if reading began behind it."""
        assert self._packets is not None
        for packet in self._packets:
            if packet.size and packet.pts is not None:
                if packet.pts == key and packet.is_keyframe:
                    return packet
                if packet.is_keyframe and packet.pts > key:
                    return None
        return None

    def received(self, pts: int) -> int:
        """The number of a frame. Raises PacketsError if it is unknown, or if frames are missing before it."""
        number = self._table.number_of(pts)
        if number is None or number < self._expected:
            raise PacketsError
        missing = set(self._table.pts[self._expected : number]) - self._skipped
        if missing & self._due or (missing and not self.is_at_its_end):
            raise PacketsError
        self._skipped.difference_update(self._table.pts[self._expected : number])
        self._due.discard(pts)
        self._expected = number + 1
        self._checked -= 1
        return number

    def __next__(self) -> av.VideoFrame:
        assert self._packets is not None
        while True:
            for frame in self._frames:
                return frame
            if self.is_at_its_end:
                raise StopIteration
            if next(iter(self._lacking.values()), float("inf")) > self.newest_key:
                # It has got all that is wanted before the next key frame: it gives them now. Otherwise it would take
                # more packets first, as frames may come out of order.
                self.is_at_its_end = True
                self._frames = iter(self._decoded(None))
                continue
            packet = next(self._packets)
            if packet.size or packet.dts is None:  # without a time it is the end; an empty packet repeats a frame
                self._frames = iter(self._decode(packet))

    def _decode(self, packet: av.Packet) -> list[av.VideoFrame]:
        skip = self._may_skip and self._checked <= 0 and packet.size > 0 and packet.pts not in self._wanted_pts
        if skip != self._skipping:
            self._stream.codec_context.skip_frame = "NONREF" if skip else "DEFAULT"
            self._skipping = skip
        if packet.size and packet.pts is not None:
            if skip:
                self._skipped.add(packet.pts)
            elif not packet.is_discard:
                self._due.add(packet.pts)
                self._lacking.pop(packet.pts, None)
            if packet.is_keyframe and not packet.is_discard:
                self.newest_key = packet.pts
        return self._decoded(packet)

    def _decoded(self, packet: av.Packet | None) -> list[av.VideoFrame]:
        """What the decoder gives for a packet; without one, all that is left in it."""
        try:
            return self._stream.codec_context.decode(packet)
        except av.error.FFmpegError:
            raise PacketsError from None


def _from_start(
    source: Source, wanted: Sequence[int], use: Use | None, threads: int = 1
) -> Iterator[tuple[int, np.ndarray]]:
    """The wanted frames, in increasing order. Raises IndexError for a number that the video does not have."""
    remaining = set(wanted)
    if not remaining:
        return
    count = 0
    convert = RgbConverter()
    with opened_video(source, threads) as (container, stream):
        for frame in decoded_frames(container, stream):
            if count in remaining or count == 0:  # the first one decides the size of all
                image = convert(frame)
            if count in remaining:
                yield count, image if use is None else use(image)
                remaining.remove(count)
                if not remaining:
                    return
            count += 1
    raise IndexError(f"frame {max(remaining)} of a video of {count} frames")
