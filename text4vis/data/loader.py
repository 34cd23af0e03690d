"""From shards to uint8 frames on the device: the steps of the data room put together, each working ahead of the next.

    plan (which videos, frames, crops)  ->  read (only those frames' bytes)  ->  decode (the needed regions)
         ->  finish (resize, crop, flip, colours)  ->  Batch

B videos, V views, T frames, S side of the model's input.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch

from shards.format import SampleError
from shards.reader import ShardDataset
from text4vis.cluster.distributed import cores_per_rank
from text4vis.config.batches import BatchSizes
from text4vis.config.schema import Config, ConfigError
from text4vis.data.bad_videos import BadVideos
from text4vis.data.datasets import open_split
from text4vis.data.decoding import CpuDecoder, Decoder, GpuDecoder
from text4vis.data.finishing import CpuFinisher, Finisher, Finishing, GpuFinisher, Pixels, used_here
from text4vis.data.plan import BatchPlan, Planner
from text4vis.data.prefetch import Prefetcher, pipelined
from text4vis.data.reading import PlanReader
from text4vis.data.repair import Repair


@dataclass(frozen=True)
class Batch:
    """What the model sees.

    frames: (B, V, T, 3, S, S) uint8 on the decoding device, channels last in memory; V is 1 in training.
    labels: (B,) int64 on the CPU; (B, C) bool, whether a video has each of the data set's classes, where videos may
    have several labels, or none. ids: (B,) int64 on the CPU, positions in the data set.
    """

    frames: torch.Tensor
    labels: torch.Tensor
    ids: torch.Tensor


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
    `dataset`; `planner`, which decides what the batches hold; `device`, where frames are decoded; `bad`, the videos
    that `data.on_error: skip` has skipped.
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
        self.device = _decode_device(config)
        self.bad = BadVideos(dataset, self.planner.videos, config.data.max_bad_share, endless=split == "train")
        self._consumed, self._owns_dataset = consumed, owns_dataset
        self._num_threads = config.data.workers or cores_per_rank()
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
        batches = self._synthetic() if self.config.data.synthetic else self._batches()
        running = Prefetcher(batches, self.config.data.prefetch, f"{self.split}-loader", self._receive)
        self._running.add(running)
        return running

    def _receive(self, batch: Batch) -> None:
        if batch.frames.is_cuda:
            used_here(batch.frames)

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

    def _batches(self) -> Generator[Batch, None, None]:
        """Starts the threads, and chooses the steps for the device."""
        finish_threads = max(1, self._num_threads // 2)  # finishing takes a third of the time that decoding takes
        with (
            ThreadPoolExecutor(1, "read") as reads,
            ThreadPoolExecutor(self._num_threads, "decode") as decodes,
            ThreadPoolExecutor(finish_threads, "finish") as finishes,
        ):
            on_gpu, views_shape = self.device.type == "cuda", self.planner.views_shape
            reader = PlanReader(self.dataset, self.planner, reads, in_parts=not on_gpu)
            if on_gpu:
                torch.cuda.set_device(self.device)  # of this thread, which would else open GPU 0 too
                yield from self._steps(
                    reader, lambda: self._gpu_decoder(decodes), GpuFinisher(views_shape, self.device)
                )
            else:
                finisher = CpuFinisher(views_shape, finishes, finish_threads)
                yield from self._steps(reader, lambda: self._cpu_decoder(decodes), finisher)

    def _steps(
        self, reader: PlanReader, make_decoder: Callable[[], Decoder[Pixels]], finisher: Finisher[Pixels]
    ) -> Generator[Batch, None, None]:
        """Reads, decodes and finishes batch after batch."""
        decoder = make_decoder()
        repair = Repair(self.dataset, self.planner, reader, make_decoder, self.bad)
        unreadable, undecodable = ((SampleError,), (SampleError, RuntimeError)) if self._skips else ((), ())
        picked = self.dataset.ahead(self.planner.batches(self._consumed), lambda batch: batch[0])
        begun = pipelined(picked, reader.begin, lambda batch: batch, reader.batches_ahead)
        read = pipelined(
            begun, reader.start, reader.finish, 2, recover=lambda batch: repair.reread(batch.picked), errors=unreadable
        )
        decoded = pipelined(read, decoder.start, decoder.finish, 1, recover=repair.redecode, errors=undecodable)
        for videos, frames_BVTSS3 in pipelined(decoded, finisher.start, Finishing.result, 2):
            if videos:  # in evaluation nothing may be left of a batch
                yield _batch(self.planner.batch_plan(videos), frames_BVTSS3)

    @property
    def _skips(self) -> bool:
        return self.config.data.on_error == "skip"

    def _cpu_decoder(self, threads: ThreadPoolExecutor) -> CpuDecoder:
        return CpuDecoder(self.dataset, threads, num_threads=self._num_threads, max_frames=self.planner.max_frames)

    def _gpu_decoder(self, threads: ThreadPoolExecutor) -> GpuDecoder:
        assert self.device.index is not None
        return GpuDecoder(
            self.dataset,
            threads,
            device_id=self.device.index,
            num_threads=self._num_threads,
            resize="linear" if self.planner.augments or self.config.data.interpolation == "bilinear" else "cubic",
            max_frames=self.planner.max_frames,
            max_videos=self.planner.batch_size,
        )

    def _synthetic(self) -> Generator[Batch, None, None]:
        """Batches of the right shapes, ids and labels, whose frames are one block of noise: they cost nothing."""
        shape = (self.planner.batch_size, *self.planner.views_shape)
        generator = torch.Generator().manual_seed(self.config.seed)
        noise_BVTSS3 = torch.randint(256, shape, dtype=torch.uint8, generator=generator).to(self.device)
        for plan in self.plans():
            yield _batch(plan, noise_BVTSS3[: len(plan.videos)])


def _batch(plan: BatchPlan, frames_BVTSS3: torch.Tensor) -> Batch:
    return Batch(frames_BVTSS3.permute(0, 1, 2, 5, 3, 4), torch.from_numpy(plan.labels), torch.from_numpy(plan.ids))


def _decode_device(config: Config) -> torch.device:
    """Where frames are decoded and batches end up."""
    if config.data.decode == "gpu" and not torch.cuda.is_available():
        raise ConfigError("data.decode: gpu asked for, but no GPU is visible; use --set data.decode=cpu")
    if config.data.decode == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", torch.cuda.current_device())
