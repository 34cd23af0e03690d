"""Turns the bytes of a batch into images: DALI decodes stored frames, PyAV (or DALI, on a GPU) stored videos.

k distinct frames of a video; H, W of the region that is decoded, or of what it is resized to.
"""

from __future__ import annotations

import io
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import torch
from PIL import Image

from shards.format import SampleError
from shards.nvdec import nvdec_shows_the_same
from shards.reader import ShardDataset
from shards.stored import decode_stored
from shards.video import VideoError
from text4vis.data import dali
from text4vis.data.finishing import Decoded, Pixels, at_decoded_size
from text4vis.data.plan import VideoPlan
from text4vis.data.reading import ReadVideo, undecodable


@dataclass(frozen=True)
class Run:
    """A batch that is being decoded. It keeps the encoded bytes alive, which DALI does not copy.

    stored_videos: by row of the batch, the frames (k of (H, W, 3) uint8) of videos that PyAV decodes.
    """

    videos: list[ReadVideo]
    stored_videos: dict[int, Future[list[np.ndarray]]] = field(default_factory=dict)


class Decoder(Protocol[Pixels]):
    """Decodes batch after batch. A second batch may be started before the first is finished; they finish in order."""

    def start(self, videos: list[ReadVideo]) -> Run:
        """Starts decoding a batch, and returns at once."""

    def finish(self, run: Run) -> Decoded[Pixels]:
        """Waits for the batch. Raises SampleError if a video does not decode, RuntimeError if DALI fails otherwise."""


class CpuDecoder:
    """Decodes on the CPU. Its images are the regions that the plan asks for, not resized: (H, W, 3) uint8 arrays.

    threads: decode stored videos. num_threads: DALI's. max_frames: the most frames of a batch.
    """

    def __init__(
        self, dataset: ShardDataset, threads: ThreadPoolExecutor, *, num_threads: int, max_frames: int
    ) -> None:
        self._dataset, self._threads = dataset, threads
        self._graph = dali.image_graph(device_id=None, num_threads=num_threads, batch_size=max_frames, resize=None)

    def start(self, videos: list[ReadVideo]) -> Run:
        """Starts DALI on the stored frames, PyAV on the stored videos."""
        run = Run(videos)
        encoded, regions = [], []
        for row, (plan, files, is_stored_video) in enumerate(videos):
            if is_stored_video:
                num_frames = int(self._dataset.num_frames[plan.sample])
                run.stored_videos[row] = self._threads.submit(
                    decode_stored, files[0], plan.numbers, num_frames=num_frames
                )
            else:
                encoded += files
                regions += [frame.geometry.region for frame in plan.frames]
        if encoded:
            dali.start_run(self._graph, encoded, regions)
        return run

    def finish(self, run: Run) -> Decoded[np.ndarray]:
        """The videos and, for each, its k images. Raises SampleError, RuntimeError."""
        stored_frames = iter(_stored_frames(self._graph, self._dataset, run))
        decoded = []
        for row, (plan, _, is_stored_video) in enumerate(run.videos):
            if is_stored_video:
                images = _regions(self._dataset, plan, run.stored_videos[row])
            else:
                images = [np.asarray(next(stored_frames)) for _ in plan.frames]
            decoded.append((plan, images))
        return decoded


class GpuDecoder:
    """Decodes and resizes on a GPU. Its images are (H, W, 3) uint8 tensors on the device, of `geometry.decoded_size`.

    Stored frames and stored videos have a graph each; a batch may hold both. Videos that NVIDIA's decoder would show
    differently from a player are decoded and resized on the CPU, by `threads`. num_threads: DALI's. resize: "linear"
    or "cubic". max_frames, max_videos: the most frames and videos of a batch.
    """

    def __init__(
        self,
        dataset: ShardDataset,
        threads: ThreadPoolExecutor,
        *,
        device_id: int,
        num_threads: int,
        resize: str,
        max_frames: int,
        max_videos: int,
    ) -> None:
        self._dataset, self._threads = dataset, threads
        self._device = torch.device("cuda", device_id)
        self._by_nvdec: dict[int, bool] = {}  # by sample
        self._images = dali.image_graph(
            device_id=device_id, num_threads=num_threads, resize=resize, batch_size=max_frames
        )
        self._videos = dali.video_graph(
            device_id=device_id, num_threads=num_threads, resize=resize, batch_size=max_videos
        )

    def start(self, videos: list[ReadVideo]) -> Run:
        """Starts a run of each graph for which the batch holds something, and PyAV on the other videos."""
        run, by_nvdec = Run(videos), []
        shown_by_nvdec = list(self._threads.map(self._shown_by_nvdec, videos))  # a new video takes milliseconds
        for row, video in enumerate(videos):
            if video.is_stored_video and not shown_by_nvdec[row]:
                num_frames = int(self._dataset.num_frames[video.plan.sample])
                run.stored_videos[row] = self._threads.submit(
                    decode_stored, video.files[0], video.plan.numbers, num_frames=num_frames
                )
            elif video.is_stored_video:
                by_nvdec.append(video)
        stored_frames = [video for video in videos if not video.is_stored_video]
        if stored_frames:
            geometries = [frame.geometry for video in stored_frames for frame in video.plan.frames]
            encoded = [data for video in stored_frames for data in video.files]
            dali.start_run(self._images, encoded, [g.region for g in geometries], [g.decoded_size for g in geometries])
        if by_nvdec:
            geometries = [video.plan.frames[0].geometry for video in by_nvdec]  # all frames of a video are alike
            dali.start_run(
                self._videos,
                [video.files[0] for video in by_nvdec],
                [g.region for g in geometries],
                [g.decoded_size for g in geometries],
                [video.plan.numbers.astype(np.int32) for video in by_nvdec],
            )
        return run

    def _shown_by_nvdec(self, video: ReadVideo) -> bool:
        """Whether NVIDIA's decoder shows a stored video as PyAV does; looked up once for each video."""
        sample = video.plan.sample
        if video.is_stored_video and sample not in self._by_nvdec:
            self._by_nvdec[sample] = nvdec_shows_the_same(video.files[0], int(self._dataset.num_frames[sample]))
        return video.is_stored_video and self._by_nvdec[sample]

    def finish(self, run: Run) -> Decoded[torch.Tensor]:
        """The videos and, for each, its k images, uncopied where DALI decoded. Raises SampleError, RuntimeError."""
        stored_frames = iter(_stored_frames(self._images, self._dataset, run))
        stored_videos = sum(video.is_stored_video for video in run.videos)
        sequences = iter(dali.outputs(self._videos) if stored_videos > len(run.stored_videos) else ())
        decoded = []
        for row, (plan, _, is_stored_video) in enumerate(run.videos):
            if row in run.stored_videos:
                regions = _regions(self._dataset, plan, run.stored_videos[row])
                resized = map(at_decoded_size, regions, [frame.geometry for frame in plan.frames])
                images = [torch.tensor(image, device=self._device) for image in resized]
            elif is_stored_video:
                images = list(torch.from_dlpack(next(sequences)).unbind(0))
            else:
                images = [torch.from_dlpack(next(stored_frames)) for _ in plan.frames]
            decoded.append((plan, images))
        return decoded


def _regions(dataset: ShardDataset, plan: VideoPlan, frames: Future[list[np.ndarray]]) -> list[np.ndarray]:
    """The planned regions (H, W, 3) uint8 of a stored video's frames, which PyAV decodes. Raises SampleError."""
    try:
        whole = frames.result()
    except (VideoError, IndexError) as error:  # the file may hold fewer frames than the index says
        raise SampleError(undecodable(dataset, plan.sample, error)) from error
    images = []
    for frame, image in zip(plan.frames, whole, strict=True):
        if image.shape[:2] != frame.size:
            height, width = frame.size
            reason = f"{image.shape[1]}x{image.shape[0]} pixels, the index says {width}x{height}"
            raise SampleError(undecodable(dataset, plan.sample, reason, frame.number))
        top, left, height, width = frame.geometry.region
        images.append(image[top : top + height, left : left + width])
    return images


def _stored_frames(
    graph: dali.Pipeline, dataset: ShardDataset, run: Run
) -> list[dali.TensorCPU] | list[dali.TensorGPU]:
    """The decoded frames of all videos whose frames are stored one by one. Raises SampleError, RuntimeError."""
    stored = [video for video in run.videos if not video.is_stored_video]
    if not stored:
        return []
    try:
        return dali.outputs(graph)
    except RuntimeError as error:
        raise _explained(dataset, stored, error) from error


def _explained(dataset: ShardDataset, stored: list[ReadVideo], error: RuntimeError) -> Exception:
    """SampleError about the first frame that Pillow does not decode either; `error` where it decodes all.

    DALI's report is about the whole batch and does not say which frame failed.
    """
    for video in stored:
        for frame, data in zip(video.plan.frames, video.files, strict=True):
            try:
                Image.open(io.BytesIO(data)).load()
            except Exception as reason:
                return SampleError(undecodable(dataset, video.plan.sample, reason, frame.number))
    return error
