"""Turns the bytes of a batch into images on the CPU: DALI decodes stored frames, PyAV stored videos.

k distinct frames of a video; H, W of the region that is decoded.
"""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from typing import Protocol, TypeVar

import numpy as np
from PIL import Image

from shards.format import SampleError
from shards.reader import ShardDataset
from shards.stored import decode_stored
from shards.video import VideoError
from text4vis.data import dali
from text4vis.data.finishing import Decoded
from text4vis.data.plan import VideoPlan
from text4vis.data.reading import ReadVideo, undecodable

# The most of one run of DALI for each of its threads: enough that they end at nearly the same time. A run's output is
# one block of memory, and blocks as large as a batch leave large gaps.
FRAMES_A_THREAD = 64

Run = TypeVar("Run")
Done_co = TypeVar("Done_co", covariant=True)


class Decoder(Protocol[Run, Done_co]):
    """Decodes batch after batch. A second batch may be started before the first is finished; they finish in order."""

    def start(self, videos: list[ReadVideo]) -> Run:
        """Starts decoding a batch, and returns at once. The run keeps the encoded bytes alive: DALI does not copy."""

    def finish(self, run: Run) -> Done_co:
        """Waits for the batch. Raises SampleError if a video does not decode, RuntimeError if DALI fails otherwise."""


class Graph:
    """A DALI graph, built when it is first needed, and built again after a run of it has failed.

    Runs that were started before the failure end on the graph that they were started on.
    """

    def __init__(self, build: Callable[[], dali.Pipeline]) -> None:
        self._build = build
        self._built: dali.Pipeline | None = None

    def start(self, start: Callable[[dali.Pipeline], None]) -> Callable[..., list[dali.Tensor]]:
        """Starts a run. The result waits for its outputs; it takes `dali.outputs` or `dali.dense_outputs`."""
        graph = self._built = self._built or self._build()
        start(graph)
        return partial(self._outputs, graph)

    def _outputs(self, graph: dali.Pipeline, get: Callable[[dali.Pipeline], list[dali.Tensor]]) -> list[dali.Tensor]:
        try:
            return get(graph)
        except RuntimeError:
            if self._built is graph:
                self._built = None
            raise


@dataclass(frozen=True)
class CpuRun:
    """A batch that is being decoded.

    stored_frames: DALI's runs in order, each of which waits for the regions of the next stored frames. stored_videos:
    by row of the batch, a video's regions.
    """

    videos: list[ReadVideo]
    stored_frames: list[Callable[..., list[dali.Tensor]]]
    stored_videos: dict[int, Future[list[np.ndarray]]] = field(default_factory=dict)


class CpuDecoder:
    """Decodes on the CPU. Its images are the regions that the plan asks for, not resized: (H, W, 3) uint8 arrays.

    threads: decode stored videos. num_threads: DALI's.
    """

    def __init__(self, dataset: ShardDataset, threads: ThreadPoolExecutor, *, num_threads: int) -> None:
        self._dataset, self._threads = dataset, threads
        self._run_frames = FRAMES_A_THREAD * num_threads
        self._graph = Graph(lambda: dali.region_graph(num_threads=num_threads, batch_size=self._run_frames))

    def start(self, videos: list[ReadVideo]) -> CpuRun:
        """Starts DALI on the stored frames, PyAV on the stored videos."""
        stored_frames = [video for video in videos if not video.is_stored_video]
        stored_videos = {
            row: self._threads.submit(planned_regions, self._dataset, video)
            for row, video in enumerate(videos)
            if video.is_stored_video
        }
        encoded = [data for video in stored_frames for data in video.files]
        regions = [frame.geometry.region for video in stored_frames for frame in video.plan.frames]
        runs = [
            self._graph.start(partial(dali.start_regions, encoded=encoded[part], regions=regions[part]))
            for part in (slice(i, i + self._run_frames) for i in range(0, len(encoded), self._run_frames))
        ]
        return CpuRun(videos, runs, stored_videos)

    def finish(self, run: CpuRun) -> Decoded:
        """The videos and, for each, its k images. Raises SampleError, RuntimeError."""
        stored_frames = self._stored_frames(run)
        decoded = []
        for row, (plan, _, is_stored_video) in enumerate(run.videos):
            if is_stored_video:
                images = run.stored_videos[row].result()
            else:
                images = [np.asarray(next(stored_frames)) for _ in plan.frames]
            decoded.append((plan, images))
        return decoded

    def _stored_frames(self, run: CpuRun) -> Iterator[dali.Tensor]:
        """Takes what all of DALI's runs give, after a failure too: the next batch's runs may wait in the same graph."""
        tensors: list[dali.Tensor] = []
        errors: list[RuntimeError] = []
        for outputs in run.stored_frames:
            try:
                tensors += outputs(dali.outputs)
            except RuntimeError as error:
                errors.append(error)
        if errors:
            raise explained(self._dataset, run.videos, errors[0]) from errors[0]
        return iter(tensors)


def planned_regions(dataset: ShardDataset, video: ReadVideo) -> list[np.ndarray]:
    """The planned regions (H, W, 3) uint8 of a stored video's frames, decoded by PyAV. Raises SampleError."""
    plan, num_frames = video.plan, int(dataset.num_frames[video.plan.sample])
    try:
        whole = decode_stored(video.files[0], plan.numbers, num_frames=num_frames)
    except (VideoError, IndexError) as error:  # the file may hold fewer frames than the index says
        raise SampleError(undecodable(dataset, plan.sample, error)) from error
    return [_region(dataset, plan, frame, image) for frame, image in enumerate(whole)]


def _region(dataset: ShardDataset, plan: VideoPlan, position: int, image: np.ndarray) -> np.ndarray:
    frame = plan.frames[position]
    if image.shape[:2] != frame.size:
        height, width = frame.size
        reason = f"{image.shape[1]}x{image.shape[0]} pixels, the index says {width}x{height}"
        raise SampleError(undecodable(dataset, plan.sample, reason, frame.number))
    top, left, height, width = frame.geometry.region
    return image[top : top + height, left : left + width]


def explained(dataset: ShardDataset, videos: Sequence[ReadVideo], error: RuntimeError) -> Exception:
    """SampleError about the first stored frame that Pillow does not decode either; `error` where it decodes all.

    DALI's report is about the whole batch and does not say which frame failed.
    """
    for video in videos if not out_of_memory(error) else ():
        for frame, data in zip(video.plan.frames, () if video.is_stored_video else video.files, strict=False):
            try:
                Image.open(io.BytesIO(data)).load()
            except Exception as reason:
                return SampleError(undecodable(dataset, video.plan.sample, reason, frame.number))
    return error


def report_of(error: RuntimeError) -> str:
    """What went wrong, of DALI's report: the traceback of the graph's definition comes before it, advice after it."""
    return " ".join(str(error).rpartition("encountered:")[2].partition("Current pipeline")[0].split())


def out_of_memory(error: RuntimeError) -> bool:
    """Whether no video is at fault. DALI calls every video a "memory file"."""
    return bool(re.search("bad_alloc|memory(?! file)", report_of(error), re.IGNORECASE))
