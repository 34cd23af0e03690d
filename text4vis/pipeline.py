"""From shards to uint8 frames on the device: plan, read, decode, resize, crop. The only module that knows DALI.

    plan (which videos, frames, crops; pure)  ->  read (threads, only those frames' bytes)
         ->  decode the needed region (DALI: `cpu` or `mixed`)  ->  resize, crop, flip, grey  ->  Batch

Every decision is made in Python before DALI runs and handed to it as arguments; DALI draws no random number. One graph
serves both devices. On a GPU it also resizes. On a CPU its resize is the slowest step by far, so OpenCV (training) and
Pillow (evaluation, the published recipe's own bicubic) resize in threads, straight from DALI's output buffers.

B videos, V views, T frames, S side of the model's input; F frames of a batch, each decoded once.
"""

from __future__ import annotations

import io
import itertools
import queue
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, TypeVar

import cv2
import numpy as np
import torch
from nvidia.dali import fn, pipeline_def, types
from PIL import Image
from shards.reader import ShardDataset, open_dataset

from shards.annotations import parse_labels
from shards.format import ShardError
from shards.plan import Stream, eval_slice, rank_slice
from text4vis import augmentation, sampling
from text4vis.augmentation import Crop, Geometry
from text4vis.config import Config, ConfigError
from text4vis.distributed import cores_per_rank

cv2.setNumThreads(1)  # the pipeline's own threads are the parallelism

Item = TypeVar("Item")
Started = TypeVar("Started")
Done = TypeVar("Done")


@dataclass(frozen=True)
class Batch:
    """What the model sees. V is 1 in training.

    frames: (B, V, T, 3, S, S) uint8 on the device, channels last in memory. labels, ids: (B,) int64 on the CPU; ids are
    positions in the data set.
    """

    frames: torch.Tensor
    labels: torch.Tensor
    ids: torch.Tensor


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


def build_loader(config: Config, split: str, *, rank: int = 0, world_size: int = 1, consumed: int = 0) -> Loader:
    """The batches of one rank.

    split: "train" is endless and starts after `consumed` samples of the whole job; "val" is one finite pass over the
    rank's share, every video once over all ranks. Raises ConfigError or shards.format.ShardError.
    """
    if split not in {"train", "val"}:
        raise ValueError(f"split must be 'train' or 'val', got {split!r}")
    dataset = open_split(config, split)
    return Loader(config, split, dataset, rank=rank, world_size=world_size, consumed=consumed)


def open_split(config: Config, split: str) -> ShardDataset:
    """The data set behind `data.train` or `data.val`."""
    sources = config.data.train if split == "train" else config.data.val
    if not sources:
        raise ConfigError(f"data.{split}: no shards named; build them with tools/build_shards.py and name the folder")
    return open_dataset(
        list(sources),
        cache_dir=config.data.cache_dir,
        cache_bytes=config.data.cache_bytes or None,
        verify=config.data.verify,
    )


def class_names(config: Config, dataset: ShardDataset) -> list[str]:
    """Names by label: those of `data.label_list`, or those stored in the shards."""
    if config.data.label_list is None:
        return list(dataset.classes)
    names = parse_labels(config.data.label_list)
    if len(dataset) and int(dataset.labels.max()) >= len(names):
        raise ConfigError(
            f"data.label_list: {config.data.label_list} names {len(names)} classes, but the shards hold label "
            f"{int(dataset.labels.max())}; give the list that the shards were built with"
        )
    return names


class Loader:
    """Iterable of Batch; see `build_loader`. Close it (or use it as a context manager) to stop its threads."""

    def __init__(
        self, config: Config, split: str, dataset: ShardDataset, *, rank: int, world_size: int, consumed: int
    ) -> None:
        self.config, self.split, self.dataset = config, split, dataset
        self.rank, self.world_size, self.consumed = rank, world_size, consumed
        if not len(dataset):
            raise ConfigError(f"data.{split}: the data set {', '.join(getattr(config.data, split))} holds no videos")
        self.num_threads = config.data.workers or cores_per_rank()
        self.device = _decode_device(config)
        self._workers: list[_Worker] = []

    def __iter__(self) -> Iterator[Batch]:
        worker = _Worker(self)
        self._workers.append(worker)
        return worker

    def close(self) -> None:
        for worker in self._workers:
            worker.close()
        self._workers.clear()

    def __enter__(self) -> Loader:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

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

    def jobs(self) -> Iterator[Job]:
        """The plans of the rank's batches, in order. Pure: reads nothing but the index."""
        if self.split == "train":
            for ids, epochs in self._train_positions():
                yield self._train_job(ids, epochs)
        else:
            start, stop = eval_slice(len(self.dataset), self.rank, self.world_size)
            for first in range(start, stop, self.batch_size):
                yield self._eval_job(np.arange(first, min(first + self.batch_size, stop)))

    def _train_positions(self) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """(ids, epochs) of the rank's micro batches: its slice of each global batch, cut by gradient accumulation."""
        steps = self.config.solver.grad_accumulation_steps
        global_batch = self.batch_size * steps * self.world_size
        stream = Stream(len(self.dataset), self.config.seed, self.config.data.shuffle, self.dataset.shard_of)
        for position in itertools.count(self.consumed, global_batch):
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


def _decode_device(config: Config) -> torch.device:
    """Where frames are decoded and batches end up."""
    if config.data.decode == "gpu" and not torch.cuda.is_available():
        raise ConfigError("data.decode: gpu asked for, but no GPU is visible; use --set data.decode=cpu")
    if config.data.decode == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", torch.cuda.current_device())


def decode_graph(*, device_id: int | None, num_threads: int, max_frames: int, resize: str | None) -> Any:
    """The DALI pipeline, not yet built: encoded frames -> RGB regions (H, W, 3) uint8, one per frame.

    device_id: GPU for decoding ("mixed"), or None for the CPU. resize: None, "linear" or "cubic" (both with antialias)
    to the size given with each frame. Inputs: `encoded`, `start`, `shape` (top-left, height-width of the region) and,
    with resize, `size`.
    """

    @pipeline_def(
        batch_size=max_frames, num_threads=num_threads, device_id=device_id, prefetch_queue_depth=1, exec_dynamic=True
    )
    def graph() -> Any:
        encoded = fn.external_source(name="encoded", dtype=types.UINT8, ndim=1, no_copy=True)
        start = fn.external_source(name="start", dtype=types.INT32, ndim=1)
        shape = fn.external_source(name="shape", dtype=types.INT32, ndim=1)
        images = fn.decoders.image_slice(
            encoded,
            start=start,
            shape=shape,
            axes=(0, 1),
            device="cpu" if device_id is None else "mixed",
            output_type=types.RGB,
            adjust_orientation=False,  # as Pillow: EXIF orientation is not applied
            jpeg_fancy_upsampling=True,  # as Pillow
        )
        if resize is not None:
            size = fn.external_source(name="size", dtype=types.FLOAT, ndim=1)
            kind = {"linear": types.INTERP_LINEAR, "cubic": types.INTERP_CUBIC}[resize]
            images = fn.resize(images, size=size, interp_type=kind, antialias=True)
        return images

    return graph()


def pipelined(
    items: Iterable[Item], start: Callable[[Item], Started], finish: Callable[[Started], Done], depth: int
) -> Iterator[Done]:
    """Yields finish(start(item)) in order, with `depth` items started ahead of the one being finished."""
    pending: deque[Started] = deque()
    for item in items:
        pending.append(start(item))
        if len(pending) > depth:
            yield finish(pending.popleft())
    while pending:
        yield finish(pending.popleft())


class _Worker(Iterator[Batch]):
    """One running pass of a loader: a thread that drives reading, decoding and finishing into a bounded queue."""

    def __init__(self, loader: Loader) -> None:
        self._loader = loader
        self._queue: queue.Queue[Any] = queue.Queue(maxsize=loader.config.data.prefetch)
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, name=f"{loader.split}-loader", daemon=True)
        self._thread.start()

    def __next__(self) -> Batch:
        item = self._queue.get()
        if isinstance(item, Batch):
            return item
        self._put(item)  # the end and an error stay the answer of every later call
        if item is None:
            raise StopIteration
        raise item

    def close(self) -> None:
        """Stops the thread and waits for it. The iterator then ends."""
        self._stopped.set()
        while self._thread.is_alive():
            try:
                self._queue.get_nowait()
            except queue.Empty:
                self._thread.join(timeout=0.05)
        self._queue = queue.Queue()
        self._queue.put(None)

    def _put(self, item: Any) -> bool:
        while not self._stopped.is_set():
            try:
                self._queue.put(item, timeout=0.1)
                return True
            except queue.Full:
                continue
        return False

    def _run(self) -> None:
        try:
            for batch in self._batches():
                if not self._put(batch):
                    return
            self._put(None)
        except BaseException as error:  # whatever it is, the consumer must see it
            self._put(error)

    def _batches(self) -> Iterator[Batch]:
        loader = self._loader
        if loader.config.data.synthetic:
            yield from map(_Synthetic(loader), loader.jobs())
            return
        threads = loader.num_threads
        with ThreadPoolExecutor(1, "read") as reads, ThreadPoolExecutor(threads, "finish") as finishes:
            decoder = _Decoder(loader)
            finisher = _Finisher(loader, finishes)
            read = pipelined(
                loader.jobs(),
                lambda job: (job, reads.submit(loader.dataset.read_many, job.requests)),
                lambda started: (started[0], started[1].result()),
                depth=2,
            )
            decoded = pipelined(read, decoder.start, decoder.finish, depth=1)
            yield from pipelined(decoded, finisher.start, finisher.finish, depth=1)


class _Decoder:
    """Encoded frames to images, by DALI."""

    def __init__(self, loader: Loader) -> None:
        self._dataset = loader.dataset
        self._on_gpu = loader.device.type == "cuda"
        cubic = loader.split == "val" or loader.config.data.augmentation == "none"
        self._graph = decode_graph(
            device_id=loader.device.index if self._on_gpu else None,
            num_threads=loader.num_threads,
            max_frames=loader.max_frames,
            resize=("cubic" if cubic else "linear") if self._on_gpu else None,
        )
        self._graph.build()

    def start(self, read: tuple[Job, list[list[bytes]]]) -> tuple[Job, list[bytes]]:
        job, by_video = read
        encoded = list(itertools.chain.from_iterable(by_video))
        regions = np.array([frame.geometry.region for frame in job.frames], dtype=np.int32)
        self._graph.feed_input("encoded", [np.frombuffer(data, np.uint8) for data in encoded])
        self._graph.feed_input("start", np.ascontiguousarray(regions[:, :2]))
        self._graph.feed_input("shape", np.ascontiguousarray(regions[:, 2:]))
        if self._on_gpu:
            sizes = np.array([(f.geometry.height, f.geometry.width) for f in job.frames], dtype=np.float32)
            self._graph.feed_input("size", sizes)
        self._graph.schedule_run()
        return job, encoded

    def finish(self, started: tuple[Job, list[bytes]]) -> tuple[Job, Any]:
        """The job and its F images, as a DALI tensor list whose buffers live as long as it does."""
        job, encoded = started
        try:
            (images,) = self._graph.share_outputs()
        except RuntimeError as error:
            raise self._explain(job, encoded, error) from error
        self._graph.release_outputs()
        return job, images

    def _explain(self, job: Job, encoded: list[bytes], error: RuntimeError) -> Exception:
        """DALI reports a batch; find the frame that does not decode."""
        names = [(sample, frame) for sample, frames in job.requests for frame in frames.tolist()]
        for (sample, frame), data in zip(names, encoded, strict=True):
            try:
                Image.open(io.BytesIO(data)).load()
            except Exception as reason:
                return ShardError(
                    f"{self._dataset.describe(sample)}: frame {frame} does not decode ({reason}); find all such frames "
                    "with tools/check_shards.py --deep, then rebuild the data set without them"
                )
        return error


class _Finisher:
    """Images to a batch: resize (CPU only), crop, flip, grey."""

    def __init__(self, loader: Loader, threads: ThreadPoolExecutor) -> None:
        self._loader, self._threads = loader, threads
        data = loader.config.data
        self._shape = (loader.num_views, data.num_segments, data.input_size, data.input_size, 3)
        self._parts = 2 * loader.num_threads  # smaller than a thread's share, so that no thread waits long

    def start(self, decoded: tuple[Job, Any]) -> tuple[Job, torch.Tensor, list[Future[None]]]:
        job, images = decoded
        if self._loader.device.type == "cuda":
            frames = torch.empty((len(job.ids), *self._shape), dtype=torch.uint8, device=self._loader.device)
            stream = torch.cuda.Stream(self._loader.device)
            with torch.cuda.stream(stream):
                place_on_device(job.frames, [torch.from_dlpack(images[f]) for f in range(len(job.frames))], frames)
            stream.synchronize()
            return job, frames, []
        frames = torch.empty((len(job.ids), *self._shape), dtype=torch.uint8, pin_memory=torch.cuda.is_available())
        out = frames.numpy()

        def part(first: int, last: int) -> None:
            for f in range(first, last):
                place(job.frames[f], np.asarray(images.at(f)), out)

        edges = np.linspace(0, len(job.frames), self._parts + 1).astype(int).tolist()
        return job, frames, [self._threads.submit(part, *edge) for edge in itertools.pairwise(edges)]

    def finish(self, started: tuple[Job, torch.Tensor, list[Future[None]]]) -> Batch:
        job, frames_BVTHWC, futures = started
        for future in futures:
            future.result()
        return _batch(job, frames_BVTHWC)


def _batch(job: Job, frames_BVTHWC: torch.Tensor) -> Batch:
    return Batch(
        frames_BVTHWC.permute(0, 1, 2, 5, 3, 4),
        torch.from_numpy(np.asarray(job.labels, dtype=np.int64)),
        torch.from_numpy(np.asarray(job.ids, dtype=np.int64)),
    )


def place(frame: Frame, image_HW3: np.ndarray, out_BVTSS3: np.ndarray) -> None:
    """Resizes a decoded region on the CPU and writes its crops into the batch. Releases the interpreter lock."""
    image_HW3 = _resize(image_HW3, frame.geometry)
    side = out_BVTSS3.shape[3]
    for b, v, t, crop in frame.targets:
        view = image_HW3[crop.top : crop.top + side, crop.left : crop.left + side]
        if crop.grey:
            view = cv2.cvtColor(cv2.cvtColor(view, cv2.COLOR_RGB2GRAY), cv2.COLOR_GRAY2RGB)
        if crop.flip:
            cv2.flip(view, 1, dst=out_BVTSS3[b, v, t])
        else:
            out_BVTSS3[b, v, t] = view


def _resize(image_HW3: np.ndarray, geometry: Geometry) -> np.ndarray:
    """Evaluation: Pillow's bicubic with antialias. Training: bilinear, averaging when shrinking by two or more."""
    height, width = geometry.height, geometry.width
    if image_HW3.shape[:2] == (height, width):
        return image_HW3
    if geometry.cubic:
        return np.asarray(Image.fromarray(image_HW3).resize((width, height), Image.Resampling.BICUBIC))
    shrinks = image_HW3.shape[0] >= 2 * height or image_HW3.shape[1] >= 2 * width
    return cv2.resize(image_HW3, (width, height), interpolation=cv2.INTER_AREA if shrinks else cv2.INTER_LINEAR)


def place_on_device(frames: list[Frame], images_HW3: list[torch.Tensor], out_BVTSS3: torch.Tensor) -> None:
    """The same as `place` for resized images that are tensors on the batch's device."""
    side = out_BVTSS3.shape[3]
    luma = torch.tensor([19595, 38470, 7471], dtype=torch.float32, device=out_BVTSS3.device) / 65536  # ITU-R 601-2
    for frame, image_HW3 in zip(frames, images_HW3, strict=True):
        for b, v, t, crop in frame.targets:
            view = image_HW3[crop.top : crop.top + side, crop.left : crop.left + side]
            if crop.flip:
                view = view.flip(1)
            if crop.grey:
                view = (view.float() @ luma).round().to(torch.uint8)[..., None]
            out_BVTSS3[b, v, t] = view


class _Synthetic:
    """Batches of the right shapes and labels from one block of noise: a loader that costs nothing."""

    def __init__(self, loader: Loader) -> None:
        data = loader.config.data
        shape = (loader.batch_size, loader.num_views, data.num_segments, data.input_size, data.input_size, 3)
        noise = torch.Generator().manual_seed(loader.config.seed)
        self._frames = torch.randint(256, shape, dtype=torch.uint8, generator=noise).to(loader.device)

    def __call__(self, job: Job) -> Batch:
        return _batch(job, self._frames[: len(job.ids)])
