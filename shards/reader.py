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
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from isal import isal_zlib

from shards.address import expand_sources, local_path, scheme_of
from shards.cache import CachedShards, ShardCache, default_cache_dir, entry_name, fetch_once
from shards.format import INDEX_ROLES, MANIFEST, Manifest, ShardError, video_crc32
from shards.index import MAX_MANIFEST_BYTES, Index, check_crc32, open_index, read_local_manifest
from shards.local import LocalShards, ShardSource
from shards.remote import RemoteFiles, RemoteShards
from shards.text import printable

_OPENING_THREADS = 8


@dataclass(frozen=True)
class _Options:
    """The keyword arguments of `open_dataset`."""

    cache_dir: str | Path | None
    cache_bytes: int | None
    verify: bool
    retries: int
    timeout_seconds: float
    storage_options: Mapping[str, Any] | None
    io_threads: int

    @property
    def cache_path(self) -> Path:
        return default_cache_dir() if self.cache_dir is None else Path(self.cache_dir).expanduser().absolute()


@dataclass(frozen=True)
class _Part:
    """One of the data sets that are joined."""

    index: Index
    source: ShardSource


class _Wanted(NamedTuple):
    """What one request reads: the distinct members `numbers`, their checksums and byte ranges, in one shard.

    positions: for each frame of the request its place among the distinct ones.
    """

    part: _Part
    sample: int
    shard: int
    numbers: list[int]
    crc32s: list[int]
    ranges: list[tuple[int, int]]
    positions: list[int]


def open_dataset(
    sources: str | Sequence[str],
    *,
    cache_dir: str | Path | None = None,
    cache_bytes: int | None = None,
    verify: bool = True,
    retries: int = 5,
    timeout_seconds: float = 30,
    storage_options: Mapping[str, Any] | None = None,
    io_threads: int = 16,
) -> ShardDataset:
    """Opens one data set, or several joined into one. Costs O(videos).

    sources: a folder, a file://, http(s)://, s3:// or other fsspec address, or a list of them; braces are expanded:
        's3://bucket/part{0..3}'.
    cache_dir: where the index files of remote data sets are kept, and shards if `cache_bytes` is given; shared by the
        processes of the node. Default: $XDG_CACHE_HOME/text4vis or ~/.cache/text4vis.
    cache_bytes: keep whole shards of remote data sets, up to this many bytes, least recently used out first. Without
        it only the ranges of the wanted frames are fetched. Local folders, network mounts included, are read in place.
    verify: compare each frame with its CRC-32.
    retries: attempts after the first when a remote or mount fails for a moment, with exponential backoff.
    timeout_seconds: for connecting and for each wait for data.
    storage_options: passed to fsspec for the remote data sets (credentials, endpoint ...).
    io_threads: requests that `read_many` works on at the same time. One is enough for local folders: the kernel is told
        of all ranges beforehand and fetches them at the same time.

    Raises ShardError for anything that is not a sound data set, ValueError for bad options.
    """
    if retries < 0 or io_threads < 1 or timeout_seconds <= 0 or (cache_bytes is not None and cache_bytes < 1):
        raise ValueError(
            "open_dataset: expected retries >= 0, io_threads >= 1, timeout_seconds > 0 and cache_bytes >= 1, got "
            f"{retries}, {io_threads}, {timeout_seconds} and {cache_bytes}"
        )
    options = _Options(cache_dir, cache_bytes, verify, retries, timeout_seconds, storage_options, io_threads)
    addresses = expand_sources(sources)
    with ThreadPoolExecutor(min(_OPENING_THREADS, len(addresses))) as pool:
        parts = list(pool.map(lambda address: _open_part(address, options), addresses))
    return ShardDataset(addresses, options, parts)


def _open_part(address: str, options: _Options) -> _Part:
    if scheme_of(address) is not None:
        return _open_remote(address, options)
    folder = local_path(address)
    manifest = read_local_manifest(folder)
    files = {role: folder / manifest.index[role]["file"] for role in INDEX_ROLES}
    index = open_index(printable(str(folder)), manifest, files)
    return _Part(index, LocalShards(folder, manifest.shards, options.retries))


def _open_remote(address: str, options: _Options) -> _Part:
    remote = RemoteFiles(
        address,
        retries=options.retries,
        timeout_seconds=options.timeout_seconds,
        storage_options=options.storage_options,
    )
    manifest = Manifest.from_json(remote.read_whole(MANIFEST, MAX_MANIFEST_BYTES), remote.place(MANIFEST))
    index = _open_fetched_index(remote, manifest, options.cache_path / "index")
    if options.cache_bytes is None:
        return _Part(index, RemoteShards(remote, manifest.shards))
    cache = ShardCache(options.cache_path / "shards", options.cache_bytes)
    return _Part(index, CachedShards(remote, manifest, cache))


def _open_fetched_index(remote: RemoteFiles, manifest: Manifest, folder: Path) -> Index:
    files = {role: _fetch_index(remote, manifest.index[role], folder) for role in INDEX_ROLES}
    try:
        return open_index(remote.where, manifest, files)
    except ShardError:
        # The local copies may have been damaged since they were fetched; what is wrong in the store stays wrong.
        for role, path in files.items():
            path.unlink(missing_ok=True)
            _fetch_index(remote, manifest.index[role], folder)
        return open_index(remote.where, manifest, files)


def _fetch_index(remote: RemoteFiles, entry: Mapping[str, Any], folder: Path) -> Path:
    """Local copy of an index file, downloaded if needed."""
    name, size, crc32 = entry["file"], entry["bytes"], entry["crc32"]
    path = folder / f"{entry_name(remote.place(name), size, crc32)}.npy"

    def download(descriptor: int) -> None:
        remote.download(name, size, descriptor)
        try:
            check_crc32(Path(f"/proc/self/fd/{descriptor}"), crc32)
        except ShardError:
            raise ShardError(
                f"{remote.place(name)}: is not the file that {MANIFEST} describes; upload it again"
            ) from None

    try:
        fetch_once(path, size, download)
    except OSError as error:
        raise ShardError(
            f"{folder}: the index of {remote.where} cannot be kept here: {error.strerror or error}; free some space or "
            "name another cache_dir"
        ) from error
    return path


def _reopen(addresses: list[str], options: _Options, fingerprint: str) -> ShardDataset:
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

    Any number of threads may use it. It survives a fork, and pickling opens it again. Close it, or use it as a context
    manager.
    """

    def __init__(self, addresses: list[str], options: _Options, parts: list[_Part]) -> None:
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
        counts = [len(part.index.videos) for part in parts]
        self._starts = [0, *itertools.accumulate(counts)]
        shard_starts = np.cumsum([0, *(len(part.index.manifest.shards) for part in parts)])
        self.labels = self._column("label")
        self.num_frames = self._column("num_frames")
        self.shard_of = self._column("shard") + np.repeat(shard_starts[:-1], counts)
        self.classes: list[str] = list(first.manifest.classes)
        prints = [part.index.manifest.fingerprint for part in parts]
        self.fingerprint = prints[0] if len(prints) == 1 else hashlib.sha256("\n".join(prints).encode()).hexdigest()
        self._closed = False
        self._pool = self._make_pool()
        _opened.add(self)

    def _column(self, name: str) -> np.ndarray:
        return np.concatenate([part.index.videos[name].astype(np.int64) for part in self._parts])

    def _make_pool(self) -> ThreadPoolExecutor:
        return ThreadPoolExecutor(self._options.io_threads, thread_name_prefix="shards-read")

    def _renew(self) -> None:
        """Replaces what does not survive a fork."""
        self._pool = self._make_pool()
        for part in self._parts:
            part.source.renew()

    def __len__(self) -> int:
        return self._starts[-1]

    @property
    def places(self) -> list[str]:
        """Addresses of the data sets as they may be shown."""
        return [part.index.where for part in self._parts]

    @property
    def part_sizes(self) -> list[int]:
        """Videos of each of the data sets, in their order."""
        return [len(part.index.videos) for part in self._parts]

    @property
    def skipped(self) -> list[dict[str, Any]]:
        """Inputs that were left out when the data sets were built, as {"name", "line", "reason"}."""
        return [entry for part in self._parts for entry in part.index.manifest.skipped]

    def _locate(self, sample: int) -> tuple[_Part, int]:
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

    def frame_sizes(self, sample: int, frames: np.ndarray) -> list[tuple[int, int]]:
        """(height, width) in pixels of each of the (k,) frames, zeros where unknown."""
        part, video = self._locate(sample)
        rows = part.index.member_rows(video, np.array(self._member_numbers(part, sample, frames), np.int64))
        return list(zip(rows["height"].tolist(), rows["width"].tolist(), strict=True))

    def _member_numbers(self, part: _Part, sample: int, frames: np.ndarray) -> list[int]:
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
        return self._read(self._wanted(sample, frames))

    def read_video(self, sample: int) -> bytes:
        """The encoded file of a stored video. Raises ShardError, ValueError if its frames are stored one by one."""
        if self.content(sample) != "video":
            raise ValueError(f"{self.describe(sample)}: stored as single frames; use read")
        return self._read(self._wanted(sample, np.zeros(1, np.int64)))[0]

    def read_many(self, requests: Sequence[tuple[int, np.ndarray]]) -> list[list[bytes]]:
        """`read(sample, frames)` of each request, at the same time on `io_threads` threads, results in order.

        For a stored video the list holds its one file, whatever the frames. Raises what `read` and `read_video` raise.
        """
        wanted = [
            self._wanted(sample, frames if self.content(sample) == "frames" else np.zeros(1, np.int64))
            for sample, frames in requests
        ]
        for one in wanted:
            one.part.source.expect(one.shard, one.ranges)
        if self._options.io_threads == 1:
            return [self._read(one) for one in wanted]
        futures = [self._pool.submit(self._read, one) for one in wanted]
        try:
            return [future.result() for future in futures]
        except BaseException:
            for future in futures:
                future.cancel()
            raise

    def _wanted(self, sample: int, frames: np.ndarray) -> _Wanted:
        if self._closed:
            raise ValueError("the data set is closed")
        part, video = self._locate(sample)
        wanted = self._member_numbers(part, sample, frames)
        place = {number: position for position, number in enumerate(sorted(set(wanted)))}
        distinct, positions = list(place), [place[number] for number in wanted]
        rows = part.index.member_rows(video, np.array(distinct, np.int64))
        ranges, shard = part.index.ranges(video, rows), int(part.index.videos["shard"][video])
        return _Wanted(part, sample, shard, distinct, rows["crc32"].tolist(), ranges, positions)

    def _read(self, wanted: _Wanted) -> list[bytes]:
        if not wanted.ranges:
            return []
        part = wanted.part

        def check(chunks: Sequence[bytes]) -> str | None:
            if not self._options.verify:
                return None
            for number, expected, chunk in zip(wanted.numbers, wanted.crc32s, chunks, strict=True):
                if isal_zlib.crc32(chunk) != expected:
                    return self._describe_damage(part, wanted.sample, number, isal_zlib.crc32(chunk), expected)
            return None

        chunks = part.source.read(wanted.shard, wanted.ranges, check)
        return [chunks[position] for position in wanted.positions]

    def _describe_damage(self, part: _Part, sample: int, number: int, actual: int, expected: int) -> str:
        index, video = part.index, self._locate(sample)[1]
        rows = index.member_rows(video, np.arange(index.videos["num_members"][video]))
        if video_crc32(rows) != index.videos["crc32"][video]:
            return (
                f"{self.describe(sample)}: its rows of the member table are damaged; copy the index again, or empty "
                "the cache folder if the data set is remote"
            )
        what = f"frame {number}" if index.manifest.content == "frames" else "the video"
        return (
            f"{self.describe(sample)}: {what} has the CRC-32 {actual:#010x}, the index says {expected:#010x}; the "
            "shard is damaged: find what else is with check_shards, then copy it again or rebuild"
        )

    def __reduce__(self) -> tuple[Any, ...]:
        return _reopen, (self._addresses, self._options, self.fingerprint)

    def close(self) -> None:
        """Ends threads, connections and open files. Reading afterwards is an error."""
        self._closed = True
        self._pool.shutdown(cancel_futures=True)
        for part in self._parts:
            part.source.close()

    def __enter__(self) -> ShardDataset:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _first_difference(ours: list[str], theirs: list[str]) -> str:
    if len(ours) != len(theirs):
        return f"{len(ours)} and {len(theirs)} classes"
    label = next(label for label, (our, their) in enumerate(zip(ours, theirs, strict=True)) if our != their)
    return f"class {label} is {printable(ours[label])!r} and {printable(theirs[label])!r}"
