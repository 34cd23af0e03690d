"""The samples of tars that other programs wrote: which members belong together, and what index rows they give.

Keys and extensions are found by webdataset's own rule: the key of a member is its path up to the first dot of the base
name, the extension is what follows, in lower case; a sample is a run of members with one key. Members that are used:

    KEY.mp4 (avi, mkv, webm, mov ...)           one stored video, or
    KEY.jpg, KEY.000.jpg KEY.001.jpg ...        frames (jpg, png, webp, bmp), in the order of their numbers; what comes
                                                before the number, as in KEY.img_1.jpg, is the same for all
    KEY.cls, KEY.json or KEY.txt                the label: a number or a class name
"""

from __future__ import annotations

import json
import re
import tarfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import IO, Any

import numpy as np
from isal import isal_zlib

from shards.format import (
    BLOCK_BYTES,
    CONTROL_CHARACTER,
    MAX_FRAMES,
    MAX_MEMBER_BYTES,
    MEMBER_DTYPE,
    ShardError,
    video_crc32,
)
from shards.images import ImageProbe
from shards.text import printable
from shards.video import VideoError, probe_video

_IMAGES = {"jpg", "jpeg", "png", "webp", "bmp"}
_VIDEOS = {
    *("mp4", "m4v", "mov", "avi", "mkv", "webm", "mpg", "mpeg", "wmv", "flv", "f4v", "3gp", "ts", "mts", "m2ts"),
    *("ogv", "vob", "asf", "gif"),
}
_LABELS = ("cls", "json", "txt")
_JSON_KEYS = ("label", "class", "cls", "category")
_SEVERAL = "but a sample of such tars takes one: unpack them and build shards from a list with several labels a video"
# webdataset passes over such members too.
_META = re.compile(r"__[^/]*__($|/)")
_HALF_LETTER = re.compile("[\ud800-\udfff]")  # JSON can write one, UTF-8 cannot
_MAX_SIDE = 65_535
_MAX_LABEL_BYTES = 16 << 20


@dataclass
class TarRows:
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


def read_tar(stream: IO[bytes], where: str, name: str, *, label_key: str | None, on_error: str) -> TarRows:
    """Index rows of one tar, read from its beginning. where: its address, for errors. Raises ShardError, OSError."""
    rows = TarRows()
    keys: set[str] = set()
    try:
        for key, files in _samples(stream, where, rows.unused):
            try:
                if key in keys:
                    raise _SampleError("it comes a second time; the members of a key must follow one another")
                keys.add(key)
                _add_sample(rows, f"{name.removesuffix('.tar')}/{key}", files, label_key)
            except _SampleError as problem:
                if on_error == "fail":
                    raise ShardError(
                        f"{where}: sample {printable(key)!r}: {problem}; fix the tar, or leave such samples out "
                        "with --on-error skip"
                    ) from None
                rows.skipped.append({"name": f"{name}/{printable(key)}", "line": 0, "reason": str(problem)})
    except (tarfile.TarError, EOFError) as error:
        raise ShardError(
            f"{where}: not a plain tar ({error}); unpack it if compressed, copy it again, or pack its files anew"
        ) from None
    return rows


_File = tuple[int, bytes]  # offset of the data in the tar, and the data


def _samples(stream: IO[bytes], where: str, unused: Counter[str]) -> Iterator[tuple[str, dict[str, _File]]]:
    """(key, {extension: file}) of each sample; members that belong to none are counted."""
    from webdataset.tariterators import base_plus_ext  # loads torch

    current: str | None = None
    files: dict[str, _File] = {}
    with tarfile.open(fileobj=stream, mode="r|") as archive:
        for member in archive:
            if not member.isfile() or _META.match(member.name):
                kind = "meta" if member.isfile() else "link" if member.islnk() or member.issym() else "no file"
                unused[kind] += not member.isdir()
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
        _check_end(archive)
    if current is not None:
        yield current, files


def _check_end(archive: tarfile.TarFile) -> None:
    """Raises tarfile.ReadError if more follows: tarfile takes a damaged header, and the end of a first tar, for the
    end of all."""
    assert archive.fileobj is not None
    while rest := archive.fileobj.read(1 << 20):
        if rest.strip(b"\0"):
            raise tarfile.ReadError("more data follows where its members end: a header is damaged, or tars were joined")


def _is_used(extension: str) -> bool:
    return extension in _VIDEOS or extension in _LABELS or extension.rpartition(".")[2] in _IMAGES


def _add_sample(rows: TarRows, name: str, files: dict[str, _File], label_key: str | None) -> None:
    """Adds the rows of a sample. Raises _SampleError, and then adds none."""
    videos = [extension for extension in files if extension in _VIDEOS]
    frames = [extension for extension in files if extension.rpartition(".")[2] in _IMAGES]
    if len(videos) > 1 or (videos and frames):
        some = ", ".join([*videos, *frames][:3])
        raise _SampleError(f"it holds {some}: one video can be used, or frames")
    if not videos and not frames:
        raise _SampleError(
            f"it holds no video and no image, only {', '.join(files) or 'unused members'}; a key ends at the first dot "
            "of the name, and KEY.mp4, KEY.jpg or KEY.0.jpg are used"
        )
    frames = _in_order(frames)
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
    # Rows and names are counted within the tar; `_publish` makes them global and sets the label and the shard.
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


def _in_order(frames: list[str]) -> list[str]:
    """Extensions of a sample's images by their numbers; a single one needs none. Raises _SampleError."""
    if len(frames) < 2:
        return frames
    found: dict[tuple[int, str], str] = {}
    names = [extension.rpartition(".")[0] for extension in frames]
    before = names[0].rstrip("0123456789")
    for name, extension in zip(names, frames, strict=True):
        number = name.removeprefix(before)
        if not (name.startswith(before) and number.isascii() and number.isdecimal()):
            other = frames[0] if extension != frames[0] else frames[1]
            raise _SampleError(
                f"its images .{printable(other)} and .{printable(extension)} are not numbered as frames of one video, "
                ".0.jpg, .1.jpg and so on"
            )
        number = number.lstrip("0")
        other = found.setdefault((len(number), number), extension)
        if other != extension:
            raise _SampleError(f"its images .{printable(other)} and .{printable(extension)} have the same number")
    return [found[number] for number in sorted(found)]


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
            if isinstance(value, list):
                raise _SampleError(f"{key!r} of its json is a list, {_SEVERAL}")
            if isinstance(value, (bool, float)):
                raise _SampleError(f"{key!r} of its json is {json.dumps(value)}, no whole number and no class name")
        if label_key is None and isinstance(facts, dict) and isinstance(facts.get("labels"), list):
            raise _SampleError(f"'labels' of its json is a list, {_SEVERAL}")
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
    if not text or CONTROL_CHARACTER.search(text) or _HALF_LETTER.search(text):
        raise _SampleError(f"its label {printable(text[:40])!r} is no class")
    if re.fullmatch(r"\d+(,\d+)+", text, re.ASCII):
        raise _SampleError(f"its label {printable(text[:40])!r} stands for several classes, {_SEVERAL}")
    return int(text) if re.fullmatch(r"\d{1,9}", text, re.ASCII) else text
