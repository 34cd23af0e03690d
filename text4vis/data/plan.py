"""What every batch holds, decided before anything is read: videos, frames, regions, crops. Pure but for the index.

    stream position -> sample ids and epochs -> frame numbers -> for each distinct frame its geometry and its places

B videos, V views, T frames; F distinct frames of a batch, each read and decoded once however many views show it.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np

from shards.format import SampleError
from shards.images import MAX_FRAME_PIXELS
from shards.plan import eval_slice, few_shot_subset
from shards.reader import ShardDataset
from text4vis.config.schema import Config, ConfigError
from text4vis.data import augmentation, sampling
from text4vis.data.augmentation import Geometry
from text4vis.data.order import TrainOrder

SUBSTITUTES = 2  # stream of the counter-based generator; augmentation draws from stream 0, mixing from 1


class Frame(NamedTuple):
    """One distinct frame of a batch: what is cut from it, and where: (b, v, t, c), c of `geometry.crops`.

    A batch has hundreds. Tuples of numbers are nothing that Python's garbage collector would have to follow.
    """

    geometry: Geometry
    targets: tuple[tuple[int, int, int, int], ...]


PlannedVideo = tuple[tuple[int, np.ndarray], list[Frame], list[tuple[int, int]]]


@dataclass(frozen=True)
class Job:
    """The plan of one batch: for each video its distinct frames' indices, and the F frames in the same order.

    ids, epochs, labels: (B,) int64. sizes: (height, width) of the F frames as the index has them, pixels.
    """

    ids: np.ndarray
    epochs: np.ndarray
    labels: np.ndarray
    requests: list[tuple[int, np.ndarray]]
    frames: list[Frame]
    sizes: list[tuple[int, int]]


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
        if self.split == "train":
            _ = self.order  # what it complains of is said before anything is read

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

    @cached_property
    def videos(self) -> np.ndarray:
        """Ids, sorted, of the videos that the split goes over, all ranks together."""
        chosen = self.few_shot if self.split == "train" else self.ids
        return np.arange(len(self.dataset)) if chosen is None else chosen

    @cached_property
    def order(self) -> TrainOrder:
        """The order of training, of the split "train". Raises ConfigError."""
        return TrainOrder(self.config, self.dataset, self.videos, self.epoch_samples)

    def few_shot_list(self) -> str:
        """The chosen videos as an annotation list: `name frames label`, or `name label` for stored videos."""
        data, lines = self.dataset, []
        for sample in [] if self.few_shot is None else self.few_shot.tolist():
            frames = "" if data.content(sample) == "video" else f"{data.num_frames[sample]} "
            lines.append(f"{data.name(sample)} {frames}{data.labels[sample]}\n")
        return "".join(lines)

    @property
    def epoch_samples(self) -> int:
        """Samples in an epoch: the data set's number of videos, that of all sources together in a mixture. Few-shot:
        as many whole passes over the chosen videos as that number holds, so that an epoch is about as long as without
        (the original's rule). Each pass shuffles and augments anew.
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
        """The plans of `batches`, every video being sound."""
        return (self.job(ids, epochs) for ids, epochs in self.batches(consumed))

    def batches(self, consumed: int = 0) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """(ids, epochs) of the rank's batches in order: an endless stream after `consumed` samples of the whole job, or
        one pass over the rank's share. An epoch of training is a pass over the data, evaluation's is 0."""
        if self.split == "train":
            yield from self._train_batches(consumed)
            return
        start, stop = eval_slice(len(self.videos), self.rank, self.world_size)
        for first in range(start, stop, self.batch_size):
            ids = self.videos[first : min(first + self.batch_size, stop)]
            yield ids, np.zeros_like(ids)

    def job(self, ids: np.ndarray, epochs: np.ndarray) -> Job:
        """The plan of the batch of these videos. Raises SampleError for one whose index rows cannot be right, or whose
        frames are larger than shards.images.MAX_FRAME_PIXELS."""
        return self._train_job(ids, epochs) if self.split == "train" else self._eval_job(ids, epochs)

    def substitutes(self, sample: int, epoch: int) -> Iterator[int]:
        """Videos to take, the first that is sound, where `sample` cannot be used in `epoch`. None in evaluation.

        Drawn from `videos`, in a mixture from those of the sample's source, by (seed, epoch, sample) alone: the same at
        every world size, in every batch and after every restart.
        """
        if self.split == "train":
            peers = self.order.peers(sample)
            rng = augmentation.generator(self.config.seed, epoch, sample, SUBSTITUTES)
            while True:
                yield int(peers[int(rng.random() * len(peers))])

    def _train_batches(self, consumed: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """(ids, passes) of the rank's micro batches: its share of each global batch, cut by gradient accumulation."""
        steps = self.config.solver.grad_accumulation_steps
        global_batch = self.batch_size * steps * self.world_size
        for start in itertools.count(consumed, global_batch):
            ids, passes = self.order.share(start, global_batch, self.rank, self.world_size)
            for first in range(0, len(ids), self.batch_size):
                yield ids[first : first + self.batch_size], passes[first : first + self.batch_size]

    def _train_job(self, ids: np.ndarray, epochs: np.ndarray) -> Job:
        data = self.config.data
        videos = []
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

            videos.append(self._plan_video(b, sample, indices, geometry))
        return _joined(ids, epochs, labels, videos)

    @cached_property
    def _mirrored(self) -> dict[int, int]:
        return augmentation.flip_swaps(self.config.data)

    def _eval_job(self, ids: np.ndarray, epochs: np.ndarray) -> Job:
        data = self.config.data

        def geometry(height: int, width: int) -> Geometry:
            return augmentation.eval_geometry(height, width, self.config.scale_size, data.input_size, data.test_crops)

        videos = [
            self._plan_video(b, sample, self._eval_indices(sample, data.test_clips), geometry)
            for b, sample in enumerate(ids.tolist())
        ]
        return _joined(ids, epochs, self.dataset.labels[ids], videos)

    def _eval_indices(self, sample: int, num_clips: int) -> np.ndarray:
        data = self.config.data
        return sampling.test_indices(int(self.dataset.num_frames[sample]), data.num_segments, num_clips, data.dense)

    def _plan_video(
        self, b: int, sample: int, indices: np.ndarray, geometry: Callable[[int, int], Geometry]
    ) -> PlannedVideo:
        """The distinct frames of `indices` (clips x T, clip-major), where each one's crops go, and their sizes.

        View v of crop c of clip k is k * crops + c.
        """
        segments = self.config.data.num_segments
        places: dict[int, list[int]] = {}
        for position, frame in enumerate(indices.tolist()):
            places.setdefault(frame, []).append(position)
        distinct = np.array(sorted(places), np.int64)
        by_size: dict[tuple[int, int], Geometry] = {}
        frames = []
        sizes = self.dataset.frame_sizes(sample, distinct)
        for frame, size in zip(distinct.tolist(), sizes, strict=True):
            if size not in by_size:
                by_size[size] = self._checked_geometry(sample, frame, size, geometry)
            plan = by_size[size]
            crops = range(len(plan.crops))
            targets = [
                (b, position // segments * len(crops) + c, position % segments, c)
                for position in places[frame]
                for c in crops
            ]
            frames.append(Frame(plan, tuple(targets)))
        return (sample, distinct), frames, sizes

    def _checked_geometry(
        self, sample: int, frame: int, size: tuple[int, int], geometry: Callable[[int, int], Geometry]
    ) -> Geometry:
        height, width = size
        complaint = f"of which 1 to {MAX_FRAME_PIXELS} can be used"
        if 0 < height * width <= MAX_FRAME_PIXELS:
            planned = geometry(height, width)
            if planned.height * planned.width <= MAX_FRAME_PIXELS:
                return planned
            complaint = f"{planned.width}x{planned.height} when scaled, more than {MAX_FRAME_PIXELS}"
        raise SampleError(
            f"{self.dataset.describe(sample)}: frame {frame} is {width}x{height} pixels by the index, {complaint}; "
            "check the data set with tools/check_shards.py, and rebuild it with smaller frames or without the video"
        )


def _joined(ids: np.ndarray, epochs: np.ndarray, labels: np.ndarray, videos: list[PlannedVideo]) -> Job:
    requests, frames, sizes = [], [], []
    for request, planned, sizes_of_video in videos:
        requests.append(request)
        frames += planned
        sizes += sizes_of_video
    return Job(ids, epochs, labels, requests, frames, sizes)
