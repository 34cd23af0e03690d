"""Indexes tars that other programs wrote, in place, so that they can be read like our own shards.

Every tar is read once, from its beginning to its end, and nothing is written beside the index: `manifest.json` and the
tables of `shards.format`. The manifest names the tars; the member table says where each one's bytes lie.
"""

from __future__ import annotations

import os
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from contextlib import closing
from functools import partial
from itertools import takewhile
from pathlib import Path
from typing import Any, TypeVar

import fsspec
import numpy as np

from shards.address import expand_sources, join_address, local_path, scheme_of
from shards.answers import explain, is_transient
from shards.building import Workspace, clean_up, write_index
from shards.files import require_folder
from shards.foreign_samples import TarRows, read_tar
from shards.format import (
    BLOCK_BYTES,
    MANIFEST,
    MEMBER_DTYPE,
    VIDEO_DTYPE,
    Manifest,
    ShardError,
    ShardInfo,
    tar_place_problem,
)
from shards.index import read_local_manifest
from shards.remote import RemoteFiles
from shards.text import printable, redact
from shards.transfer import Transfers

T = TypeVar("T")

_RETRIES = 5  # of a range
_TIMEOUT_SECONDS = 30
_PAUSES_SECONDS = (0.5, 1, 2)  # of a listing; a host that is misspelt should not be waited for long


def index_tars(
    sources: str | Sequence[str],
    *,
    output: str | Path,
    labels: Sequence[str] | None = None,
    label_key: str | None = None,
    on_error: str = "fail",
    workers: int | None = None,
    progress: Callable[[int], object] | None = None,
) -> Manifest:
    """Writes an index of existing WebDataset tars into the folder `output`. Goes on where a killed call stopped.

    sources: addresses of tars, or of folders that hold `*.tar`; braces are expanded. All lie below one place.
    labels: class names by label. Needed where the tars hold numbers; else the names found, sorted, are the classes.
    label_key: key of KEY.json that holds the label, dots for nested ones; by default KEY.cls, then the keys `label`,
        `class`, `cls` and `category` of KEY.json, then KEY.txt.
    on_error: "fail" at the first sample that cannot be used, or "skip" such samples and list them in the manifest.
    progress: called with the number of videos indexed since its last call.

    Raises ShardError that names the tar, the sample and the fix; OSError where the output cannot be written.
    """
    if on_error not in {"fail", "skip"}:
        raise ValueError(f"on_error must be 'fail' or 'skip', got {on_error!r}")
    output = Path(output)
    place, tars = _find_tars(sources)
    require_folder(output)
    options = {"label_key": label_key, "on_error": on_error}
    wanted = {"tool": "index_tars", "tars": [list(tar) for tar in tars], "labels": labels and list(labels), **options}
    if (output / MANIFEST).exists():
        manifest = read_local_manifest(output)
        if manifest.build.get("wanted") == wanted:
            return manifest
        raise ShardError(f"{output}: holds another data set; choose an empty or new folder as --output")
    with Workspace(output) as workspace:
        if workspace.settings() != wanted:
            workspace.begin(wanted)
        _record_all(workspace, place, tars, options=options, workers=workers, progress=progress or (lambda count: None))
        manifest = _publish(workspace, place, tars, labels, wanted)
        clean_up(workspace, manifest)
    return manifest


def _find_tars(sources: str | Sequence[str]) -> tuple[str, list[tuple[str, int]]]:
    """The place below which all tars lie, and their names below it with their sizes in bytes, sorted by name."""
    found: dict[str, int] = {}
    for address in expand_sources(sources):
        where = redact(address)
        if scheme_of(address) is not None and where != printable(address):
            raise ShardError(
                f"{where}: user names, passwords and tokens, or what follows '?' or '#', do not belong into an index; "
                "give credentials by the environment, as for training"
            )
        try:
            found |= _local_tars(local_path(address)) if scheme_of(address) is None else _remote_tars(address)
        except ShardError:
            raise
        except FileNotFoundError as error:
            # fsspec's own says no more than the address; the store's answer is what it came from.
            reason = explain(error.__cause__) if error.__cause__ else "not found, or the folder holds no *.tar"
            raise ShardError(f"{where}: {reason}; name tars, or their folder") from None
        except Exception as error:  # drivers raise what they like
            raise ShardError(f"{where}: {explain(error)}; check the address and the credentials") from None
    place = _common_place(found)
    tars = sorted((address[len(place) + 1 :], size) for address, size in found.items())
    for name, size in tars:
        problem = tar_place_problem(name)
        if problem:
            raise ShardError(f"{redact(place)}: the name {printable(name)!r} {problem}; rename the tar")
        if size == 0 or size % BLOCK_BYTES:
            raise ShardError(f"{redact(place)}/{printable(name)}: has {size} bytes, which no tar has; copy it again")
    return place, tars


def _common_place(addresses: Iterable[str]) -> str:
    """The folder or address below which all of them lie. Raises ShardError where they have none in common."""
    folders = sorted({address.rpartition("/")[0] for address in addresses})
    columns = zip(*(folder.split("/") for folder in folders), strict=False)
    place = "/".join(parts[0] for parts in takewhile(lambda parts: len(set(parts)) == 1, columns))
    # Below "s3://" or "/" lies everything.
    if not place.strip("/") or place.endswith(("/", ":")):
        raise ShardError(
            f"{', '.join(map(redact, folders[:3]))}: the tars lie in places that have nothing in common; index each "
            "place by itself and name all the indexes in data.train"
        )
    return place


def _local_tars(path: Path) -> dict[str, int]:
    paths = sorted(path.glob("*.tar")) if path.is_dir() else [path]
    if not paths:
        raise FileNotFoundError
    return {str(one.absolute()): one.stat().st_size for one in paths}


def _remote_tars(address: str) -> dict[str, int]:
    kind = fsspec.get_filesystem_class(scheme_of(address))
    # Not fsspec's url_to_fs: it takes the host [::1] for chained addresses.
    filesystem, path = kind(**kind._get_kwargs_from_urls(address)), kind._strip_protocol(address)
    paths = {address: path}
    if not path.endswith(".tar"):
        # Not glob: a host like [::1] and a folder's own brackets and stars are no patterns.
        found = _patiently(lambda: filesystem.ls(f"{path.rstrip('/')}/", detail=False))
        listed = [(one, *one.replace("/./", "/").rpartition("/")) for one in found]
        folder = path.replace("/./", "/").strip("/")
        # Below the address itself: some drivers leave out the host.
        paths = {
            join_address(address, name): one
            for one, parent, _, name in listed
            if parent.strip("/") == folder and name.endswith(".tar")
        }
    if not paths:
        raise FileNotFoundError
    sizes = {tar: _patiently(partial(filesystem.size, paths[tar])) for tar in sorted(paths)}
    for tar, size in sizes.items():
        if size is None:
            raise ShardError(
                f"{redact(tar)}: the server does not say how large it is (Content-Length); have it sent uncompressed "
                "and whole, or copy it to a local folder"
            )
    return {tar: int(size) for tar, size in sizes.items()}


def _patiently(ask: Callable[[], T]) -> T:
    """The store's answer; asked for again after faults that pass."""
    for pause in _PAUSES_SECONDS:
        try:
            return ask()
        except Exception as error:  # drivers raise what they like, fsspec a FileNotFoundError for most answers
            if not is_transient(error.__cause__ or error):
                raise
        time.sleep(pause)
    return ask()


def _record_all(
    workspace: Workspace,
    place: str,
    tars: list[tuple[str, int]],
    *,
    options: Mapping[str, Any],
    workers: int | None,
    progress: Callable[[int], object],
) -> None:
    """Records the rows of all tars that no earlier call has recorded."""

    def record(number: int) -> None:
        found = workspace.recorded(number)
        if found is None:
            name, size = tars[number]
            rows = _read(tar_files, place, name, size, options)
            tables = {
                "videos": np.array(rows.videos, VIDEO_DTYPE),
                "members": np.concatenate([np.empty(0, MEMBER_DTYPE), *rows.members]),
                "names": np.frombuffer(b"".join(rows.names), np.uint8),
            }
            kept = {key: getattr(rows, key) for key in ("labels", "content", "skipped", "unused")}
            workspace.record(number, kept, tables)
            progress(len(rows.videos))
        else:
            progress(len(found[1]["videos"]))

    with closing(Transfers()) as transfers:
        tar_files = None if scheme_of(place) is None else _remote_files(place, transfers)
        with ThreadPoolExecutor(workers or len(os.sched_getaffinity(0)), "index") as pool:
            futures = [pool.submit(record, number) for number in range(len(tars))]
            try:
                wait(futures, return_when=FIRST_EXCEPTION)
            finally:
                pool.shutdown(cancel_futures=True)
    for future in futures:
        if not future.cancelled():
            future.result()


def _remote_files(place: str, transfers: Transfers) -> RemoteFiles:
    return RemoteFiles(place, transfers, retries=_RETRIES, timeout_seconds=_TIMEOUT_SECONDS, storage_options=None)


def _read(files: RemoteFiles | None, place: str, name: str, size: int, options: Mapping[str, Any]) -> TarRows:
    """Index rows of one tar. files: where it is, None for a local folder. Raises ShardError."""
    address = join_address(place, name)
    try:
        with local_path(address).open("rb") if files is None else files.stream(name, size) as stream:
            return read_tar(stream, redact(address), name, **options)
    except OSError as error:
        raise ShardError(
            f"{redact(address)}: cannot be read: {explain(error)}; check the disk, then start again"
        ) from None


def _publish(
    workspace: Workspace,
    place: str,
    tars: list[tuple[str, int]],
    labels: Sequence[str] | None,
    wanted: dict[str, Any],
) -> Manifest:
    """Joins the rows of all tars to one data set. Raises ShardError."""
    output, where = workspace.output, redact(place)
    recorded = []
    for number in range(len(tars)):
        rows = workspace.recorded(number)
        assert rows is not None
        recorded.append((rows[0], rows[1]["videos"], rows[1]["names"]))
    contents = {meta["content"] for meta, videos, _ in recorded if len(videos)}
    if len(contents) > 1:
        raise ShardError(f"{where}: some tars hold videos, some frames; index each kind by itself, into two folders")
    if not contents:
        raise ShardError(f"{where}: none of the samples can be used; --on-error fail says why")
    found = [(name, meta["labels"]) for (name, _), (meta, _, _) in zip(tars, recorded, strict=True)]
    classes = _classes(where, found, labels)
    label_of: dict[int | str, int] = {name: label for label, name in enumerate(classes)}
    num_members = num_bytes = 0
    shards = []
    for number, ((name, size), (meta, videos, names)) in enumerate(zip(tars, recorded, strict=True)):
        videos["shard"] = number
        videos["first_member"] += num_members
        videos["name_start"] += num_bytes
        videos["label"] = [label if isinstance(label, int) else label_of[label] for label in meta["labels"]]
        shards.append(ShardInfo(name, size, len(videos), int(videos["num_members"].sum())))
        num_members += shards[-1].members
        num_bytes += len(names)
    unused: Counter[str] = Counter()
    for meta, _, _ in recorded:
        unused.update(meta["unused"])
    return write_index(
        output,
        shards,
        np.concatenate([videos for _, videos, _ in recorded]),
        np.concatenate([names for _, _, names in recorded]),
        (workspace.table(number, "members") for number in range(len(tars))),
        content=contents.pop(),
        classes=classes,
        build={"wanted": wanted, "unused_members": dict(sorted(unused.items()))},
        skipped=[entry for meta, _, _ in recorded for entry in meta["skipped"]],
        tars="." if scheme_of(place) is None and local_path(place) == output.absolute() else place,
    )


def _classes(where: str, found: list[tuple[str, list[int | str]]], labels: Sequence[str] | None) -> list[str]:
    """Class names by label; every label that was found is checked. found: (tar, its labels). Raises ShardError."""
    tar_of: dict[int | str, str] = {}
    for name, of_tar in found:
        for label in of_tar:
            tar_of.setdefault(label, name)
    if labels is None:
        numbers = [label for label in tar_of if isinstance(label, int)]
        if numbers:
            raise ShardError(
                f"{where}/{printable(tar_of[numbers[0]])}: the labels are numbers ({numbers[0]}); give the class "
                "names with --labels CSV"
            )
        return sorted(map(str, tar_of))
    known = set(labels)
    for label, name in tar_of.items():
        if (isinstance(label, int) and not 0 <= label < len(labels)) or (isinstance(label, str) and label not in known):
            raise ShardError(
                f"{where}/{printable(name)}: the label {label!r} is not in the class list of {len(labels)} names; add "
                "it, or correct --labels"
            )
    return list(labels)
