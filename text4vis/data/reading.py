"""Plans batches, reads their bytes, and checks them before a decoder gets them."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import NamedTuple

from shards.format import SampleError
from shards.images import ImageProbe, eight_bits
from shards.reader import ShardDataset
from text4vis.data.plan import Picked, Planner, VideoPlan


class ReadVideo(NamedTuple):
    """A planned video with its bytes.

    files: the encoded frames of `plan.frames`, in that order; for a stored video, its one file.
    """

    plan: VideoPlan
    files: list[bytes]
    is_stored_video: bool


class PlanReader:
    """Plans and reads batches on the given thread, so that reading overlaps with decoding."""

    def __init__(self, dataset: ShardDataset, planner: Planner, thread: ThreadPoolExecutor) -> None:
        self._dataset, self._planner, self._thread = dataset, planner, thread

    def start(self, picked: Picked) -> Future[list[ReadVideo]]:
        """Starts planning and reading a batch, and returns at once."""
        return self._thread.submit(self.read, picked)

    def finish(self, started: Future[list[ReadVideo]]) -> list[ReadVideo]:
        """Waits for a batch that was started. Raises what `read` raises."""
        return started.result()

    def read(self, picked: Picked) -> list[ReadVideo]:
        """Plans a batch and reads it, here and now.

        Raises SampleError if one of its videos is at fault, another ShardError if the store is.
        """
        plan = self._planner.plan(*picked)
        files = self._dataset.read_many(plan.requests)
        videos = [
            ReadVideo(video, of_video, self._dataset.content(video.sample) == "video")
            for video, of_video in zip(plan.videos, files, strict=True)
        ]
        for video in videos:
            if not video.is_stored_video:
                video.files[:] = self._checked(video)
        return videos

    def _checked(self, video: ReadVideo) -> Iterator[bytes]:
        """The frames as every decoder shows them alike, their headers compared with the index: an image of another
        size would be cut in the wrong place."""
        probe, sample = ImageProbe(), video.plan.sample
        for frame, data in zip(video.plan.frames, video.files, strict=True):
            try:
                info, image = probe(data), eight_bits(data)
            except ValueError as error:
                raise SampleError(undecodable(self._dataset, sample, error, frame.number)) from None
            if (info.height, info.width) != frame.size:
                height, width = frame.size
                raise SampleError(
                    f"{self._dataset.describe(sample)}: frame {frame.number} is {info.width}x{info.height} pixels, the "
                    f"index says {width}x{height}; the index is damaged or of other data: check both with "
                    "tools/check_shards.py, then copy the data set again or rebuild it"
                )
            yield image


def undecodable(dataset: ShardDataset, sample: int, reason: object, frame: int | None = None) -> str:
    """The message about a video, or one frame of it, that does not decode."""
    what = "" if frame is None else f"frame {frame} "
    return (
        f"{dataset.describe(sample)}: {what}does not decode ({reason}); find all such videos with "
        "tools/check_shards.py --deep, then rebuild the data set without them"
    )
