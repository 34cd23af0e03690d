"""What a video file shows: which stream, which frames at which times, turned and coloured as `ffmpeg` shows them.

Every decision on a video is made here, so building, checking, training, evaluation and prediction see the same pixels.
Uses PyAV and numpy only: `tools/export.py --onnx` copies this file, `shards/frames.py` and `shards/headers.py` beside
its program.

Frame numbers count from 0 in the order of presentation, the order in which a decoder gives frames out. `iter_frames`,
`Timing.times_N` and all of `shards.frames` agree on these numbers.

N frames of a video, K of them.
"""

from __future__ import annotations

import io
import math
import os
import stat
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any, BinaryIO, cast

import av
import av.error
import av.filter
import numpy as np
from av.container import InputContainer
from av.sidedata.sidedata import Type
from av.stream import Disposition

from shards.headers import HeaderError, refuse_promises

# FFmpeg also "opens" playlists and scripts, which make it read other files and addresses, and pictures: only these.
_FORMATS = (
    "mov,mp4,avi,matroska,webm,mpegts,mpeg,mpegvideo,flv,asf,ogg,m4v,gif,apng,dv,mxf,rm,nut,ivf,wtv,"
    "h264,hevc,vvc,obu,av1,h261,h263,vc1,vc1test,yuv4mpegpipe,dhav,gxf,amv,nuv,mjpeg,mpjpeg,swf,roq"
)

# Matroska, WebM, FLV and ASF round times to a millisecond: a frame counts as shown up to half of one before its time.
_ROUNDING = 0.0005 + 1e-6
_DEFAULT_FPS = 25.0
# A longer step of the clock is a jump and no frame that stands still: the limits of `ffmpeg`, in seconds.
_LONGEST_STEP, _LONGEST_STEPS = 30 * 3600.0, {"mpegts": 10.0, "mpeg": 10.0}
_REORDERED_FRAMES = 8  # frames may come out of order for so long; a clock that stays behind was reset
_PICTURES = Disposition.attached_pic | Disposition.timed_thumbnails | Disposition.still_image
_NO_TIMESTAMPS = 0x80  # AVFMT_NOTIMESTAMPS
UNSPECIFIED = 2  # of colour matrices, by ITU-T H.273

# Limits of what is read, above all real videos: 8K, and 38 hours at 30 frames a second.
MOST_PIXELS = 1 << 25
MOST_FRAMES = 1 << 22
_MATRICES = {0, 1, UNSPECIFIED, 4, 5, 6, 7, 9}  # RGB, BT.709, …, FCC, BT.601 twice, SMPTE 240M, BT.2020

Source = str | Path | bytes
_Filter = tuple[str, str]  # name and arguments


class VideoError(ValueError):
    """A video that does not open or decode. The message says why; the caller knows the file's name."""


@dataclass(frozen=True)
class Timing:
    """When the frames of a video are shown.

    duration in seconds. times_N: seconds at which each decoded frame is shown, from 0, increasing.
    """

    duration: float
    times_N: np.ndarray

    @property
    def num_frames(self) -> int:
        """Frames that are shown."""
        return len(self.times_N)

    def shown(self, start: float, stop: float) -> np.ndarray:
        """Numbers (K,) int64 of the frames on the screen from `start` to `stop` seconds, one for each step of the
        video's usual rate: a frame that stands still is repeated. At least one."""
        steps = max(1, round(min((stop - start) / self._usual_step, MOST_FRAMES)))
        step = self._usual_step if steps < MOST_FRAMES else (stop - start) / steps
        return frames_at(self.times_N, start + np.arange(steps) * step)

    @cached_property
    def _usual_step(self) -> float:
        return float(np.median(np.diff(self.times_N))) if self.num_frames > 1 else self.duration


@dataclass(frozen=True)
class VideoInfo(Timing):
    """extension: mp4, avi, mkv or webm by the container, None for another container.

    width, height in pixels as shown, fps (average; None when unknown) in frames a second.
    """

    extension: str | None
    width: int
    height: int
    fps: float | None


def frames_at(times_N: np.ndarray, seconds_K: np.ndarray) -> np.ndarray:
    """Numbers (K,) int64 of the frames on the screen at these times: the last one whose time is not later."""
    return np.maximum(np.searchsorted(times_N, seconds_K + _ROUNDING, side="right") - 1, 0).astype(np.int64)


def frames_at_rate(times_N: np.ndarray, duration: float, fps: float) -> np.ndarray:
    """Numbers (K,) int64 of the frames on the screen at the times 0, 1/fps, 2/fps … of a video of `duration` seconds.

    K is duration x fps, rounded, and at least 1. A rate above the video's own repeats frames. Raises VideoError where K
    would be more than MOST_FRAMES.
    """
    if duration * fps > MOST_FRAMES:
        raise VideoError(
            f"by its clock it lasts {duration:.0f} s; {MOST_FRAMES} frames are the limit, {fps:g} a second"
        )
    return frames_at(times_N, np.arange(max(1, math.floor(duration * fps + 0.5))) / fps)


def probe_video(source: Source, look: Callable[[int, av.VideoFrame], object] = lambda *_: None) -> VideoInfo:
    """Decodes the whole video: only then is it certain how many frames there are, and that all of them decode.

    look: called with the number and every frame. Raises VideoError.
    """
    with opened_video(source) as (container, stream):
        clock = _Clock(timed=is_timed(container))
        size: tuple[int, int] | None = None
        for number, frame in enumerate(decoded_frames(container, stream)):
            refuse_more_frames(number)
            clock.add(frame)
            look(number, frame)
            if size is None:
                height, width, _ = RgbConverter()(frame).shape
                size = width, height
        if size is None:
            raise VideoError("it holds no frame that decodes")
        stated = float(stream.average_rate) if stream.average_rate else None
        timing = clock.timing(stated, container.format.name)
        measured = timing.num_frames / timing.duration
        fps = stated if timing.num_frames == 1 or (stated and abs(stated - measured) < 0.01 * measured) else measured
        extension = _extension(container.format.name, source)
        return VideoInfo(timing.duration, timing.times_N, extension, *size, fps)


def iter_frames(source: Source, *, threads: int = 1) -> Iterator[np.ndarray]:
    """All frames in order, each (H, W, 3) uint8 RGB of one size. Raises VideoError."""
    with opened_video(source, threads) as (container, stream):
        yield from map(RgbConverter(), decoded_frames(container, stream))


@contextmanager
def opened_video(source: Source, threads: int = 1) -> Iterator[tuple[InputContainer, av.VideoStream]]:
    """Container and the stream that is played; what goes wrong in the body is a VideoError too."""
    try:
        with _open(source) as container:
            stream = _played(container)
            stream.codec_context.options = {"max_pixels": str(MOST_PIXELS)}
            stream.codec_context.thread_count = threads
            stream.codec_context.thread_type = "SLICE" if threads == 1 else "AUTO"
            yield container, stream
    except (av.error.FFmpegError, UnicodeDecodeError) as error:
        # FFmpeg's errors derive from OSError and ValueError in turn; strerror is the sentence without the address.
        raise VideoError(f"it does not decode ({getattr(error, 'strerror', None) or error})") from error


def is_timed(container: InputContainer) -> bool:
    """Whether it stores times: those of a stream without a container are guesses of FFmpeg's parser."""
    return not container.format.flags & _NO_TIMESTAMPS


def refuse_more_frames(count: int) -> None:
    """Raises VideoError for a video of so many frames and one more."""
    if count >= MOST_FRAMES:
        raise VideoError(f"it has more than {MOST_FRAMES} frames; cut it")


def _open(source: Source) -> InputContainer:
    _refuse_header(source)
    try:
        file = io.BytesIO(source) if isinstance(source, bytes) else f"file:{source}"
        # PyAV 18 loses a copy of `options` for each stream of a file that it cannot open, so the long one isn't there.
        return av.open(
            file,
            "r",
            options={"max_pixels": str(MOST_PIXELS)},
            container_options={"format_whitelist": _FORMATS},
            metadata_errors="replace",  # titles and the like are not used, and old files have them in any encoding
        )
    except av.error.ArgumentError:
        raise VideoError("not a video format that is read here") from None


def open_regular(path: Path) -> BinaryIO:
    """Opens a file; raises VideoError for a pipe or a device, which might never end, and OSError."""
    file = os.fdopen(os.open(path, os.O_RDONLY | os.O_NONBLOCK), "rb")
    if stat.S_ISREG(os.fstat(file.fileno()).st_mode):
        return file
    file.close()
    raise VideoError("it is no regular file")


def _refuse_header(source: Source) -> None:
    """Raises VideoError for what is no file, and for one whose header promises more than the file can hold."""
    try:
        with io.BytesIO(source) if isinstance(source, bytes) else open_regular(Path(source)) as file:
            refuse_promises(file)
    except HeaderError as error:
        raise VideoError(str(error)) from None
    except OSError:
        return  # FFmpeg says why


def _played(container: InputContainer) -> av.VideoStream:
    """The stream that players show: no cover picture; of several the one marked as default, then the largest."""
    videos = [stream for stream in container.streams.video if not stream.disposition & _PICTURES]
    if not videos:
        raise VideoError(f"it holds {'a cover picture, but ' if container.streams.video else ''}no video stream")
    known = [stream for stream in videos if stream.codec_context is not None]
    if not known:
        raise VideoError("its codec is unknown")

    def rank(stream: av.VideoStream) -> tuple[bool, bool, int]:
        context = stream.codec_context
        return stream.frames != 1, bool(stream.disposition & Disposition.default), context.width * context.height

    return max(known, key=rank)


def packets_of(container: InputContainer, *streams: av.VideoStream) -> Iterator[av.Packet]:
    """The packets of these streams, or of all. PyAV loses memory of a `demux` that is left early and not closed."""
    yield from container.demux(*streams)


def decoded_frames(container: InputContainer, stream: av.VideoStream) -> Iterator[av.VideoFrame]:
    """Decoded frames in order. Packets before a recording's first key frame that do not decode give no frame.

    An empty packet, as AVI and Ogg have them, repeats the frame before it: that one stays on the screen.
    """
    started = False
    for packet in packets_of(container, stream):
        if packet.size == 0 and packet.dts is not None:  # without a time it is the end
            continue
        try:
            frames = packet.decode()
        except av.error.InvalidDataError:
            if started:
                raise
            continue
        started = started or bool(frames)
        yield from frames


class RgbConverter:
    """Frames of one video to (H, W, 3) uint8 RGB, by the filters that `ffmpeg` itself would choose.

    These know colour matrices, ranges and the sampling of chroma. A frame of another size than the first is scaled to
    that of the first. Pixels are not stretched where they are not square; fields are shown together.
    """

    def __init__(self) -> None:
        self._size: tuple[int, int] | None = None
        self._graphs: dict[Any, av.filter.Graph] = {}

    def __call__(self, frame: av.VideoFrame) -> np.ndarray:
        turning = turning_filters(frame)
        if int(frame.colorspace) not in _MATRICES:  # newer versions of FFmpeg refuse it, older convert like this
            frame.colorspace = 9 if int(frame.colorspace) == 10 else UNSPECIFIED
        frame.color_trc = frame.color_primaries = UNSPECIFIED  # not converted
        key = (frame.format.name, frame.width, frame.height, int(frame.colorspace), int(frame.color_range), turning)
        if key not in self._graphs:
            self._graphs[key] = self._graph(frame, turning)
        graph = self._graphs[key]
        graph.vpush(frame)
        image = graph.vpull().to_ndarray()
        self._size = self._size or (image.shape[1], image.shape[0])
        return image

    def _graph(self, frame: av.VideoFrame, turning: tuple[_Filter, ...]) -> av.filter.Graph:
        graph = av.filter.Graph()
        graph.threads = 1  # videos are decoded beside each other
        source = f"video_size={frame.width}x{frame.height}:pix_fmt={frame.format.name}:time_base=1/1"
        source += f":colorspace={int(frame.colorspace)}:range={int(frame.color_range)}"
        filters: list[_Filter] = [("buffer", source), *turning]
        if self._size is not None:
            filters.append(("scale", f"{self._size[0]}:{self._size[1]}:flags=bicubic"))
        filters += [("format", "rgb24"), ("buffersink", "")]
        graph.link_nodes(*(graph.add(name, arguments) for name, arguments in filters)).configure()
        return graph


def turning_filters(frame: av.VideoFrame) -> tuple[_Filter, ...]:
    """The filters by which `ffmpeg` turns and mirrors a frame."""
    matrix = cast("Any", frame.side_data).get(Type.DISPLAYMATRIX)  # the stubs have it map texts
    a, b, _, c, d = np.frombuffer(bytes(36) if matrix is None else bytes(matrix), np.int32)[:5].tolist()
    if not math.hypot(a, c) or not math.hypot(b, d):
        return ()
    degrees = round(math.degrees(math.atan2(b / math.hypot(b, d), a / math.hypot(a, c)))) % 360
    flips = (("hflip", ""),) * (a < 0) + (("vflip", ""),) * (d < 0)
    turns: dict[int, tuple[_Filter, ...]] = {
        0: flips,
        90: (("transpose", "cclock_flip" if c > 0 else "clock"),),
        180: flips,
        270: (("transpose", "clock_flip" if c < 0 else "cclock"),),
    }
    return turns.get(degrees, (("rotate", f"{degrees}*PI/180"),))


class _Clock:
    """The times of a video's frames, from what the container says of them."""

    def __init__(self, timed: bool) -> None:
        self._timed = timed
        self._stamps: list[tuple[float | None, float | None]] = []  # presentation and decoding time, seconds
        self._last_frame = 0.0  # how long it is shown

    def add(self, frame: av.VideoFrame) -> None:
        base = frame.time_base or 1
        stamps = (frame.pts, frame.dts) if self._timed else (None, None)
        pts, dts = (None if stamp is None else float(stamp * base) for stamp in stamps)
        self._stamps.append((pts, dts))
        self._last_frame = float(frame.duration * base)

    def timing(self, stated_fps: float | None, format_name: str) -> Timing:
        """Where the clock jumps, frames follow at the usual rate; frames without a time lie between their neighbours.

        Which step counts as a jump depends on the container's format.
        """
        stamps = min(([pts for pts, _ in self._stamps], [dts for _, dts in self._stamps]), key=_faults)
        return timing_of(stamps, self._last_frame, stated_fps, format_name)


def timing_of(stamps: Sequence[float | None], last_frame: float, stated_fps: float | None, format_name: str) -> Timing:
    """From the frames' times in seconds, how long the last one is shown, and the rate that the stream states."""
    longest_step = _LONGEST_STEPS.get(format_name, _LONGEST_STEP)
    steps = np.diff([stamp for stamp in stamps if stamp is not None])
    steps = steps[(steps > 0) & (steps <= longest_step)]
    usual = float(np.median(steps)) if len(steps) else last_frame or 1 / (stated_fps or _DEFAULT_FPS)
    times_N = _continuous(stamps, usual, longest_step)
    return Timing(float(times_N[-1]) + max(last_frame, usual), times_N)


def _faults(stamps: Sequence[float | None]) -> int:
    """How many are missing or not later than the one before."""
    return sum(b is None or (a is not None and b <= a) for a, b in pairwise([None, *stamps]))


def _continuous(stamps: Sequence[float | None], usual: float, longest_step: float) -> np.ndarray:
    """Seconds (N,) from 0, increasing; see `_Clock.timing`."""
    numbers: list[int] = []  # of the frames whose stamps hold, and their times
    times: list[float] = []
    offset = last = 0.0
    for number, stamp in enumerate(stamps):
        if stamp is None:
            continue
        if numbers and not 0 < stamp - last <= longest_step:
            ahead = stamps[number + 1 : number + 1 + _REORDERED_FRAMES]
            if stamp <= last and any(later is not None and 0 < later - last <= longest_step for later in ahead):
                continue  # out of order, and the clock goes on
            offset = times[-1] + usual * (number - numbers[-1]) - stamp
        numbers.append(number)
        times.append(stamp + offset)
        last = stamp
    if not numbers:
        return np.arange(len(stamps)) * usual
    before, behind = np.arange(numbers[0]) - numbers[0], np.arange(1, len(stamps) - numbers[-1])
    inner = np.interp(np.arange(numbers[0], numbers[-1] + 1), numbers, times)
    times_N = np.concatenate([times[0] + before * usual, inner, times[-1] + behind * usual])
    return times_N - times_N[0]


def container_extension(data: bytes) -> str:
    """What to call a file after its container: mp4 (also of MOV), avi, mkv or webm, else FFmpeg's name for it.

    Raises VideoError.
    """
    if data[4:8] == b"ftyp":  # most files need not be opened
        return "mp4"
    with opened_video(data) as (container, _):
        return _extension(container.format.name, data) or str(container.format.name.split(",")[0])


def _extension(format_name: str, source: Source) -> str | None:
    kind = next((kind for kind in ("mp4", "avi", "matroska") if kind in format_name.split(",")), None)
    if kind != "matroska":
        return kind
    # One demuxer reads both; the file's first element names its document type.
    if isinstance(source, bytes):
        return "webm" if b"webm" in source[:64] else "mkv"
    with Path(source).open("rb") as stream:
        return "webm" if b"webm" in stream.read(64) else "mkv"
