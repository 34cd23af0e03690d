"""Chooses the frames of a video: pure functions of its number of frames and of a random generator.

Segment sampling cuts n frames into T segments ("ticks" at i*n//T) and takes one frame of each:

    frames    0 1 2 3 4 5 6 7 8 9        n = 10, T = 4
    segments  |...|.....|...|.....|      ticks 0 2 5 7 10
    train         one random frame in each
    val           0   2     5   7        int(n/T * i)

Dense sampling takes T frames at stride 128 // T from one window of 128 frames. Frame numbers are 0-based.
The rules are those of the original project's data set class, so published numbers can be reproduced.
"""

from __future__ import annotations

import itertools

import numpy as np

from text4vis.config.schema import DENSE_WINDOW


def train_indices(num_frames: int, num_segments: int, rng: np.random.Generator, dense: bool = False) -> np.ndarray:
    """The frames of one training clip, (T,) int64, ascending unless dense sampling wraps around the video's end.

    num_frames: n, num_segments: T, each at least 1, else ValueError. A video of n <= T frames gives all n frames and
    T - n random repeats. Calls only `rng.random`, which gives the same numbers in every version of numpy.
    """
    _check(num_frames, num_segments, 1)
    if dense:
        starts = max(1, num_frames - DENSE_WINDOW)  # the original never draws the last start
        return (int(rng.random() * starts) + _dense_offsets(num_segments)) % num_frames
    if num_frames <= num_segments:
        repeats = (rng.random(num_segments - num_frames) * num_frames).astype(np.int64)
        return np.sort(np.concatenate([np.arange(num_frames), repeats]))
    ticks = [segment * num_frames // num_segments for segment in range(num_segments + 1)]
    draws = rng.random(num_segments).tolist()
    segments = zip(draws, itertools.pairwise(ticks), strict=True)
    return np.array([first + int(number * (stop - first)) for number, (first, stop) in segments], np.int64)


def val_indices(num_frames: int, num_segments: int) -> np.ndarray:
    """The first frame of each segment, `int(n/T * i)`, (T,) int64; the same as one clip of `test_indices`.

    num_frames: n, num_segments: T, each at least 1, else ValueError.
    """
    return test_indices(num_frames, num_segments)


def test_indices(num_frames: int, num_segments: int, num_clips: int = 1, dense: bool = False) -> np.ndarray:
    """The frames of K evaluation clips, (K * T,) int64, clip after clip.

    num_frames: n, num_segments: T, num_clips: K, each at least 1, else ValueError.
    Uniform: clips start at `linspace(0, n/T - 1, K)`, rounded down; frames `int(start + n/T * i) % n`. So where n < T,
    all clips but the first start at -1, the video's last frame, as the original's do.
    Dense: windows start at `k * floor(max(0, n - 128) / (K - 1))`; one clip takes the centre window (the original
    divides by zero there).
    """
    _check(num_frames, num_segments, num_clips)
    if dense:
        spare = max(0, num_frames - DENSE_WINDOW)
        starts = np.arange(num_clips) * (spare // (num_clips - 1)) if num_clips > 1 else np.array([spare // 2])
        return ((starts[:, None] + _dense_offsets(num_segments)) % num_frames).reshape(-1)
    tick = num_frames / num_segments
    starts = np.linspace(0, tick - 1, num=num_clips, dtype=int)
    return ((starts[:, None] + tick * np.arange(num_segments)).astype(np.int64) % num_frames).reshape(-1)


def _dense_offsets(num_segments: int) -> np.ndarray:
    return np.arange(num_segments, dtype=np.int64) * (DENSE_WINDOW // num_segments)


def _check(num_frames: int, num_segments: int, num_clips: int) -> None:
    for name, value in (("num_frames", num_frames), ("num_segments", num_segments), ("num_clips", num_clips)):
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
