"""From shards to uint8 frames on the device: the steps of the data room put together, each working ahead of the next.

    plan (which videos, frames, crops)  ->  read (only those frames' bytes)  ->  decode (the needed regions)
         ->  finish (resize, crop, flip, colours)  ->  hand over to the consumer's thread  ->  Batch

On a GPU one graph decodes and finishes. Where there is a GPU, every batch is on it when it leaves the loader.

B videos, V views, T frames, S side of the model's input.
"""

from __future__ import annotations

import logging
import weakref
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch

from shards.format import SampleError
from shards.reader import ShardDataset
from text4vis.cluster import distributed
from text4vis.config.batches import BatchSizes
from text4vis.config.schema import Config, ConfigError
from text4vis.data.augmentation import num_operations
from text4vis.data.bad_videos import BadVideos
from text4vis.data.datasets import open_split
from text4vis.data.decoding import CpuDecoder, Decoder, Done_co
from text4vis.data.finishing import CpuFinisher, Finishing
from text4vis.data.gpu_decoding import GpuDecoder, VideoChoice
from text4vis.data.handover import CudaGpu, Event, HandOver, SameMemory, Sent
from text4vis.data.plan import BatchPlan, Planner, VideoPlan
from text4vis.data.prefetch import Prefetcher, pipelined
from text4vis.data.reading import PlanReader
from text4vis.data.repair import Repair

logger = logging.getLogger("text4vis")

# Videos, what makes their frames (B, V, T, S, S, 3) uint8 on a device, and what it makes them from.
Made = tuple[list[VideoPlan], Callable[[torch.device], torch.Tensor], object]


@dataclass(frozen=True)
class Batch:
    """What the model sees.

    frames: (B, V, T, 3, S, S) uint8 on the rank's GPU, or on the CPU where there is none; channels last in memory; V
    is 1 in training. labels: (B,) int64 on the CPU; (B, C) bool, whether a video has each of the data set's classes,
    where videos may have several labels, or none. ids: (B,) int64 on the CPU, positions in the data set. ready: on a
    GPU, the event after which the frames are there; the stream of the thread that takes the batch waits for it already.
    """

    frames: torch.Tensor
    labels: torch.Tensor
    ids: torch.Tensor
    ready: Event | None = None


def build_loader(
    config: Config,
    split: str,
    *,
    rank: int = 0,
    world_size: int = 1,
    consumed: int = 0,
    sizes: BatchSizes | None = None,
) -> Loader:
    """The batches of one rank. sizes: of these batches; by default they follow from `config` and `world_size`.

    split: "train" is an endless stream that starts after `consumed` samples of the whole job; "val" is one finite pass
    over the rank's share, in which all ranks together see every video once. Raises ConfigError if keys do not fit the
    data or the machine, shards.ShardError if the data set cannot be opened, ValueError for another split.
    """
    if split not in {"train", "val"}:
        raise ValueError(f"split must be 'train' or 'val', got {split!r}")
    dataset = open_split(config, split)
    return Loader(config, split, dataset, rank=rank, world_size=world_size, consumed=consumed, sizes=sizes)


class Loader:
    """Iterable of Batch, made by `build_loader` or `subset`. Close it, or use it as a context manager.

    A loader of `build_loader` owns its data set and closes it; one of `subset` does not. Attributes: `config`, `split`,
    `dataset`; `planner`, which decides what the batches hold; `device`, where frames are decoded (batches are on the
    rank's GPU either way, if it has one); `bad`, the videos that `data.on_error: skip` has skipped.
    """

    def __init__(
        self,
        config: Config,
        split: str,
        dataset: ShardDataset,
        *,
        rank: int,
        world_size: int,
        consumed: int = 0,
        ids: np.ndarray | None = None,
        owns_dataset: bool = True,
        sizes: BatchSizes | None = None,
    ) -> None:
        if not len(dataset):
            raise ConfigError(f"data.{split}: the data set {', '.join(dataset.places)} holds no videos")
        self.config, self.split, self.dataset = config, split, dataset
        self.world_size = world_size
        self.planner = Planner(config, split, dataset, rank, world_size, ids, sizes)
        self.device = _decode_device(config, split, self.planner)
        self._target = distributed.device()
        self.bad = BadVideos(dataset, self.planner.videos, config.data.max_bad_share, endless=split == "train")
        self._consumed, self._owns_dataset = consumed, owns_dataset
        self._num_threads = config.data.workers or distributed.cores_per_rank()
        self._finish_threads = max(1, self._num_threads // 2)  # it takes a third of the time that decoding takes
        self._choice = VideoChoice(dataset)
        self._running: weakref.WeakSet[Prefetcher[Batch]] = weakref.WeakSet()

    @property
    def epoch_samples(self) -> int:
        """Samples in an epoch of training, see `Planner.epoch_samples`."""
        return self.planner.epoch_samples

    @property
    def batch_size(self) -> int:
        """Most videos of a batch."""
        return self.planner.batch_size

    def plans(self) -> Iterator[BatchPlan]:
        """The plans behind the batches, without reading anything. Raises SampleError as `Planner.plan_video` does."""
        return self.planner.plans(self._consumed)

    def subset(self, ids: np.ndarray, *, config: Config | None = None, rank: int = 0, world_size: int = 1) -> Loader:
        """A loader of one finite pass over some videos of this loader's data set, as an evaluation sees them.

        ids: (N,) int64, positions in the data set. config: where it is not this loader's. The data set stays this
        loader's: close this one last. Raises ConfigError.
        """
        return Loader(
            config or self.config, "val", self.dataset, rank=rank, world_size=world_size, ids=ids, owns_dataset=False
        )

    def __iter__(self) -> Prefetcher[Batch]:
        """A new pass, prepared by a thread. Close it, or the loader, if you leave it before its end.

        Raises ShardError where a video cannot be used and `data.on_error` is `fail`, or where too many cannot.
        """
        hand_over = HandOver(CudaGpu(self._target)) if self._target.type == "cuda" else SameMemory()
        running = Prefetcher(
            self._batches(hand_over),
            self.config.data.prefetch - 1,  # one more is finished, or nearly so, behind the one that waits for room
            f"{self.split}-loader",
            lambda batch: hand_over.receive(batch.frames, batch.ready),
        )
        self._running.add(running)
        return running

    def close(self) -> None:
        """Stops the threads of all passes; closes the data set if it is the loader's own."""
        for running in list(self._running):
            running.close()
        if self._owns_dataset:
            self.dataset.close()

    def __enter__(self) -> Loader:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _batches(self, hand_over: HandOver | SameMemory) -> Generator[Batch, None, None]:
        """Hands over batch after batch."""
        if self._target.type == "cuda":
            torch.cuda.set_device(self._target)  # of this thread, which would else open GPU 0 too
        if self.config.data.synthetic:
            yield from self._synthetic(hand_over)
            return
        with (
            ThreadPoolExecutor(1, "read") as reads,
            ThreadPoolExecutor(self._num_threads, "decode") as decodes,
            ThreadPoolExecutor(self._finish_threads, "finish") as finishes,
        ):
            on_gpu = self.device.type == "cuda"
            reader = PlanReader(self.dataset, self.planner, reads, in_parts=not on_gpu)
            made = self._made_on_gpu(reader, decodes) if on_gpu else self._made_on_cpu(reader, decodes, finishes)
            try:
                for videos, make, sources in made:
                    if videos:  # in evaluation nothing may be left of a batch
                        sent = hand_over.send(partial(make, self._target), sources)
                        yield _batch(self.planner.batch_plan(videos), sent)
            finally:
                self._choice.say()

    def _made_on_cpu(
        self, reader: PlanReader, decodes: ThreadPoolExecutor, finishes: ThreadPoolExecutor
    ) -> Iterator[Made]:
        """Decodes and finishes on the CPU; what is left to do is the copy to the GPU, if there is one."""
        pinned = self._target.type == "cuda"
        finisher = CpuFinisher(self.planner.views_shape, finishes, self._finish_threads, pinned=pinned)
        regions = self._decoded(reader, lambda: CpuDecoder(self.dataset, decodes, num_threads=self._num_threads))
        for videos, frames_BVTSS3 in pipelined(regions, finisher.start, Finishing.result, 1, gradual=True):
            yield videos, partial(frames_BVTSS3.to, non_blocking=True), frames_BVTSS3

    def _made_on_gpu(self, reader: PlanReader, decodes: ThreadPoolExecutor) -> Iterator[Made]:
        """Decodes and finishes on the GPU; what is left to do is to put the frames into their order."""
        graph = {"device_id": self._target.index, "num_threads": self._num_threads}
        for decoded in self._decoded(reader, lambda: GpuDecoder(self.planner, decodes, self._choice, **graph)):
            yield decoded.videos, decoded.frames, decoded

    def _decoded(self, reader: PlanReader, make_decoder: Callable[[], Decoder[Any, Done_co]]) -> Iterator[Done_co]:
        """Reads and decodes batch after batch; repairs those that cannot be, with `data.on_error: skip`."""
        decoder = make_decoder()
        repair = Repair(self.dataset, self.planner, reader, make_decoder, self.bad)
        unreadable, undecodable = ((SampleError,), (SampleError, RuntimeError)) if self._skips else ((), ())
        picked = self.dataset.ahead(self.planner.batches(self._consumed), lambda batch: batch[0])
        # Until the first batch is there the others must not share its way.
        begun = pipelined(picked, reader.begin, lambda batch: batch, reader.batches_ahead, gradual=True)
        read = pipelined(
            begun,
            reader.start,
            reader.finish,
            2,
            gradual=True,
            recover=lambda batch: repair.reread(batch.picked),
            errors=unreadable,
        )
        return pipelined(
            read, decoder.start, decoder.finish, 1, gradual=True, recover=repair.redecode, errors=undecodable
        )

    @property
    def _skips(self) -> bool:
        return self.config.data.on_error == "skip"

    def _synthetic(self, hand_over: HandOver | SameMemory) -> Generator[Batch, None, None]:
        """Batches of the right shapes, ids and labels, whose frames are one block of noise: they cost nothing."""
        shape = (self.planner.batch_size, *self.planner.views_shape)
        generator = torch.Generator().manual_seed(self.config.seed)
        noise_BVTSS3 = torch.randint(256, shape, dtype=torch.uint8, generator=generator)
        frames_BVTSS3, ready = hand_over.send(lambda: noise_BVTSS3.to(self._target), noise_BVTSS3)
        for plan in self.plans():
            yield _batch(plan, Sent(frames_BVTSS3[: len(plan.videos)], ready))


def _batch(plan: BatchPlan, sent: Sent) -> Batch:
    labels, ids = torch.from_numpy(plan.labels), torch.from_numpy(plan.ids)
    return Batch(sent.frames.permute(0, 1, 2, 5, 3, 4), labels, ids, sent.ready)


def _decode_device(config: Config, split: str, planner: Planner) -> torch.device:
    """Where frames are decoded. Raises ConfigError where `data.decode` asks for what cannot be done."""
    decode, has_gpu = config.data.decode, torch.cuda.is_available()
    if decode == "gpu" and not has_gpu:
        raise ConfigError("data.decode: gpu asked for, but no GPU is visible; use --set data.decode=cpu")
    if decode == "cpu" or not has_gpu:
        return torch.device("cpu")
    if planner.augments and num_operations(config.data):
        reason = "RandAugment (data.augmentation: paper, or data.randaug.N) is done on the CPU"
        if decode == "gpu":
            raise ConfigError(f"data.decode: gpu asked for, but {reason}; use --set data.decode=auto")
        logger.info("data.decode: auto decodes data.%s on the CPU, because %s", split, reason)
        return torch.device("cpu")
    return distributed.device()
