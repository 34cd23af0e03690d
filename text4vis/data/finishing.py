"""The CPU's way from decoded regions to a batch's frames: resized, cropped, flipped and coloured as planned.

OpenCV resizes in training, Pillow in evaluation (as the published models' own code): DALI's resize would be the slowest
step by far. On a GPU the graph of `dali.view_graph` does all this.

B videos, V views, T frames, S side of the model's input, H, W of a decoded image.
"""

from __future__ import annotations

import itertools
import math
import weakref
from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import cv2
import numpy as np
import torch
from PIL import Image

from text4vis.data import pixels
from text4vis.data.augmentation import Crop, Geometry
from text4vis.data.plan import Target, VideoPlan

# Videos in the order of the batch, each with the decoded regions (H, W, 3) uint8 of its `plan.frames`.
Decoded = list[tuple[VideoPlan, list[np.ndarray]]]

cv2.setNumThreads(1)  # the loader's own threads are the parallelism
# Intel's bilinear resize where OpenCV has it: a quarter faster, and at most 1 of 255 away from OpenCV's own.
cv2.ipp.setUseIPP_NotExact(True)


@dataclass(frozen=True)
class Finishing:
    """A batch that is being finished: frames (B, V, T, S, S, 3) uint8, complete when all `parts` are done."""

    videos: list[VideoPlan]
    frames_BVTSS3: torch.Tensor
    parts: list[Future[None]]

    def result(self) -> tuple[list[VideoPlan], torch.Tensor]:
        """Waits for the batch: its videos and their frames."""
        for part in self.parts:
            part.result()
        return self.videos, self.frames_BVTSS3


class CpuFinisher:
    """Finishes batches on `num_threads` threads of `threads`.

    views_shape: (V, T, S, S, 3) of a video. pinned: whether batches lie in pinned memory, for copies to a GPU that
    nobody waits for.
    """

    def __init__(
        self, views_shape: tuple[int, ...], threads: ThreadPoolExecutor, num_threads: int, *, pinned: bool = False
    ) -> None:
        self._views_shape, self._threads = views_shape, threads
        self._memory = _Memory(pinned)
        self._num_parts = 2 * num_threads  # smaller than a thread's share, so that no thread waits long

    def start(self, decoded: Decoded) -> Finishing:
        """Starts to finish a batch, and returns at once."""
        out_BVTSS3 = self._memory.lend((len(decoded), *self._views_shape))
        images = [
            (row, frame, image)
            for row, (plan, images) in enumerate(decoded)
            for frame, image in zip(plan.frames, images, strict=True)
        ]

        def finish(first: int, last: int) -> None:
            for row, frame, image in images[first:last]:
                place(image, frame.geometry, frame.targets, out_BVTSS3[row])

        edges = np.linspace(0, len(images), self._num_parts + 1).astype(int).tolist()
        parts = [self._threads.submit(finish, *edge) for edge in itertools.pairwise(edges)]
        return Finishing([plan for plan, _ in decoded], torch.from_numpy(out_BVTSS3), parts)


class _Memory:
    """Lends blocks of memory to batches, and takes a block back when nobody holds the batch any more.

    Mapping tens of megabytes for every batch would cost a fifth of the loader's CPU time.
    """

    def __init__(self, pinned: bool) -> None:
        self._pinned = pinned
        self._free: deque[np.ndarray] = deque()

    def lend(self, shape: tuple[int, ...]) -> np.ndarray:
        """A uint8 array of unspecified content; a tensor made of it keeps it lent."""
        size = math.prod(shape)
        block = self._free.pop() if self._free else self._new(size)
        if block.size < size:
            block = self._new(size)
        lent = block[:size].reshape(shape)
        weakref.finalize(lent, self._free.append, block)
        return lent

    def _new(self, size: int) -> np.ndarray:
        return (
            torch.empty(size, dtype=torch.uint8, pin_memory=True).numpy() if self._pinned else np.empty(size, np.uint8)
        )


def place(image_HW3: np.ndarray, geometry: Geometry, targets: Sequence[Target], out_VTSS3: np.ndarray) -> None:
    """Resizes the decoded region of a frame on the CPU and writes its crops where `targets` say.

    image_HW3, out_VTSS3: uint8 RGB. Releases Python's lock for most of the work.
    """
    side = out_VTSS3.shape[2]
    if geometry.part is not None:
        top, left, height, width = geometry.part
        whole = pixels.operate(Image.fromarray(image_HW3), geometry.operations)
        image_HW3 = np.asarray(whole.crop((left, top, left + width, top + height)))
    if geometry.resampling == "fast" and (geometry.height, geometry.width) == (side, side):
        _place_whole(image_HW3, geometry, targets, out_VTSS3)
        return
    image_HW3 = _resize(image_HW3, geometry)
    for v, t, c in targets:
        view, crop = out_VTSS3[v, t], geometry.crops[c]
        view[:] = _cut(image_HW3, crop, side)
        if crop.grey:
            cv2.cvtColor(cv2.cvtColor(view, cv2.COLOR_RGB2GRAY), cv2.COLOR_GRAY2RGB, dst=view)
        _flip_and_recolour(view, crop)


def _cut(image_HW3: np.ndarray, crop: Crop, side: int) -> np.ndarray:
    """The crop's square of an image, uncopied where the image covers it; elsewhere it is black."""
    top, left = max(crop.top, 0), max(crop.left, 0)
    part = image_HW3[top : crop.top + side, left : crop.left + side]
    if part.shape[:2] == (side, side):
        return part
    square = np.zeros((side, side, 3), np.uint8)
    y, x = top - crop.top, left - crop.left
    square[y : y + part.shape[0], x : x + part.shape[1]] = part
    return square


def _place_whole(image_HW3: np.ndarray, geometry: Geometry, targets: Sequence[Target], out_VTSS3: np.ndarray) -> None:
    """Training: the whole resized region is the view, so it is resized straight into the batch.

    All targets share one crop.
    """
    (v, t, c), *others = targets
    view, crop = out_VTSS3[v, t], geometry.crops[c]
    if crop.grey:  # one channel to resize instead of three
        grey_HW = _resize(cv2.cvtColor(image_HW3, cv2.COLOR_RGB2GRAY), geometry)
        cv2.cvtColor(grey_HW, cv2.COLOR_GRAY2RGB, dst=view)
    else:
        _resize(image_HW3, geometry, into=view)
    _flip_and_recolour(view, crop)
    for v, t, _ in others:
        out_VTSS3[v, t] = view


def _flip_and_recolour(view_SS3: np.ndarray, crop: Crop) -> None:
    if crop.flip:
        cv2.flip(view_SS3, 1, dst=view_SS3)
    if crop.blur or crop.solarize:
        view_SS3[:] = np.asarray(pixels.recolour(Image.fromarray(view_SS3), crop))


def _resize(image: np.ndarray, geometry: Geometry, into: np.ndarray | None = None) -> np.ndarray:
    """Evaluation: Pillow's, with antialias. Training: bilinear, averaging when it shrinks by two or more."""
    height, width = geometry.height, geometry.width
    if geometry.resampling != "fast":
        if image.shape[:2] == (height, width):
            return image
        kernel = Image.Resampling[geometry.resampling.upper()]
        return np.asarray(Image.fromarray(image).resize((width, height), kernel))
    shrinks = image.shape[0] >= 2 * height or image.shape[1] >= 2 * width
    kind = cv2.INTER_AREA if shrinks else cv2.INTER_LINEAR
    return cv2.resize(image, (width, height), dst=into, interpolation=kind)
