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
import math
import weakref
from collections import deque
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import cv2
import numpy as np
import torch
from nvidia.dali import fn, pipeline_def, types
from nvidia.dali.tensors import TensorCPU
from PIL import Image

from shards.address import scheme_of
from shards.annotations import parse_labels
from shards.format import SampleError, ShardError
from shards.images import ImageProbe
from shards.reader import ShardDataset, open_dataset
from shards.video import VideoError, decode_frames
from text4vis.cluster.distributed import cores_per_rank
from text4vis.config.schema import Config, ConfigError, addresses
from text4vis.data import pixels
from text4vis.data.augmentation import Crop, Geometry
from text4vis.data.bad_videos import BadVideos
from text4vis.data.plan import Frame, Job, Planner
from text4vis.data.prefetch import Prefetcher, pipelined

# A plan and the bytes it asks for, video by video.
Loaded = tuple[Job, list[list[bytes]]]

REMOTE_IO_THREADS = 16

cv2.setNumThreads(1)  # the pipeline's own threads are the parallelism
# Intel's bilinear resize where OpenCV has it: a quarter faster, and at most 1 of 255 away from OpenCV's own.
cv2.ipp.setUseIPP_NotExact(True)


@dataclass(frozen=True)
class Batch:
    """What the model sees. V is 1 in training.

    frames: (B, V, T, 3, S, S) uint8 on the device, channels last in memory. labels, ids: (B,) int64 on the CPU; ids are
    positions in the data set.
    """

    frames: torch.Tensor
    labels: torch.Tensor
    ids: torch.Tensor


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
    """The data set behind `data.train` or `data.val`. Raises ConfigError, ShardError."""
    sources = config.data.train if split == "train" else config.data.val
    if not sources:
        raise ConfigError(f"data.{split}: no shards named; build them with tools/build_shards.py and name the folder")
    paths = addresses(sources)
    is_local = all(scheme_of(path) is None for path in paths)
    try:
        return open_dataset(
            paths,
            io_threads=config.data.io_threads or (1 if is_local else REMOTE_IO_THREADS),
            cache_dir=config.data.cache_dir,
            cache_bytes=config.data.cache_bytes or None,
            verify=config.data.verify,
        )
    except ShardError as error:
        raise ShardError(f"data.{split}: {error}") from error


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
    """Iterable of Batch; see `build_loader`. Owns its data set: close it, or use it as a context manager.

    ids: with "val", just these videos.
    """

    def __init__(
        self,
        config: Config,
        split: str,
        dataset: ShardDataset,
        *,
        rank: int,
        world_size: int,
        consumed: int,
        ids: np.ndarray | None = None,
    ) -> None:
        self.config, self.split, self.dataset = config, split, dataset
        self.planner = Planner(config, split, dataset, rank, world_size, ids)
        self.world_size, self.consumed = world_size, consumed
        if not len(dataset):
            raise ConfigError(f"data.{split}: the data set {', '.join(dataset.places)} holds no videos")
        self.epoch_samples = self.planner.epoch_samples
        self.num_threads = config.data.workers or cores_per_rank()
        self.device = _decode_device(config)
        self.bad = BadVideos(dataset, self.planner.videos, config.data.max_bad_share, endless=split == "train")
        self._running: weakref.WeakSet[Prefetcher[Batch]] = weakref.WeakSet()

    def __iter__(self) -> Prefetcher[Batch]:
        """A new pass. Who leaves one unfinished closes it, or the loader."""
        running = Prefetcher(self._batches(), self.config.data.prefetch, f"{self.split}-loader")
        self._running.add(running)
        return running

    def _batches(self) -> Generator[Batch, None, None]:
        """Reads, decodes and finishes batch after batch, each step working ahead of the next."""
        if self.config.data.synthetic:
            yield from map(_Synthetic(self), self.jobs())
            return
        with (
            ThreadPoolExecutor(1, "read") as reads,
            ThreadPoolExecutor(self.num_threads, "decode") as decodes,
            ThreadPoolExecutor(finish_threads(self.num_threads), "finish") as finishes,
        ):

            def make_decoder() -> Any:
                return _GpuDecoder(self) if self.device.type == "cuda" else _CpuDecoder(self, decodes)

            decoder = make_decoder()
            repair = _Repair(self, make_decoder) if self.config.data.on_error == "skip" else None

            def start_reading(batch: tuple[np.ndarray, np.ndarray]) -> tuple[Any, Future[Loaded]]:
                return batch, reads.submit(self.load, *batch)

            def finish_reading(started: tuple[Any, Future[Loaded]]) -> Loaded:
                try:
                    return started[1].result()
                except SampleError:
                    if repair is None:
                        raise
                return repair(*started[0], decode=False)

            def start_decoding(loaded: Loaded) -> tuple[Job, Any]:
                return loaded[0], decoder.start(loaded)

            def finish_decoding(started: tuple[Job, Any]) -> tuple[Job, list[Any]]:
                job, run = started
                try:
                    return decoder.finish(run)
                except (SampleError, RuntimeError):
                    if repair is None:
                        raise
                return repair.decode(repair(job.ids, job.epochs, decode=True))

            finisher = _Finisher(self, finishes)
            loaded = pipelined(self.planner.batches(self.consumed), start_reading, finish_reading, depth=2)
            decoded = pipelined(loaded, start_decoding, finish_decoding, depth=1)
            batches = pipelined(decoded, finisher.start, finisher.finish, depth=2)
            yield from (batch for batch in batches if len(batch.ids))

    def load(self, ids: np.ndarray, epochs: np.ndarray) -> Loaded:
        """The plan of a batch and its bytes, looked at before they are decoded: a decoder that is given an image of
        another size than planned cuts the wrong part. Raises SampleError."""
        job = self.planner.job(ids, epochs)
        by_video = self.dataset.read_many(job.requests)
        sizes = iter(job.sizes)
        for (sample, numbers), files in zip(job.requests, by_video, strict=True):
            planned = list(itertools.islice(sizes, len(numbers)))
            if self.dataset.content(sample) == "frames":
                self._check_headers(sample, numbers, planned, files)
        return job, by_video

    def _check_headers(
        self, sample: int, numbers: np.ndarray, planned: list[tuple[int, int]], files: list[bytes]
    ) -> None:
        probe = ImageProbe()
        for number, (height, width), data in zip(numbers.tolist(), planned, files, strict=True):
            try:
                info = probe(data)
            except ValueError as error:
                raise SampleError(_undecodable(self.dataset, sample, error, number)) from None
            if (info.height, info.width) != (height, width):
                raise SampleError(
                    f"{self.dataset.describe(sample)}: frame {number} is {info.width}x{info.height} pixels, the index "
                    f"says {width}x{height}; the index is damaged or of other data: check both with "
                    "tools/check_shards.py, then copy the data set again or rebuild it"
                )

    def close(self) -> None:
        """Stops the threads of all passes and closes the data set."""
        for running in list(self._running):
            running.close()
        self.dataset.close()

    def __enter__(self) -> Loader:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def jobs(self) -> Iterator[Job]:
        """The plans behind the batches."""
        return self.planner.jobs(self.consumed)

    @property
    def batch_size(self) -> int:
        """Videos of a full batch."""
        return self.planner.batch_size


def _decode_device(config: Config) -> torch.device:
    """Where frames are decoded and batches end up."""
    if config.data.decode == "gpu" and not torch.cuda.is_available():
        raise ConfigError("data.decode: gpu asked for, but no GPU is visible; use --set data.decode=cpu")
    if config.data.decode == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", torch.cuda.current_device())


def image_graph(*, device_id: int | None, num_threads: int, batch_size: int, resize: str | None) -> Any:
    """The DALI pipeline for stored frames, not yet built: F encoded frames -> F regions (H, W, 3) uint8 RGB.

    device_id: GPU for decoding ("mixed"), or None for the CPU. resize: None, "linear" or "cubic" (both with antialias)
    to the size given with each frame. Inputs: `encoded`, `start`, `shape` (top-left, height-width of the region) and,
    with resize, `size`.
    """

    def graph() -> Any:
        images = fn.decoders.image_slice(
            _input("encoded", types.UINT8),
            start=_input("start", types.INT32),
            shape=_input("shape", types.INT32),
            axes=(0, 1),
            device="cpu" if device_id is None else "mixed",
            output_type=types.RGB,
            adjust_orientation=False,  # as Pillow: EXIF orientation is not applied
            jpeg_fancy_upsampling=True,  # as Pillow
        )
        return _resized(images, resize)

    return _pipeline(graph, device_id, num_threads, batch_size)


def video_graph(*, device_id: int, num_threads: int, batch_size: int, resize: str) -> Any:
    """The DALI pipeline for stored videos on a GPU, not yet built: B encoded files -> B sequences (k, H, W, 3) uint8.

    `frames` holds each video's (k,) frame numbers; the other inputs are those of `image_graph`, once a video. There is
    no CPU version: DALI's CPU decoder does not know H.264.
    """

    def graph() -> Any:
        frames = fn.decoders.video(
            _input("encoded", types.UINT8), frames=_input("frames", types.INT32), device="mixed", affine=False
        )
        regions = fn.slice(
            frames,
            _input("start", types.INT32),
            _input("shape", types.INT32),
            axis_names="HW",
            out_of_bounds_policy="error",
        )
        return _resized(regions, resize)

    return _pipeline(graph, device_id, num_threads, batch_size)


def _input(name: str, dtype: Any) -> Any:
    return fn.external_source(name=name, dtype=dtype, ndim=1, no_copy=name == "encoded")


def _resized(images: Any, resize: str | None) -> Any:
    if resize is None:
        return images
    kind = {"linear": types.INTERP_LINEAR, "cubic": types.INTERP_CUBIC}[resize]
    return fn.resize(images, size=_input("size", types.FLOAT), interp_type=kind, antialias=True)


def _pipeline(graph: Callable[[], Any], device_id: int | None, num_threads: int, batch_size: int) -> Any:
    return pipeline_def(
        graph,
        batch_size=batch_size,
        num_threads=num_threads,
        device_id=device_id,
        prefetch_queue_depth=1,  # how many runs are in flight is decided here, by `pipelined`
        exec_dynamic=True,  # outputs stay valid as long as they are held
    )()


@dataclass(frozen=True)
class _Run:
    """A batch on its way through a decoder. encoded: the stored frames' bytes; videos: what decodes stored videos."""

    job: Job
    encoded: list[bytes]
    videos: dict[int, Future[list[np.ndarray]]]


class _CpuDecoder:
    """Read bytes to the regions that the plan asks for: DALI for stored frames, PyAV for stored videos."""

    def __init__(self, loader: Loader, threads: ThreadPoolExecutor) -> None:
        self._dataset, self._threads = loader.dataset, threads
        self._graph = image_graph(
            device_id=None, num_threads=loader.num_threads, batch_size=loader.planner.max_frames, resize=None
        )

    def start(self, loaded: Loaded) -> _Run:
        job, by_video = loaded
        encoded, regions, videos = [], [], {}
        frames = iter(job.frames)
        for b, ((sample, numbers), files) in enumerate(zip(job.requests, by_video, strict=True)):
            own = [next(frames) for _ in numbers]
            if self._dataset.content(sample) == "video":
                num_frames = int(self._dataset.num_frames[sample])
                videos[b] = self._threads.submit(decode_frames, files[0], numbers, num_frames=num_frames)
            else:
                encoded += files
                regions += [frame.geometry.region for frame in own]
        if encoded:
            feed(self._graph, encoded, regions)
            self._graph.schedule_run()
        return _Run(job, encoded, videos)

    def finish(self, started: _Run) -> tuple[Job, list[np.ndarray]]:
        """The job and its F images (H, W, 3) uint8, each the region that was planned."""
        job = started.job
        stored = iter(_outputs(self._graph, self._dataset, started) if started.encoded else ())
        images: list[np.ndarray] = []
        for b, (sample, numbers) in enumerate(job.requests):
            if b not in started.videos:
                images += map(np.asarray, itertools.islice(stored, len(numbers)))
                continue
            try:
                whole = started.videos[b].result()
            except (VideoError, IndexError) as error:  # the file may hold fewer frames than the index says
                raise SampleError(_undecodable(self._dataset, sample, error)) from error
            for number, image in zip(numbers.tolist(), whole, strict=True):
                height, width = job.sizes[len(images)]
                if image.shape[:2] != (height, width):
                    reason = f"{image.shape[1]}x{image.shape[0]} pixels, the index says {width}x{height}"
                    raise SampleError(_undecodable(self._dataset, sample, reason, number))
                top, left, height, width = job.frames[len(images)].geometry.region
                images.append(image[top : top + height, left : left + width])
        return job, images


class _GpuDecoder:
    """Read bytes to resized images on the GPU, by DALI. A data set of frames and videos joined takes both graphs."""

    def __init__(self, loader: Loader) -> None:
        self._dataset = loader.dataset
        cubic = loader.split == "val" or loader.config.data.augmentation == "none"
        options: dict[str, Any] = {
            "device_id": loader.device.index,
            "num_threads": loader.num_threads,
            "resize": "cubic" if cubic else "linear",
        }
        self._images = image_graph(**options, batch_size=loader.planner.max_frames)
        self._videos = video_graph(**options, batch_size=loader.batch_size)

    def start(self, loaded: Loaded) -> tuple[_Run, list[bytes]]:
        job, by_video = loaded
        encoded, stored, videos, wanted, first_frames = [], [], [], [], []
        frames = iter(job.frames)
        for (sample, numbers), files in zip(job.requests, by_video, strict=True):
            own = [next(frames) for _ in numbers]
            if self._dataset.content(sample) == "video":
                videos += files
                wanted.append(np.asarray(numbers, np.int32))
                first_frames.append(own[0].geometry)
            else:
                encoded += files
                stored += [frame.geometry for frame in own]
        if encoded:
            feed(self._images, encoded, [g.region for g in stored], [g.decoded_size for g in stored])
            self._images.schedule_run()
        if videos:
            regions = [g.region for g in first_frames]
            feed(self._videos, videos, regions, [g.decoded_size for g in first_frames], wanted)
            self._videos.schedule_run()
        return _Run(job, encoded, {}), videos

    def finish(self, started: tuple[_Run, list[bytes]]) -> tuple[Job, list[torch.Tensor]]:
        run, videos = started
        job = run.job
        stored = iter(_outputs(self._images, self._dataset, run) if run.encoded else ())
        sequences = iter(_outputs(self._videos, self._dataset, run) if videos else ())
        images: list[torch.Tensor] = []
        for sample, numbers in job.requests:
            if self._dataset.content(sample) == "video":
                images += torch.from_dlpack(next(sequences)).unbind(0)
            else:
                images += map(torch.from_dlpack, itertools.islice(stored, len(numbers)))
        return job, images


def feed(
    graph: Any,
    encoded: list[bytes],
    regions: list[tuple[int, int, int, int]],
    sizes: list[tuple[int, int]] | None = None,
    frames: list[np.ndarray] | None = None,
) -> None:
    """Gives `image_graph` or `video_graph` one batch: encoded files, regions, with resize the sizes after it,
    with videos their frame numbers. The files are not copied: hold on to them until the run is done."""
    regions_N4 = np.array(regions, dtype=np.int32)
    graph.feed_input("encoded", [TensorCPU(data, "") for data in encoded])  # arrays would cost a conversion each
    graph.feed_input("start", np.ascontiguousarray(regions_N4[:, :2]))
    graph.feed_input("shape", np.ascontiguousarray(regions_N4[:, 2:]))
    if sizes is not None:
        graph.feed_input("size", np.array(sizes, dtype=np.float32))
    if frames is not None:
        graph.feed_input("frames", frames)


def _outputs(graph: Any, dataset: ShardDataset, run: _Run) -> list[Any]:
    """The next run's outputs, one by one, without copies: each holds on to DALI's memory."""
    try:
        (images,) = graph.share_outputs()
    except RuntimeError as error:
        raise _explain(dataset, run, error) from error
    graph.release_outputs()
    return list(images)


def _explain(dataset: ShardDataset, run: _Run, error: RuntimeError) -> Exception:
    """DALI reports a batch; find the frame that does not decode."""
    names = [
        (sample, frame)
        for sample, frames in run.job.requests
        if dataset.content(sample) == "frames"
        for frame in frames.tolist()
    ]
    for (sample, frame), data in zip(names, run.encoded, strict=True):
        try:
            Image.open(io.BytesIO(data)).load()
        except Exception as reason:
            return SampleError(_undecodable(dataset, sample, reason, frame))
    return error


def _undecodable(dataset: ShardDataset, sample: int, reason: object, frame: int | None = None) -> str:
    what = "" if frame is None else f"frame {frame} "
    return (
        f"{dataset.describe(sample)}: {what}does not decode ({reason}); find all such videos with "
        "tools/check_shards.py --deep, then rebuild the data set without them"
    )


class _Repair:
    """`data.on_error: skip`: a batch that failed, anew and without the videos that are at fault.

    Each video is tried by itself, with the reader and the decoder of the loader. Which frames it is tried with depends
    on (seed, epoch, video) alone, so its place in the stream is filled alike by whichever rank meets it. Decoding one
    after another is slow: where reading told which one is at fault, only what takes its place is decoded as well.
    """

    def __init__(self, loader: Loader, make_decoder: Callable[[], Any]) -> None:
        self._loader, self._make_decoder = loader, make_decoder
        self._decoder: Any = None  # of its own, for the loader's has the next batch under way

    def __call__(self, ids: np.ndarray, epochs: np.ndarray, *, decode: bool) -> Loaded:
        """The plan and bytes of the batch with substitutes in training, of what is left of it in evaluation.

        decode: whether the batch's own videos are decoded too, and not only read; substitutes always are. Raises
        ShardError past `data.max_bad_share`.
        """
        kept: list[tuple[int, int]] = []
        by_video: list[list[bytes]] = []
        for sample, epoch in zip(ids.tolist(), epochs.tolist(), strict=True):
            for candidate in itertools.chain([sample], self._loader.planner.substitutes(sample, epoch)):
                files = self._try(candidate, epoch, decode=decode or candidate != sample)
                if files is not None:
                    kept.append((candidate, epoch))
                    by_video.append(files)
                    break
        kept_ids, kept_epochs = np.array(kept, np.int64).reshape(-1, 2).T.copy()
        return self._loader.planner.job(kept_ids, kept_epochs), by_video

    def decode(self, loaded: Loaded) -> tuple[Job, list[Any]]:
        if self._decoder is None:
            self._decoder = self._make_decoder()
        return self._decoder.finish(self._decoder.start(loaded))

    def _try(self, sample: int, epoch: int, *, decode: bool) -> list[bytes] | None:
        """The bytes of a video that reads, and decodes; None, and a record, if it does not."""
        try:
            job, (files,) = self._loader.load(np.array([sample]), np.array([epoch]))
            if decode:
                self.decode((job, [files]))
            return files
        except SampleError as error:
            reason = str(error)
        except RuntimeError as error:
            # DALI's report holds the traceback of the graph's definition, then what it met.
            met = str(error).rpartition("encountered:")[2].partition("Current pipeline")[0]
            if "memory" in met.lower():
                raise
            reason = _undecodable(self._loader.dataset, sample, " ".join(met.split()))
        self._loader.bad.add(sample, reason)
        return None


class _Memory:
    """Blocks for batches, used again once nobody holds the batch: mapping tens of megabytes anew for every batch costs
    the CPU a fifth of the loader's time."""

    def __init__(self) -> None:
        self._free: deque[np.ndarray] = deque()

    def lend(self, shape: tuple[int, ...]) -> np.ndarray:
        """A uint8 array of unspecified content; a tensor made of it keeps it lent."""
        size = math.prod(shape)
        block = self._free.pop() if self._free else np.empty(size, np.uint8)
        if block.size < size:
            block = np.empty(size, np.uint8)
        lent = block[:size].reshape(shape)
        weakref.finalize(lent, self._free.append, block)
        return lent


def finish_threads(num_threads: int) -> int:
    """Resizing takes a third of the time of decoding, and threads that do it take Python's lock from each other."""
    return max(1, num_threads // 2)


class _Finisher:
    """Images to a batch: resize (CPU only), crop, flip, grey."""

    def __init__(self, loader: Loader, threads: ThreadPoolExecutor) -> None:
        self._device, self._threads = loader.device, threads
        data = loader.config.data
        self._shape = (loader.planner.num_views, data.num_segments, data.input_size, data.input_size, 3)
        self._memory = _Memory()
        self._parts = 2 * finish_threads(loader.num_threads)  # smaller than a share, so that no thread waits long

    def start(self, decoded: tuple[Job, list[Any]]) -> tuple[Job, torch.Tensor, list[Future[None]]]:
        job, images = decoded
        if self._device.type == "cuda":
            frames_BVTHWC = torch.empty((len(job.ids), *self._shape), dtype=torch.uint8, device=self._device)
            stream = torch.cuda.Stream(self._device)
            with torch.cuda.stream(stream):
                place_on_device(job.frames, images, frames_BVTHWC)
            stream.synchronize()
            return job, frames_BVTHWC, []
        out = self._memory.lend((len(job.ids), *self._shape))
        frames_BVTHWC = torch.from_numpy(out)

        def part(first: int, last: int) -> None:
            for frame, image in zip(job.frames[first:last], images[first:last], strict=True):
                place(frame, image, out)

        edges = np.linspace(0, len(job.frames), self._parts + 1).astype(int).tolist()
        return job, frames_BVTHWC, [self._threads.submit(part, *edge) for edge in itertools.pairwise(edges)]

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
    geometry, side = frame.geometry, out_BVTSS3.shape[3]
    if geometry.part is not None:
        top, left, height, width = geometry.part
        whole = pixels.operate(Image.fromarray(image_HW3), geometry.operations)
        image_HW3 = np.asarray(whole.crop((left, top, left + width, top + height)))
    if not geometry.cubic and (geometry.height, geometry.width) == (side, side):
        _place_whole(frame, image_HW3, out_BVTSS3)
        return
    image_HW3 = _resize(image_HW3, geometry)
    for b, v, t, c in frame.targets:
        view, crop = out_BVTSS3[b, v, t], geometry.crops[c]
        view[:] = image_HW3[crop.top : crop.top + side, crop.left : crop.left + side]
        if crop.grey:
            cv2.cvtColor(cv2.cvtColor(view, cv2.COLOR_RGB2GRAY), cv2.COLOR_GRAY2RGB, dst=view)
        _flip_and_recolour(view, crop)


def _place_whole(frame: Frame, image_HW3: np.ndarray, out_BVTSS3: np.ndarray) -> None:
    """Training: the resized region is the view, so it is resized where it belongs; all targets share one crop."""
    (b, v, t, c), *others = frame.targets
    view, crop = out_BVTSS3[b, v, t], frame.geometry.crops[c]
    if crop.grey:  # one channel to resize instead of three
        grey_HW = _resize(cv2.cvtColor(image_HW3, cv2.COLOR_RGB2GRAY), frame.geometry)
        cv2.cvtColor(grey_HW, cv2.COLOR_GRAY2RGB, dst=view)
    else:
        _resize(image_HW3, frame.geometry, into=view)
    _flip_and_recolour(view, crop)
    for b, v, t, _ in others:
        out_BVTSS3[b, v, t] = view


def _flip_and_recolour(view_SS3: np.ndarray, crop: Crop) -> None:
    if crop.flip:
        cv2.flip(view_SS3, 1, dst=view_SS3)
    if crop.blur or crop.solarize:
        view_SS3[:] = np.asarray(pixels.recolour(Image.fromarray(view_SS3), crop))


def _resize(image: np.ndarray, geometry: Geometry, into: np.ndarray | None = None) -> np.ndarray:
    """Evaluation: Pillow's bicubic with antialias. Training: bilinear, averaging when shrinking by two or more."""
    height, width = geometry.height, geometry.width
    if geometry.cubic:
        if image.shape[:2] == (height, width):
            return image
        return np.asarray(Image.fromarray(image).resize((width, height), Image.Resampling.BICUBIC))
    shrinks = image.shape[0] >= 2 * height or image.shape[1] >= 2 * width
    kind = cv2.INTER_AREA if shrinks else cv2.INTER_LINEAR
    return cv2.resize(image, (width, height), dst=into, interpolation=kind)


def place_on_device(frames: list[Frame], images_HW3: list[torch.Tensor], out_BVTSS3: torch.Tensor) -> None:
    """The same as `place` for images that are tensors on the batch's device, resized unless operations come first."""
    side = out_BVTSS3.shape[3]
    luma = torch.tensor([19595, 38470, 7471], dtype=torch.float32, device=out_BVTSS3.device) / 65536  # ITU-R 601-2
    for frame, image_HW3 in zip(frames, _operated(frames, images_HW3, side), strict=True):
        for b, v, t, c in frame.targets:
            crop = frame.geometry.crops[c]
            view = image_HW3[crop.top : crop.top + side, crop.left : crop.left + side]
            if crop.flip:
                view = view.flip(1)
            if crop.grey:
                view = (view.float() @ luma).round().to(torch.uint8)[..., None].expand(-1, -1, 3)
            if crop.blur or crop.solarize:
                view = pixels.recolour(view.permute(2, 0, 1), crop).permute(1, 2, 0)
            out_BVTSS3[b, v, t] = view


def _operated(frames: list[Frame], images_HW3: list[torch.Tensor], side: int) -> Iterator[torch.Tensor]:
    """The images in order; where there are operations, these done, a video at a time, and the view cut and resized."""
    pairs = zip(frames, images_HW3, strict=True)
    for geometry, group in itertools.groupby(pairs, key=lambda pair: pair[0].geometry):
        images = [image for _, image in group]
        if geometry.part is None:
            yield from images
            continue
        top, left, height, width = geometry.part
        whole_NCHW = pixels.operate(torch.stack(images).permute(0, 3, 1, 2), geometry.operations)
        part_NCHW = whole_NCHW[..., top : top + height, left : left + width]
        yield from pixels.resize(part_NCHW, side).permute(0, 2, 3, 1)


class _Synthetic:
    """Batches of the right shapes and labels from one block of noise: a loader that costs nothing."""

    def __init__(self, loader: Loader) -> None:
        data = loader.config.data
        shape = (loader.batch_size, loader.planner.num_views, data.num_segments, data.input_size, data.input_size, 3)
        noise = torch.Generator().manual_seed(loader.config.seed)
        self._frames = torch.randint(256, shape, dtype=torch.uint8, generator=noise).to(loader.device)

    def __call__(self, job: Job) -> Batch:
        return _batch(job, self._frames[: len(job.ids)])
