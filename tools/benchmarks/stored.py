"""Benchmark of stored videos: eight frames of each, from the packets that they need, against decoders that get the
whole file."""

from __future__ import annotations

import hashlib
import io
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
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


def cpu_milliseconds(decode: Decode, videos: list[Video], threads: int) -> float:
    """Processor time of this process for the frames of one draw, mean over all draws, decoded in some threads."""
    started = time.process_time()
    with ThreadPoolExecutor(threads) as pool:
        futures = [pool.submit(decode, video, draw) for video in videos for draw in video.draws]
        for future in futures:
            future.result()
    return 1e3 * (time.process_time() - started) / len(futures)


def stored(work: Path, clips: Path | None, processes: Processes, *, threads: int, rounds: int) -> list[Figure]:
    """Processor time for eight frames of a video, and the share of its bytes that they need, by the distance of key
    frames."""
    folder = work / "stored"
    folder.mkdir(parents=True, exist_ok=True)
    sources = clip_files(clips) or photograph_clips(folder)
    rivals = _rivals()
    figures = []
    for gop in _GOPS:
        videos = [_video(source, folder, gop) for source in track(sources, f"encoding, a key frame every {gop} frames")]
        contenders: dict[str, Decode] = {_OURS: _by_packets, _WHOLE: _whole, **rivals}
        runs = {
            name: partial(processes.run, "stored", cpu_milliseconds, decode, videos, threads)
            for name, decode in contenders.items()
        }
        values = interleaved(f"stored, {gop}", runs, rounds)
        name = f"a key frame every {gop} frames"
        figures.append(Figure("stored", f"{name}: {_OURS}", "ms", values[_OURS]))
        best = [min(values[rival][turn] for rival in rivals or [_WHOLE]) for turn in range(rounds)]
        what = f"the best of {' and '.join(rivals)}" if rivals else f"{_WHOLE} (neither torchcodec nor decord is here)"
        figures.append(Figure("stored", f"{name}: {what}", "ms", best, against(best, values[_OURS]), "at least 1.1"))
        target = "at most 0.5" if gop == min(_GOPS) else ""
        figures.append(Figure("stored", f"{name}: bytes read / file", "", [_share(videos)], target=target))
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
    return Video(data, packets, info.num_frames, draws)


def _share(videos: list[Video]) -> float:
    return float(np.mean([video.num_bytes(draw) / len(video.data) for video in videos for draw in video.draws]))
