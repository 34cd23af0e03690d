"""Turns the bytes of a batch into its frames on a GPU: one DALI graph decodes, cuts, resizes and colours.

The tests run it on the CPU as well: with `device_id=None` the same operators run there.

B videos, V views, T frames, K crops of a frame, S side of the model's input, N pictures (S, S, 3).
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial

import numpy as np
import torch

from shards.nvdec import why_not_nvdec
from shards.reader import ShardDataset
from text4vis.data import dali
from text4vis.data.augmentation import frame_rule
from text4vis.data.decoding import Graph, explained, out_of_memory, planned_regions, report_of
from text4vis.data.finishing import place
from text4vis.data.plan import Planner, VideoPlan
from text4vis.data.reading import ReadVideo

logger = logging.getLogger("text4vis")

_TELLING_VIDEOS = 500


def steps_of(planner: Planner) -> dali.Steps:
    """The graph's steps for the batches of a planner that draws no RandAugment."""
    data = planner.config.data
    if not planner.augments:
        _, interpolation = frame_rule(data)
        return dali.Steps(data.input_size, planner.num_crops, interpolation, flip=planner.num_crops == 10)
    return dali.Steps(
        data.input_size,
        1,
        "fast",
        flip=data.flip > 0,
        grey=data.grey > 0,
        blur=data.blur > 0,
        solarize=data.solarize > 0,
    )


class VideoChoice:
    """Which stored videos NVIDIA's decoder may decode, because it shows them as PyAV does.

    Each is looked at once for all passes of a loader, in about ten milliseconds. The log says once how many are decoded
    on the CPU, and why: after 500 videos, or at the end of the first pass. Where NVIDIA's decoder fails on videos that
    PyAV decodes (a GPU may not know their codec), it gets no more of them.
    """

    def __init__(self, dataset: ShardDataset) -> None:
        self._dataset = dataset
        self._reasons: dict[int, str | None] = {}  # by sample
        self._said = self._gave_up = False

    def by_nvdec(self, video: ReadVideo) -> bool:
        """Whether NVIDIA's decoder shows a stored video as PyAV does."""
        sample = video.plan.sample
        if self._gave_up:
            return False
        if sample not in self._reasons:
            num_frames = int(self._dataset.num_frames[sample])
            self._reasons[sample] = why_not_nvdec(video.files[0], num_frames, video.plan.frames[0].size)
        return self._reasons[sample] is None

    def give_up(self, error: RuntimeError) -> None:
        """Leaves all further videos to PyAV, and says so."""
        if not self._gave_up:
            logger.warning(
                "NVIDIA's decoder failed on sound stored videos, so all are decoded on the CPU from here on: %s",
                report_of(error),
            )
        self._gave_up = True

    def say(self, at_least: int = 0) -> None:
        """Logs the counts, unless they were logged before or fewer than `at_least` videos were looked at."""
        reasons = Counter(reason for reason in self._reasons.values() if reason)
        if self._said or not reasons or len(self._reasons) < at_least:
            return
        self._said = True
        listed = "; ".join(f"{count} {reason}" for reason, count in reasons.most_common())
        logger.warning(
            "%d of the first %d stored videos are decoded on the CPU, because NVIDIA's decoder would show them "
            "otherwise: %s (docs/videos.md)",
            reasons.total(),
            len(self._reasons),
            listed,
        )


@dataclass(frozen=True)
class GpuBatch:
    """A decoded batch, not yet in its order.

    parts: tensors (…, S, S, 3) uint8, together N pictures; DALI owns their memory. rows_BVT: which of the N pictures is
    frame t of view v.
    """

    videos: list[VideoPlan]
    parts: list[torch.Tensor]
    rows_BVT: np.ndarray

    def frames(self, device: torch.device) -> torch.Tensor:
        """The frames (B, V, T, S, S, 3) uint8 in memory of their own. Queues a copy of the rows and one gather."""
        pictures = [part.to(device, non_blocking=True).flatten(0, -4) for part in self.parts]
        pictures_NSS3 = pictures[0] if len(pictures) == 1 else torch.cat(pictures)
        rows = torch.from_numpy(self.rows_BVT.ravel()).to(device, non_blocking=True)
        return pictures_NSS3.index_select(0, rows).unflatten(0, self.rows_BVT.shape)


@dataclass(frozen=True)
class GpuRun:
    """A batch that is being decoded.

    stored_frames, stored_videos: wait for the outputs of the graphs' runs. by_nvdec: rows of the batch. on_cpu: by row,
    the views (V, T, S, S, 3) uint8 of the other stored videos.
    """

    videos: list[ReadVideo]
    stored_frames: Callable[..., list[dali.Tensor]] | None
    stored_videos: Callable[..., list[dali.Tensor]] | None
    by_nvdec: set[int]
    on_cpu: dict[int, Future[np.ndarray]] = field(default_factory=dict)


class GpuDecoder:
    """Decodes and finishes batches on a GPU, or on the CPU by the same graphs where `device_id` is None.

    Stored frames and stored videos have a graph each; a batch may hold both. Stored videos that `choice` keeps from
    NVIDIA's decoder are decoded and finished on the CPU, by `threads`. num_threads: DALI's.
    """

    def __init__(
        self,
        planner: Planner,
        threads: ThreadPoolExecutor,
        choice: VideoChoice,
        *,
        device_id: int | None,
        num_threads: int,
    ) -> None:
        self._planner, self._dataset = planner, planner.dataset
        self._threads, self._choice = threads, choice
        self._steps = steps_of(planner)
        view_graph = partial(dali.view_graph, self._steps, device_id=device_id, num_threads=num_threads)
        video_graph = partial(dali.video_graph, self._steps, device_id=device_id, num_threads=num_threads)
        self._images = Graph(lambda: view_graph(batch_size=planner.max_frames))
        self._videos = Graph(lambda: video_graph(batch_size=planner.batch_size))

    def start(self, videos: list[ReadVideo]) -> GpuRun:
        """Starts a run of each graph for which the batch holds something, and PyAV on the other videos."""
        stored = {row: video for row, video in enumerate(videos) if video.is_stored_video}
        chosen = dict(zip(stored, self._threads.map(self._choice.by_nvdec, stored.values()), strict=True))
        self._choice.say(_TELLING_VIDEOS)
        on_cpu = {row: self._threads.submit(self._placed, stored[row]) for row in stored if not chosen[row]}
        frames = [video for video in videos if not video.is_stored_video]
        by_nvdec = [video for row, video in stored.items() if chosen[row]]
        return GpuRun(
            videos,
            self._images.start(partial(self._start_frames, frames)) if frames else None,
            self._videos.start(partial(self._start_videos, by_nvdec)) if by_nvdec else None,
            {row for row in stored if chosen[row]},
            on_cpu,
        )

    def _start_frames(self, videos: list[ReadVideo], graph: dali.Pipeline) -> None:
        encoded = [data for video in videos for data in video.files]
        geometries = [frame.geometry for video in videos for frame in video.plan.frames]
        dali.start_views(graph, self._steps, encoded, geometries)

    def _start_videos(self, videos: list[ReadVideo], graph: dali.Pipeline) -> None:
        encoded = [video.files[0] for video in videos]
        geometries = [video.plan.frames[0].geometry for video in videos]  # all frames of a video are alike
        frames = [video.plan.numbers.astype(np.int32) for video in videos]
        dali.start_views(graph, self._steps, encoded, geometries, frames)

    def _placed(self, video: ReadVideo) -> np.ndarray:
        """The views (V, T, S, S, 3) uint8 of a stored video, decoded and finished on the CPU. Raises SampleError."""
        views_VTSS3 = np.empty(self._planner.views_shape, np.uint8)
        for frame, region in zip(video.plan.frames, planned_regions(self._dataset, video), strict=True):
            place(region, frame.geometry, frame.targets, views_VTSS3)
        return views_VTSS3

    def finish(self, run: GpuRun) -> GpuBatch:
        """The batch. Raises SampleError, RuntimeError."""
        outputs = [_outputs(run.stored_frames), _outputs(run.stored_videos)]  # both: the next batch's follow
        frames, sequences = outputs
        if isinstance(frames, RuntimeError):
            raise explained(self._dataset, run.videos, frames) from frames
        by_nvdec, on_cpu = run.by_nvdec, {row: views.result() for row, views in run.on_cpu.items()}
        if isinstance(sequences, RuntimeError):
            if out_of_memory(sequences):
                raise sequences
            on_cpu |= {row: self._placed(run.videos[row]) for row in sorted(by_nvdec)}
            self._choice.give_up(sequences)
            by_nvdec, sequences = set(), []
        parts = [torch.from_dlpack(tensor) for tensor in (*frames, *sequences)]
        parts += [torch.from_numpy(views_VTSS3) for views_VTSS3 in on_cpu.values()]
        return GpuBatch([video.plan for video in run.videos], parts, self._rows(run.videos, by_nvdec, list(on_cpu)))

    def _rows(self, videos: list[ReadVideo], by_nvdec: set[int], on_cpu: list[int]) -> np.ndarray:
        """Which picture is which frame, (B, V, T) int64: those of stored frames come first, then NVDEC's, then ours."""
        shape = (len(videos), *self._planner.views_shape[:2])
        rows_BVT, next_row = np.empty(shape, np.int64), 0
        stored_frames = [row for row, video in enumerate(videos) if not video.is_stored_video]
        for row in (*stored_frames, *sorted(by_nvdec)):
            for frame in videos[row].plan.frames:
                for v, t, c in frame.targets:
                    rows_BVT[row, v, t] = next_row + c
                next_row += self._steps.num_crops
        for row in on_cpu:
            count = rows_BVT[row].size
            rows_BVT[row] = np.arange(next_row, next_row + count).reshape(shape[1:])
            next_row += count
        return rows_BVT


def _outputs(waiting: Callable[..., list[dali.Tensor]] | None) -> list[dali.Tensor] | RuntimeError:
    """The outputs of a run, or why there are none."""
    try:
        return waiting(dali.dense_outputs) if waiting else []
    except RuntimeError as error:
        return error
