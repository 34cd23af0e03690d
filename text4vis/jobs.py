"""What every batch holds, decided before anything is read: videos, frames, regions, crops. Pure but for the index.

    stream position -> sample ids and epochs -> frame numbers -> for each distinct frame its geometry and its places

B videos, V views, T frames; F distinct frames of a batch, each read and decoded once however many views show it.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np

from shards.plan import Stream, eval_slice, rank_slice
from shards.reader import ShardDataset
from text4vis import augmentation, sampling
from text4vis.augmentation import Crop, Geometry
from text4vis.config import Config


@dataclass(frozen=True)
class Frame:
    """One distinct frame of a batch: what is cut from it, and where each crop goes: (b, v, t, crop)."""

    geometry: Geometry
    targets: tuple[tuple[int, int, int, Crop], ...]


@dataclass(frozen=True)
class Job:
    """The plan of one batch: for each video its distinct frames' indices, and the F frames in the same order."""

    ids: np.ndarray
    labels: np.ndarray
    requests: list[tuple[int, np.ndarray]]
    frames: list[Frame]


@dataclass(frozen=True)
class Planner:
    """The plans of one rank's batches of the split "train" or "val"."""

    config: Config
    split: str
    dataset: ShardDataset
    rank: int
    world_size: int

    @property
    def num_views(self) -> int:
        return 1 if self.split == "train" else self.config.data.test_clips * self.config.data.test_crops

    @property
    def batch_size(self) -> int:
        """Videos per batch: views of an evaluation share the memory of one training batch."""
        return max(1, self.config.data.batch_size // self.num_views)

    @property
    def max_frames(self) -> int:
        """Most distinct frames that one batch can hold."""
        clips = 1 if self.split == "train" else self.config.data.test_clips
        return self.batch_size * clips * self.config.data.num_segments

    def jobs(self, consumed: int = 0) -> Iterator[Job]:
        """In order: an endless stream after `consumed` samples of the whole job, or one pass over the rank's share."""
        if self.split == "train":
            for ids, epochs in self._train_positions(consumed):
                yield self._train_job(ids, epochs)
        else:
            start, stop = eval_slice(len(self.dataset), self.rank, self.world_size)
            for first in range(start, stop, self.batch_size):
                yield self._eval_job(np.arange(first, min(first + self.batch_size, stop)))

    def _train_positions(self, consumed: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """(ids, epochs) of the rank's micro batches: its slice of each global batch, cut by gradient accumulation."""
        steps = self.config.solver.grad_accumulation_steps
        global_batch = self.batch_size * steps * self.world_size
        stream = Stream(len(self.dataset), self.config.seed, self.config.data.shuffle, self.dataset.shard_of)
        for position in itertools.count(consumed, global_batch):
            start, stop = rank_slice(position, global_batch, self.rank, self.world_size)
            for first in range(start, stop, self.batch_size):
                yield stream.take(first, first + self.batch_size)

    def _train_job(self, ids: np.ndarray, epochs: np.ndarray) -> Job:
        data = self.config.data
        requests, frames = [], []
        for b, (sample, epoch) in enumerate(zip(ids.tolist(), epochs.tolist(), strict=True)):
            if data.augmentation == "none":
                drawn, indices = None, sampling.val_indices(int(self.dataset.num_frames[sample]), data.num_segments)
            else:
                rng = augmentation.generator(self.config.seed, epoch, sample)
                drawn = augmentation.draw(data, int(self.dataset.num_frames[sample]), rng)
                indices = drawn.indices

            def geometry(height: int, width: int, drawn: augmentation.Draw | None = drawn) -> Geometry:
                if drawn is None:
                    return augmentation.eval_geometry(height, width, self.config.scale_size, data.input_size, 1)
                return augmentation.train_geometry(drawn, height, width, data.input_size)

            request, planned = self._plan_video(b, sample, indices, geometry)
            requests.append(request)
            frames += planned
        return Job(ids, self.dataset.labels[ids], requests, frames)

    def _eval_job(self, ids: np.ndarray) -> Job:
        data = self.config.data

        def geometry(height: int, width: int) -> Geometry:
            return augmentation.eval_geometry(height, width, self.config.scale_size, data.input_size, data.test_crops)

        requests, frames = [], []
        for b, sample in enumerate(ids.tolist()):
            num_frames = int(self.dataset.num_frames[sample])
            if data.test_clips == 1 and not data.dense:
                indices = sampling.val_indices(num_frames, data.num_segments)
            else:
                indices = sampling.test_indices(num_frames, data.num_segments, data.test_clips, data.dense)
            request, planned = self._plan_video(b, sample, indices, geometry)
            requests.append(request)
            frames += planned
        return Job(ids, self.dataset.labels[ids], requests, frames)

    def _plan_video(
        self, b: int, sample: int, indices: np.ndarray, geometry: Callable[[int, int], Geometry]
    ) -> tuple[tuple[int, np.ndarray], list[Frame]]:
        """The distinct frames of `indices` (clips x T, clip-major) and where each one's crops go.

        View v of crop c of clip k is k * crops + c.
        """
        segments = self.config.data.num_segments
        distinct, where = np.unique(indices, return_inverse=True)
        places: list[list[int]] = [[] for _ in distinct]
        for position, frame in enumerate(where.tolist()):
            places[frame].append(position)
        by_size: dict[tuple[int, int], Geometry] = {}
        frames = []
        for size, positions in zip(self.dataset.frame_sizes(sample, distinct).tolist(), places, strict=True):
            height, width = size
            if (height, width) not in by_size:
                by_size[height, width] = geometry(height, width)
            plan = by_size[height, width]
            targets = tuple(
                (b, position // segments * len(plan.crops) + c, position % segments, crop)
                for position in positions
                for c, crop in enumerate(plan.crops)
            )
            frames.append(Frame(plan, targets))
        return (sample, distinct), frames
