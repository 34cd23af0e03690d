"""Finds videos of two data sets that show the same recording: encoded anew, resized, or one cut from the other.

Up to 32 evenly spread frames of each video become a 64-bit difference hash each: the frame in grey at 9x8 pixels, a bit
for each pair of neighbours in a row, set where the right one is brighter. Frames almost without contrast (black, white,
fog) are dropped, because their hashes are noise. Two frames match if at most 10 of their 64 bits differ. Two videos are
similar if three quarters of the frames of one match some frame of the other.

This is fast because only videos with nearly equal frames are compared: those with frames of which two of the four
16-bit blocks are equal. It finds no mirrored, turned, cropped or bordered copies, and nothing in videos of fewer than 3
frames with contrast; two recordings of one fixed camera with little change look the same.

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
from shards.frames import FrameReader
from shards.index import Index
from shards.sources import thinned
from shards.video import VideoError

FRAMES = 32
MAX_BITS = 10
MIN_SHARE = 0.75
MIN_FRAMES = 3
_MIN_CONTRAST = 2.0  # mean step between neighbours of the 9x8 pixels, in grey levels
_MAX_PER_KEY = 64  # videos of a data set that are compared for one key; many share a title or a fixed camera
_BATCH = 4096


@dataclass(frozen=True)
class VideoHashes:
    """Hashes of the frames of a data set's videos: hashes_NK uint64; valid_NK bool, whether a frame has contrast."""

    hashes_NK: np.ndarray
    valid_NK: np.ndarray


@dataclass(frozen=True)
class SimilarPair:
    """Two videos, by their numbers in their data sets, and the larger share of frames that match."""

    first: int
    second: int
    share: float


def frame_hash(grey_HW: np.ndarray) -> tuple[int, bool]:
    """Difference hash of a grey frame, uint8, and whether the frame has enough contrast for it."""
    small = cv2.resize(grey_HW, (9, 8), interpolation=cv2.INTER_AREA).astype(np.int16)
    steps = np.diff(small, axis=1)
    bits = np.packbits(steps.ravel() > 0)
    return int.from_bytes(bits.tobytes(), "big"), float(np.abs(steps).mean()) >= _MIN_CONTRAST


def hash_videos(
    index: Index,
    folder: Path,
    *,
    workers: int | None = None,
    progress: Callable[[int], object] | None = None,
) -> VideoHashes:
    """Hashes of all videos of a local data set. A frame that cannot be read or decoded counts as one without contrast.

    Decodes up to 32 frames of each video at an eighth of their size; in stored videos it seeks to them.
    """
    count = len(index.videos)
    hashes = VideoHashes(np.zeros((count, FRAMES), np.uint64), np.zeros((count, FRAMES), bool))
    hashes_of = _stored_video if index.manifest.content == "video" else _stored_frames

    def hash_video(video: int) -> None:
        shard = index.manifest.shards[int(index.videos["shard"][video])]
        try:
            with (folder / shard.name).open("rb", buffering=0) as stream:
                for place, (value, is_valid) in enumerate(hashes_of(index, stream.fileno(), video)):
                    hashes.hashes_NK[video, place], hashes.valid_NK[video, place] = value, is_valid
        except (ShardError, VideoError, IndexError, OSError, cv2.error):
            pass  # `check_datasets` names what is wrong with the video
        if progress:
            progress(1)

    with ThreadPoolExecutor(workers or len(os.sched_getaffinity(0))) as pool:
        for start in range(0, count, _BATCH):
            list(pool.map(hash_video, range(start, min(start + _BATCH, count))))
    return hashes


def _stored_frames(index: Index, file: int, video: int) -> Iterator[tuple[int, bool]]:
    rows = index.member_rows(video, thinned(int(index.videos["num_members"][video]), FRAMES))
    sides = np.minimum(rows["width"], rows["height"]).tolist()
    for (start, stop), side in zip(index.ranges(video, rows), sides, strict=True):
        data = np.frombuffer(os.pread(file, stop - start, start), np.uint8)
        grey = cv2.imdecode(data, _reading(side)) if len(data) else None
        yield (0, False) if grey is None else frame_hash(grey)


def _reading(side: int) -> int:
    """OpenCV's flags: grey, reduced by the JPEG decoder as far as at least 16 pixels are left; 9x8 are needed."""
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


def similar_pairs(first: VideoHashes, second: VideoHashes) -> list[SimilarPair]:
    """Pairs of a video of the first data set and one of the second, in order. Vectorised: no loop over videos."""
    pairs_P2 = _candidate_pairs(first, second)
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


def _shares(first: VideoHashes, second: VideoHashes, pairs_P2: np.ndarray) -> np.ndarray:
    """(P,) the share of matching frames in the video of each pair in which it is larger."""
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


def _candidate_pairs(first: VideoHashes, second: VideoHashes) -> np.ndarray:
    """(P, 2) int64 numbers of videos with frames that share two of their four blocks, sorted, each pair once."""
    pairs = [np.empty(0, np.uint64)]
    for one, other in combinations(range(4), 2):
        left, right = (_keys(hashes, one, other) for hashes in (first, second))
        start_R = np.searchsorted(right[0], left[0], "left")
        count_R = np.searchsorted(right[0], left[0], "right") - start_R
        total = int(count_R.sum())
        offsets = np.arange(total) - np.repeat(np.cumsum(count_R) - count_R, count_R)
        others = right[1][np.repeat(start_R, count_R) + offsets]
        pairs.append(np.unique((np.repeat(left[1], count_R) << np.uint64(32)) | others))
    packed = np.unique(np.concatenate(pairs))
    return np.stack([packed >> np.uint64(32), packed & np.uint64(2**32 - 1)], 1).astype(np.int64)


def _keys(hashes: VideoHashes, one: int, other: int) -> tuple[np.ndarray, np.ndarray]:
    """Keys (two blocks of each valid hash) and their videos, (R,) uint64 each, sorted, a key's first videos only."""
    video_R, place_R = np.nonzero(hashes.valid_NK)
    hashes_R = hashes.hashes_NK[video_R, place_R]
    block = np.uint64(0xFFFF)
    keys = ((hashes_R >> np.uint64(16 * one) & block) << np.uint64(16)) | (hashes_R >> np.uint64(16 * other) & block)
    rows = np.unique((keys << np.uint64(32)) | video_R.astype(np.uint64))
    keys = rows >> np.uint64(32)
    rank = np.arange(len(keys)) - np.searchsorted(keys, keys, "left")
    few = rank < _MAX_PER_KEY
    return keys[few], rows[few] & np.uint64(2**32 - 1)
