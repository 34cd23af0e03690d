"""Proves a data set sound: manifest, index and tars agree to the last byte, and no video is in two data sets."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
from isal import isal_zlib

from shards.address import local_path, scheme_of
from shards.building import FOLDER
from shards.format import (
    BLOCK_BYTES,
    Manifest,
    ShardError,
    frame_suffix,
    padding,
    tar_header,
    video_crc32,
    video_key,
)
from shards.images import check_decodes, probe_image
from shards.index import Index, check_crc32, open_index, read_local_manifest
from shards.local import pread_exactly
from shards.shardfile import label_facts
from shards.similar import hash_videos, similar_pairs
from shards.text import printable, redact
from shards.video import probe_video

# A rank that sees fewer videos an epoch than two batches of 32 spends its time in start-up and evaluation.
VIDEOS_PER_RANK = 64
_VIDEO_EXTENSIONS = ("mp4", "avi", "mkv", "webm")
_MAX_PROBLEMS = 1000
_BATCH_VIDEOS = 256


@dataclass
class DatasetReport:
    """What was found in one data set. problems make it unsound, warnings do not; each is one line."""

    path: str
    problems: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    statistics: dict[str, Any] = field(default_factory=dict)


@dataclass
class Report:
    """The result for data sets that were checked together. leaks: videos that are in more than one of them.

    similar: videos of two data sets that look like one recording; only a warning, because looks may deceive.
    """

    datasets: list[DatasetReport]
    leaks: list[str]
    similar: list[str] = field(default_factory=list)

    @property
    def sound(self) -> bool:
        """Whether no data set has a problem and no video is in two of them."""
        return not self.leaks and not any(dataset.problems for dataset in self.datasets)

    def to_json(self) -> str:
        """The report as JSON, with `sound` first."""
        return json.dumps({"sound": self.sound, **asdict(self)}, ensure_ascii=False, indent=1) + "\n"


def check_datasets(
    paths: Sequence[str | Path],
    *,
    labels: Sequence[str] | None = None,
    deep: bool = False,
    similar: bool = False,
    workers: int | None = None,
    progress: Callable[[int], object] | None = None,
) -> Report:
    """Checks the data sets in local folders, each by itself and all against each other.

    Every byte is read: headers, checksums, JSON members and image headers. labels: the class names that the data sets
    must have. deep: also decode every frame. similar: also look for the same recording in two data sets, see
    `shards.similar`. progress: called with the number of videos done since its last call.
    """
    workers = workers or len(os.sched_getaffinity(0))
    progress = progress or (lambda videos: None)
    reports, opened = [], []
    for path in paths:
        report = DatasetReport(str(path))
        reports.append(report)
        try:
            index = _open(Path(path), report)
        except ShardError as error:
            report.problems.append(str(error))
            continue
        opened.append((str(path), index))
        report.statistics = _statistics(index)
        place = _place_of_tars(Path(path), index.manifest)
        _check_classes(index, labels, report)
        _check_layout(index, report)
        if place is None:
            report.warnings.append(f"{path}: the tars lie at {redact(index.manifest.tars or '')}; they were not read")
        else:
            _check_folder(Path(path), place, index.manifest, report)
            _check_members(place, index, report, deep=deep, workers=workers, progress=progress)
        _check_duplicates(index, report)
    return Report(reports, _leaks(opened), _similar(opened, workers, progress) if similar else [])


def _open(path: Path, report: DatasetReport) -> Index:
    manifest = read_local_manifest(path)
    files = {role: path / entry["file"] for role, entry in manifest.index.items()}
    index = open_index(str(path), manifest, files)
    for role in index.large_tables:
        try:
            check_crc32(files[role], manifest.index[role]["crc32"])
        except ShardError as error:
            report.problems.append(str(error))
    return index


def _place_of_tars(path: Path, manifest: Manifest) -> Path | None:
    """The local folder that the tars lie in, None if they lie elsewhere."""
    if manifest.tars in (None, "."):
        return path
    return local_path(manifest.tars) if scheme_of(manifest.tars) is None else None


def _check_folder(path: Path, place: Path, manifest: Manifest, report: DatasetReport) -> None:
    expected = {shard.name: shard.bytes for shard in manifest.shards}
    for name, size in expected.items():
        try:
            found = (place / name).stat().st_size
        except OSError:
            report.problems.append(f"{place / name}: missing; copy it again")
            continue
        if found != size:
            report.problems.append(f"{place / name}: has {found} bytes, the manifest says {size}; copy it again")
    unfinished = (path / FOLDER).exists()
    if unfinished:
        report.warnings.append(f"{path / FOLDER}: an unfinished build; run it again or delete it")
    extra = {file.name for file in path.glob("*.tar")} - set(expected) if manifest.tars is None else set()
    for name in sorted(extra):
        line = f"{path / name}: not in the manifest; delete it, or finish the --append that wrote it"
        (report.warnings if unfinished else report.problems).append(line)


def _check_classes(index: Index, labels: Sequence[str] | None, report: DatasetReport) -> None:
    classes = index.manifest.classes
    if labels is not None and list(labels) != classes:
        pairs = enumerate(zip(labels, classes, strict=False))
        moved = [number for number, (name, stored) in pairs if name != stored and name in classes]
        what = None
        if len(labels) != len(classes):
            what = f"{len(classes)} classes, the class list has {len(labels)}"
        elif moved:
            name = labels[moved[0]]
            what = f"class {classes.index(name)} as {name!r}, in the class list it is {moved[0]}"
        if what:
            report.problems.append(f"{index.where}: has {what}; give the class list it was built with, or rebuild")
        else:
            new = [f"{old!r} to {name!r}" for old, name in zip(classes, labels, strict=True) if old != name]
            some = ", ".join(new[:5]) + (", …" if len(new) > 5 else "")
            report.warnings.append(f"{index.where}: the class list rewords {len(new)} of {len(classes)} names: {some}")
    empty = np.flatnonzero(np.bincount(index.labels, minlength=len(classes)) == 0).tolist()
    if empty:
        names = ", ".join(repr(classes[number]) for number in empty[:5]) + (", …" if len(empty) > 5 else "")
        report.warnings.append(f"{index.where}: {len(empty)} of {len(classes)} classes have no video: {names}")


def _check_layout(index: Index, report: DatasetReport) -> None:
    """The rows of the index follow each other without gaps."""
    videos = index.videos
    for column, size in (("first_member", "num_members"), ("name_start", "name_size")):
        expected = np.concatenate([[0], np.cumsum(videos[size].astype(np.uint64))])[:-1]
        wrong = np.flatnonzero(videos[column] != expected)
        if len(wrong):
            report.problems.append(f"{index.where}: index row {wrong[0]}: {column} leaves a gap or overlaps; rebuild")
    counts = np.bincount(videos["shard"], minlength=len(index.manifest.shards))
    members = np.bincount(videos["shard"], videos["num_members"], minlength=len(index.manifest.shards))
    if (np.diff(videos["shard"].astype(np.int64)) < 0).any():
        report.problems.append(f"{index.where}: the index is not in the order of the shards; rebuild")
    for number, shard in enumerate(index.manifest.shards):
        if counts[number] != shard.videos or members[number] != shard.members:
            report.problems.append(
                f"{index.where}: the index has {counts[number]} videos and {int(members[number])} members in "
                f"{shard.name}, the manifest {shard.videos} and {shard.members}; rebuild"
            )


def _check_members(
    path: Path, index: Index, report: DatasetReport, *, deep: bool, workers: int, progress: Callable[[int], object]
) -> None:
    """Walks every tar along its index rows; they must cover it from the first byte to the last."""
    videos = index.videos
    for number, shard in enumerate(index.manifest.shards):
        first, last = np.searchsorted(videos["shard"], [number, number + 1]).tolist()
        try:
            file = os.open(path / shard.name, os.O_RDONLY)
        except OSError:
            continue  # `_check_folder` has reported it
        try:
            walk = _TarWalk(file, f"{path / shard.name}", index, deep)
            with ThreadPoolExecutor(workers) as pool:
                for start in range(first, last, _BATCH_VIDEOS):
                    batch = range(start, min(start + _BATCH_VIDEOS, last))
                    for problems in pool.map(walk.check_video, batch):
                        report.problems += problems[: _MAX_PROBLEMS - len(report.problems)]
                    progress(len(batch))
            if index.manifest.tars is not None:
                continue  # what others wrote may hold more than the index uses, in their own headers
            end = walk.end_of(last - 1) if last > first else 0
            trailer = os.pread(file, 2 * BLOCK_BYTES + 1, end)
            if trailer != bytes(2 * BLOCK_BYTES):
                report.problems.append(
                    f"{path / shard.name}: at byte {end}, behind the last video of the index, is no end of archive; "
                    "the tar holds members that the index lacks, or is cut off: rebuild"
                )
        finally:
            os.close(file)


class _TarWalk:
    """Compares the videos of one tar with their index rows."""

    def __init__(self, file: int, where: str, index: Index, deep: bool) -> None:
        self.file = file
        self.bytes = os.fstat(file).st_size
        self.where = where
        self.index = index
        self.label_counts = index.label_counts
        self.label_ends = np.cumsum(self.label_counts)
        self.deep = deep

    def end_of(self, video: int) -> int:
        """First byte behind a video."""
        row = self.index.videos[video]
        last = self.index.members[int(row["first_member"]) + int(row["num_members"]) - 1]
        size = int(last["size"])
        return int(last["block"]) * BLOCK_BYTES + size + padding(size)

    def check_video(self, video: int) -> list[str]:
        """One line for each problem."""
        found = self._problems(video) if self.index.manifest.tars is None else self._problems_of_data(video)
        return [f"{self.where}: {problem}; copy the shard again or rebuild" for problem in found]

    def _problems_of_data(self, video: int) -> Iterator[str]:
        """Problems in a tar that others wrote: only the bytes that the index uses are checked."""
        row = self.index.videos[video]
        members = self.index.member_rows(video, np.arange(int(row["num_members"])))
        for number, (block, size, *facts) in enumerate(members.tolist()):
            what = f"frame {number}" if self.index.manifest.content == "frames" else "the video"
            name = f"{printable(self.index.name(video))}, {what}"
            data = pread_exactly(self.file, block * BLOCK_BYTES, block * BLOCK_BYTES + size)
            yield from self._data_problems(name, data, tuple(facts), int(row["num_frames"]))

    def _problems(self, video: int) -> Iterator[str]:
        row = self.index.videos[video]
        key = video_key(video)
        first_of_shard = video == 0 or self.index.videos["shard"][video - 1] != row["shard"]
        position = 0 if first_of_shard else self.end_of(video - 1)
        json_block, json_size = int(row["json_block"]), int(row["json_size"])
        text = yield from self._member(position, f"{key}.json", json_block, json_size)
        position = json_block * BLOCK_BYTES + json_size + padding(json_size)
        members = self.index.member_rows(video, np.arange(int(row["num_members"])))
        if video_crc32(members) != row["crc32"]:
            yield f"{key}: the video's checksum in the index does not fit its members'"
        if text is not None:
            yield from self._json_problems(video, key, text, members)
        for number, (block, size, crc32, width, height) in enumerate(members.tolist()):
            name = self._name(position, key, number)
            data = yield from self._member(position, name, block, size)
            position = block * BLOCK_BYTES + size + padding(size)
            if data is not None:
                yield from self._data_problems(name, data, (crc32, width, height), int(row["num_frames"]))

    def _name(self, position: int, key: str, number: int) -> str:
        """The name that a member should have: its extension is the tar's own, if it is one that we write."""
        raw = os.pread(self.file, 100, position).split(b"\0", 1)[0]
        extension = raw.rpartition(b".")[2].decode("ascii", "replace")
        if self.index.manifest.content == "video":
            return f"{key}.{extension if extension in _VIDEO_EXTENSIONS else 'mp4'}"
        return f"{key}.{frame_suffix(number, extension if extension in ('jpg', 'png', 'webp', 'bmp') else 'jpg')}"

    def _member(self, position: int, name: str, block: int, size: int) -> Generator[str, None, bytes | None]:
        """Yields problems and returns the member's data, None if it is not where the index says."""
        if position + BLOCK_BYTES != block * BLOCK_BYTES:
            yield f"{name}: the index places it at byte {block * BLOCK_BYTES}, it follows at {position + BLOCK_BYTES}"
            return None
        length = BLOCK_BYTES + size + padding(size)
        data = b"" if position + length > self.bytes else os.pread(self.file, length, position)
        while data and len(data) < length and (more := os.pread(self.file, length - len(data), position + len(data))):
            data += more
        if len(data) != length:
            yield f"{name}: the tar ends before it does"
            return None
        if data[:BLOCK_BYTES] != tar_header(name, size):
            yield f"{name}: at byte {position} is the header of another member, or a damaged one"
            return None
        if any(data[BLOCK_BYTES + size :]):
            yield f"{name}: the filling behind it is not zero"
        return data[BLOCK_BYTES : BLOCK_BYTES + size]

    def _json_problems(self, video: int, key: str, text: bytes, members: np.ndarray) -> Iterator[str]:
        row, manifest = self.index.videos[video], self.index.manifest
        labels = self.index.labels[self.label_ends[video] - self.label_counts[video] : self.label_ends[video]].tolist()
        expected: dict[str, Any] = {
            "name": self.index.name(video),
            **label_facts(labels, manifest.classes, manifest.multi_label),
            "num_frames": int(row["num_frames"]),
        }
        for side in ("width", "height"):
            values = members[side]
            expected[side] = int(values[0]) if (values == values[0]).all() else None
        try:
            content = json.loads(text)
            different = [name for name, value in expected.items() if content[name] != value]
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            yield f"{key}.json: not the JSON of a video ({type(error).__name__}: {error})"
            return
        for name in different:
            yield f"{key}.json: {name} is {content[name]!r}, the index says {expected[name]!r}"

    def _data_problems(self, name: str, data: bytes, row: tuple[int, int, int], num_frames: int) -> Iterator[str]:
        crc32, width, height = row
        if isal_zlib.crc32(data) != crc32:
            yield f"{name}: its bytes have another checksum than the index"
            return
        try:
            if self.index.manifest.content == "frames":
                info = probe_image(data)
                ours = self.index.manifest.tars is None
                if (info.width, info.height) != (width, height) or (ours and not name.endswith(info.extension)):
                    yield f"{name}: a {info.extension} of {info.width}x{info.height}, not {width}x{height} as indexed"
                if self.deep:
                    check_decodes(data)
            elif self.deep:
                found = probe_video(data)
                if (found.num_frames, found.width, found.height) != (num_frames, width, height):
                    yield (
                        f"{name}: decodes to {found.num_frames} frames of {found.width}x{found.height}, the index says "
                        f"{num_frames} of {width}x{height}"
                    )
        except ValueError as error:
            yield f"{name}: {error}"


def _statistics(index: Index) -> dict[str, Any]:
    manifest, videos, members = index.manifest, index.videos, index.members
    frames = videos["num_frames"]
    per_class = np.bincount(index.labels, minlength=len(manifest.classes))
    short_sides = np.minimum(members["width"], members["height"])
    return {
        "fingerprint": manifest.fingerprint,
        "content": manifest.content,
        "videos": manifest.num_videos,
        "frames": int(frames.sum(dtype=np.int64)),
        "shards": len(manifest.shards),
        "bytes": sum(shard.bytes for shard in manifest.shards),
        "frames_per_video": _spread(frames),
        "member_bytes": _spread(members["size"]),
        "short_side": _spread(short_sides),
        "classes": len(manifest.classes),
        "empty_classes": int((per_class == 0).sum()),
        "videos_per_class": _spread(per_class),
        **({"labels_per_video": _spread(index.label_counts)} if manifest.multi_label else {}),
        "skipped": len(manifest.skipped),
        "well_fed_ranks": max(1, manifest.num_videos // VIDEOS_PER_RANK),
        "videos_per_rank_of_8": manifest.num_videos // 8,
    }


def _spread(values: np.ndarray) -> dict[str, int]:
    return {"min": int(values.min()), "median": int(np.median(values)), "max": int(values.max())}


def _identities(index: Index) -> tuple[list[str], list[tuple[int, int, int]]]:
    """The name of each video, and what identifies its content: checksum, number of frames, bytes."""
    videos = index.videos
    sizes = np.concatenate([[0], np.cumsum(index.members["size"], dtype=np.int64)])
    first = videos["first_member"].astype(np.int64)
    total = sizes[first + videos["num_members"]] - sizes[first]
    names = [index.name(video) for video in range(len(videos))]
    return names, list(zip(videos["crc32"].tolist(), videos["num_frames"].tolist(), total.tolist(), strict=True))


def _check_duplicates(index: Index, report: DatasetReport) -> None:
    names, contents = _identities(index)
    seen_names: set[str] = set()
    seen_contents: dict[tuple[int, int, int], str] = {}
    for name, content in zip(names, contents, strict=True):
        if name in seen_names:
            report.problems.append(f"{index.where}: {name!r} is in the data set twice; rebuild from a corrected list")
        elif content in seen_contents:
            report.warnings.append(f"{index.where}: {name!r} has the same content as {seen_contents[content]!r}")
        seen_names.add(name)
        seen_contents.setdefault(content, name)


def _leaks(opened: list[tuple[str, Index]]) -> list[str]:
    """Videos of a data set that an earlier one holds too, by name or by content."""
    leaks: list[str] = []
    owner_of_name: dict[str, str] = {}
    owner_of_content: dict[tuple[int, int, int], tuple[str, str]] = {}
    for path, index in opened:
        names, contents = _identities(index)
        for name, content in zip(names, contents, strict=True):
            if name in owner_of_name:
                leaks.append(f"{path}: {name!r} is in {owner_of_name[name]} too; keep it in one of the two")
            elif content in owner_of_content:
                other, twin = owner_of_content[content]
                leaks.append(f"{path}: {name!r} has the content of {twin!r} in {other}; keep it in one of the two")
        owner_of_name.update((name, path) for name in names if name not in owner_of_name)
        for name, content in zip(names, contents, strict=True):
            owner_of_content.setdefault(content, (path, name))
    return leaks


def _similar(opened: list[tuple[str, Index]], workers: int, progress: Callable[[int], object]) -> list[str]:
    """Videos of two data sets that look like one recording, except those that `_leaks` finds."""
    opened = [(path, index) for path, index in opened if _place_of_tars(Path(path), index.manifest) is not None]
    hashes = [
        hash_videos(index, place, workers=workers, progress=progress)
        for path, index in opened
        if (place := _place_of_tars(Path(path), index.manifest)) is not None
    ]
    identities = [_identities(index) for _, index in opened]
    lines: list[str] = []
    for one, other in combinations(range(len(opened)), 2):
        (names, contents), (other_names, other_contents) = identities[one], identities[other]
        for pair in similar_pairs(hashes[one], hashes[other]):
            name, twin = other_names[pair.second], names[pair.first]
            if name != twin and other_contents[pair.second] != contents[pair.first]:
                lines.append(
                    f"{opened[other][0]}: {name!r} looks like {twin!r} in {opened[one][0]}: {pair.share:.0%} of the "
                    "frames of one match the other; look at both, and keep one recording in one data set"
                )
    return lines
