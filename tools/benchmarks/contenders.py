"""The loaders that are compared: ours, decoding alone as an upper limit, and common alternatives.

Each is a context manager that gives an endless iterator of batches; the length of a batch is its number of videos. All
alternatives get the frames, regions, flips and greys that our own plan draws, so they do the same work on the same
pixels.

B videos, V views, T frames, S side of the model's input.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterator, Mapping, Sized
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any

import cv2
import numpy as np
import torch
import webdataset as wds
from PIL import Image
from torch.utils.data import DataLoader, Dataset, Sampler
from torchvision.io import ImageReadMode, decode_jpeg, read_file
from torchvision.transforms import InterpolationMode, v2

from benchmarks.data import Workload
from text4vis.config.loading import config_from_dict
from text4vis.config.schema import Config
from text4vis.data import augmentation, sampling
from text4vis.data.dali import image_graph, outputs, start_run
from text4vis.data.loader import build_loader
from text4vis.data.plan import BatchPlan
from text4vis.data.prefetch import pipelined, settled

# CLIP's, as the original applies them on the CPU.
_MEAN = (0.48145466, 0.4578275, 0.40821073)
_STD = (0.26862954, 0.26130258, 0.27577711)
_CEILING_BATCHES = 16
_WARM_UP_TURNS = 8  # after these the loaders have allocated all their memory
_WORKER_START = "fork"  # quick, and safe only in a process without threads: `figures.run_fresh` gives one


@dataclass(frozen=True)
class Setup:
    """What every contender gets: the data, the batch size, and the number of threads or worker processes."""

    workload: Workload
    batch_size: int
    workers: int

    def config(self, **data: Any) -> Config:
        folder = str(self.workload.shards)
        values = {"train": folder, "val": folder, "batch_size": self.batch_size, "workers": self.workers}
        return config_from_dict({"data": values | {"decode": "cpu"} | data}, "benchmark")

    @property
    def train(self) -> Config:
        """The released recipe."""
        return self.config()

    @property
    def views(self) -> Config:
        """The published evaluation of 4 clips x 3 crops."""
        return self.config(test_clips=4, test_crops=3)


Batches = Iterator[Sized]
Contender = Callable[[Setup], AbstractContextManager[Batches]]


@contextmanager
def ours_train(setup: Setup) -> Iterator[Batches]:
    with build_loader(setup.train, "train") as loader:
        yield (batch.frames for batch in loader)


@contextmanager
def ours_views(setup: Setup) -> Iterator[Batches]:
    with build_loader(setup.views, "val") as loader:
        yield (batch.frames for _ in itertools.count() for batch in loader)


@contextmanager
def decode_only(setup: Setup, device_id: int | None = None) -> Iterator[Batches]:
    """The upper limit: DALI decodes the regions of our plan from bytes in memory, and does nothing else.

    device_id: the GPU that decodes, or None for the CPU.
    """
    with build_loader(setup.train, "train") as loader:
        plans = list(itertools.islice(loader.plans(), _CEILING_BATCHES))
        read = [(plan, list(itertools.chain(*loader.dataset.read_many(plan.requests)))) for plan in plans]
        graph = image_graph(
            device_id=device_id, num_threads=setup.workers, batch_size=loader.planner.max_frames, resize=None
        )

        def start(item: tuple[BatchPlan, list[bytes]]) -> BatchPlan:
            plan, encoded = item
            start_run(graph, encoded, [frame.geometry.region for video in plan.videos for frame in video.frames])
            return plan

        def finish(plan: BatchPlan) -> Sized:
            outputs(graph)
            return plan.videos

        yield pipelined(itertools.cycle(read), start, finish, depth=1)


class _Endless(Sampler[int]):
    """0, 1, 2, …: position p stands for video p modulo N in epoch p // N."""

    def __iter__(self) -> Iterator[int]:
        return itertools.count()


@contextmanager
def _data_loader(dataset: Dataset[torch.Tensor], batch_size: int, workers: int) -> Iterator[Batches]:
    """An ordinary DataLoader with worker processes."""
    loader = DataLoader(
        dataset, batch_size, sampler=_Endless(), num_workers=workers, multiprocessing_context=_WORKER_START
    )
    yield iter(loader)


def _draw(config: Config, num_frames: int, epoch: int, video: int) -> augmentation.Draw:
    return augmentation.draw(config.data, num_frames, augmentation.generator(config.seed, epoch, video))


class OriginalTrain(Dataset[torch.Tensor]):
    """The original project's training sample from frame folders: PIL and torchvision, (T * 3, S, S) float32.

    Decode, convert to RGB, short side to 256 (bicubic), random resized crop (bilinear), flip, grey, stack, divide,
    normalise: its steps in its order, on the whole group of frames.
    """

    def __init__(self, workload: Workload, config: Config) -> None:
        self.workload, self.config = workload, config
        self.resize = v2.Resize(config.scale_size, InterpolationMode.BICUBIC)

    def __getitem__(self, position: int) -> torch.Tensor:
        epoch, video = divmod(position, len(self.workload.videos))
        drawn = _draw(self.config, self.workload.videos[video][1], epoch, video)
        images = [self.resize(image) for image in _open_group(self.workload, video, drawn.indices)]
        geometry = augmentation.train_geometry(drawn, images[0].height, images[0].width, self.config.data.input_size)
        (top, left, height, width), size = geometry.region, (geometry.width, geometry.height)
        images = [
            image.crop((left, top, left + width, top + height)).resize(size, Image.Resampling.BILINEAR)
            for image in images
        ]
        if drawn.flip:
            images = [image.transpose(Image.Transpose.FLIP_LEFT_RIGHT) for image in images]
        if drawn.grey:
            images = [image.convert("L").convert("RGB") for image in images]
        return _stacked(images)


class OriginalViews(Dataset[torch.Tensor]):
    """The original project's evaluation sample, every view on its own: (V * T * 3, S, S) float32."""

    def __init__(self, workload: Workload, config: Config) -> None:
        self.workload, self.config = workload, config
        self.resize = v2.Resize(config.scale_size, InterpolationMode.BICUBIC)

    def __getitem__(self, position: int) -> torch.Tensor:
        data = self.config.data
        video = position % len(self.workload.videos)
        indices = sampling.test_indices(self.workload.videos[video][1], data.num_segments, data.test_clips)
        images = [self.resize(image) for image in _open_group(self.workload, video, indices)]
        height, width, side = images[0].height, images[0].width, data.input_size
        crops = augmentation.eval_geometry(height, width, self.config.scale_size, side, data.test_crops).crops
        return _stacked(
            [image.crop((crop.left, crop.top, crop.left + side, crop.top + side)) for crop in crops for image in images]
        )


def _open_group(workload: Workload, video: int, indices: np.ndarray) -> list[Image.Image]:
    return [Image.open(workload.frame(video, index)).convert("RGB") for index in indices.tolist()]


def _stacked(images: list[Image.Image]) -> torch.Tensor:
    """The original's Stack, ToTorchFormatTensor and GroupNormalize."""
    array_HWC = np.concatenate([np.asarray(image) for image in images], axis=2)
    tensor_CHW = torch.from_numpy(array_HWC).permute(2, 0, 1).contiguous().float().div(255)
    for channel, mean, std in zip(tensor_CHW, itertools.cycle(_MEAN), itertools.cycle(_STD), strict=False):
        channel.sub_(mean).div_(std)
    return tensor_CHW


def original_train(setup: Setup) -> AbstractContextManager[Batches]:
    return _data_loader(OriginalTrain(setup.workload, setup.train), setup.batch_size, setup.workers)


def original_views(setup: Setup) -> AbstractContextManager[Batches]:
    batch_size = max(1, setup.batch_size // (setup.views.data.test_clips * setup.views.data.test_crops))
    return _data_loader(OriginalViews(setup.workload, setup.views), batch_size, setup.workers)


class TensorTrain(Dataset[torch.Tensor]):
    """torchvision's tensors from frame folders: decode_jpeg and v2 on uint8, (T, 3, S, S) uint8."""

    def __init__(self, workload: Workload, config: Config) -> None:
        self.workload, self.config = workload, config

    def __getitem__(self, position: int) -> torch.Tensor:
        epoch, video = divmod(position, len(self.workload.videos))
        drawn = _draw(self.config, self.workload.videos[video][1], epoch, video)
        files = [read_file(str(self.workload.frame(video, index))) for index in drawn.indices.tolist()]
        frames_TCHW = torch.stack([decode_jpeg(file, ImageReadMode.RGB) for file in files])
        side = self.config.data.input_size
        height, width = frames_TCHW.shape[-2:]
        geometry = augmentation.train_geometry(drawn, height, width, side)
        frames_TCHW = v2.functional.resized_crop(frames_TCHW, *geometry.region, [side, side], antialias=True)
        if drawn.flip:
            frames_TCHW = v2.functional.horizontal_flip(frames_TCHW)
        return v2.functional.rgb_to_grayscale(frames_TCHW, 3) if drawn.grey else frames_TCHW


def tensor_train(setup: Setup) -> AbstractContextManager[Batches]:
    return _data_loader(TensorTrain(setup.workload, setup.train), setup.batch_size, setup.workers)


class OpenCvTrain:
    """Turns a WebDataset sample (all files of a video) into (T, S, S, 3) uint8 with OpenCV."""

    def __init__(self, config: Config) -> None:
        self.config = config
        self._count = itertools.count()

    def __call__(self, sample: Mapping[str, Any]) -> torch.Tensor:
        names = sorted(name for name in sample if name.endswith((".jpg", ".png")))
        drawn = _draw(self.config, len(names), next(self._count), int(sample["__key__"]))
        side = self.config.data.input_size
        frames_TSSC = np.empty((len(drawn.indices), side, side, 3), np.uint8)
        for t, index in enumerate(drawn.indices.tolist()):
            image = cv2.imdecode(np.frombuffer(sample[names[index]], np.uint8), cv2.IMREAD_COLOR)
            if image is None:
                raise ValueError(f"{sample['__key__']}.{names[index]} does not decode")
            rows, columns, _ = image.shape
            top, left, height, width = augmentation.train_geometry(drawn, rows, columns, side).region
            image = cv2.resize(image[top : top + height, left : left + width], (side, side))
            if drawn.flip:
                image = cv2.flip(image, 1)
            if drawn.grey:
                image = cv2.cvtColor(cv2.cvtColor(image, cv2.COLOR_BGR2GRAY), cv2.COLOR_GRAY2BGR)
            cv2.cvtColor(image, cv2.COLOR_BGR2RGB, dst=frames_TSSC[t])
        return torch.from_numpy(frames_TSSC)


@contextmanager
def webdataset_train(setup: Setup) -> Iterator[Batches]:
    """WebDataset over the same tars: it reads every frame of a video to use T of them."""
    dataset = (
        wds.WebDataset(setup.workload.tars, shardshuffle=False)
        .map(OpenCvTrain(setup.train))
        .batched(setup.batch_size, collation_fn=torch.stack)
        .repeat()
    )
    loader = wds.WebLoader(dataset, batch_size=None, num_workers=setup.workers, multiprocessing_context=_WORKER_START)
    yield (frames_BTSSC.permute(0, 1, 4, 2, 3) for frames_BTSSC in loader)


def throughput(contender: Contender, setup: Setup, seconds: float, producers: int) -> float:
    """Starts a loader and measures its videos per second after a warm-up.

    Counts whole turns, in which each of its `producers` gives one batch. Batches are taken without a pause, so the
    loader's queues are as empty at the start of the measurement as at its end.
    """
    with contender(setup) as batches, settled():  # as training does
        for _ in range(_WARM_UP_TURNS * producers):
            next(batches)
        videos, started = 0, time.perf_counter()
        while True:
            videos += sum(len(batch) for batch in itertools.islice(batches, producers))
            if (elapsed := time.perf_counter() - started) >= seconds:
                return videos / elapsed
