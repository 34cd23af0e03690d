"""`data.on_error: skip`: rebuilds a batch that failed without the videos that are at fault."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable
from functools import cached_property
from typing import Any, Generic

import numpy as np

from shards.format import SampleError
from shards.reader import ShardDataset
from text4vis.data.bad_videos import BadVideos
from text4vis.data.decoding import Decoder, Done_co, out_of_memory, report_of
from text4vis.data.plan import Picked, Planner
from text4vis.data.reading import PlanReader, ReadVideo, undecodable


class Repair(Generic[Done_co]):
    """Tries the videos of a failed batch one by one, and fills the places of bad ones with substitutes.

    Which frames a video is tried with depends on (seed, epoch, video) alone, so every rank that meets a bad video fills
    its place alike. In evaluation there are no substitutes: bad videos are left out.

    make_decoder: called once, when a video must be decoded. The loader's own decoder cannot serve, because it has the
    next batch under way. bad: takes note of what was found.
    """

    def __init__(
        self,
        dataset: ShardDataset,
        planner: Planner,
        reader: PlanReader,
        make_decoder: Callable[[], Decoder[Any, Done_co]],
        bad: BadVideos,
    ) -> None:
        self._dataset, self._planner, self._reader, self._bad = dataset, planner, reader, bad
        self._make_decoder: Callable[[], Decoder[Any, Done_co]] = make_decoder

    def reread(self, picked: Picked) -> list[ReadVideo]:
        """Reads a batch that could not be read. Raises ShardError past `data.max_bad_share`.

        Only substitutes are also decoded, because decoding one video after another is slow.
        """
        ids, epochs = picked
        return self._sound(zip(ids.tolist(), epochs.tolist(), strict=True), decode=False)

    def redecode(self, videos: list[ReadVideo]) -> Done_co:
        """Decodes a batch that could not be decoded. Raises ShardError past `data.max_bad_share`."""
        return self.decode(self._sound(((video.plan.sample, video.plan.epoch) for video in videos), decode=True))

    def decode(self, videos: list[ReadVideo]) -> Done_co:
        """Decodes videos now. Raises SampleError, RuntimeError."""
        return self._decoder.finish(self._decoder.start(videos))

    @cached_property
    def _decoder(self) -> Decoder[Any, Done_co]:
        return self._make_decoder()

    def _sound(self, pairs: Iterable[tuple[int, int]], *, decode: bool) -> list[ReadVideo]:
        """The videos (sample, epoch) that can be used, and substitutes for the others.

        decode: whether to decode the videos themselves as well; substitutes always are.
        """
        found = []
        for sample, epoch in pairs:
            for candidate in itertools.chain([sample], self._planner.substitutes(sample, epoch)):
                video = self._try(candidate, epoch, decode=decode or candidate != sample)
                if video is not None:
                    found.append(video)
                    break
        return found

    def _try(self, sample: int, epoch: int, *, decode: bool) -> ReadVideo | None:
        """The video as read, or None if it cannot be read or decoded; then it is noted as bad."""
        try:
            (video,) = self._reader.read((np.array([sample]), np.array([epoch])))
            if decode:
                self.decode([video])
            return video
        except SampleError as error:
            reason = str(error)
        except RuntimeError as error:
            if out_of_memory(error):
                raise
            reason = undecodable(self._dataset, sample, report_of(error))
        self._bad.add(sample, reason)
        return None
