"""Finds videos of two data sets that show the same recording: encoded anew, resized, or one cut from the other.

Of each video up to 32 frames, evenly spread, become a 64-bit difference hash each: the frame in grey at 9x8 pixels, a
bit for each pair of neighbours in a row, set where the right one is brighter. Frames almost without contrast (black,
white, fog) say nothing and are dropped. Two frames match if at most 10 of their 64 bits differ. Two videos are similar
if three quarters of the frames of one match some frame of the other.

That is fast because only videos with nearly equal frames are compared: two frames meet if two of their four 16-bit
blocks are equal. It finds no mirrored, turned, cropped or bordered copies, and nothing in videos of fewer than 3 frames
with contrast; and what one fixed camera has seen twice with little change looks the same.

Letters: N videos, K frames of a video, P pairs of videos, R rows of a table.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path

import cv2
import numpy as np

from shards.format import ShardError
from shards.index import Index
from shards.sources import thinned
from shards.video import FrameReader, VideoError

FRAMES = 32
MAX_BITS = 10
MIN_SHARE = 0.75
MIN_FRAMES = 3
_MIN_CONTRAST = 2.0  # mean step between neighbours of the 9x8 pixels, in grey levels
_MAX_MEETING = 64  # videos of one data set that are compared for one look; more share it (a title, a fixed camera)
_BATCH = 4096


@dataclass(frozen=True)
class Looks:
    """Hashes of a data set's videos: hashes_NK uint64; valid_NK bool, whether a frame means something."""

    hashes_NK: np.ndarray
    valid_NK: np.ndarray


@dataclass(frozen=True)
class SimilarPair:
    """Two videos, by their numbers in their data sets, and the larger share of frames that match."""

    first: int
    second: int
    share: float


def frame_hash(grey_HW: np.ndarray) -> tuple[int, bool]:
    """Difference hash of a grey frame, uint8, and whether it has enough contrast to mean something."""
    small = cv2.resize(grey_HW, (9, 8), interpolation=cv2.INTER_AREA).astype(np.int16)
    steps = np.diff(small, axis=1)
    bits = np.packbits(steps.ravel() > 0)
    return int.from_bytes(bits.tobytes(), "big"), float(np.abs(steps).mean()) >= _MIN_CONTRAST


def look_at(
    index: Index,
    folder: Path,
    *,
    workers: int | None = None,
    progress: Callable[[int], object] | None = None,
) -> Looks:
    """Hashes of all videos of a local data set. A frame that cannot be read or decoded counts as one that says nothing.

    Costs a decoded frame at an eighth of its size for each of up to 32 frames a video; stored videos are sought.
    """
    count = len(index.videos)
    looks = Looks(np.zeros((count, FRAMES), np.uint64), np.zeros((count, FRAMES), bool))
    hashes_of = _stored_video if index.manifest.content == "video" else _stored_frames

    def look(video: int) -> None:
        shard = index.manifest.shards[int(index.videos["shard"][video])]
        try:
            with (folder / shard.name).open("rb", buffering=0) as stream:
                for place, (value, means) in enumerate(hashes_of(index, stream.fileno(), video)):
                    looks.hashes_NK[video, place], looks.valid_NK[video, place] = value, means
        except (ShardError, VideoError, IndexError, OSError, cv2.error):
            pass  # `check_datasets` names what is wrong with the video
        if progress:
            progress(1)

    with ThreadPoolExecutor(workers or len(os.sched_getaffinity(0))) as pool:
        for start in range(0, count, _BATCH):
            list(pool.map(look, range(start, min(start + _BATCH, count))))
    return looks


def _stored_frames(index: Index, file: int, video: int) -> Iterator[tuple[int, bool]]:
    rows = index.member_rows(video, thinned(int(index.videos["num_members"][video]), FRAMES))
    sides = np.minimum(rows["width"], rows["height"]).tolist()
    for (start, stop), side in zip(index.ranges(video, rows), sides, strict=True):
        data = np.frombuffer(os.pread(file, stop - start, start), np.uint8)
        grey = cv2.imdecode(data, _reading(side)) if len(data) else None
        yield (0, False) if grey is None else frame_hash(grey)


def _reading(side: int) -> int:
    """OpenCV's flags: grey, as small as JPEG gives it out while at least 16 pixels are left; 9x8 are needed."""
    if side >= 128:
        flag = cv2.IMREAD_REDUCED_GRAYSCALE_8
    else:
        flag = cv2.IMREAD_REDUCED_GRAYSCALE_4 if side >= 64 else cv2.IMREAD_GRAYSCALE
    return int(flag | cv2.IMREAD_IGNORE_ORIENTATION)


def _stored_video(index: Index, file: int, video: int) -> Iterator[tuple[int, bool]]:
    ((start, stop),) = index.ranges(video, index.member_rows(video, np.zeros(1, np.int64)))
    num_frames = int(index.videos["num_frames"][video])
    reader = FrameReader(os.pread(file, stop - start, start), num_frames=num_frames)
    yield from map(frame_hash, reader.read(thinned(num_frames, FRAMES), _small_grey))


def _small_grey(frame_HWC: np.ndarray) -> np.ndarray:
    return cv2.resize(cv2.cvtColor(frame_HWC, cv2.COLOR_RGB2GRAY), (9, 8), interpolation=cv2.INTER_AREA)


def similar_pairs(first: Looks, second: Looks) -> list[SimilarPair]:
    """Pairs of a video of the first data set and one of the second, in order. Vectorised: no loop over videos."""
    pairs_P2 = _meeting_pairs(first, second)
    found: list[SimilarPair] = []
    for start in range(0, len(pairs_P2), _BATCH):
        batch = pairs_P2[start : start + _BATCH]
        share_P = _shares(first, second, batch)
        chosen = np.flatnonzero(share_P >= MIN_SHARE)
        found += [
            SimilarPair(int(one), int(other), float(share))
            for (one, other), share in zip(batch[chosen], share_P[chosen], strict=True)
        ]
    return found


def _shares(first: Looks, second: Looks, pairs_P2: np.ndarray) -> np.ndarray:
    """(P,) the share of matching frames, of that video of the pair which has the larger one."""
    one_P, other_P = pairs_P2.T
    bits_PKK = np.bitwise_count(first.hashes_NK[one_P][:, :, None] ^ second.hashes_NK[other_P][:, None, :])
    valid_PK, other_valid_PK = first.valid_NK[one_P], second.valid_NK[other_P]
    match_PKK = (bits_PKK <= MAX_BITS) & valid_PK[:, :, None] & other_valid_PK[:, None, :]
    share_P = np.maximum(
        match_PKK.any(2).sum(1) / np.maximum(1, valid_PK.sum(1)),
        match_PKK.any(1).sum(1) / np.maximum(1, other_valid_PK.sum(1)),
    )
    enough_P = np.minimum(valid_PK.sum(1), other_valid_PK.sum(1)) >= MIN_FRAMES
    return np.where(enough_P, share_P, 0.0)


def _meeting_pairs(first: Looks, second: Looks) -> np.ndarray:
    """(P, 2) int64 numbers of the videos of which two frames have two of four blocks in common, sorted, each once."""
    pairs = [np.empty(0, np.uint64)]
    for one, other in combinations(range(4), 2):
        left, right = (_keys(looks, one, other) for looks in (first, second))
        start_R = np.searchsorted(right[0], left[0], "left")
        count_R = np.searchsorted(right[0], left[0], "right") - start_R
        total = int(count_R.sum())
        offsets = np.arange(total) - np.repeat(np.cumsum(count_R) - count_R, count_R)
        others = right[1][np.repeat(start_R, count_R) + offsets]
        pairs.append(np.unique((np.repeat(left[1], count_R) << np.uint64(32)) | others))
    packed = np.unique(np.concatenate(pairs))
    return np.stack([packed >> np.uint64(32), packed & np.uint64(2**32 - 1)], 1).astype(np.int64)


def _keys(looks: Looks, one: int, other: int) -> tuple[np.ndarray, np.ndarray]:
    """Two blocks of each valid hash and its video, (R,) uint64 each, sorted; of one look the first videos only."""
    video_R, place_R = np.nonzero(looks.valid_NK)
    hashes_R = looks.hashes_NK[video_R, place_R]
    block = np.uint64(0xFFFF)
    keys = ((hashes_R >> np.uint64(16 * one) & block) << np.uint64(16)) | (hashes_R >> np.uint64(16 * other) & block)
    rows = np.unique((keys << np.uint64(32)) | video_R.astype(np.uint64))
    keys = rows >> np.uint64(32)
    rank = np.arange(len(keys)) - np.searchsorted(keys, keys, "left")
    few = rank < _MAX_MEETING
    return keys[few], rows[few] & np.uint64(2**32 - 1)
