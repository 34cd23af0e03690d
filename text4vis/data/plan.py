"""What every batch holds, decided before anything is read: videos, frames, regions, crops.

    position in the stream -> sample ids and epochs -> frame numbers -> for each distinct frame its geometry and targets

Nothing is read but the data set's index, and every decision is a pure function of it, the configuration and the
position.

B videos, V views, T frames of a view, S side of the model's input; k distinct frames of a video.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property, partial
from typing import NamedTuple

import numpy as np

from shards.annotations import Label
from shards.format import SampleError
from shards.images import MAX_FRAME_PIXELS
from shards.plan import eval_slice, few_shot_subset
from shards.reader import ShardDataset
from text4vis.config.batches import BatchSizes
from text4vis.config.schema import Config, ConfigError
from text4vis.data import augmentation, sampling
from text4vis.data.augmentation import Geometry
from text4vis.data.order import TrainOrder

SUBSTITUTES = 2  # stream of the counter-based generator; augmentation draws from stream 0, mixing from 1

# The videos of a batch: (ids, epochs), each (B,) int64.
Picked = tuple[np.ndarray, np.ndarray]
# Where a crop goes: (v, t, c). Crop c of the frame's geometry becomes frame t of view v.
Target = tuple[int, int, int]


class FramePlan(NamedTuple):
    """One distinct frame of a video: it is read and decoded once, however many views show it.

    number: 0-based, in the video. size: (height, width) in pixels that the index gives. geometry: what becomes of the
    frame's pixels. targets: where its crops go.
    """

    number: int
    size: tuple[int, int]
    geometry: Geometry
    targets: tuple[Target, ...]


class VideoPlan(NamedTuple):
    """One video of a batch.

    sample: its position in the data set. epoch: training's pass over the data; 0 in evaluation. label: the stored one,
    or its mirror image where a flip swaps labels; a tuple of them where videos may have several, or none. frames: k of
    them, numbers ascending.
    """

    sample: int
    epoch: int
    label: Label
    frames: tuple[FramePlan, ...]

    @property
    def numbers(self) -> np.ndarray:
        """The distinct frames' numbers, (k,) int64, ascending."""
        return np.array([frame.number for frame in self.frames], np.int64)


@dataclass(frozen=True)
class BatchPlan:
    """The plan of one batch: B videos in the order of the batch's rows.

    num_classes: C of a data set whose videos may have several labels, or none; None where each has one.
    """

    videos: list[VideoPlan]
    num_classes: int | None = None

    @property
    def ids(self) -> np.ndarray:
        """Positions in the data set, (B,) int64."""
        return np.array([video.sample for video in self.videos], np.int64)

    @property
    def labels(self) -> np.ndarray:
        """Labels, (B,) int64; with `num_classes` whether a video has each, (B, C) bool."""
        if self.num_classes is None:
            return np.array([video.label for video in self.videos], np.int64)
        targets_BC = np.zeros((len(self.videos), self.num_classes), bool)
        for row, video in enumerate(self.videos):
            targets_BC[row, video.label] = True
        return targets_BC

    @property
    def requests(self) -> list[tuple[int, np.ndarray]]:
        """What to read: (sample, frame numbers) of each video, as `ShardDataset.read_many` takes it."""
        return [(video.sample, video.numbers) for video in self.videos]


@dataclass(frozen=True)
class Planner:
    """Plans the batches of one rank.

    split: "train" or "val". ids: with "val", (N,) int64, the videos to go over; None for all. sizes: of the batches; by
    default those that follow from `config` and `world_size`. Raises ConfigError if the configuration names labels that
    the data set does not have, more videos of a class than it holds, or not how frames are resized.
    """

    config: Config
    split: str
    dataset: ShardDataset
    rank: int
    world_size: int
    ids: np.ndarray | None = None
    sizes: BatchSizes | None = None

    def __post_init__(self) -> None:
        num_classes = len(self.dataset.classes)
        if self.split == "train" and max(self._mirrored, default=0) >= num_classes:
            raise ConfigError(
                f"data.flip_swaps: a flip swaps label {max(self._mirrored)}, but there are {num_classes} classes; "
                "name this data set's pairs of labels, or [] if it has none"
            )
        if self.split == "train":
            _ = self.order  # raises its errors before anything is read
        if not self.augments:
            _ = self._eval_geometry  # likewise

    @cached_property
    def few_shot(self) -> np.ndarray | None:
        """The ids that training goes over with `data.shot`, (N,) int64, sorted; None without it.

        The same on every rank. Raises ConfigError if a class has fewer videos: K-shot means K videos of every class.
        """
        data = self.config.data
        if self.split != "train" or not data.shot:
            return None
        if self.dataset.multi_label:
            raise ConfigError(
                f"data.shot: {data.shot} videos of each class cannot be chosen where videos have several labels; leave "
                "it out"
            )
        seed = self.config.seed if data.shot_seed is None else data.shot_seed
        try:
            return few_shot_subset(self.dataset.labels, data.shot, seed)
        except ValueError as error:
            raise ConfigError(f"data.shot: {error}") from None

    @cached_property
    def videos(self) -> np.ndarray:
        """Ids of the videos that the split goes over, all ranks together, (N,) int64."""
        chosen = self.few_shot if self.split == "train" else self.ids
        return np.arange(len(self.dataset)) if chosen is None else chosen

    @cached_property
    def order(self) -> TrainOrder:
        """The order of training, of the split "train". Raises ConfigError."""
        return TrainOrder(self.config, self.dataset, self.videos, self.epoch_samples)

    def few_shot_list(self) -> str:
        """The videos of `few_shot` as an annotation list: `name frames label`, or `name label` for stored videos."""
        data, lines = self.dataset, []
        for sample in [] if self.few_shot is None else self.few_shot.tolist():
            frames = "" if data.content(sample) == "video" else f"{data.num_frames[sample]} "
            lines.append(f"{data.name(sample)} {frames}{data.labels[sample]}\n")
        return "".join(lines)

    @property
    def epoch_samples(self) -> int:
        """Samples in an epoch: the number of videos in the data set, of all sources together in a mixture.

        Few-shot: as many whole passes over the chosen videos as fit into that number, so that an epoch is about as long
        as without (the original's rule). Each pass shuffles and augments anew.
        """
        if self.few_shot is None:
            return len(self.dataset)
        return len(self.dataset) // len(self.few_shot) * len(self.few_shot)

    @property
    def batch_size(self) -> int:
        """Most videos of a batch. In an evaluation a batch has as many views as training's has videos, or
        `data.val_batch_size`, and one video at least."""
        if self.split == "train":
            return self._sizes.micro
        data = self.config.data
        views = data.val_batch_size or (self.sizes.micro if self.sizes else data.batch_size)
        return max(1, views // self.num_views)

    @property
    def num_clips(self) -> int:
        """Clips of a video: 1 in training."""
        return 1 if self.split == "train" else self.config.data.test_clips

    @property
    def num_crops(self) -> int:
        """Crops of a clip: 1 in training."""
        return 1 if self.split == "train" else self.config.data.test_crops

    @property
    def num_views(self) -> int:
        """V, the clips times the crops."""
        return self.num_clips * self.num_crops

    @property
    def views_shape(self) -> tuple[int, int, int, int, int]:
        """(V, T, S, S, 3): a video as it is put into a batch, channels last."""
        data = self.config.data
        return self.num_views, data.num_segments, data.input_size, data.input_size, 3

    @cached_property
    def _sizes(self) -> BatchSizes:
        return self.sizes or BatchSizes.of(self.config, self.world_size)

    @property
    def max_frames(self) -> int:
        """Most distinct frames that one batch can hold."""
        return self.batch_size * self.num_clips * self.config.data.num_segments

    @property
    def augments(self) -> bool:
        """Whether frames and crops are drawn, as in training; else they are those of the evaluation."""
        return self.split == "train" and self.config.data.augmentation != "none"

    def plans(self, consumed: int = 0) -> Iterator[BatchPlan]:
        """The plans of `batches(consumed)`. Raises SampleError as `plan` does."""
        return itertools.starmap(self.plan, self.batches(consumed))

    def batches(self, consumed: int = 0) -> Iterator[Picked]:
        """The ids and epochs of the rank's batches, in order.

        Training: an endless stream that starts after `consumed` samples of the whole job; an epoch is a pass over the
        data. Evaluation: one pass over the rank's share, epoch 0.
        """
        if self.split == "train":
            yield from self._train_batches(consumed)
            return
        start, stop = eval_slice(len(self.videos), self.rank, self.world_size)
        for first in range(start, stop, self.batch_size):
            ids = self.videos[first : min(first + self.batch_size, stop)]
            yield ids, np.zeros_like(ids)

    def plan(self, ids: np.ndarray, epochs: np.ndarray) -> BatchPlan:
        """The plan of the batch of these videos, `ids` and `epochs` (B,) int64. Raises SampleError as `plan_video`."""
        return self.batch_plan([self.plan_video(*pair) for pair in zip(ids.tolist(), epochs.tolist(), strict=True)])

    def batch_plan(self, videos: list[VideoPlan]) -> BatchPlan:
        """The plan of a batch that holds these videos."""
        return BatchPlan(videos, len(self.dataset.classes) if self.dataset.multi_label else None)

    def plan_video(self, sample: int, epoch: int) -> VideoPlan:
        """The plan of one video, which depends on (seed, epoch, sample) alone.

        Raises SampleError if its rows of the index cannot be right, or if its frames, stored or scaled, are larger than
        shards.images.MAX_FRAME_PIXELS.
        """
        label = self.dataset.label_of(sample)
        if not self.augments:
            frames = self._plan_frames(sample, self._test_indices(sample), self._eval_geometry)
            return VideoPlan(sample, epoch, label, frames)
        drawn = self._draw(sample, epoch)
        if drawn.flip:
            label = self._mirror(label)
        geometry = partial(augmentation.train_geometry, drawn, side=self.config.data.input_size)
        return VideoPlan(sample, epoch, label, self._plan_frames(sample, drawn.indices, geometry))

    def frame_numbers(self, sample: int, epoch: int) -> np.ndarray:
        """The frames that `plan_video` chooses, (clips * T,) int64, clip after clip; one may occur several times."""
        return self._draw(sample, epoch).indices if self.augments else self._test_indices(sample)

    def _draw(self, sample: int, epoch: int) -> augmentation.Draw:
        rng = augmentation.generator(self.config.seed, epoch, sample)
        return augmentation.draw(self.config.data, int(self.dataset.num_frames[sample]), rng)

    def _test_indices(self, sample: int) -> np.ndarray:
        data, num_frames = self.config.data, int(self.dataset.num_frames[sample])
        return sampling.test_indices(num_frames, data.num_segments, self.num_clips, data.dense)

    def substitutes(self, sample: int, epoch: int) -> Iterator[int]:
        """Videos to try one after another where `sample` cannot be used in `epoch`; none in evaluation.

        Drawn from `videos`, in a mixture from those of the sample's source, by (seed, epoch, sample) alone, so they are
        the same at every world size, in every batch and after every restart.
        """
        if self.split == "train":
            peers = self.order.peers(sample)
            rng = augmentation.generator(self.config.seed, epoch, sample, SUBSTITUTES)
            while True:
                yield int(peers[int(rng.random() * len(peers))])

    def _train_batches(self, consumed: int) -> Iterator[Picked]:
        """The rank's micro batches: its share of each global batch, cut by gradient accumulation."""
        global_batch = self._sizes.global_batch
        for start in itertools.count(consumed, global_batch):
            ids, epochs = self.order.share(start, global_batch, self.rank, self.world_size)
            for first in range(0, len(ids), self.batch_size):
                yield ids[first : first + self.batch_size], epochs[first : first + self.batch_size]

    def _mirror(self, label: Label) -> Label:
        if isinstance(label, tuple):
            return tuple(self._mirrored.get(one, one) for one in label)
        return self._mirrored.get(label, label)

    @cached_property
    def _mirrored(self) -> dict[int, int]:
        return augmentation.flip_swaps(self.config.data)

    @cached_property
    def _eval_geometry(self) -> Callable[[int, int], Geometry]:
        resize, interpolation = augmentation.frame_rule(self.config.data)
        return partial(
            augmentation.eval_geometry,
            scale_size=self.config.scale_size,
            side=self.config.data.input_size,
            num_crops=self.num_crops,
            resize=resize,
            interpolation=interpolation,
        )

    @cached_property
    def _targets(self) -> list[tuple[Target, ...]]:
        """The targets of the frame at each of the clips * T positions, clip after clip.

        View v of crop c of clip k is k * crops + c.
        """
        return [
            tuple((clip * self.num_crops + c, t, c) for c in range(self.num_crops))
            for clip in range(self.num_clips)
            for t in range(self.config.data.num_segments)
        ]

    def _plan_frames(
        self, sample: int, indices: np.ndarray, geometry: Callable[[int, int], Geometry]
    ) -> tuple[FramePlan, ...]:
        """The distinct frames of `indices` (clips * T,), clip after clip; `geometry` maps (height, width) to theirs."""
        targets: dict[int, tuple[Target, ...]] = {}
        for position, number in enumerate(indices.tolist()):
            targets[number] = targets.get(number, ()) + self._targets[position]
        numbers = sorted(targets)
        by_size: dict[tuple[int, int], Geometry] = {}
        frames = []
        for number, size in zip(numbers, self.dataset.frame_sizes(sample, np.array(numbers, np.int64)), strict=True):
            if size not in by_size:
                by_size[size] = self._checked_geometry(sample, number, size, geometry)
            frames.append(FramePlan(number, size, by_size[size], targets[number]))
        return tuple(frames)

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
