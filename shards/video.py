"""Video files: what they hold, all their frames in order, or exactly the frames with given numbers. Uses PyAV.

Frame numbers count from 0 in the order of presentation, the order in which a decoder gives frames out. Everything here
agrees on these numbers: `iter_frames`, `decode_frames` and the count in `VideoInfo`. A rotation that the file asks for
(phones write it) is applied, as `ffmpeg` and OpenCV do.
"""

from __future__ import annotations

import io
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import av
import av.container
import av.error
import numpy as np

# FFmpeg also "opens" playlists and scripts, which make it read other files and addresses; only real containers here.
_FORMATS = (
    "mov,mp4,avi,matroska,webm,mpegts,mpeg,mpegvideo,flv,live_flv,asf,ogg,m4v,gif,apng,dv,mxf,rm,nut,ivf,wtv,"
    "h264,hevc,vvc,obu,av1,h261,h263,vc1,vc1test,mjpeg,yuv4mpegpipe,swf,nuv,dhav,gxf,amv,film_cpk,roq,smk,bink,nsv,pva"
)

# Containers round times, so a duration is known to a part of a frame only.
_RATE_TOLERANCE = 0.05
_DEFAULT_FPS = 25.0


Use = Callable[[np.ndarray], np.ndarray]


class VideoError(ValueError):
    """A video that does not open or decode. The message says why; the caller knows the file's name."""


@dataclass(frozen=True)
class VideoInfo:
    """extension: mp4, avi, mkv or webm by the container, None for another container.

    width, height in pixels as shown, fps (average; None when unknown) in frames a second, duration in seconds.
    times_N: seconds at which each decoded frame is shown, from 0, increasing.
    """

    extension: str | None
    width: int
    height: int
    fps: float | None
    duration: float
    times_N: np.ndarray

    @property
    def num_frames(self) -> int:
        return len(self.times_N)


def probe_video(source: str | Path | bytes) -> VideoInfo:
    """Decodes the whole video: only then is the number of frames known, and that all of them decode.

    Raises VideoError.
    """
    with _opened(source) as (container, stream):
        times: list[float | None] = []
        size: tuple[int, int] | None = None
        for frame in container.decode(stream):
            times.append(frame.time)
            if size is None:
                size = (frame.height, frame.width) if frame.rotation % 180 else (frame.width, frame.height)
        if size is None:
            raise VideoError("it holds no frame that decodes")
        stated_fps = float(stream.average_rate) if stream.average_rate else None
        times_N = _times(times, stated_fps)
        fps = _fps(times_N, stated_fps)
        return VideoInfo(
            extension=_extension(container.format.name, source),
            width=size[0],
            height=size[1],
            fps=fps,
            duration=float(times_N[-1]) + (1 / fps if fps else 0.0),
            times_N=times_N,
        )


def frames_at_rate(times_N: np.ndarray, duration: float, fps: float) -> np.ndarray:
    """Numbers (K,) int64 of the frames nearest to the times 0, 1/fps, 2/fps … below `duration` seconds.

    A rate above the video's own repeats frames. The earlier frame wins a tie. At least one frame is chosen.
    """
    wanted_K = np.arange(max(1, int(np.ceil(duration * fps - _RATE_TOLERANCE)))) / fps
    middles = (times_N[1:] + times_N[:-1]) / 2
    return np.searchsorted(middles, wanted_K - 1e-9, side="left").astype(np.int64)


def iter_frames(source: str | Path | bytes, *, threads: int = 1) -> Iterator[np.ndarray]:
    """All frames in order, each (H, W, 3) uint8 RGB. Raises VideoError."""
    with _opened(source, threads) as (container, stream):
        for frame in container.decode(stream):
            yield _to_rgb(frame)


def decode_frames(
    source: str | Path | bytes, indices: Sequence[int] | np.ndarray, *, num_frames: int | None = None, threads: int = 1
) -> list[np.ndarray]:
    """`FrameReader.read` of a video that is read once."""
    return FrameReader(source, num_frames=num_frames, threads=threads).read(indices)


class FrameReader:
    """A video's frames by their numbers.

    Where the container gives every frame a time, decoding starts at the last key frame before a wanted frame instead of
    at the beginning. num_frames: the video's number of frames if known; a file whose packets do not add up to it
    is decoded from the beginning, so that damage never shifts the numbers.
    """

    def __init__(self, source: str | Path | bytes, *, num_frames: int | None = None, threads: int = 1) -> None:
        self._source, self._num_frames, self._threads = source, num_frames, threads
        self._table: _PacketTable | None = None
        self._looked = False

    def read(self, indices: Sequence[int] | np.ndarray, use: Use | None = None) -> list[np.ndarray]:
        """Exactly the frames with the numbers `indices` (any order, repeats allowed), each (H, W, 3) uint8 RGB.

        use: makes something smaller of each frame as soon as it is decoded, and is given instead of it. Raises
        VideoError; IndexError for a number that the video does not have.
        """
        wanted = sorted({int(index) for index in indices})
        if not wanted:
            return []
        if wanted[0] < 0:
            raise IndexError(f"frame {wanted[0]} of a video")
        found: dict[int, np.ndarray] | None = None
        with _opened(self._source, self._threads) as (container, stream):
            table = self._packets(container, stream)
            if table is not None and wanted[-1] < len(table.pts):
                found = _decode_seeking(container, stream, table, wanted, use)
        if found is None:
            found = _decode_from_start(self._source, wanted, self._threads, use)
        return [found[int(index)] for index in indices]

    def _packets(self, container: av.container.InputContainer, stream: av.VideoStream) -> _PacketTable | None:
        """Read once; None where packets do not tell the frames' numbers."""
        if not self._looked:
            table = _PacketTable.read(container, stream)
            self._table = table if table is not None and self._num_frames in (None, len(table.pts)) else None
            self._looked = True
        return self._table


@dataclass(frozen=True)
class _PacketTable:
    """Presentation times of all frames in order, and of the key frames, in the stream's time base."""

    pts: list[int]
    key_pts: list[int]

    @classmethod
    def read(cls, container: av.container.InputContainer, stream: av.VideoStream) -> _PacketTable | None:
        """None where packets do not tell the frames' times: without times, with equal ones, or hidden packets."""
        pts: list[int] = []
        key_pts: list[int] = []
        for packet in container.demux(stream):
            if packet.size == 0 or packet.is_discard:
                continue
            if packet.pts is None:
                return None
            pts.append(packet.pts)
            if packet.is_keyframe:
                key_pts.append(packet.pts)
        pts.sort()
        key_pts.sort()
        if not pts or not key_pts or key_pts[0] != pts[0] or any(a == b for a, b in pairwise(pts)):
            return None
        return cls(pts, key_pts)


def _decode_seeking(
    container: av.container.InputContainer,
    stream: av.VideoStream,
    table: _PacketTable,
    wanted: list[int],
    use: Use | None,
) -> dict[int, np.ndarray] | None:
    """The wanted frames, or None when the decoder's frames do not follow the packet table."""
    found: dict[int, np.ndarray] = {}
    position = -1  # number of the last frame decoded
    frames: Iterator[av.VideoFrame] | None = None
    for index in wanted:
        key = table.key_pts[bisect_right(table.key_pts, table.pts[index]) - 1]
        if frames is None or key > table.pts[position]:
            container.seek(key, stream=stream, backward=True)
            frames = container.decode(stream)
            position = -1
        for frame in frames:
            if frame.pts is None:
                return None
            number = bisect_right(table.pts, frame.pts) - 1
            if number < 0 or table.pts[number] != frame.pts or (position >= 0 and number != position + 1):
                return None
            if number > index:
                return None
            position = number
            if number == index:
                found[index] = _used(frame, use)
                break
        else:
            return None
    return found


def _decode_from_start(
    source: str | Path | bytes, wanted: list[int], threads: int, use: Use | None
) -> dict[int, np.ndarray]:
    found: dict[int, np.ndarray] = {}
    remaining = set(wanted)
    count = 0
    with _opened(source, threads) as (container, stream):
        for frame in container.decode(stream):
            if count in remaining:
                found[count] = _used(frame, use)
                remaining.remove(count)
                if not remaining:
                    return found
            count += 1
    raise IndexError(f"frame {max(remaining)} of a video of {count} frames")


@contextmanager
def _opened(
    source: str | Path | bytes, threads: int = 1
) -> Iterator[tuple[av.container.InputContainer, av.VideoStream]]:
    """Container and first video stream; what goes wrong in the body is a VideoError too."""
    try:
        file = io.BytesIO(source) if isinstance(source, bytes) else f"file:{source}"
        with av.open(file, "r", options={"format_whitelist": _FORMATS}) as container:
            if not container.streams.video:
                raise VideoError("it holds no video stream")
            stream = container.streams.video[0]
            if stream.codec_context is None:
                raise VideoError("its codec is unknown")
            stream.codec_context.thread_count = threads
            stream.codec_context.thread_type = "SLICE" if threads == 1 else "AUTO"
            yield container, stream
    except (av.error.FFmpegError, UnicodeDecodeError) as error:
        # FFmpeg's errors derive from OSError and ValueError in turn; strerror is the sentence without the address.
        raise VideoError(f"it does not decode ({getattr(error, 'strerror', None) or error})") from error


def _used(frame: av.VideoFrame, use: Use | None) -> np.ndarray:
    return _to_rgb(frame) if use is None else use(_to_rgb(frame))


def _to_rgb(frame: av.VideoFrame) -> np.ndarray:
    array = frame.to_ndarray(format="rgb24")
    turns = round(frame.rotation / 90) % 4
    return np.ascontiguousarray(np.rot90(array, turns)) if turns else array


def _times(times: list[float | None], fps: float | None) -> np.ndarray:
    """Seconds from 0 of each frame, evenly spaced where the container has no true times (AVI with B-frames)."""
    known = [time for time in times if time is not None]
    if len(known) == len(times) and all(a < b for a, b in pairwise(known)):
        return np.array(known, np.float64) - known[0]
    span = max(known) - min(known) if len(known) > 1 else 0.0
    step = span / (len(known) - 1) if span else 1 / (fps or _DEFAULT_FPS)
    return np.arange(len(times)) * step


def _fps(times_N: np.ndarray, stated: float | None) -> float | None:
    """Average rate: as the container states it if the frames' times agree, else as they say."""
    if len(times_N) < 2 or times_N[-1] <= 0:
        return stated
    measured = (len(times_N) - 1) / float(times_N[-1])
    return stated if stated is not None and abs(stated - measured) < 0.01 * measured else measured


def _extension(format_name: str, source: str | Path | bytes) -> str | None:
    kinds = format_name.split(",")
    if "mp4" in kinds:
        return "mp4"
    if "avi" in kinds:
        return "avi"
    if "matroska" in kinds:
        # One demuxer reads both; the file's first element names its document type.
        if isinstance(source, bytes):
            head = source[:64]
        else:
            with Path(source).open("rb") as stream:
                head = stream.read(64)
        return "webm" if b"webm" in head else "mkv"
    return None
