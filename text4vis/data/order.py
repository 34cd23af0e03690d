"""In which order training goes over the videos: one stream of all of them, or a mixture of sources with weights.

    data.train, data.shuffle, data.streams, seed  ->  ids and passes of a rank's share of each global batch

Pure but for the index. B videos of a global batch, R ranks.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from fractions import Fraction
from itertools import accumulate

import numpy as np

from shards.address import expand_sources, redact
from shards.mixture import Mixture, exact_shares
from shards.plan import Stream, share_positions
from shards.reader import ShardDataset
from text4vis.config.schema import Config, ConfigError
from text4vis.config.sources import WeightedSource, addresses


@dataclass(frozen=True)
class Source:
    """An entry of `data.train`: the videos start <= id < stop. name: its path as it may be shown."""

    name: str
    start: int
    stop: int
    weight: float | None


class TrainOrder:
    """The endless order of training. Raises ConfigError.

    dataset: the one behind `data.train`. videos: the sorted ids that training goes over. epoch_samples: the length of
    an epoch, of which each source of a mixture has its share.
    """

    def __init__(self, config: Config, dataset: ShardDataset, videos: np.ndarray, epoch_samples: int) -> None:
        data = config.data
        self.sources = _sources(config, dataset)
        self._videos, self._num_streams = videos, data.streams
        shard_of = dataset.shard_of[videos] if len(videos) < len(dataset) else dataset.shard_of
        if data.streams > 1 and data.streams > (num_shards := len(np.unique(shard_of))):
            raise ConfigError(
                f"data.streams: {data.streams} streams cannot share {num_shards} shards; set it to at most "
                f"{num_shards}, or build smaller shards with --shard-bytes"
            )
        self._mixture = self._mix(config, shard_of, epoch_samples)
        self._stream = self._mixture or Stream(
            len(videos), config.seed, data.shuffle, shard_of, num_streams=data.streams
        )

    def _mix(self, config: Config, shard_of: np.ndarray, epoch_samples: int) -> Mixture | None:
        weights = [source.weight for source in self.sources if source.weight is not None]
        if not weights:
            return None
        sizes = [len(self._of_source(source)) for source in self.sources]
        if 0 in sizes:
            name = self.sources[sizes.index(0)].name
            raise ConfigError(f"data.train: {name} has a weight, but data.shot chose none of its videos; leave it out")
        try:
            counts = exact_shares(weights, epoch_samples)
        except ValueError as error:
            raise ConfigError(f"data.train: {error}") from None
        data = config.data
        return Mixture(sizes, counts, config.seed, data.shuffle, shard_of, num_streams=data.streams)

    def _of_source(self, source: Source) -> np.ndarray:
        first, last = np.searchsorted(self._videos, [source.start, source.stop]).tolist()
        return self._videos[first:last]

    def share(self, start: int, global_batch: int, rank: int, world_size: int) -> tuple[np.ndarray, np.ndarray]:
        """Ids and passes, both (B / R,) int64, of a rank's share of the batch that begins after `start` samples.

        A pass goes once over all videos, over the few that were chosen, or over those of a source of a mixture.
        """
        return self.at(share_positions(start, global_batch, rank, world_size, self._num_streams))

    def at(self, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Ids and passes, both (n,) int64, at these (n,) positions of the endless stream."""
        places, passes = self._stream.at(positions)
        return self._videos[places], passes

    def source_of(self, ids: np.ndarray) -> np.ndarray:
        """(B,) int64: which entry of `data.train`, from 0, each of the (B,) videos belongs to."""
        return np.searchsorted([source.stop for source in self.sources], ids, side="right")

    def peers(self, sample: int) -> np.ndarray:
        """Ids of the videos that may stand in for a video: those of its source in a mixture, else all."""
        if self._mixture is None:
            return self._videos
        return self._of_source(self.sources[int(self.source_of(np.array([sample]))[0])])

    @property
    def mixture(self) -> list[tuple[int, float]]:
        """Videos and weight of each source; empty without weights."""
        return [(source.stop - source.start, source.weight) for source in self.sources if source.weight is not None]

    def samples_by_source(self, consumed: int) -> dict[str, int]:
        """How many of the job's first `consumed` samples are of each source, by its name; empty without weights."""
        return {} if self._mixture is None else dict(zip(self._names(), self._mixture.consumed(consumed), strict=True))

    def shares(self) -> dict[str, float]:
        """Each source's share of the samples, by its name; empty without weights."""
        weights = [Fraction(weight) for _, weight in self.mixture]
        return {name: float(weight / sum(weights)) for name, weight in zip(self._names(), weights, strict=False)}

    def _names(self) -> list[str]:
        """The sources' names, numbered where one occurs twice."""
        times = Counter(source.name for source in self.sources)
        return [
            source.name if times[source.name] == 1 else f"{source.name} ({number})"
            for number, source in enumerate(self.sources, start=1)
        ]


def _sources(config: Config, dataset: ShardDataset) -> list[Source]:
    given = config.data.train
    parts = [len(expand_sources(addresses([source]))) for source in given]
    starts = [0, *accumulate(dataset.part_sizes)]
    edges = [starts[number] for number in (0, *accumulate(parts))]
    return [
        Source(
            " + ".join(redact(path) for path in addresses([source])),
            start,
            stop,
            source.weight if isinstance(source, WeightedSource) else None,
        )
        for source, start, stop in zip(given, edges[:-1], edges[1:], strict=True)
    ]
