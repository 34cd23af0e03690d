"""From a video of any kind to the frames that a model sees: which of them, and their pixels. Knows no model.

T frames a video, S side of the model's input, W windows.
"""

from __future__ import annotations

import contextlib
import re
import tempfile
from collections.abc import Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import fsspec
import numpy as np

from shards.address import scheme_of
from shards.format import ShardError
from shards.frames import LongVideo, sample_frames
from shards.images import read_image
from shards.text import redact, redact_text
from shards.video import Timing, VideoError
from shards.walk import is_hidden
from text4vis.config.schema import Config
from text4vis.data.augmentation import eval_geometry, frame_rule
from text4vis.data.finishing import place
from text4vis.data.prefetch import Prefetcher, pipelined
from text4vis.data.sampling import test_indices

FRAME_SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".bmp"}
FRAMES_IN_FLIGHT = 256
"""Frames of (S, S, 3) bytes that wait for the model or are being decoded for it, unless a batch needs more."""

MOST_HOURS = 48
"""Of a video whose every window is looked at: a clock may claim any time between two frames."""

Video = str | Path | np.ndarray
Sampled = tuple[np.ndarray, np.ndarray]  # numbers (T,) int64 of a video's sampled frames, and these (T, S, S, 3) uint8


class PredictionError(Exception):
    """Input that cannot be recognised. The message names it and the fix."""


class Sampler:
    """Reads the frames that an evaluation of one clip takes, scaled and cropped as there, as `config` says."""

    def __init__(self, config: Config) -> None:
        self._config = config

    def sample_many(
        self, videos: Iterable[Video], *, threads: int, at_least: int
    ) -> Iterator[Sampled | PredictionError]:
        """`sample` of each video in order, in threads that work ahead: `at_least` videos, and more while they hold no
        more than FRAMES_IN_FLIGHT frames together. Yields the error of a video that cannot be read in its place."""
        ahead = max(at_least, FRAMES_IN_FLIGHT // self._config.data.num_segments)
        pool = ThreadPoolExecutor(threads, thread_name_prefix="video")
        try:
            yield from pipelined(videos, lambda video: pool.submit(self._sample_or_error, video), Future.result, ahead)
        finally:
            pool.shutdown(cancel_futures=True)

    def _sample_or_error(self, video: Video) -> Sampled | PredictionError:
        try:
            return self.sample(video)
        except PredictionError as error:
            return error
        except ShardError as error:  # an address that is refused
            return PredictionError(str(error))

    def sample(self, video: Video) -> Sampled:
        """The sampled frames of a file or its address, a folder of frames, or an array (N, H, W, 3) uint8 RGB.

        A file is read once. Raises PredictionError, and ShardError for an address that is refused.
        """
        if isinstance(video, np.ndarray):
            if video.ndim != 4 or video.shape[3] != 3 or video.dtype != np.uint8 or not video.size:
                raise PredictionError(f"expected frames (N, H, W, 3) uint8, got {video.shape} {video.dtype}")
            indices = self.indices(len(video))
            return indices, np.stack([self.prepare(video[i]) for i in indices])
        if not isinstance(video, str | Path):
            raise PredictionError(f"expected a path, an address or an array of frames, got {type(video).__name__}")
        with local_copy(video) as path:
            if path.is_dir():
                files = _frames_in(path)
                indices = self.indices(len(files))
                return indices, np.stack([self.prepare(_read_image(files[i])) for i in indices])
            with _naming(path):
                indices, frames = sample_frames(path, lambda timing: self.indices(timing.num_frames), self.prepare)
            return indices, np.stack(frames)

    def sample_part(self, path: str | Path, start: float = 0.0, end: float | None = None) -> np.ndarray:
        """The frames (T, S, S, 3) of a part of a file, in seconds, by default of the whole. Raises PredictionError."""

        def choose(timing: Timing) -> np.ndarray:
            if not 0 <= start < timing.duration:
                raise PredictionError(f"{path}: lasts {timing.duration:.1f} s, so there is no moment at {start:g} s")
            if end is None:
                return self.indices(timing.num_frames)
            return self.windows(timing, np.array([[start, min(end, timing.duration)]]))[0]

        with _naming(Path(path)):
            return np.stack(sample_frames(path, choose, self.prepare)[1])

    def indices(self, num_frames: int) -> np.ndarray:
        """The frames that an evaluation of one clip takes, (T,) int64."""
        return test_indices(num_frames, self._config.data.num_segments, dense=self._config.data.dense)

    def windows(self, timing: Timing, seconds_W2: np.ndarray) -> np.ndarray:
        """The frames that it takes of each window, (W, T) int64."""
        shown = [timing.shown(start, stop) for start, stop in seconds_W2.tolist()]
        return np.stack([frames_n[self.indices(len(frames_n))] for frames_n in shown])

    def in_order(self, path: Path, video: LongVideo, wanted: Sequence[int], threads: int) -> Iterator[tuple[int, Any]]:
        """Yields these numbers, increasing, with their frames (S, S, 3): each is decoded once, `threads` parts of the
        file beside each other, at most FRAMES_IN_FLIGHT frames ahead.

        Raises PredictionError, and shards.frames.PacketsError where the video's times are not to be trusted.
        """
        parts: list[Prefetcher[tuple[int, np.ndarray]]] = []

        def read(part: Sequence[int]) -> Generator[tuple[int, np.ndarray], None, None]:
            with _naming(path):
                yield from video.read(part, self.prepare)

        def start(part: Sequence[int]) -> Prefetcher[tuple[int, np.ndarray]]:
            parts.append(Prefetcher(read(part), max(1, FRAMES_IN_FLIGHT // threads), "video"))
            return parts[-1]

        try:
            for frames in pipelined(video.parts(wanted), start, lambda started: started, threads - 1):
                yield from frames
                parts.remove(frames)
        finally:
            for frames in parts:
                frames.close()

    def prepare(self, image: np.ndarray) -> np.ndarray:
        """A frame (H, W, 3) as (S, S, 3) uint8: scaled and centre-cropped as in evaluation."""
        side = self._config.data.input_size
        out_VTSS3 = np.empty((1, 1, side, side, 3), np.uint8)
        (height, width), scale_size = image.shape[:2], self._config.scale_size
        resize, interpolation = frame_rule(self._config.data)
        geometry = eval_geometry(height, width, scale_size, side, 1, resize=resize, interpolation=interpolation)
        place(image, geometry, [(0, 0, 0)], out_VTSS3)
        return out_VTSS3[0, 0]


def open_long(path: Path, *, by_packets: bool = True) -> LongVideo:
    """Opens a file for `Sampler.in_order`. Raises PredictionError."""
    with _naming(path):
        video = LongVideo(path, by_packets=by_packets)
        if video.timing.duration > MOST_HOURS * 3600:
            raise VideoError(
                f"by its clock it lasts {video.timing.duration / 3600:.0f} hours, {MOST_HOURS} is the limit"
            )
        return video


@contextlib.contextmanager
def local_copy(video: str | Path) -> Iterator[Path]:
    """The file or folder itself, or for an address a copy that stays for a while. Raises PredictionError."""
    address = str(video)
    if scheme_of(address) is None:
        yield Path(video)
        return
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "video"
        try:
            fsspec.filesystem(scheme_of(address)).get_file(address, str(copy))
        except Exception as error:  # every kind of file system has its own
            reason = redact_text(str(error))
            if reason in ("", redact(address)):  # a server's 404 is no more than the address
                reason = "not found" if isinstance(error, FileNotFoundError) else type(error).__name__
            raise PredictionError(f"{redact(address)}: cannot be fetched ({reason})") from None
        try:
            yield copy
        except PredictionError as error:
            raise PredictionError(str(error).replace(str(copy), redact(address))) from error


@contextlib.contextmanager
def _naming(path: Path) -> Iterator[None]:
    """What goes wrong with the video is a PredictionError with its path."""
    if not path.is_file():
        raise PredictionError(f"{path}: no such video file or folder of frames")
    try:
        yield
    except VideoError as error:
        raise PredictionError(f"{path}: {error}; is it a video file?") from error
    except IndexError as error:
        raise PredictionError(f"{path}: {error}; is it damaged?") from error


def _frames_in(folder: Path) -> list[Path]:
    files = [path for path in folder.iterdir() if path.suffix.lower() in FRAME_SUFFIXES and not is_hidden(path.name)]
    if not files:
        raise PredictionError(f"{folder}: holds no frames ({', '.join(sorted(FRAME_SUFFIXES))})")
    return sorted(files, key=_natural)


def _read_image(path: Path) -> np.ndarray:
    try:
        return np.asarray(read_image(path.read_bytes()))
    except (OSError, ValueError) as error:
        raise PredictionError(f"{path}: not a readable image ({error})") from error


def _natural(path: Path) -> list[Any]:
    """Sorts img_2 before img_10."""
    return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", path.name)]
