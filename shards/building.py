"""The state of an unfinished build, `.building/` in the output folder, and how it becomes a data set.

    .building/lock              held by the one builder of the folder
    .building/settings.json     what is being built; another build in the same folder is refused
    .building/000003.tar.part   the shard being written
    .building/000003.npz        index rows of a finished shard; written after its tar is on disk

A shard counts as finished once its index rows exist, so `kill -9` costs at most the shard that was being written.
Publishing writes new index files, then the manifest in one step, then removes what is no longer needed: at every
moment the folder holds the old data set, or the new one, or (before the first manifest) none.
"""

from __future__ import annotations

import io
import json
import os
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
from isal import isal_zlib

from shards.files import is_at, leftovers, replacing, sync, try_lock, write_atomically
from shards.format import (
    FORMAT_VERSION,
    INDEX_ROLES,
    LABELS_ROLE,
    MANIFEST,
    MULTI_LABEL_VERSION,
    PACKETS_ROLE,
    PACKETS_VERSION,
    STREAMS_ROLE,
    Manifest,
    ShardError,
    ShardInfo,
    fingerprint,
    index_file,
    shard_name,
    table_dtypes,
    table_header,
)
from shards.index import Index, one_header_at_a_time

FOLDER = ".building"
SETTINGS = "settings.json"


@dataclass(frozen=True)
class FinishedShard:
    """A shard on disk. next_position: place in the build order of the first video after it."""

    info: ShardInfo
    name_bytes: int
    next_position: int
    skipped: list[dict[str, Any]]


class Workspace:
    """`.building/` of an output folder, locked for this process. Use as a context manager.

    Raises ShardError when another process builds there, OSError as the file system does.
    """

    def __init__(self, output: Path) -> None:
        self.output = output
        self.path = output / FOLDER
        self._lock: int | None = self._take_lock()

    def __enter__(self) -> Workspace:
        return self

    def __exit__(self, *_: object) -> None:
        self._release()

    def _release(self) -> None:
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def _take_lock(self) -> int:
        name = self.path / "lock"
        while True:
            self.path.mkdir(parents=True, exist_ok=True)
            try:
                lock = os.open(name, os.O_RDWR | os.O_CREAT, 0o644)
            except FileNotFoundError:  # another builder finished and removed the folder just now
                continue
            if not try_lock(lock):
                os.close(lock)
                raise ShardError(
                    f"{self.output}: another process is building here; wait for it, or choose another --output"
                )
            if is_at(lock, name):
                return lock
            os.close(lock)

    def settings(self) -> dict[str, Any] | None:
        """Settings of the build that was begun here, None for none."""
        path = self.path / SETTINGS
        try:
            settings = json.loads(path.read_bytes())
        except FileNotFoundError:
            return None
        except (ValueError, RecursionError):
            settings = None
        if not isinstance(settings, dict):
            raise ShardError(f"{path}: damaged; delete {self.path} and build again")
        return settings

    def begin(self, settings: dict[str, Any]) -> None:
        """Discards an earlier build and records the settings of this one."""
        self._remove_all_but({"lock"})
        write_atomically(self.path / SETTINGS, json.dumps(settings, indent=1, ensure_ascii=False).encode())

    def finished_shards(self, first_shard: int) -> list[FinishedShard]:
        """The shards that earlier runs finished, without a gap; rows behind the first gap are removed."""
        finished: list[FinishedShard] = []
        keep = {"lock", SETTINGS}
        while (shard := self._load(first_shard + len(finished))) is not None:
            keep.add(self._rows_path(first_shard + len(finished)).name)
            finished.append(shard)
        self._remove_all_but(keep)
        return finished

    def part(self, number: int) -> Path:
        """Where a shard lies while it is written."""
        return self.path / f"{shard_name(number)}.part"

    def commit(self, number: int, shard: FinishedShard, tables: dict[str, np.ndarray]) -> None:
        """Puts a shard, written and synced at `part`, in its place and records its index rows."""
        self.part(number).replace(self.output / shard_name(number))
        sync(self.output)
        self.record(
            number,
            {"bytes": shard.info.bytes, "next_position": shard.next_position, "skipped": shard.skipped},
            tables,
        )

    def record(self, number: int, meta: dict[str, Any], tables: dict[str, np.ndarray]) -> None:
        """Records the index rows of a shard that is complete. meta: further facts about it."""
        stream = io.BytesIO()
        np.savez(stream, meta=np.frombuffer(json.dumps(meta).encode(), np.uint8), **tables)  # type: ignore[arg-type]
        write_atomically(self._rows_path(number), stream.getvalue())

    def recorded(self, number: int) -> tuple[dict[str, Any], dict[str, np.ndarray]] | None:
        """What `record` has written about a shard; None if that is missing or damaged."""
        try:
            with one_header_at_a_time, np.load(self._rows_path(number), allow_pickle=False) as arrays:
                optional = [role for role in (LABELS_ROLE, STREAMS_ROLE, PACKETS_ROLE) if role in arrays]
                return json.loads(arrays["meta"].tobytes()), {role: arrays[role] for role in (*INDEX_ROLES, *optional)}
        except Exception:  # a damaged archive fails in any way
            return None

    def table(self, number: int, role: str) -> np.ndarray:
        """Index rows of a finished shard. One of frames has no packets, and so have the videos of older programs."""
        rows = self._rows_path(number).read_bytes()  # zipfile would take a disk's error for a damaged archive
        with np.load(io.BytesIO(rows), allow_pickle=False) as arrays:
            if role in arrays:
                return arrays[role]
            return np.zeros(len(arrays["videos"]) if role == STREAMS_ROLE else 0, table_dtypes(False, True)[role])

    def remove(self) -> None:
        """Ends the build.

        The lock is held until only the folder is left. NFS keeps a removed file that is open in its folder, under
        another name, so the file is closed before the folder goes.
        """
        self._remove_all_but({"lock"})
        (self.path / "lock").unlink()
        self._release()
        with suppress(OSError):  # the next builder has begun here already
            self.path.rmdir()

    def _rows_path(self, number: int) -> Path:
        return self.path / f"{number:06d}.npz"

    def _remove_all_but(self, keep: set[str]) -> None:
        for path in self.path.iterdir():
            if path.name not in keep:
                path.unlink()

    def _load(self, number: int) -> FinishedShard | None:
        found = self.recorded(number)
        if found is None:
            return None
        meta, tables = found
        try:
            if (self.output / shard_name(number)).stat().st_size != meta["bytes"]:
                return None
            info = ShardInfo(shard_name(number), meta["bytes"], len(tables["videos"]), len(tables["members"]))
            return FinishedShard(info, len(tables["names"]), meta["next_position"], meta["skipped"])
        except (OSError, KeyError):
            return None


def publish(
    workspace: Workspace,
    finished: list[FinishedShard],
    existing: Index | None,
    *,
    content: str,
    classes: list[str],
    record: dict[str, Any],
    skipped: list[dict[str, Any]],
    multi_label: bool = False,
) -> Manifest:
    """Writes the index and the manifest over the existing data set's shards and the finished ones.

    multi_label: of both, whether videos may have several labels, or none.
    """
    output = workspace.output
    old = existing.manifest if existing else None
    shards = [*(old.shards if old else []), *(shard.info for shard in finished)]
    numbers = range(len(shards) - len(finished), len(shards))

    def joined(role: str, length: int) -> Iterable[np.ndarray]:
        """The rows of the existing data set, `length` of them, then those of the finished shards."""
        if existing:
            table = _table_of(existing, role)
            # In slices: the table may be mapped and larger than the memory.
            yield from (table[start : start + 2**20] for start in range(0, length, 2**20))
        yield from (workspace.table(number, role) for number in numbers)

    def whole(role: str) -> np.ndarray:
        return np.concatenate([*joined(role, len(_table_of(existing, role)) if existing else 0)])

    streams = whole(STREAMS_ROLE) if content == "video" else None
    manifest = write_index(
        output,
        shards,
        whole("videos"),
        whole("names"),
        joined("members", len(existing.members) if existing else 0),
        content=content,
        classes=classes,
        build={"runs": [*(old.build.get("runs", []) if old else []), record]},
        skipped=[*(old.skipped if old else []), *skipped],
        labels=whole(LABELS_ROLE) if multi_label else None,
        streams=streams,
        packets=joined(PACKETS_ROLE, len(_table_of(existing, PACKETS_ROLE)) if existing else 0),
    )
    clean_up(workspace, manifest)
    return manifest


def _table_of(index: Index, role: str) -> np.ndarray:
    """A table of an existing data set; one of streams or packets that it doesn't have says so of each video."""
    if role == STREAMS_ROLE and index.streams is None:
        return np.zeros(len(index.videos), table_dtypes(False, True)[STREAMS_ROLE])
    if role in ("members", PACKETS_ROLE):
        table = index.large_tables.get(role)
        return np.zeros(0, table_dtypes(False, True)[role]) if table is None else table.rows
    return getattr(index, role)


def write_index(
    output: Path,
    shards: list[ShardInfo],
    videos: np.ndarray,
    names: np.ndarray,
    members: Iterable[np.ndarray],
    *,
    content: str,
    classes: list[str],
    build: dict[str, Any],
    skipped: list[dict[str, Any]],
    tars: str | None = None,
    labels: np.ndarray | None = None,
    streams: np.ndarray | None = None,
    packets: Iterable[np.ndarray] = (),
) -> Manifest:
    """Writes the index tables, then the manifest in one step. members: pieces of the member table, in order.

    labels: the table of a data set with several labels a video, None for others. streams, packets: of stored videos,
    the latter in pieces; left out if no video can be read in parts.
    """
    identity = fingerprint(videos, names, classes, content, labels)
    num_members = sum(shard.members for shard in shards)
    (output / "index").mkdir(exist_ok=True)
    tables: dict[str, tuple[int, Iterable[np.ndarray]]] = {
        "videos": (len(videos), [videos]),
        "members": (num_members, members),
        "names": (len(names), [names]),
    }
    if labels is not None:
        tables[LABELS_ROLE] = len(labels), [labels]
    num_packets = 0 if streams is None else int(streams["num_packets"].sum(dtype=np.int64))
    if streams is not None and num_packets:
        tables |= {STREAMS_ROLE: (len(streams), [streams]), PACKETS_ROLE: (num_packets, packets)}
    version = FORMAT_VERSION if labels is None else MULTI_LABEL_VERSION
    dtypes = table_dtypes(labels is not None, num_packets > 0)
    index: dict[str, dict[str, Any]] = {}
    for role, (length, arrays) in tables.items():
        file = index_file(role, identity)
        size, crc32 = _write_table(output / file, dtypes[role], length, arrays)
        index[role] = {"file": file, "bytes": size, "crc32": crc32}
    manifest = Manifest(
        content=content,
        classes=classes,
        num_videos=len(videos),
        num_members=num_members,
        fingerprint=identity,
        shards=shards,
        index=index,
        build=build,
        skipped=skipped,
        version=PACKETS_VERSION if num_packets else version,
        tars=tars,
    )
    write_atomically(output / MANIFEST, manifest.to_json().encode())
    return manifest


def clean_up(workspace: Workspace, manifest: Manifest) -> None:
    """Removes what a published data set no longer needs: index files of the one before, half a manifest that a killed
    builder left, and the workspace."""
    used = {Path(entry["file"]).name for entry in manifest.index.values()}
    unused = [path for path in (workspace.output / "index").iterdir() if path.name not in used]
    for path in [*unused, *leftovers(workspace.output / MANIFEST)]:
        path.unlink()
    workspace.remove()


def _write_table(path: Path, dtype: np.dtype, length: int, arrays: Iterable[np.ndarray]) -> tuple[int, int]:
    """Writes a .npy file of `length` rows, piece by piece. Returns its bytes and its CRC-32."""
    size, crc32 = 0, 0
    with replacing(path) as stream:
        for piece in chain([table_header(dtype, length)], (array.tobytes() for array in arrays)):
            stream.write(piece)
            size, crc32 = size + len(piece), isal_zlib.crc32(piece, crc32)
    return size, crc32
