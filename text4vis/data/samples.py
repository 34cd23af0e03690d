"""The videos of a split as plain samples, for programs that decode and batch on their own; webdataset's layout.

    the loader's order (`Planner.order`) and frames (`Planner.frame_numbers`)  ->  their stored bytes  ->  dicts

k distinct frames of a video.
"""

from __future__ import annotations

import itertools
import json
import logging
import math
from collections.abc import Iterator, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np
from torch.utils.data import IterableDataset, get_worker_info

from shards.format import SampleError, frame_suffix
from shards.images import ImageProbe
from shards.plan import eval_slice, share_positions
from shards.reader import Reading, ShardDataset
from shards.shardfile import label_facts
from shards.video import VideoError, container_extension
from text4vis.config.loading import config_from_dict
from text4vis.config.schema import Config
from text4vis.data.bad_videos import BadVideos
from text4vis.data.datasets import open_split
from text4vis.data.plan import Picked, Planner
from text4vis.data.prefetch import pipelined
from text4vis.data.reading import batches_ahead, undecodable

logger = logging.getLogger("text4vis")

_BATCH_VIDEOS = 16  # that are picked together and begun at the same time

Sample = dict[str, Any]


def iterate_samples(
    source: Config | str | Sequence[str],
    split: Literal["train", "val"] = "train",
    *,
    frames: Literal["sampled", "all"] = "sampled",
    rank: int = 0,
    world_size: int = 1,
    consumed: int = 0,
    epochs: int | None = None,
) -> SampleStream:
    """The samples of one rank as `webdataset.WebDataset` gives those of the same tars: dicts of undecoded bytes.

    source: a configuration, whose keys say which videos and frames come in which order; or the shards alone, as
        `data.train` names them, with the default of every key.
    split: "train" is the endless stream that training sees, "val" one pass over the rank's share.
    frames: "sampled" reads just the frames that a training or evaluation sample shows; "all" reads every frame.
    consumed: of "train", the samples that all ranks together have taken before.
    epochs: of "train", end after this many epochs, counted from the beginning of the stream.

    Each sample holds `__key__`, `__url__` (the tar, without user names, passwords and query), `__frames__` (a list of
    the frame numbers that the recipe shows, one for each position), `json` (bytes: of our shards the stored ones, of
    other tars `label`, `class` or their plurals, `num_frames` and `name` of the index), and `000012.jpg` and so on, the
    stored bytes of the k frames. A stored video has its whole file instead, as `mp4` or what else its container is.

    Raises ConfigError, shards.ShardError if the data set cannot be opened, and ValueError for bad arguments.
    """
    if split not in {"train", "val"} or frames not in {"sampled", "all"}:
        raise ValueError(f"expected the split train or val and the frames sampled or all, got {split!r} and {frames!r}")
    if not 0 <= rank < world_size:
        raise ValueError(f"rank: expected 0 <= rank < world_size, got {rank} of {world_size}")
    if consumed < 0 or (epochs is not None and epochs < 1) or (split == "val" and (consumed or epochs)):
        raise ValueError(
            "expected consumed >= 0 and epochs >= 1, and neither with the split val, which is one pass; got "
            f"{consumed} and {epochs}"
        )
    if not isinstance(source, Config):
        source = config_from_dict({"data": {"train": source, "val": source}}, "iterate_samples")
    return SampleStream(
        Planner(source, split, open_split(source, split), rank, world_size),
        read_all=frames == "all",
        consumed=consumed,
        epochs=epochs,
    )


class _Begun(NamedTuple):
    """A video whose bytes are on their way. shown: frame numbers, (clips * T,) int64; numbers: (k,) of those read."""

    sample: int
    epoch: int
    shown: np.ndarray
    numbers: np.ndarray
    reading: Reading


class _Unreadable(NamedTuple):
    """A video whose rows of the index cannot be used."""

    sample: int
    epoch: int
    error: SampleError


class SampleStream(IterableDataset[Sample]):
    """Iterable of samples, made by `iterate_samples`. Every pass begins at `consumed` again.

    Workers of a torch DataLoader share the rank's samples: worker w of W yields the samples w, w + W … of those that
    one process would yield, so that without batches (`batch_size=None`) they come in the same order. With
    `data.on_error: skip` a video that cannot be read is logged, and others stand in for it as in training; each process
    counts what it has met. Close it, or use it as a context manager.
    """

    def __init__(self, planner: Planner, *, read_all: bool, consumed: int, epochs: int | None) -> None:
        self.planner = planner
        self.dataset: ShardDataset = planner.dataset
        self._read_all, self._consumed, self._epochs = read_all, consumed, epochs

    def __iter__(self) -> Iterator[Sample]:
        """A new pass. Raises ShardError where a video cannot be read, with `skip` where too many cannot."""
        data, endless = self.planner.config.data, self.planner.split == "train"
        bad = BadVideos(self.dataset, self.planner.videos, data.max_bad_share, endless=endless)
        batches = self.dataset.ahead(self._batches(), lambda batch: batch[0])
        depth = batches_ahead(
            self.dataset, data, videos=_BATCH_VIDEOS, frames=1 if self._read_all else data.num_segments
        )
        for begun in pipelined(batches, self._begin_batch, lambda batch: batch, depth):
            for one in begun:
                if (sample := self._finish(one, bad)) is not None:
                    yield sample
        bad.join(())

    def __reduce__(self) -> tuple[Any, ...]:
        """For workers that are not forked: the data set is opened again, the order computed again."""
        of = self.planner
        place = (of.config, of.split, of.dataset, of.rank, of.world_size)
        return _remade, (place, self._read_all, self._consumed, self._epochs)

    def close(self) -> None:
        """Closes the data set."""
        self.dataset.close()

    def __enter__(self) -> SampleStream:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _batches(self) -> Iterator[Picked]:
        """What this process reads, some videos at a time."""
        worker = get_worker_info()
        first, step = (0, 1) if worker is None else (worker.id, worker.num_workers)
        own = itertools.islice(self._rank_positions(), first, None, step)
        while batch := list(itertools.islice(own, _BATCH_VIDEOS)):
            positions = np.array(batch, np.int64)
            if self.planner.split == "train":
                yield self.planner.order.at(positions)
            else:
                yield self.planner.videos[positions], np.zeros_like(positions)

    def _rank_positions(self) -> Iterator[int]:
        """The rank's positions, of the stream or of the pass.

        Ranks take turns in the stream, so that any number of samples may be taken of each. With sub-streams of hosts
        a turn is as long as it takes for all ranks to have the same number of whole streams, or of parts of one.
        """
        planner = self.planner
        if planner.split == "val":
            yield from range(*eval_slice(len(planner.videos), planner.rank, planner.world_size))
            return
        streams = planner.config.data.streams
        turn = math.lcm(planner.world_size, streams)
        stop = math.inf if self._epochs is None else self._epochs * planner.epoch_samples
        for start in itertools.takewhile(lambda start: start < stop, itertools.count(self._consumed, turn)):
            positions = share_positions(start, turn, planner.rank, planner.world_size, streams)
            yield from positions[positions < stop].tolist()

    def _begin_batch(self, picked: Picked) -> list[_Begun | _Unreadable]:
        ids, epochs = picked
        return [self._begin(*pair) for pair in zip(ids.tolist(), epochs.tolist(), strict=True)]

    def _begin(self, sample: int, epoch: int) -> _Begun | _Unreadable:
        try:
            shown = self.planner.frame_numbers(sample, epoch)
            numbers = np.arange(self.dataset.num_frames[sample]) if self._read_all else np.unique(shown)
            return _Begun(sample, epoch, shown, numbers, self.dataset.start([(sample, numbers)], with_json=True))
        except SampleError as error:
            return _Unreadable(sample, epoch, error)

    def _finish(self, begun: _Begun | _Unreadable, bad: BadVideos) -> Sample | None:
        """The sample, or the first of its substitutes that can be read; in evaluation there are none."""
        others = self.planner.substitutes(begun.sample, begun.epoch)
        for each in itertools.chain([begun], (self._begin(other, begun.epoch) for other in others)):
            try:
                if isinstance(each, _Begun):
                    return self._sample(each)
                raise each.error
            except SampleError as error:
                if self.planner.config.data.on_error != "skip":
                    raise
                bad.add(each.sample, str(error))
                logger.warning("skipped, data.%s: %s", self.planner.split, error)
        return None

    def _sample(self, begun: _Begun) -> Sample:
        """Waits for the bytes. Raises SampleError."""
        (files,) = begun.reading.result()
        number, is_video = begun.sample, self.dataset.content(begun.sample) == "video"
        num_members = 1 if is_video else len(begun.numbers)
        stored_json, members = files[:-num_members], files[-num_members:]
        key, url, multi_label = self.dataset.tar_sample(number)
        facts = self._facts(number, multi_label)
        facts_json = self._checked(number, stored_json[0], facts) if stored_json else json.dumps(facts).encode()
        sample: Sample = {"__key__": key, "__url__": url, "__frames__": begun.shown.tolist(), "json": facts_json}
        try:
            if is_video:
                return sample | {container_extension(members[0]): members[0]}
            probe = ImageProbe()
            for frame, data in zip(begun.numbers.tolist(), members, strict=True):
                sample[frame_suffix(frame, probe(data).extension)] = data
            return sample
        except (ValueError, VideoError) as error:
            raise SampleError(undecodable(self.dataset, number, error)) from None

    def _facts(self, number: int, multi_label: bool) -> dict[str, Any]:
        """What the index says of a video, as the JSON in our own shards does: a list of labels with `multi_label`."""
        label, dataset = self.dataset.label_of(number), self.dataset
        labelled = label_facts(label if isinstance(label, tuple) else [label], dataset.classes, multi_label)
        return {"name": dataset.name(number), **labelled, "num_frames": int(dataset.num_frames[number])}

    def _checked(self, number: int, stored: bytes, expected: dict[str, Any]) -> bytes:
        """The JSON as it is stored. Raises SampleError if it contradicts the index: it has no checksum."""
        try:
            found = json.loads(stored)
            if {name: found.get(name) for name in expected} == expected:
                return stored
            problem = "it contradicts the index"
        except (ValueError, AttributeError, RecursionError) as error:
            problem = str(error)
        raise SampleError(
            f"{self.dataset.describe(number)}: its JSON in the tar is damaged ({problem}); find what else is with "
            "tools/check_shards.py, then copy the shard again or rebuild"
        )


def _remade(place: tuple[Any, ...], read_all: bool, consumed: int, epochs: int | None) -> SampleStream:
    return SampleStream(Planner(*place), read_all=read_all, consumed=consumed, epochs=epochs)
