"""Decoded images become the batch's frames: resized, cropped, flipped and coloured as planned.

On the CPU this also resizes: OpenCV in training, Pillow in evaluation (as the published models' own code). DALI's
resize is the slowest step by far there. On a GPU DALI has resized already.

B videos, V views, T frames, S side of the model's input, H, W of a decoded image.
"""

from __future__ import annotations

import itertools
import math
import weakref
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Protocol, TypeVar

import cv2
import numpy as np
import torch
from PIL import Image

from text4vis.data import pixels
from text4vis.data.augmentation import Crop, Geometry
from text4vis.data.plan import FramePlan, Target, VideoPlan

# A decoded image (H, W, 3) uint8: an array on the CPU, a tensor on a GPU.
Pixels = TypeVar("Pixels", np.ndarray, torch.Tensor)
# Videos in the order of the batch, each with the images of its `plan.frames`.
Decoded = list[tuple[VideoPlan, list[Pixels]]]

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


class Finisher(Protocol[Pixels]):
    """Makes the frames of batch after batch."""

    def start(self, decoded: Decoded[Pixels]) -> Finishing:
        """Starts to finish a batch."""


class CpuFinisher:
    """Finishes batches on `num_threads` threads of `threads`.

    views_shape: (V, T, S, S, 3) of a video.
    """

    def __init__(self, views_shape: tuple[int, ...], threads: ThreadPoolExecutor, num_threads: int) -> None:
        self._views_shape, self._threads = views_shape, threads
        self._memory = _Memory()
        self._num_parts = 2 * num_threads  # smaller than a thread's share, so that no thread waits long

    def start(self, decoded: Decoded[np.ndarray]) -> Finishing:
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


class GpuFinisher:
    """Finishes batches on a GPU, on a stream of its own. views_shape: (V, T, S, S, 3) of a video.

    Batches are allocated within that stream. Memory of another stream would be given to the next batch as soon as the
    trainer lets go of a batch, although the trainer's GPU work may still read it; `used_here` prevents that.
    """

    def __init__(self, views_shape: tuple[int, ...], device: torch.device) -> None:
        self._views_shape, self._device = views_shape, device
        self._stream = torch.cuda.Stream(device)

    def start(self, decoded: Decoded[torch.Tensor]) -> Finishing:
        """Finishes a batch; its frames are complete when this returns."""
        shape = (len(decoded), *self._views_shape)
        with torch.cuda.stream(self._stream):
            frames_BVTSS3 = torch.empty(shape, dtype=torch.uint8, device=self._device)
            for (plan, images), out_VTSS3 in zip(decoded, frames_BVTSS3, strict=True):
                place_on_device(images, plan.frames, out_VTSS3)
        self._stream.synchronize()
        return Finishing([plan for plan, _ in decoded], frames_BVTSS3, [])


def used_here(frames: torch.Tensor) -> None:
    """Tells the allocator that the caller's present stream uses a tensor that another stream has made.

    When the tensor is freed, its memory is then lent again only after the work that this stream has been given.
    """
    frames.record_stream(torch.cuda.current_stream(frames.device))


class _Memory:
    """Lends blocks of memory to batches, and takes a block back when nobody holds the batch any more.

    Mapping tens of megabytes for every batch would cost a fifth of the loader's CPU time.
    """

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


def _cut(image_HW3: Pixels, crop: Crop, side: int) -> Pixels:
    """The crop's square of an image, uncopied where the image covers it; elsewhere it is black."""
    top, left = max(crop.top, 0), max(crop.left, 0)
    part = image_HW3[top : crop.top + side, left : crop.left + side]
    if part.shape[:2] == (side, side):
        return part
    shape = (side, side, 3)
    square = np.zeros(shape, np.uint8) if isinstance(image_HW3, np.ndarray) else image_HW3.new_zeros(shape)
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


def at_decoded_size(image: np.ndarray, geometry: Geometry) -> np.ndarray:
    """A decoded region (H, W, 3) uint8 as a decoder that also resizes gives it: at `geometry.decoded_size`."""
    return np.ascontiguousarray(image if geometry.part is not None else _resize(image, geometry))


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


def place_on_device(images_HW3: Sequence[torch.Tensor], frames: Sequence[FramePlan], out_VTSS3: torch.Tensor) -> None:
    """Does what `place` does for all frames of a video, whose images are uint8 tensors on the device of `out_VTSS3`.

    They are resized already, except where RandAugment's operations come first.
    """
    side = out_VTSS3.shape[2]
    luma = torch.tensor([19595, 38470, 7471], dtype=torch.float32, device=out_VTSS3.device) / 65536  # ITU-R 601-2
    for frame, image_HW3 in zip(frames, _operated(images_HW3, frames, side), strict=True):
        for v, t, c in frame.targets:
            crop = frame.geometry.crops[c]
            view = _cut(image_HW3, crop, side)
            if crop.flip:
                view = view.flip(1)
            if crop.grey:
                view = (view.float() @ luma).round().to(torch.uint8)[..., None].expand(-1, -1, 3)
            if crop.blur or crop.solarize:
                view = pixels.recolour(view.permute(2, 0, 1), crop).permute(1, 2, 0)
            out_VTSS3[v, t] = view


def _operated(images_HW3: Sequence[torch.Tensor], frames: Sequence[FramePlan], side: int) -> Iterator[torch.Tensor]:
    """The images in order. Frames with operations are operated on, cut and resized, those of one geometry at once."""
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
