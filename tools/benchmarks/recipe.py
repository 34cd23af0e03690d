"""What every loader that is compared gets: data, batch size, workers, and the frames, crops and flips of our plan.

This imports no loader, so that a peer's process holds what that peer needs and nothing of ours.

B videos, T frames, S side of the model's input.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence, Sized
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import cv2
import numpy as np
import simplejpeg
import torch

from benchmarks.data import Workload
from text4vis.config.loading import config_from_dict
from text4vis.config.schema import Config
from text4vis.data import augmentation

# Quick, and safe only in a process without threads: `figures.run_fresh` gives one.
WORKER_START = "fork"
_JPEG_START = b"\xff\xd8"


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


def drawn(config: Config, num_frames: int, epoch: int, video: int) -> augmentation.Draw:
    """The frames, crop and flip that our loader draws for a video in an epoch."""
    return augmentation.draw(config.data, num_frames, augmentation.generator(config.seed, epoch, video))


class OpenCvFrames:
    """Turns the stored frames of a video into a training sample, with simplejpeg (others: OpenCV) and OpenCV.

    Gives the sample of epoch 0 when it meets a video for the first time, that of epoch 1 the second time, and so on.
    """

    def __init__(self, config: Config) -> None:
        self.config = config
        self._seen: Counter[int] = Counter()

    def draw(self, video: int, num_frames: int) -> augmentation.Draw:
        """Draws for a video's next epoch."""
        self._seen[video] += 1
        return drawn(self.config, num_frames, self._seen[video] - 1, video)

    def show(self, draw: augmentation.Draw, encoded: Sequence[bytes | memoryview], output_TSSC: np.ndarray) -> None:
        """Decodes the T drawn frames, and crops, resizes and flips them into `output_TSSC`, (T, S, S, 3) uint8."""
        side = self.config.data.input_size
        for frame_SSC, data in zip(output_TSSC, encoded, strict=True):
            image_HWC = _decoded(data)
            rows, columns, _ = image_HWC.shape
            top, left, height, width = augmentation.train_geometry(draw, rows, columns, side).region
            image_HWC = cv2.resize(image_HWC[top : top + height, left : left + width], (side, side))
            if draw.flip:
                image_HWC = cv2.flip(image_HWC, 1)
            if draw.grey:
                image_HWC = cv2.cvtColor(cv2.cvtColor(image_HWC, cv2.COLOR_RGB2GRAY), cv2.COLOR_GRAY2RGB)
            frame_SSC[:] = image_HWC

    def empty(self, *shape: int) -> np.ndarray:
        """(*shape, T, S, S, 3) uint8 to be filled."""
        data = self.config.data
        return np.empty((*shape, data.num_segments, data.input_size, data.input_size, 3), np.uint8)

    def sample(self, video: int, num_frames: int, read: Callable[[int], bytes | memoryview]) -> torch.Tensor:
        """The next sample of a video, (T, S, S, 3) uint8. read(frame): the bytes of a stored frame."""
        draw, output_TSSC = self.draw(video, num_frames), self.empty()
        self.show(draw, [read(index) for index in draw.indices.tolist()], output_TSSC)
        return torch.from_numpy(output_TSSC)


def _decoded(data: bytes | memoryview) -> np.ndarray:
    if data[:2] == _JPEG_START:
        return simplejpeg.decode_jpeg(data, colorspace="RGB")
    image_HWC = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR)
    if image_HWC is None:
        raise ValueError("a frame does not decode")
    return cv2.cvtColor(image_HWC, cv2.COLOR_BGR2RGB)


def channels_first(frames_BTSSC: torch.Tensor) -> torch.Tensor:
    return frames_BTSSC.permute(0, 1, 4, 2, 3)
