"""Opens one data set: its manifest, its index, and where the bytes of its shards come from."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from shards.address import local_path, scheme_of, shown_address
from shards.cache import ShardCache, entry_name, fetch_once
from shards.cached import CachedShards
from shards.format import MANIFEST, PACKETS_ROLE, Manifest, ShardError, video_key
from shards.index import MAX_MANIFEST_BYTES, Index, crc32_of, open_index, read_local_manifest
from shards.local import LocalShards, ShardSource
from shards.remote import RemoteFiles, RemoteShards
from shards.rows import WHOLE_TABLE_BYTES, FarRows, cannot_keep, prepare_rows
from shards.text import printable
from shards.transfer import Transfers

_ROWS_SUFFIX = ".rows"  # of a table that is not here whole


@dataclass(frozen=True)
class Options:
    """The keyword arguments of `open_dataset`."""

    cache_dir: str | Path | None
    cache_bytes: int | None
    verify: bool
    retries: int
    timeout_seconds: float
    storage_options: Mapping[str, Any] | None
    requests_in_flight: int
    bytes_in_flight: int

    def cache_path(self, where: str) -> Path:
        """The folder of the cache, for the data set at `where`. Raises ShardError if none was given."""
        if self.cache_dir is None:
            raise ShardError(
                f"{where}: a remote data set needs a local folder for its index and shards; give cache_dir"
            )
        return Path(self.cache_dir).expanduser().absolute()


class TarSample(NamedTuple):
    """A video in webdataset's words: its key, and the address of its tar as it may be shown.

    multi_label: whether its JSON has a list of labels, as in all of a data set whose videos may have several, or none.
    """

    key: str
    url: str
    multi_label: bool


@dataclass(frozen=True)
class Part:
    """One of the data sets that are joined. place: the folder or address of its tars."""

    index: Index
    source: ShardSource
    place: str

    def tar_sample(self, video: int) -> TarSample:
        """A video in webdataset's words."""
        index, several = self.index, self.index.manifest.multi_label
        shard = index.manifest.shards[int(index.videos["shard"][video])]
        url = shown_address(self.place, shard.name)
        if index.manifest.tars is not None:
            return TarSample(index.name(video).removeprefix(f"{shard.name.removesuffix('.tar')}/"), url, several)
        return TarSample(video_key(video), url, several)

    def renew(self) -> None:
        """Drops what does not survive a fork. Called in the child."""
        self.source.renew()
        for rows in self.index.far:
            rows.renew()

    def close(self) -> None:
        """Ends threads and closes files; the loop that serves them has ended before."""
        self.source.close()
        for rows in self.index.far:
            rows.close()


def open_part(address: str, options: Options, transfers: Transfers) -> Part:
    """Opens the data set at an address. transfers: fetch what is remote. Raises ShardError."""
    if scheme_of(address) is not None:
        return _open_remote(address, options, transfers)
    folder = local_path(address)
    manifest = read_local_manifest(folder)
    files = {role: folder / manifest.index[role]["file"] for role in manifest.roles}
    index = open_index(printable(str(folder)), manifest, files, options.retries)
    place = manifest.tars
    if place is None or place == ".":
        return Part(index, LocalShards(folder, manifest.shards, options.retries), str(folder))
    if scheme_of(place) is None:
        return Part(index, LocalShards(local_path(place), manifest.shards, options.retries), str(local_path(place)))
    return Part(index, _remote_source(_remote_files(place, options, transfers), manifest, options), place)


def _open_remote(address: str, options: Options, transfers: Transfers) -> Part:
    remote = _remote_files(address, options, transfers)
    manifest = _read_manifest(remote)
    if manifest.tars not in (None, "."):
        raise ShardError(
            f"{remote.place(MANIFEST)}: names tars in another place, which is followed from local folders alone; copy "
            "the index to a local folder"
        )
    folder = options.cache_path(remote.where) / "index"
    index = _open_fetched_index(remote, manifest, folder, by_shard=options.cache_bytes is not None)
    return Part(index, _remote_source(remote, manifest, options), address)


def _read_manifest(remote: RemoteFiles) -> Manifest:
    """The manifest, whose size and checksum nobody knows: damage on the way is gone at the second attempt."""
    where = remote.place(MANIFEST)
    text = remote.read_whole(MANIFEST, MAX_MANIFEST_BYTES)
    try:
        return Manifest.from_json(text, where)
    except ShardError:
        return Manifest.from_json(remote.read_whole(MANIFEST, MAX_MANIFEST_BYTES), where)


def _remote_files(address: str, options: Options, transfers: Transfers) -> RemoteFiles:
    return RemoteFiles(
        address,
        transfers,
        retries=options.retries,
        timeout_seconds=options.timeout_seconds,
        storage_options=options.storage_options,
        has_checksums=options.verify,
    )


def _remote_source(remote: RemoteFiles, manifest: Manifest, options: Options) -> ShardSource:
    """The tars below an address: whole in the cache, or by ranges."""
    if options.cache_bytes is None:
        return RemoteShards(remote, manifest.shards)
    return CachedShards(remote, manifest, ShardCache(options.cache_path(remote.where) / "shards", options.cache_bytes))


def _open_fetched_index(remote: RemoteFiles, manifest: Manifest, folder: Path, *, by_shard: bool) -> Index:
    files = {role: _fetch_index(remote, manifest, role, folder) for role in manifest.roles}
    try:
        index = open_index(remote.where, manifest, files)
    except ShardError:
        # The local copies may have been damaged since they were fetched; what is wrong in the store stays wrong.
        for role, path in files.items():
            path.unlink(missing_ok=True)
            _fetch_index(remote, manifest, role, folder)
        index = open_index(remote.where, manifest, files)
    tables = {
        role: replace(table, far=_far_rows(remote, index, role, files[role], by_shard))
        for role, table in index.large_tables.items()
        if files[role].suffix == _ROWS_SUFFIX
    }
    return replace(
        index,
        member_table=tables.get("members", index.member_table),
        packet_table=tables.get(PACKETS_ROLE, index.packet_table),
    )


def _far_rows(remote: RemoteFiles, index: Index, role: str, path: Path, by_shard: bool) -> FarRows:
    table, shards, ends = index.large_tables[role], index.videos["shard"], None
    if by_shard:
        per_shard = np.bincount(shards, table.count, minlength=len(index.manifest.shards))
        ends = np.concatenate([[0], np.cumsum(per_shard.astype(np.int64))])
    return FarRows(remote, index.manifest.index[role], path, table, shards=shards, shard_ends=ends)


def _fetch_index(remote: RemoteFiles, manifest: Manifest, role: str, folder: Path) -> Path:
    """Local copy of an index file, downloaded if needed; of a large table one that is filled as needed."""
    entry = manifest.index[role]
    name, size, crc32 = entry["file"], entry["bytes"], entry["crc32"]
    path = folder / f"{entry_name(remote.place(name), size, crc32)}.npy"

    def download(descriptor: int) -> None:
        copy = Path(f"/proc/self/fd/{descriptor}")
        remote.download(name, size, descriptor)
        with suppress(ShardError):
            if crc32_of(copy) == crc32:
                return
        remote.download(name, size, descriptor)  # damage on the way is gone now
        if crc32_of(copy) != crc32:
            raise ShardError(f"{remote.place(name)}: is not the file that {MANIFEST} describes; upload it again")

    try:
        if role in ("members", PACKETS_ROLE) and size > WHOLE_TABLE_BYTES and not path.exists():
            path = path.with_suffix(_ROWS_SUFFIX)
            prepare_rows(remote.place(name), size, manifest.dtypes[role], path)
        else:
            fetch_once(path, size, download)
    except OSError as error:
        raise cannot_keep(folder, remote, error) from error
    return path
