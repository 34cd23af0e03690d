"""Opens one data set: its manifest, its index, and where the bytes of its shards come from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from shards.address import local_path, scheme_of
from shards.cache import ShardCache, entry_name, fetch_once
from shards.cached import CachedShards
from shards.format import MANIFEST, Manifest, ShardError
from shards.index import MAX_MANIFEST_BYTES, Index, check_crc32, open_index, read_local_manifest
from shards.local import LocalShards, ShardSource
from shards.remote import RemoteFiles, RemoteShards
from shards.text import printable
from shards.transfer import Transfers


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


@dataclass(frozen=True)
class Part:
    """One of the data sets that are joined."""

    index: Index
    source: ShardSource


def open_part(address: str, options: Options, transfers: Transfers) -> Part:
    """Opens the data set at an address. transfers: fetch what is remote. Raises ShardError."""
    if scheme_of(address) is not None:
        return _open_remote(address, options, transfers)
    folder = local_path(address)
    manifest = read_local_manifest(folder)
    files = {role: folder / manifest.index[role]["file"] for role in manifest.roles}
    index = open_index(printable(str(folder)), manifest, files)
    place = manifest.tars
    if place is None or place == ".":
        return Part(index, LocalShards(folder, manifest.shards, options.retries))
    if scheme_of(place) is None:
        return Part(index, LocalShards(local_path(place), manifest.shards, options.retries))
    return Part(index, _remote_source(_remote_files(place, options, transfers), manifest, options))


def _open_remote(address: str, options: Options, transfers: Transfers) -> Part:
    remote = _remote_files(address, options, transfers)
    manifest = Manifest.from_json(remote.read_whole(MANIFEST, MAX_MANIFEST_BYTES), remote.place(MANIFEST))
    if manifest.tars not in (None, "."):
        raise ShardError(
            f"{remote.place(MANIFEST)}: names tars in another place, which is followed from local folders alone; copy "
            "the index to a local folder"
        )
    index = _open_fetched_index(remote, manifest, options.cache_path(remote.where) / "index")
    return Part(index, _remote_source(remote, manifest, options))


def _remote_files(address: str, options: Options, transfers: Transfers) -> RemoteFiles:
    return RemoteFiles(
        address,
        transfers,
        retries=options.retries,
        timeout_seconds=options.timeout_seconds,
        storage_options=options.storage_options,
    )


def _remote_source(remote: RemoteFiles, manifest: Manifest, options: Options) -> ShardSource:
    """The tars below an address: whole in the cache, or by ranges."""
    if options.cache_bytes is None:
        return RemoteShards(remote, manifest.shards)
    return CachedShards(remote, manifest, ShardCache(options.cache_path(remote.where) / "shards", options.cache_bytes))


def _open_fetched_index(remote: RemoteFiles, manifest: Manifest, folder: Path) -> Index:
    files = {role: _fetch_index(remote, manifest.index[role], folder) for role in manifest.roles}
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
