"""Annotations of the field's data sets, read as they are distributed, and the videos that belong to them.

kinetics      train.csv, val.csv, test.csv: label,youtube_id,time_start,time_end,…; videos ID_START_END.*
ucf101        classInd.txt, trainlist0N.txt (labels from 1), testlist0N.txt (no labels); videos CLASS/v_….avi
hmdb51        CLASS_test_splitN.txt: `video.avi 1`, 1 for training, 2 for testing, 0 for neither
activitynet   activity_net*.json: subsets, labels and some misspelled classes; videos v_ID.* or ID.*
"""

from __future__ import annotations

import csv
import json
import re
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from pathlib import Path, PurePosixPath

from shards.annotations import parse_labels
from shards.format import ShardError
from shards.list_lines import is_video_file
from shards.walk import list_files

_KINETICS_SPLITS = {"train": "train", "val": "val", "validate": "val", "validation": "val", "test": "test"}
_KINETICS_COLUMNS = ("label", "youtube_id", "time_start", "time_end")
_ACTIVITYNET_SPLITS = {"training": "train", "validation": "val"}
# Names in the files of the data sets, and as the class lists spell them.
_SPELLED = {
    "moopingfloor": "moppingfloor", "plataformdiving": "platformdiving", "playingflauta": "playingflute",
    "playingguitarra": "playingguitar", "polishingforniture": "polishingfurniture",
}  # fmt: skip


@dataclass(frozen=True)
class Entry:
    """One video of an annotation file. keys: names that its file may have, without ending, the likeliest first."""

    keys: tuple[str, ...]
    label: int


@dataclass
class Official:
    """names: classes by id. splits: train, val, test as far as they are there. notices: what was passed over."""

    names: list[str]
    splits: dict[str, list[Entry]]
    notices: list[str] = field(default_factory=list)


@dataclass
class Matched:
    """videos: path below the root and label, in the order of the annotations. missing: the likeliest name of each."""

    videos: list[tuple[str, int]]
    missing: list[str]


def read_kinetics(folder: Path, labels: Path | None, _split: int) -> Official:
    """labels: the class list; without one (Kinetics-700) classes are numbered in the order of their names."""
    files: dict[str, Path] = {}
    for path in _files(folder, ".csv"):
        match = re.fullmatch(r"(?:kinetics?[-_]?\d*[-_])?([a-z]+)", path.stem.lower())
        split = _KINETICS_SPLITS.get(match[1]) if match else None
        if split and split in files:
            raise ShardError(f"{path}: {files[split]} lists {split} too; name the folder of one data set's files")
        if split:
            files[split] = path
    if not files:
        raise ShardError(f"{folder}: holds none of train.csv, val.csv and test.csv of Kinetics; name their folder")
    rows = {split: list(_kinetics_rows(files[split])) for split in ("train", "val", "test") if split in files}
    official = Official([], {})
    if labels is None:
        official.names = sorted({row["label"] for split in rows.values() for _, row in split if row["label"]})
    else:
        official.names = parse_labels(labels)
    label_of = _label_finder(official.names)
    for split, of_split in rows.items():
        named = [(where, row) for where, row in of_split if row["label"]]
        if len(named) < len(of_split):
            official.notices.append(f"{files[split]}: {len(of_split) - len(named)} rows without a label are left out")
        if named:
            official.splits[split] = [
                Entry(_kinetics_keys(row, where), label_of(row["label"], where)) for where, row in named
            ]
    return official


def _kinetics_rows(path: Path) -> Iterator[tuple[str, dict[str, str]]]:
    reader = csv.DictReader(_text(path).splitlines())
    if missing := [column for column in _KINETICS_COLUMNS if column not in (reader.fieldnames or ())]:
        raise ShardError(f"{path}:1: no column {missing[0]!r}; expected the header {','.join(_KINETICS_COLUMNS)},…")
    for row in reader:
        yield f"{path}:{reader.line_num}", {column: (row[column] or "").strip() for column in _KINETICS_COLUMNS}


def _kinetics_keys(row: dict[str, str], where: str) -> tuple[str, ...]:
    try:
        start, end = (int(float(row[column])) for column in ("time_start", "time_end"))
    except ValueError:
        raise ShardError(f"{where}: the times are {row['time_start']!r} and {row['time_end']!r}, no numbers") from None
    return (f"{row['youtube_id']}_{start:06d}_{end:06d}", f"{row['youtube_id']}_{start}_{end}")


def read_ucf101(folder: Path, labels: Path | None, split: int) -> Official:
    """The official split 1, 2 or 3; its test list is val."""
    files = {path.name.lower(): path for path in _files(folder, ".txt")}
    wanted = ("classInd.txt", f"trainlist{split:02d}.txt", f"testlist{split:02d}.txt")
    index, train, test = (_required(folder, name, files.get(name.lower())) for name in wanted)
    ids: dict[str, int] = {}
    for where, line in _lines(index):
        match = re.fullmatch(r"(\d+)\s+(\S+)", line)
        if match is None:
            raise ShardError(f"{where}: {line!r}; expected `1 ApplyEyeMakeup`")
        ids[match[2].lower()] = int(match[1]) - 1
    names = parse_labels(labels) if labels else sorted(ids, key=lambda name: ids[name])
    if sorted(ids.values()) != list(range(len(names))):
        raise ShardError(
            f"{index}: the classes are not numbered 1 to {len(names)}, as the class list {labels} has them"
        )
    official = Official(names, {"train": [], "val": []})
    for role, path in (("train", train), ("val", test)):
        for where, line in _lines(path):
            match = re.fullmatch(r"(\S+?)/(\S+?)(?:\s+(\d+))?", line)
            if match is None or match[1].lower() not in ids:
                raise ShardError(f"{where}: {line!r} names no class of {index.name}; expected `CLASS/video.avi 1`")
            label = ids[match[1].lower()]
            if match[3] and int(match[3]) - 1 != label:
                raise ShardError(f"{where}: {line!r}: {match[1]} has the number {label + 1} in {index.name}")
            official.splits[role].append(Entry((f"{match[1]}/{_stem(match[2])}", _stem(match[2])), label))
    return official


def read_hmdb51(folder: Path, labels: Path | None, split: int) -> Official:
    """The official split 1, 2 or 3; its test videos are val. Classes are numbered in the order of their names."""
    ending = f"_test_split{split}.txt"
    files = {path.name[: -len(ending)]: path for path in _files(folder, ".txt") if path.name.endswith(ending)}
    folders = sorted(files)
    names = parse_labels(labels) if labels else folders
    if len(folders) != len(names):
        raise ShardError(
            f"{folder}: holds {len(folders)} files CLASS{ending}, the class list has {len(names)} classes; unpack "
            "test_train_splits and name its folder"
        )
    label_of = _label_finder(names)
    official = Official(names, {"train": [], "val": []})
    for name in folders:
        for where, line in _lines(files[name]):
            match = re.fullmatch(r"(.+?)\s+([012])", line)
            if match is None:
                raise ShardError(f"{where}: {line!r}; expected `video.avi 1`, with 0, 1 or 2")
            role = {"1": "train", "2": "val"}.get(match[2])
            if role:
                entry = Entry((f"{name}/{_stem(match[1])}",), label_of(name, str(files[name])))
                official.splits[role].append(entry)
    return official


def read_activitynet(folder: Path, labels: Path | None, _split: int) -> Official:
    """A video has one class here, that of its first annotation. The subset `testing` has no labels."""
    files = [path for path in _files(folder, ".json") if path.name.lower().startswith("activity_net")]
    path = _required(folder, "activity_net.v1-3.min.json", files[0] if files else None)
    try:
        videos = json.loads(_text(path))["database"]
        rows = [(name, video["subset"], video["annotations"]) for name, video in videos.items()]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ShardError(
            f"{path}: not ActivityNet's JSON ({type(error).__name__}: {error}); download it again"
        ) from None
    every = sorted({annotation["label"] for _, _, annotations in rows for annotation in annotations})
    official = Official(parse_labels(labels) if labels else every, {"train": [], "val": []})
    label_of = _label_finder(official.names)
    without = several = 0
    for name, subset, found in rows:
        role = _ACTIVITYNET_SPLITS.get(subset)
        if role and found:
            several += len({one["label"] for one in found}) > 1
            label = label_of(found[0]["label"], f"{path}: {name}")
            official.splits[role].append(Entry((f"v_{name}", name), label))
        without += bool(role) and not found
    if without:
        official.notices.append(f"{path}: {without} videos without an annotation are left out")
    if several:
        official.notices.append(
            f"{path}: {several} videos have several classes, and get that of their first annotation"
        )
    return official


Reader = Callable[[Path, Path | None, int], Official]
# Data set: its reader, and its class list below configs/classes, if there is one.
DATASETS: dict[str, tuple[Reader, str | None]] = {
    "kinetics400": (read_kinetics, "kinetics_400.csv"),
    "kinetics600": (read_kinetics, "kinetics_600.csv"),
    "kinetics700": (read_kinetics, None),
    "ucf101": (read_ucf101, "ucf101.csv"),
    "hmdb51": (read_hmdb51, "hmdb51.csv"),
    "activitynet": (read_activitynet, "activitynet200.csv"),
}


class VideoFiles:
    """The video files below a folder, by name without ending and by class folder and name; letters' case is ignored."""

    def __init__(self, root: Path) -> None:
        self.root = root
        listing = list_files(root)
        self.left_out = listing.left_out
        self._by_key: dict[str, list[str]] = defaultdict(list)
        for path in listing.files:
            if not is_video_file(path):
                continue
            if (root / path).stat().st_size == 0:
                self.left_out["empty"].append(path)
                continue
            place = PurePosixPath(path)
            stem = _stem(place.name).lower()
            self._by_key[stem].append(path)
            self._by_key[f"{place.parent.name.lower()}/{stem}"].append(path)

    def find(self, entry: Entry, split: str) -> str | None:
        """The entry's file; of several, one in a folder that is named like the split, else the first."""
        for key in entry.keys:
            if found := self._by_key.get(key.lower()):
                named = (path for path in found if any(part.lower().startswith(split) for part in path.split("/")))
                return next(named, found[0])
        return None


def match_videos(official: Official, files: VideoFiles) -> dict[str, Matched]:
    """The videos of each split that are there. A file belongs to the first split that names it. Raises ShardError."""
    owner: dict[str, str] = {}
    matched: dict[str, Matched] = {}
    for split, entries in official.splits.items():
        matched[split] = Matched([], [])
        again = 0
        for entry in entries:
            path = files.find(entry, split)
            if path is None:
                matched[split].missing.append(entry.keys[0])
            elif path in owner:
                again += 1
            else:
                owner[path] = split
                matched[split].videos.append((path, entry.label))
        if again:
            official.notices.append(f"{again} entries of {split} name a video that is listed before, and are left out")
    if not owner:
        example = next(entry.keys[0] for entries in official.splits.values() for entry in entries)
        raise ShardError(f"{files.root}: holds none of the videos; expected e.g. {example}.mp4, in any sub-folder")
    return matched


def _label_finder(names: Sequence[str]) -> Callable[[str, str], int]:
    """Class number by a name that may differ in case, spaces, underscores and known misspellings."""
    numbers = {_plain(name): number for number, name in enumerate(names)}

    def find(name: str, where: str) -> int:
        plain = _plain(name)
        number = numbers.get(_SPELLED.get(plain, plain))
        if number is None:
            close = get_close_matches(plain, numbers, 1)
            meant = f"; the nearest is {names[numbers[close[0]]]!r}" if close else ""
            raise ShardError(f"{where}: the class {name!r} is not in the class list{meant}")
        return number

    return find


def _plain(name: str) -> str:
    return re.sub(r"[\W_]+", "", name.lower())


def _stem(name: str) -> str:
    """A file's name without the ending of a video."""
    return name[: name.rindex(".")] if is_video_file(name) else name


def _files(folder: Path, ending: str) -> list[Path]:
    if folder.is_file():
        return [folder]
    if not folder.is_dir():
        raise ShardError(f"{folder}: no such folder; give the folder of the annotation files as --annotations")
    return [folder / path for path in list_files(folder).files if path.lower().endswith(ending)]


def _required(folder: Path, name: str, path: Path | None) -> Path:
    if path is None:
        raise ShardError(f"{folder}: holds no {name}; give the folder of the annotation files as --annotations")
    return path


def _lines(path: Path) -> Iterator[tuple[str, str]]:
    """Place and text of each line that is not empty."""
    for number, line in enumerate(_text(path).splitlines(), start=1):
        if line.strip():
            yield f"{path}:{number}", line.strip()


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise ShardError(f"{path}: {error.strerror or error}; make the file readable") from None
    except UnicodeDecodeError as error:
        raise ShardError(f"{path}: not UTF-8 ({error.reason}); download it again") from None
