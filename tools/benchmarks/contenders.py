"""The loaders that are compared: ours, decoding alone as an upper limit, and what people write with torchvision.

Each is a context manager that gives an endless iterator of batches; the length of a batch is its number of videos. All
alternatives get the frames, regions, flips and greys that our own plan draws, so they do the same work on the same
pixels. Loaders that others made are in `benchmarks.peers`.

B videos, V views, T frames, S side of the model's input.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sized
from contextlib import AbstractContextManager, contextmanager

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset, Sampler
from torchvision.io import ImageReadMode, decode_jpeg, read_file
from torchvision.transforms import InterpolationMode, v2

from benchmarks.data import Workload
from benchmarks.recipe import WORKER_START, Batches, Setup, drawn
from text4vis.config.schema import Config
from text4vis.data import augmentation, dali, sampling
from text4vis.data.gpu_decoding import steps_of
from text4vis.data.loader import build_loader
from text4vis.data.plan import BatchPlan
from text4vis.data.prefetch import pipelined

# CLIP's, as the original applies them on the CPU.
_MEAN = (0.48145466, 0.4578275, 0.40821073)
_STD = (0.26862954, 0.26130258, 0.27577711)
_CEILING_BATCHES = 16


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
    """The upper limit: DALI decodes the regions of our plan from bytes in memory, and nothing else is done.

    device_id: the GPU that decodes, whose graph resizes too, or None for the CPU.
    """
    with build_loader(setup.train, "train") as loader:
        plans = list(itertools.islice(loader.plans(), _CEILING_BATCHES))
        read = [(plan, list(itertools.chain(*loader.dataset.read_many(plan.requests)))) for plan in plans]
        options = {"num_threads": setup.workers, "batch_size": loader.planner.max_frames}
        steps = steps_of(loader.planner)
        graph = (
            dali.region_graph(**options)
            if device_id is None
            else dali.view_graph(steps, device_id=device_id, **options)
        )

        def start(item: tuple[BatchPlan, list[bytes]]) -> BatchPlan:
            plan, encoded = item
            geometries = [frame.geometry for video in plan.videos for frame in video.frames]
            if device_id is None:
                dali.start_regions(graph, encoded, [geometry.region for geometry in geometries])
            else:
                dali.start_views(graph, steps, encoded, geometries)
            return plan

        def finish(plan: BatchPlan) -> Sized:
            dali.outputs(graph)
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
        dataset, batch_size, sampler=_Endless(), num_workers=workers, multiprocessing_context=WORKER_START
    )
    yield iter(loader)


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
        draw = drawn(self.config, self.workload.videos[video][1], epoch, video)
        images = [self.resize(image) for image in _open_group(self.workload, video, draw.indices)]
        geometry = augmentation.train_geometry(draw, images[0].height, images[0].width, self.config.data.input_size)
        (top, left, height, width), size = geometry.region, (geometry.width, geometry.height)
        images = [
            image.crop((left, top, left + width, top + height)).resize(size, Image.Resampling.BILINEAR)
            for image in images
        ]
        if draw.flip:
            images = [image.transpose(Image.Transpose.FLIP_LEFT_RIGHT) for image in images]
        if draw.grey:
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
        draw = drawn(self.config, self.workload.videos[video][1], epoch, video)
        files = [read_file(str(self.workload.frame(video, index))) for index in draw.indices.tolist()]
        frames_TCHW = torch.stack([decode_jpeg(file, ImageReadMode.RGB) for file in files])
        side = self.config.data.input_size
        height, width = frames_TCHW.shape[-2:]
        geometry = augmentation.train_geometry(draw, height, width, side)
        frames_TCHW = v2.functional.resized_crop(frames_TCHW, *geometry.region, [side, side], antialias=True)
        if draw.flip:
            frames_TCHW = v2.functional.horizontal_flip(frames_TCHW)
        return v2.functional.rgb_to_grayscale(frames_TCHW, 3) if draw.grey else frames_TCHW


def tensor_train(setup: Setup) -> AbstractContextManager[Batches]:
    return _data_loader(TensorTrain(setup.workload, setup.train), setup.batch_size, setup.workers)
