"""What every batch holds, decided before anything is read: videos, frames, regions, crops. Pure but for the index.

    stream position -> sample ids and epochs -> frame numbers -> for each distinct frame its geometry and its places

B videos, V views, T frames; F distinct frames of a batch, each read and decoded once however many views show it.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from shards.plan import Stream, eval_slice, few_shot_subset, rank_slice
from shards.reader import ShardDataset
from text4vis import augmentation, sampling
from text4vis.augmentation import Crop, Geometry
from text4vis.config import Config, ConfigError


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
    """The plans of one rank's batches of the split "train" or "val". Raises ConfigError for what the data forbid.

    ids: the videos of "val" where not all are wanted.
    """

    config: Config
    split: str
    dataset: ShardDataset
    rank: int
    world_size: int
    ids: np.ndarray | None = None

    def __post_init__(self) -> None:
        num_classes = len(self.dataset.classes)
        if self.split == "train" and max(self._mirrored, default=0) >= num_classes:
            raise ConfigError(
                f"data.flip_swaps: a flip swaps label {max(self._mirrored)}, but there are {num_classes} classes; "
                "name this data set's pairs of labels, or [] if it has none"
            )

    @cached_property
    def few_shot(self) -> np.ndarray | None:
        """Ids, sorted, that training goes over with `data.shot`: the same on every rank. None: over all videos.

        Raises ConfigError if a class has fewer videos: K-shot means K videos of every class.
        """
        data = self.config.data
        if self.split != "train" or not data.shot:
            return None
        seed = self.config.seed if data.shot_seed is None else data.shot_seed
        try:
            return few_shot_subset(self.dataset.labels, data.shot, seed)
        except ValueError as error:
            raise ConfigError(f"data.shot: {error}") from None

    def few_shot_list(self) -> str:
        """The chosen videos as an annotation list: `name frames label`, or `name label` for stored videos."""
        data, lines = self.dataset, []
        for sample in [] if self.few_shot is None else self.few_shot.tolist():
            frames = "" if data.content(sample) == "video" else f"{data.num_frames[sample]} "
            lines.append(f"{data.name(sample)} {frames}{data.labels[sample]}\n")
        return "".join(lines)

    @property
    def epoch_samples(self) -> int:
        """Samples in an epoch: the data set's number of videos. Few-shot: as many whole passes over the chosen videos
        as that number holds, so that an epoch is about as long as without (the original's rule). Each pass shuffles
        and augments anew.
        """
        if self.few_shot is None:
            return len(self.dataset)
        return len(self.dataset) // len(self.few_shot) * len(self.few_shot)

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
            ids = np.arange(len(self.dataset)) if self.ids is None else self.ids
            start, stop = eval_slice(len(ids), self.rank, self.world_size)
            for first in range(start, stop, self.batch_size):
                yield self._eval_job(ids[first : min(first + self.batch_size, stop)])

    def _train_positions(self, consumed: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """(ids, passes) of the rank's micro batches: its slice of each global batch, cut by gradient accumulation.

        A pass goes once over all videos, or over the few that were chosen.
        """
        steps = self.config.solver.grad_accumulation_steps
        global_batch = self.batch_size * steps * self.world_size
        chosen = self.few_shot
        shard_of = self.dataset.shard_of if chosen is None else self.dataset.shard_of[chosen]
        stream = Stream(len(shard_of), self.config.seed, self.config.data.shuffle, shard_of)
        for position in itertools.count(consumed, global_batch):
            start, stop = rank_slice(position, global_batch, self.rank, self.world_size)
            for first in range(start, stop, self.batch_size):
                ids, passes = stream.take(first, first + self.batch_size)
                yield (ids if chosen is None else chosen[ids]), passes

    def _train_job(self, ids: np.ndarray, epochs: np.ndarray) -> Job:
        data = self.config.data
        requests, frames = [], []
        labels = self.dataset.labels[ids]  # a copy
        for b, (sample, epoch) in enumerate(zip(ids.tolist(), epochs.tolist(), strict=True)):
            if data.augmentation == "none":
                drawn, indices = None, self._eval_indices(sample, 1)
            else:
                rng = augmentation.generator(self.config.seed, epoch, sample)
                drawn = augmentation.draw(data, int(self.dataset.num_frames[sample]), rng)
                indices = drawn.indices
                if drawn.flip:
                    labels[b] = self._mirrored.get(int(labels[b]), labels[b])

            def geometry(height: int, width: int, drawn: augmentation.Draw | None = drawn) -> Geometry:
                if drawn is None:
                    return augmentation.eval_geometry(height, width, self.config.scale_size, data.input_size, 1)
                return augmentation.train_geometry(drawn, height, width, data.input_size)

            request, planned = self._plan_video(b, sample, indices, geometry)
            requests.append(request)
            frames += planned
        return Job(ids, labels, requests, frames)

    @cached_property
    def _mirrored(self) -> dict[int, int]:
        return augmentation.flip_swaps(self.config.data)

    def _eval_job(self, ids: np.ndarray) -> Job:
        data = self.config.data

        def geometry(height: int, width: int) -> Geometry:
            return augmentation.eval_geometry(height, width, self.config.scale_size, data.input_size, data.test_crops)

        requests, frames = [], []
        for b, sample in enumerate(ids.tolist()):
            request, planned = self._plan_video(b, sample, self._eval_indices(sample, data.test_clips), geometry)
            requests.append(request)
            frames += planned
        return Job(ids, self.dataset.labels[ids], requests, frames)

    def _eval_indices(self, sample: int, num_clips: int) -> np.ndarray:
        data = self.config.data
        return sampling.test_indices(int(self.dataset.num_frames[sample]), data.num_segments, num_clips, data.dense)

    def _plan_video(
        self, b: int, sample: int, indices: np.ndarray, geometry: Callable[[int, int], Geometry]
    ) -> tuple[tuple[int, np.ndarray], list[Frame]]:
        """The distinct frames of `indices` (clips x T, clip-major) and where each one's crops go.

        View v of crop c of clip k is k * crops + c.
        """
        segments = self.config.data.num_segments
        places: dict[int, list[int]] = {}
        for position, frame in enumerate(indices.tolist()):
            places.setdefault(frame, []).append(position)
        distinct = np.array(sorted(places), np.int64)
        by_size: dict[tuple[int, int], Geometry] = {}
        frames = []
        for frame, size in zip(distinct.tolist(), self.dataset.frame_sizes(sample, distinct), strict=True):
            if size not in by_size:
                by_size[size] = geometry(*size)
            plan = by_size[size]
            targets = tuple(
                (b, position // segments * len(plan.crops) + c, position % segments, crop)
                for position in places[frame]
                for c, crop in enumerate(plan.crops)
            )
            frames.append(Frame(plan, targets))
        return (sample, distinct), frames
