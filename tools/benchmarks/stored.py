"""Benchmark of stored videos: eight frames of each, from the packets that they need, against decoders that get the
whole file."""

from __future__ import annotations

import hashlib
import io
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import astuple, dataclass
from functools import partial
from pathlib import Path

import numpy as np

from benchmarks.data import SHORT_SIDE, clip_files
from benchmarks.figures import Figure, Processes, against, interleaved
from benchmarks.prediction import has_torchcodec, photograph_clips
from shards.frames import decode_frames
from shards.packets import Packets, VideoParts
from shards.reencoding import reencode_video
from shards.stored import decode_stored, probe_stored
from text4vis.common.progress import track
from text4vis.data.sampling import train_indices

_GOPS = (16, 250)
_NUM_FRAMES = 8
_DRAWS = 4  # of the frames of each video
_OURS, _WHOLE = "packets that the frames need", "whole file"


@dataclass(frozen=True)
class Video:
    """A stored video, its packets, and draws of its frames, each (8,) int64."""

    data: bytes
    packets: Packets
    num_frames: int
    seconds: float
    draws: list[np.ndarray]

    def parts(self, draw: np.ndarray) -> VideoParts | None:
        """What these frames need of the file; None if it is read whole."""
        if not self.packets.stream["num_packets"]:
            return None
        return VideoParts(self.packets, len(self.data), draw)

    def num_bytes(self, draw: np.ndarray) -> int:
        """Bytes that are read for these frames."""
        parts = self.parts(draw)
        return len(self.data) if parts is None else sum(stop - start for start, stop in parts.ranges)


Decode = Callable[[Video, np.ndarray], object]


def _by_packets(video: Video, draw: np.ndarray) -> object:
    parts = video.parts(draw)
    data = video.data
    if parts is not None:
        data = parts.file([data[start:stop] for start, stop in parts.ranges])
    return decode_stored(data, draw, num_frames=video.num_frames)


def _whole(video: Video, draw: np.ndarray) -> object:
    return decode_frames(video.data, draw, num_frames=video.num_frames)


def _torchcodec(video: Video, draw: np.ndarray) -> object:
    from torchcodec.decoders import VideoDecoder

    return VideoDecoder(video.data, num_ffmpeg_threads=1).get_frames_at(draw.tolist()).data


def _decord(video: Video, draw: np.ndarray) -> object:
    import decord

    return decord.VideoReader(io.BytesIO(video.data), num_threads=1).get_batch(draw.tolist()).asnumpy()


def _rivals() -> dict[str, Decode]:
    """The decoders that are installed."""
    found: dict[str, Decode] = {"torchcodec": _torchcodec} if has_torchcodec() else {}
    try:
        import decord  # noqa: F401
    except ImportError:
        return found
    return found | {"decord": _decord}


@dataclass(frozen=True)
class Speed:
    """How fast `videos` draws were decoded by some threads: by the clock, and in processor time of the process."""

    videos: int = 0
    seconds: float = 0.0
    cpu_seconds: float = 0.0

    def __add__(self, other: Speed) -> Speed:
        return Speed(*(mine + theirs for mine, theirs in zip(astuple(self), astuple(other), strict=True)))

    @property
    def rate(self) -> float:
        """Videos a second by the clock."""
        return self.videos / self.seconds

    @property
    def cpu_ms(self) -> float:
        return 1e3 * self.cpu_seconds / self.videos


def decode_draws(decode: Decode, videos: list[Video], number: int, threads: int) -> Speed:
    """Decodes one draw of each video, the one with this number, in some threads."""
    with ThreadPoolExecutor(threads) as pool:
        started, cpu = time.perf_counter(), time.process_time()
        list(pool.map(lambda video: decode(video, video.draws[number]), videos))
        return Speed(len(videos), time.perf_counter() - started, time.process_time() - cpu)


def measure(contenders: dict[str, Decode], videos: list[Video], threads: int) -> dict[str, Speed]:
    """All draws with each decoder. They take turns draw by draw, so that other programs disturb all alike."""
    speeds = dict.fromkeys(contenders, Speed())
    for number in range(_DRAWS):
        for name, decode in contenders.items():
            speeds[name] += decode_draws(decode, videos, number, threads)
    return speeds


def stored(work: Path, clips: Path | None, processes: Processes, *, threads: int, rounds: int) -> list[Figure]:
    """Speed by the clock and processor time for eight frames of a video, and the share of its bytes that they need, by
    the distance of key frames."""
    folder = work / "stored"
    folder.mkdir(parents=True, exist_ok=True)
    sources = clip_files(clips) or photograph_clips(folder)
    figures = []
    for gop in _GOPS:
        videos = [_video(source, folder, gop) for source in track(sources, f"encoding, a key frame every {gop} frames")]
        contenders: dict[str, Decode] = {_OURS: _by_packets, _WHOLE: _whole, **_rivals()}
        run = partial(processes.run, "stored", measure, contenders, videos, threads)
        run()  # imports libraries
        results = interleaved(f"stored, {gop}", {"all": run}, rounds)["all"]
        name = f"a key frame every {gop} frames"
        figures += _compared(name, results)
        figures.append(Figure("stored", f"{name}: bytes read / file", "", [_share(videos)]))
        long = [video for video in videos if 8 <= video.seconds <= 12]
        if long:
            target = "at most 0.5" if gop == min(_GOPS) else ""
            what = f"{name}: bytes read / file, the {len(long)} videos of 8 to 12 s"
            figures.append(Figure("stored", what, "", [_share(long)], target=target))
    return figures


def _compared(name: str, results: list[dict[str, Speed]]) -> list[Figure]:
    """Ours and the best of the others, round by round: by the clock and by processor time."""
    rivals = [rival for rival in results[0] if rival not in (_OURS, _WHOLE)]
    what = f"the best of {' and '.join(rivals)}" if rivals else f"{_WHOLE} (neither torchcodec nor decord is here)"
    others = rivals or [_WHOLE]
    figures = []

    def add(how: str, unit: str, ours: list[float], best: list[float], ratios: list[float]) -> None:
        figures.append(Figure("stored", f"{name}{how}: {_OURS}", unit, ours))
        figures.append(Figure("stored", f"{name}{how}: {what}", unit, best, ratios, "at least 1.1"))

    ours = [one[_OURS].rate for one in results]
    best = [max(one[other].rate for other in others) for one in results]
    add("", "videos/s", ours, best, against(ours, best))
    ours = [one[_OURS].cpu_ms for one in results]
    best = [min(one[other].cpu_ms for other in others) for one in results]
    add(", processor time", "ms", ours, best, against(best, ours))
    return figures


def _video(source: Path, folder: Path, gop: int) -> Video:
    identity = hashlib.sha256(f"{source.name} {source.stat().st_size}".encode()).hexdigest()[:8]
    path = folder / f"{identity}-{gop}.mp4"
    if not path.exists():
        path.write_bytes(reencode_video(source, gop=gop, short_side=SHORT_SIDE))
    data = path.read_bytes()
    info, packets = probe_stored(data)
    rng = np.random.default_rng(0)
    draws = [train_indices(info.num_frames, _NUM_FRAMES, rng) for _ in range(_DRAWS)]
    return Video(data, packets, info.num_frames, info.duration, draws)


def _share(videos: list[Video]) -> float:
    return float(np.mean([video.num_bytes(draw) / len(video.data) for video in videos for draw in video.draws]))
