"""Plans batches, reads their bytes, and checks them before a decoder gets them."""

from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor
from typing import NamedTuple

from shards.format import SampleError
from shards.images import ImageProbe, plain_image
from shards.reader import Reading, ShardDataset
from text4vis.config.schema import DataConfig
from text4vis.data.plan import BatchPlan, FramePlan, Picked, Planner, VideoPlan


class ReadVideo(NamedTuple):
    """A planned video with its bytes.

    files: the encoded frames of `plan.frames`, in that order and with 8 bits a value; for a stored video, its one file.
    """

    plan: VideoPlan
    files: list[bytes]
    is_stored_video: bool


class PendingBatch(NamedTuple):
    """A batch whose bytes are on their way, once its plan is made."""

    picked: Picked
    fetched: Future[tuple[BatchPlan, Reading]]


class PlanReader:
    """Plans and reads batches on the given thread, so that reading overlaps with decoding."""

    def __init__(
        self, dataset: ShardDataset, planner: Planner, thread: ThreadPoolExecutor, *, in_parts: bool = False
    ) -> None:
        """in_parts: read of stored videos what their frames need, see `ShardDataset.start`."""
        self._dataset, self._planner, self._thread = dataset, planner, thread
        self._in_parts = in_parts

    @property
    def batches_ahead(self) -> int:
        """Batches to begin ahead of the started one: with a far store, enough for twice its limit of requests."""
        planner = self._planner
        return batches_ahead(
            self._dataset,
            planner.config.data,
            videos=planner.batch_size,
            frames=planner.max_frames // planner.batch_size,
        )

    def begin(self, picked: Picked) -> PendingBatch:
        """Starts planning and fetching a batch, and returns at once."""
        return PendingBatch(picked, self._thread.submit(self._fetch, picked))

    def start(self, pending: PendingBatch) -> Future[list[ReadVideo]]:
        """Starts taking what was fetched, and returns at once."""
        return self._thread.submit(lambda: self._take(*pending.fetched.result()))

    def finish(self, started: Future[list[ReadVideo]]) -> list[ReadVideo]:
        """Waits for a batch that was started. Raises what `read` raises."""
        return started.result()

    def read(self, picked: Picked) -> list[ReadVideo]:
        """Plans a batch and reads it, here and now.

        Raises SampleError if one of its videos is at fault, another ShardError if the store is.
        """
        return self._take(*self._fetch(picked))

    def _fetch(self, picked: Picked) -> tuple[BatchPlan, Reading]:
        plan = self._planner.plan(*picked)
        return plan, self._dataset.start(plan.requests, in_parts=self._in_parts)

    def _take(self, plan: BatchPlan, reading: Reading) -> list[ReadVideo]:
        by_video = reading.result()
        return [self._checked(video, files) for video, files in zip(plan.videos, by_video, strict=True)]

    def _checked(self, plan: VideoPlan, files: list[bytes]) -> ReadVideo:
        """The video, its frames with 8 bits a value and as large as the index says. Raises SampleError.

        A decoder would cut the wrong part out of a frame of another size, and each would show 16 bits differently.
        """
        if self._dataset.content(plan.sample) == "video":
            return ReadVideo(plan, files, True)
        probe, images = ImageProbe(), []
        for frame, data in zip(plan.frames, files, strict=True):
            try:
                info = probe(data)
                if (info.height, info.width) != frame.size:
                    raise SampleError(self._of_another_size(plan.sample, frame, info.height, info.width))
                images.append(plain_image(data))
            except ValueError as error:
                raise SampleError(undecodable(self._dataset, plan.sample, error, frame.number)) from None
        return ReadVideo(plan, images, False)

    def _of_another_size(self, sample: int, frame: FramePlan, height: int, width: int) -> str:
        return (
            f"{self._dataset.describe(sample)}: frame {frame.number} is {width}x{height} pixels, the index says "
            f"{frame.size[1]}x{frame.size[0]}; the index is damaged or of other data: check both with "
            "tools/check_shards.py, then copy the data set again or rebuild it"
        )


def batches_ahead(dataset: ShardDataset, data: DataConfig, *, videos: int, frames: int) -> int:
    """Batches of so many videos, with so many frames of each, to begin ahead of the one that is taken."""
    if not dataset.is_remote:
        return 1
    requests = videos if dataset.content(0) == "video" else videos * frames
    return 1 + -(-2 * data.requests_in_flight // requests)


def undecodable(dataset: ShardDataset, sample: int, reason: object, frame: int | None = None) -> str:
    """The message about a video, or one frame of it, that does not decode."""
    what = "" if frame is None else f"frame {frame} "
    return (
        f"{dataset.describe(sample)}: {what}does not decode ({reason}); find all such videos with "
        "tools/check_shards.py --deep, then rebuild the data set without them"
    )
