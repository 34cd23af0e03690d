"""Reading data sets: opens one or several as one, and fetches just the frames that are asked for.

Which samples and frames those are is decided elsewhere (`shards.plan`, and the caller for the frames). A sample is a
number from 0 to N-1, N videos over all data sets in the order given.

Letters: N samples, k frames of one request.
"""

from __future__ import annotations

import bisect
import hashlib
import itertools
import os
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
from isal import isal_zlib

from shards.address import expand_sources
from shards.ahead import look_ahead, rows_ahead
from shards.annotations import Label
from shards.cached import CachedShards
from shards.format import SampleError, ShardError, video_crc32
from shards.local import Check, Extent, LocalShards
from shards.opening import Options, Part, TarSample, open_part
from shards.packets import Packets, VideoParts
from shards.text import printable
from shards.transfer import BYTES_IN_FLIGHT, REQUESTS_IN_FLIGHT, Transfers

Batch = TypeVar("Batch")

_OPENING_THREADS = 8
_DAMAGED_SHARD = "the shard is damaged: find what else is with check_shards, then copy it again or rebuild"


class _Wanted(NamedTuple):
    """What one request reads: the distinct members `numbers`, their checksums and byte ranges, in one shard.

    positions: for each frame of the request its place among the distinct ones. parts: of a stored video of which not
    all is read; `ranges` are then those of its parts. num_json: 1 if the first of `ranges` is the video's JSON.
    """

    part: Part
    sample: int
    shard: int
    numbers: list[int]
    crc32s: list[int]
    ranges: list[tuple[int, int]]
    positions: list[int]
    parts: VideoParts | None = None
    num_json: int = 0

    @property
    def extent(self) -> Extent:
        """Where it lies."""
        if self.parts is None:
            return Extent(self.shard, self.ranges)
        return Extent(self.shard, self.ranges, self.parts.max_gap)


def open_dataset(
    sources: str | Sequence[str],
    *,
    cache_dir: str | Path | None = None,
    cache_bytes: int | None = None,
    verify: bool = True,
    retries: int = 5,
    timeout_seconds: float = 30,
    storage_options: Mapping[str, Any] | None = None,
    requests_in_flight: int = REQUESTS_IN_FLIGHT,
    bytes_in_flight: int = BYTES_IN_FLIGHT,
) -> ShardDataset:
    """Opens one data set, or several joined into one. Costs O(videos).

    sources: a folder, a file://, http(s)://, s3:// or other fsspec address, or a list of them; braces are expanded:
        's3://bucket/part{0..3}'.
    cache_dir: where the index files of remote data sets are kept, and shards if `cache_bytes` is given; shared by the
        processes of the node. Remote data sets need one.
    cache_bytes: keep whole shards of remote data sets, up to this many bytes; see `ShardDataset.ahead`. Without it
        only the ranges of the wanted frames are fetched. Local folders, network mounts included, are read in place.
    verify: compare each frame with its CRC-32.
    retries: attempts after the first when a remote or mount fails for a moment, with exponential backoff.
    timeout_seconds: for connecting and for each wait for data.
    storage_options: passed to fsspec for the remote data sets (credentials, endpoint ...).
    requests_in_flight, bytes_in_flight: limits for remote data sets: requests at the same time, and bytes that are
        being fetched or wait to be taken.

    Raises ShardError for anything that is not a sound data set, ValueError for bad options.
    """
    options = Options(
        cache_dir, cache_bytes, verify, retries, timeout_seconds, storage_options, requests_in_flight, bytes_in_flight
    )
    least = min(requests_in_flight, bytes_in_flight, 1 if cache_bytes is None else cache_bytes)
    if retries < 0 or timeout_seconds <= 0 or least < 1:
        raise ValueError(
            "open_dataset: expected retries >= 0, timeout_seconds > 0, and cache_bytes, requests_in_flight and "
            f"bytes_in_flight >= 1, got {retries}, {timeout_seconds}, {cache_bytes}, {requests_in_flight} and "
            f"{bytes_in_flight}"
        )
    addresses = expand_sources(sources)
    transfers = Transfers(requests_in_flight, bytes_in_flight)
    try:
        with ThreadPoolExecutor(min(_OPENING_THREADS, len(addresses))) as pool:
            parts = list(pool.map(lambda address: open_part(address, options, transfers), addresses))
        return ShardDataset(addresses, options, parts, transfers)
    except BaseException:
        transfers.close()
        raise


def _reopen(addresses: list[str], options: Options, fingerprint: str) -> ShardDataset:
    """The unpickled data set, opened anew. Raises ShardError if it is not the one that was pickled."""
    dataset = open_dataset(addresses, **vars(options))
    if dataset.fingerprint != fingerprint:
        raise ShardError(
            f"{', '.join(dataset.places)}: has the fingerprint {dataset.fingerprint[:16]}..., but was opened with "
            f"{fingerprint[:16]}...; the data set was changed while it was in use: start again"
        )
    return dataset


_opened: weakref.WeakSet[ShardDataset] = weakref.WeakSet()


def _renew_after_fork() -> None:
    for dataset in list(_opened):
        dataset._renew()


os.register_at_fork(after_in_child=_renew_after_fork)


class ShardDataset:
    """Videos of one or several data sets as samples 0 ... N-1. Made by `open_dataset`.

    Threads may share it. It survives a fork, and pickling opens it again. Close it, or use it as a context manager.
    """

    def __init__(self, addresses: list[str], options: Options, parts: list[Part], transfers: Transfers) -> None:
        first = parts[0].index
        for part in parts[1:]:
            if part.index.manifest.classes != first.manifest.classes:
                raise ShardError(
                    f"{first.where} and {part.index.where} have different class lists "
                    f"({_first_difference(first.manifest.classes, part.index.manifest.classes)}); "
                    "build both with the same --labels file"
                )
        self._addresses = addresses
        self._options = options
        self._parts = parts
        self._transfers = transfers
        counts = [len(part.index.videos) for part in parts]
        self._starts = [0, *itertools.accumulate(counts)]
        self._shard_starts = np.cumsum([0, *(len(part.index.manifest.shards) for part in parts)])[:-1].tolist()
        self.multi_label = any(part.index.manifest.multi_label for part in parts)
        self._all_labels = np.concatenate([part.index.labels.astype(np.int64) for part in parts])
        self._label_ends = np.cumsum(np.concatenate([part.index.label_counts for part in parts]))
        self.num_frames = self._column("num_frames")
        self.shard_of = self._column("shard") + np.repeat(self._shard_starts, counts)
        self.classes: list[str] = list(first.manifest.classes)
        prints = [part.index.manifest.fingerprint for part in parts]
        self.fingerprint = prints[0] if len(prints) == 1 else hashlib.sha256("\n".join(prints).encode()).hexdigest()
        self._closed = False
        _opened.add(self)

    def _column(self, name: str) -> np.ndarray:
        return np.concatenate([part.index.videos[name].astype(np.int64) for part in self._parts])

    def _renew(self) -> None:
        """Replaces what does not survive a fork."""
        self._transfers.renew()
        for part in self._parts:
            part.renew()

    def __len__(self) -> int:
        return self._starts[-1]

    @property
    def labels(self) -> np.ndarray:
        """The one label of each video, (N,) int64. Raises ShardError where videos may have several, or none."""
        if self.multi_label:
            raise ShardError(
                f"{', '.join(self.places)}: videos have several labels here, or none, where each needs one; give "
                "a data set of one label a video"
            )
        return self._all_labels

    def label_of(self, sample: int) -> Label:
        """The label of a video; where videos may have several, or none, a tuple of them, ascending."""
        if not self.multi_label:
            return int(self._all_labels[sample])
        start = self._label_ends[sample - 1] if sample else 0
        return tuple(self._all_labels[start : self._label_ends[sample]].tolist())

    def class_counts(self, num_classes: int = 0) -> np.ndarray:
        """Videos of each class from 0 to the largest label, (C,) int64, C at least `num_classes`."""
        return np.bincount(self._all_labels, minlength=num_classes)

    @property
    def places(self) -> list[str]:
        """Addresses of the data sets as they may be shown."""
        return [part.index.where for part in self._parts]

    @property
    def is_remote(self) -> bool:
        """Whether any of the data sets lies behind an address."""
        return any(not isinstance(part.source, LocalShards) for part in self._parts)

    @property
    def part_sizes(self) -> list[int]:
        """Videos of each of the data sets, in their order."""
        return [len(part.index.videos) for part in self._parts]

    @property
    def skipped(self) -> list[dict[str, Any]]:
        """Inputs that were left out when the data sets were built, as {"name", "line", "reason"}."""
        return [entry for part in self._parts for entry in part.index.manifest.skipped]

    def _locate(self, sample: int) -> tuple[Part, int]:
        if not 0 <= sample < self._starts[-1]:
            raise IndexError(f"sample {sample} of {len(self)}")
        number = bisect.bisect_right(self._starts, sample) - 1
        return self._parts[number], int(sample) - self._starts[number]

    def content(self, sample: int) -> str:
        """'frames' if the sample's frames are stored one by one, 'video' if as one encoded file."""
        return self._locate(sample)[0].index.manifest.content

    def name(self, sample: int) -> str:
        """Original name of the video. Bytes that are no UTF-8 become lone surrogates; `describe` is for showing."""
        part, video = self._locate(sample)
        return part.index.name(video)

    def place(self, sample: int) -> str:
        """Address, as it may be shown, of the data set that holds a sample."""
        return self._locate(sample)[0].index.where

    def describe(self, sample: int) -> str:
        """What messages call a sample: 'name (sample 12, 000003.tar of DIR)', control characters escaped."""
        part, video = self._locate(sample)
        shard = part.index.manifest.shards[int(part.index.videos["shard"][video])]
        return f"{printable(part.index.name(video))} (sample {sample}, {shard.name} of {part.index.where})"

    def tar_sample(self, sample: int) -> TarSample:
        """The sample in webdataset's words."""
        part, video = self._locate(sample)
        return part.tar_sample(video)

    def frame_sizes(self, sample: int, frames: np.ndarray) -> list[tuple[int, int]]:
        """(height, width) in pixels of each of the (k,) frames, zeros where unknown."""
        part, video = self._locate(sample)
        rows = part.index.member_rows(video, np.array(self._member_numbers(part, sample, frames), np.int64))
        return list(zip(rows["height"].tolist(), rows["width"].tolist(), strict=True))

    def _member_numbers(self, part: Part, sample: int, frames: np.ndarray) -> list[int]:
        """Member of each frame; the one member for all frames of a stored video. Raises IndexError."""
        numbers: list[int] = np.asarray(frames, dtype=np.int64).tolist()
        num_frames = int(self.num_frames[sample])
        for number in numbers:
            if not 0 <= number < num_frames:
                raise IndexError(f"{self.describe(sample)}: frame {number} of {num_frames}")
        return numbers if part.index.manifest.content == "frames" else [0] * len(numbers)

    def read(self, sample: int, frames: np.ndarray) -> list[bytes]:
        """Encoded bytes of the (k,) frames, in that order; a frame that is asked for twice is read once.

        Raises ShardError if they cannot be read or are damaged, IndexError for numbers out of range, ValueError if the
        sample is a stored video.
        """
        if self.content(sample) != "frames":
            raise ValueError(f"{self.describe(sample)}: a stored video has no single frames; use read_video")
        return self.read_many([(sample, frames)])[0]

    def read_video(self, sample: int) -> bytes:
        """The encoded file of a stored video. Raises ShardError, ValueError if its frames are stored one by one."""
        if self.content(sample) != "video":
            raise ValueError(f"{self.describe(sample)}: stored as single frames; use read")
        return self.read_many([(sample, np.zeros(1, np.int64))])[0][0]

    def read_many(self, requests: Sequence[tuple[int, np.ndarray]]) -> list[list[bytes]]:
        """`read(sample, frames)` of each request, fetched at the same time, results in order.

        For a stored video the list holds its one file, whatever the frames. Raises what `read` and `read_video` raise.
        """
        return self.start(requests).result()

    def start(
        self, requests: Sequence[tuple[int, np.ndarray]], *, in_parts: bool = False, with_json: bool = False
    ) -> Reading:
        """`read_many` in two steps: begins to fetch, `result()` of what it returns waits. With remote data sets many
        such readings may be under way at the same time. This waits for index rows only, which `ahead` has fetched.

        in_parts: of stored videos whose packets the index lists, read what the frames need; the result then holds a
        `shards.packets.SparseVideo` in place of the file, for `shards.stored.decode_stored`. with_json: each list
        begins with the video's JSON, which has no checksum; of tars that others wrote there is none.
        """
        self._want_rows(np.array([sample for sample, _ in requests], np.int64))
        wanted = []
        for sample, frames in requests:
            if self.content(sample) == "frames":
                wanted.append(self._wanted(sample, frames, with_json=with_json))
            elif in_parts and (parts := self._wanted_parts(sample, frames)) is not None:
                wanted.append(parts)
            else:
                wanted.append(self._wanted(sample, np.zeros(1, np.int64), with_json=with_json))
        return Reading(self, wanted)

    def ahead(self, batches: Iterable[Batch], ids_of: Callable[[Batch], np.ndarray]) -> Iterator[Batch]:
        """Yields the batches, and looks up to two passes over the data ahead.

        For remote data sets that are kept whole (cache_bytes), the shards of the coming batches are fetched in that
        order as far as they fit into the cache, and those that are needed last leave it first. Of remote data sets
        with a large table of frames, the rows of the coming batches are fetched.

        ids_of(batch): its samples, (k,) int64. Reading works without this; what is needed is then fetched when it is.
        """
        followers = [
            (part.source, first)
            for part, first in zip(self._parts, self._shard_starts, strict=True)
            if isinstance(part.source, CachedShards)
        ]
        if followers:
            batches = look_ahead(
                batches, lambda batch: self.shard_of[ids_of(batch)], followers, most_samples=2 * len(self)
            )
        if any(part.index.far for part in self._parts):
            return rows_ahead(batches, lambda batch: self._want_rows(ids_of(batch)))
        return iter(batches)

    def _want_rows(self, samples: np.ndarray) -> int:
        """Starts to fetch the index rows of the (k,) samples where they are far. Returns k."""
        for part, start, stop in zip(self._parts, self._starts, self._starts[1:], strict=False):
            for rows in part.index.far:
                rows.want(samples[(start <= samples) & (samples < stop)] - start)
        return len(samples)

    def _wanted(self, sample: int, frames: np.ndarray, *, with_json: bool = False) -> _Wanted:
        if self._closed:
            raise ValueError("the data set is closed")
        part, video = self._locate(sample)
        wanted = self._member_numbers(part, sample, frames)
        place = {number: position for position, number in enumerate(sorted(set(wanted)))}
        distinct, positions = list(place), [place[number] for number in wanted]
        rows = part.index.member_rows(video, np.array(distinct, np.int64))
        ranges, shard = part.index.ranges(video, rows), int(part.index.videos["shard"][video])
        json, crc32s = part.index.json_ranges(video) if with_json else [], rows["crc32"].tolist()
        return _Wanted(part, sample, shard, distinct, crc32s, json + ranges, positions, num_json=len(json))

    def _wanted_parts(self, sample: int, frames: np.ndarray) -> _Wanted | None:
        """What the frames of a stored video need; None if the index does not list its packets."""
        part, video = self._locate(sample)
        stream = part.index.stream(video)
        if stream is None:
            return None
        whole = self._wanted(sample, frames)
        ((start, stop),) = whole.ranges
        packets, size = Packets(stream, part.index.packet_rows(video)), stop - start
        if not packets.can_be_of(size, int(self.num_frames[sample])):
            raise SampleError(
                f"{self.describe(sample)}: its packets in the index cannot be those of a file of {size} bytes with "
                f"{self.num_frames[sample]} frames; copy the index again or rebuild it with build_shards"
            )
        parts = VideoParts(packets, size, np.asarray(frames, np.int64))
        ranges = [(start + first, start + last) for first, last in parts.ranges]
        return whole._replace(ranges=ranges, positions=[0], parts=parts)

    def _check(self, wanted: _Wanted) -> Check:
        """Compares what was read with the checksums of the index."""

        def check(chunks: Sequence[bytes]) -> str | None:
            if not self._options.verify:
                return None
            if wanted.parts is not None:
                complaint = wanted.parts.damage(chunks)
                return complaint and f"{self.describe(wanted.sample)}: {complaint}; {_DAMAGED_SHARD}"
            for number, expected, chunk in zip(wanted.numbers, wanted.crc32s, chunks[wanted.num_json :], strict=True):
                if isal_zlib.crc32(chunk) != expected:
                    return self._describe_damage(wanted.part, wanted.sample, number, isal_zlib.crc32(chunk), expected)
            return None

        return check

    def _describe_damage(self, part: Part, sample: int, number: int, actual: int, expected: int) -> str:
        index, video = part.index, self._locate(sample)[1]
        rows = index.member_rows(video, np.arange(index.videos["num_members"][video]))
        if video_crc32(rows) != index.videos["crc32"][video]:
            return (
                f"{self.describe(sample)}: its rows of the member table are damaged; copy the index again, or empty "
                "the cache folder if the data set is remote"
            )
        what = f"frame {number}" if index.manifest.content == "frames" else "the video"
        return (
            f"{self.describe(sample)}: {what} has the CRC-32 {actual:#010x}, the index says {expected:#010x}; "
            f"{_DAMAGED_SHARD}"
        )

    def __reduce__(self) -> tuple[Any, ...]:
        return _reopen, (self._addresses, self._options, self.fingerprint)

    def close(self) -> None:
        """Ends threads, connections and open files. Reading afterwards is an error, and so is what is under way."""
        self._closed = True
        self._transfers.close()
        for part in self._parts:
            part.close()

    def __enter__(self) -> ShardDataset:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class Reading:
    """Frames of several requests on their way. Made by `ShardDataset.start`."""

    def __init__(self, dataset: ShardDataset, wanted: list[_Wanted]) -> None:
        self._dataset, self._wanted = dataset, wanted
        by_part: dict[int, list[_Wanted]] = {}
        places = []
        for one in wanted:
            own = by_part.setdefault(id(one.part), [])
            places.append((id(one.part), len(own)))
            own.append(one)
        fetches = {part: own[0].part.source.start([one.extent for one in own]) for part, own in by_part.items()}
        self._places = [(fetches[part], number) for part, number in places]

    def result(self) -> list[list[bytes]]:
        """What `ShardDataset.read_many` returns; waits for it. Raises what that raises."""
        files = []
        for one, (fetch, number) in zip(self._wanted, self._places, strict=True):
            chunks = fetch.read(number, self._dataset._check(one)) if one.ranges else []
            if one.parts is not None:
                chunks = [one.parts.file(chunks)]
            json, members = chunks[: one.num_json], chunks[one.num_json :]
            files.append([*json, *(members[position] for position in one.positions)])
        return files


def _first_difference(ours: list[str], theirs: list[str]) -> str:
    if len(ours) != len(theirs):
        return f"{len(ours)} and {len(theirs)} classes"
    label = next(label for label, (our, their) in enumerate(zip(ours, theirs, strict=True)) if our != their)
    return f"class {label} is {printable(ours[label])!r} and {printable(theirs[label])!r}"
