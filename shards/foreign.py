"""Indexes tars that other programs wrote, where they lie, so that they are read as our own shards are.

Keys and extensions are found by webdataset's own rule: the key of a member is its path up to the first dot of the base
name, the extension is what follows, in lower case; a sample is a run of members with one key. Of a sample are used

    KEY.mp4 (avi, mkv, webm, mov ...)           one stored video, or
    KEY.jpg, KEY.000.jpg KEY.001.jpg ...        frames (jpg, png, webp, bmp), in the order of their numbers
    KEY.cls, KEY.json or KEY.txt                the label: a number or a class name

Every tar is read once, from its beginning to its end, and nothing is written beside the index: `manifest.json` and the
tables of `shards.format`. The manifest names the tars; the member table says where each one's bytes lie.
"""

from __future__ import annotations

import json
import os
import re
import tarfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from itertools import takewhile
from pathlib import Path
from typing import IO, Any

import fsspec
import numpy as np
from isal import isal_zlib
from webdataset.tariterators import base_plus_ext

from shards.address import expand_sources, join_address, local_path, scheme_of
from shards.annotations import VIDEO_EXTENSIONS
from shards.building import Workspace, clean_up, write_index
from shards.files import require_folder
from shards.format import (
    BLOCK_BYTES,
    CONTROL_CHARACTER,
    MANIFEST,
    MAX_FRAMES,
    MAX_MEMBER_BYTES,
    MEMBER_DTYPE,
    VIDEO_DTYPE,
    Manifest,
    ShardError,
    ShardInfo,
    tar_place_problem,
    video_crc32,
)
from shards.images import ImageProbe
from shards.index import read_local_manifest
from shards.text import printable, redact, redact_text
from shards.video import VideoError, probe_video

_IMAGES = {"jpg", "jpeg", "png", "webp", "bmp"}
_VIDEOS = {extension.removeprefix(".") for extension in VIDEO_EXTENSIONS}
_LABELS = ("cls", "json", "txt")
_JSON_KEYS = ("label", "class", "cls", "category")
# webdataset passes over such members too.
_META = re.compile(r"__[^/]*__($|/)")
_MAX_SIDE = 65_535
_MAX_LABEL_BYTES = 16 << 20


@dataclass
class _TarRows:
    """Index rows of one tar. labels: a class's number or name for each video. unused: members by extension."""

    videos: list[tuple[int, ...]] = field(default_factory=list)
    members: list[np.ndarray] = field(default_factory=list)
    names: list[bytes] = field(default_factory=list)
    labels: list[int | str] = field(default_factory=list)
    content: str = ""
    skipped: list[dict[str, Any]] = field(default_factory=list)
    unused: Counter[str] = field(default_factory=Counter)
    num_members: int = 0
    num_name_bytes: int = 0


class _SampleError(ValueError):
    """A sample that cannot be used: what is wrong with it."""


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
                f"{where}: user names, passwords and tokens do not belong into an index; give them by the environment, "
                "as for training"
            )
        try:
            found |= _local_tars(local_path(address)) if scheme_of(address) is None else _remote_tars(address)
        except (OSError, ImportError, ValueError) as error:
            raise ShardError(
                f"{where}: {redact_text(str(error)) or type(error).__name__}; name tars, or a folder that holds *.tar"
            ) from None
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
        raise FileNotFoundError("the folder holds no *.tar")
    return {str(one.absolute()): one.stat().st_size for one in paths}


def _remote_tars(address: str) -> dict[str, int]:
    filesystem, path = fsspec.url_to_fs(address)
    paths = [path] if path.endswith(".tar") else sorted(filesystem.glob(f"{path.rstrip('/')}/*.tar"))
    if not paths:
        raise FileNotFoundError("the folder holds no *.tar")
    return {str(filesystem.unstrip_protocol(one)): int(filesystem.size(one)) for one in paths}


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
            rows = _read_tar(place, tars[number][0], **options)
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

    with ThreadPoolExecutor(workers or len(os.sched_getaffinity(0)), "index") as pool:
        futures = [pool.submit(record, number) for number in range(len(tars))]
        try:
            wait(futures, return_when=FIRST_EXCEPTION)
        finally:
            pool.shutdown(cancel_futures=True)
    for future in futures:
        if not future.cancelled():
            future.result()


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


def _read_tar(place: str, name: str, *, label_key: str | None, on_error: str) -> _TarRows:
    """Index rows of one tar. Raises ShardError."""
    rows = _TarRows()
    address = join_address(place, name)
    where = redact(address)
    try:
        with fsspec.open(address if scheme_of(address) else str(local_path(address)), "rb") as stream:
            for key, files in _samples(stream, where, rows.unused):
                try:
                    _add_sample(rows, f"{name.removesuffix('.tar')}/{key}", files, label_key)
                except _SampleError as problem:
                    if on_error == "fail":
                        raise ShardError(
                            f"{where}: sample {printable(key)!r}: {problem}; mend the tar, or leave such samples out "
                            "with --on-error skip"
                        ) from None
                    rows.skipped.append({"name": f"{name}/{printable(key)}", "line": 0, "reason": str(problem)})
    except (tarfile.TarError, EOFError) as error:
        raise ShardError(f"{where}: not a plain tar ({error}); unpack it if compressed, or copy it again") from None
    except OSError as error:
        raise ShardError(
            f"{where}: cannot be read: {redact_text(str(error))}; check the store, then start again"
        ) from None
    return rows


_File = tuple[int, bytes]  # offset of the data in the tar, and the data


def _samples(stream: IO[bytes], where: str, unused: Counter[str]) -> Iterator[tuple[str, dict[str, _File]]]:
    """(key, {extension: file}) of each sample; members that belong to none are counted."""
    current: str | None = None
    files: dict[str, _File] = {}
    with tarfile.open(fileobj=stream, mode="r|") as archive:
        for member in archive:
            if not member.isfile() or _META.match(member.name):
                unused["no file" if not member.isfile() else "meta"] += not member.isdir()
                continue
            key, extension = base_plus_ext(member.name)
            if key is None or not extension:
                unused["no extension"] += 1
                continue
            if key != current:
                if current is not None:
                    yield current, files
                current, files = key, {}
            extension = extension.lower()
            if extension in files:
                raise ShardError(
                    f"{where}: sample {printable(key)!r} holds two members .{printable(extension)}; give each sample a "
                    "key of its own"
                )
            if not _is_used(extension):
                unused[extension.rpartition(".")[2]] += 1
                continue
            if member.issparse() or member.size > MAX_MEMBER_BYTES or member.offset_data % BLOCK_BYTES:
                raise ShardError(
                    f"{where}: {printable(member.name)!r} is sparse or larger than 4 GiB; store it plainly"
                )
            source = archive.extractfile(member)
            assert source is not None
            data = source.read()
            if len(data) != member.size:
                raise EOFError(f"it ends within {printable(member.name)!r}")
            files[extension] = member.offset_data, data
    if current is not None:
        yield current, files


def _is_used(extension: str) -> bool:
    return extension in _VIDEOS or extension in _LABELS or extension.rpartition(".")[2] in _IMAGES


def _add_sample(rows: _TarRows, name: str, files: dict[str, _File], label_key: str | None) -> None:
    """Raises _SampleError; then the rows are as before."""
    videos = [extension for extension in files if extension in _VIDEOS]
    frames = sorted((extension for extension in files if extension.rpartition(".")[2] in _IMAGES), key=_frame_number)
    if len(videos) > 1 or (videos and frames):
        some = ", ".join([*videos, *frames][:3])
        raise _SampleError(f"it holds {some}: one video can be used, or frames")
    if not videos and not frames:
        raise _SampleError(f"it holds no video and no image, only {', '.join(files) or 'members of no use'}")
    content = "video" if videos else "frames"
    if rows.content and content != rows.content:
        raise _SampleError(f"it holds {content}, those before it {rows.content}; a tar holds one kind")
    label = _label_of(files, label_key)
    used = videos or frames
    table = np.zeros(len(used), MEMBER_DTYPE)
    table["block"] = [files[extension][0] // BLOCK_BYTES for extension in used]
    table["size"] = [len(files[extension][1]) for extension in used]
    table["crc32"] = [isal_zlib.crc32(files[extension][1]) for extension in used]
    num_frames = _measure(table, used, files, content)
    encoded = name.encode("utf-8", "surrogateescape")
    # Rows and names are counted within the tar, and label and shard are open: `_publish` knows them.
    rows.videos.append(
        (
            rows.num_members,
            rows.num_name_bytes,
            len(encoded),
            len(table),
            num_frames,
            0,
            0,
            0,
            video_crc32(table),
            0,
        )
    )
    rows.members.append(table)
    rows.names.append(encoded)
    rows.labels.append(label)
    rows.content = content
    rows.num_members += len(table)
    rows.num_name_bytes += len(encoded)


def _frame_number(extension: str) -> tuple[int, str]:
    number = extension.rpartition(".")[0]
    return (int(number) if number.isdecimal() else -1, extension)


def _measure(table: np.ndarray, used: list[str], files: dict[str, _File], content: str) -> int:
    """Fills in the sizes in pixels. Returns the number of frames."""
    try:
        if content == "video":
            info = probe_video(files[used[0]][1])
            sizes, num_frames = [(info.width, info.height)], info.num_frames
        else:
            probe = ImageProbe()
            found = [probe(files[extension][1]) for extension in used]
            sizes, num_frames = [(image.width, image.height) for image in found], len(used)
    except (VideoError, ValueError) as error:
        raise _SampleError(f"it does not decode ({error})") from None
    if num_frames > MAX_FRAMES or max(max(size) for size in sizes) > _MAX_SIDE:
        raise _SampleError(f"{num_frames} frames of {sizes[0]} pixels are more than the format holds")
    table["width"], table["height"] = zip(*sizes, strict=True)
    return num_frames


def _label_of(files: dict[str, _File], label_key: str | None) -> int | str:
    """A class's number or name. Raises _SampleError."""
    if label_key is None and "cls" in files:
        return _number_or_name(_text(files["cls"][1]))
    if "json" in files:
        try:
            facts = json.loads(_text(files["json"][1]))
        except (ValueError, RecursionError) as error:
            raise _SampleError(f"its json cannot be read ({error})") from None
        for key in _JSON_KEYS if label_key is None else [label_key]:
            value = facts
            for part in key.split("."):
                value = value.get(part) if isinstance(value, dict) else None
            if isinstance(value, str):
                return _number_or_name(value)
            if type(value) is int:
                return value
    if label_key is None and "txt" in files:
        return _number_or_name(_text(files["txt"][1]))
    places = f"cls, txt and the keys {', '.join(_JSON_KEYS)} of json"
    if label_key is not None:
        places = f"the key {label_key!r} of its json"
    raise _SampleError(f"no label in {places}")


def _text(data: bytes) -> str:
    if len(data) > _MAX_LABEL_BYTES:
        raise _SampleError(f"a text of {len(data)} bytes is no label")
    try:
        return data.decode("utf-8-sig").strip()
    except UnicodeDecodeError:
        raise _SampleError("its label is no UTF-8") from None


def _number_or_name(text: str) -> int | str:
    if not text or CONTROL_CHARACTER.search(text):
        raise _SampleError(f"its label {printable(text[:40])!r} is no class")
    return int(text) if re.fullmatch(r"\d{1,9}", text, re.ASCII) else text


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
        if (isinstance(label, int) and label >= len(labels)) or (isinstance(label, str) and label not in known):
            raise ShardError(
                f"{where}/{printable(name)}: the label {label!r} is not in the class list of {len(labels)} names; add "
                "it, or correct --labels"
            )
    return list(labels)
