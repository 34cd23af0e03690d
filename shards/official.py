"""Annotations of the field's data sets, read as they are distributed.

kinetics      train.csv, val.csv, test.csv: label,youtube_id,time_start,time_end,…; videos ID_START_END.* or ID.*
ucf101        classInd.txt, trainlist0N.txt (labels from 1), testlist0N.txt (no labels); videos CLASS/v_….avi
hmdb51        CLASS_test_splitN.txt: `video.avi 1`, 1 for training, 2 for testing, 0 for neither
activitynet   activity_net*.json: subsets, labels and some misspelled classes; videos v_ID.* or ID.*
something-v2  labels.json, train.json, validation.json, test.json, test-answers.csv, or the names of the first release,
              something-something-v2-….json: templates with [something] where the labels have none; videos ID.webm
charades      Charades_v1_classes.txt, Charades_v1_train.csv, Charades_v1_test.csv: several classes a video; ID.mp4
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from shards.annotations import parse_labels
from shards.format import ShardError
from shards.official_files import (
    Entry,
    Official,
    annotation_files,
    csv_rows,
    file_stem,
    files_by_role,
    from_json,
    label_finder,
    lines_of,
    named_file,
    names_by_number,
    required,
    text_of,
)

_ROLES = {"train": "train", "val": "val", "validate": "val", "validation": "val", "test": "test"}
_KINETICS_NAME = r"(?:k(?:inetics)?[-_]?(?:\d+[-_])*)?([a-z]+)"
_KINETICS_COLUMNS = ("label", "youtube_id", "time_start", "time_end")
_ACTIVITYNET_ROLES = {"training": "train", "validation": "val"}
_SOMETHING_NAME = r"(?:something-something-v2-)?([a-z]+)"


def read_kinetics(folder: Path, labels: Path | None, _split: int) -> Official:
    """labels: the class list; without one (Kinetics-700) classes are numbered in the order of their names."""
    files = files_by_role(folder, ".csv", _KINETICS_NAME, _ROLES)
    if not files:
        raise ShardError(f"{folder}: holds none of train.csv, val.csv and test.csv of Kinetics; name their folder")
    rows = {
        split: list(csv_rows(files[split], _KINETICS_COLUMNS[1:] if split == "test" else _KINETICS_COLUMNS))
        for split in ("train", "val", "test")
        if split in files
    }
    every = [row for of_split in rows.values() for _, row in of_split]
    names = parse_labels(labels) if labels else sorted({row["label"] for row in every if row.get("label")})
    clips = Counter(name for name, _, _ in {(row["youtube_id"], row["time_start"], row["time_end"]) for row in every})
    official = Official(names)
    label_of = label_finder(names)
    for split, of_split in rows.items():
        named = [(where, row) for where, row in of_split if row.get("label")]
        official.unlabelled[split] = len(of_split) - len(named)
        for where, row in named:
            untimed = row["youtube_id"] if clips[row["youtube_id"]] == 1 else ""
            entry = Entry(_kinetics_keys(row, where), (label_of(row["label"], where),), untimed)
            official.splits.setdefault(split, []).append(entry)
    return official


def _kinetics_keys(row: dict[str, str], where: str) -> tuple[str, ...]:
    try:
        start, end = (int(float(row[column])) for column in ("time_start", "time_end"))
    except (ValueError, OverflowError):
        raise ShardError(f"{where}: the times are {row['time_start']!r} and {row['time_end']!r}, no numbers") from None
    return (f"{row['youtube_id']}_{start:06d}_{end:06d}", f"{row['youtube_id']}_{start}_{end}")


def read_ucf101(folder: Path, labels: Path | None, split: int) -> Official:
    """The official split 1, 2 or 3; its test list is val."""
    index = named_file(folder, "classInd.txt")
    lists = {"train": f"trainlist{split:02d}.txt", "val": f"testlist{split:02d}.txt"}
    ids: dict[str, int] = {}
    for where, line in lines_of(index):
        match = re.fullmatch(r"(\d+)\s+(\S+)", line)
        if match is None:
            raise ShardError(f"{where}: {line!r}; expected `1 ApplyEyeMakeup`")
        ids[match[2].lower()] = int(match[1]) - 1
    names = parse_labels(labels) if labels else sorted(ids, key=lambda name: ids[name])
    if sorted(ids.values()) != list(range(len(names))):
        raise ShardError(
            f"{index}: the classes are not numbered 1 to {len(names)}, as the class list {labels} has them"
        )
    plain = {_letters(name): number for name, number in ids.items()}
    for number, name in enumerate(names):  # other words for a class are fine, those of another class are not
        if plain.get(_letters(name), number) != number:
            raise ShardError(
                f"{labels}: {name!r} is class {number + 1} there, and class {plain[_letters(name)] + 1} in {index}; "
                "put the names in that order"
            )
    official = Official(names, {"train": [], "val": []})
    for role, name in lists.items():
        for where, line in lines_of(named_file(folder, name)):
            match = re.fullmatch(r"(\S+?)/(\S+?)(?:\s+(\d+))?", line)
            if match is None or match[1].lower() not in ids:
                raise ShardError(f"{where}: {line!r} names no class of {index.name}; expected `CLASS/video.avi 1`")
            label = ids[match[1].lower()]
            if match[3] and int(match[3]) - 1 != label:
                raise ShardError(f"{where}: {line!r}: {match[1]} has the number {label + 1} in {index.name}")
            stem = file_stem(match[2])
            official.splits[role].append(Entry((f"{match[1]}/{stem}", stem), (label,)))
    return official


def _letters(name: str) -> str:
    return re.sub(r"[\W_]", "", name).casefold()


def read_hmdb51(folder: Path, labels: Path | None, split: int) -> Official:
    """The official split 1, 2 or 3; its test videos are val. Classes are numbered in the order of their names."""
    ending = f"_test_split{split}.txt"
    files = {path.name[: -len(ending)]: path for path in annotation_files(folder, ending)}
    folders = sorted(files)
    names = parse_labels(labels) if labels else folders
    if len(folders) != len(names):
        raise ShardError(
            f"{folder}: holds {len(folders)} files CLASS{ending}, the class list has {len(names)} classes; unpack "
            "test_train_splits and name its folder"
        )
    label_of = label_finder(names)
    official = Official(names, {"train": [], "val": []})
    for name in folders:
        for where, line in lines_of(files[name]):
            match = re.fullmatch(r"(.+?)\s+([012])", line)
            if match is None:
                raise ShardError(f"{where}: {line!r}; expected `video.avi 1`, with 0, 1 or 2")
            role = {"1": "train", "2": "val"}.get(match[2])
            if role:
                label = label_of(name, str(files[name]))
                official.splits[role].append(Entry((f"{name}/{file_stem(match[1])}",), (label,)))
    return official


def read_activitynet(folder: Path, labels: Path | None, _split: int) -> Official:
    """A video has one class here, that of its first annotation. The subset `testing` has no labels."""
    files = (path for path in annotation_files(folder, ".json") if path.name.lower().startswith("activity_net"))
    path = required(folder, "activity_net.v1-3.min.json", next(files, None))
    rows = from_json(
        path,
        "ActivityNet's JSON",
        lambda data: [
            (name, text_of(video["subset"]), [text_of(annotation["label"]) for annotation in video["annotations"]])
            for name, video in data["database"].items()
        ],
    )
    every = sorted({label for _, _, found in rows for label in found})
    official = Official(parse_labels(labels) if labels else every, {"train": [], "val": []})
    label_of = label_finder(official.names)
    several = 0
    for name, subset, found in rows:
        role = _ACTIVITYNET_ROLES.get(subset)
        if role and found:
            several += len(set(found)) > 1
            official.splits[role].append(Entry((f"v_{name}", name), (label_of(found[0], f"{path}: {name}"),)))
        elif role:
            official.unlabelled[role] += 1
    if several:
        official.notices.append(
            f"{path}: {several} videos have several classes, and get that of their first annotation"
        )
    return official


def read_something(folder: Path, _labels: Path | None, _split: int) -> Official:
    """Something-Something V2. Classes have the numbers of its labels; test videos those of test-answers.csv."""
    files = files_by_role(folder, ".json", _SOMETHING_NAME, _ROLES | {"labels": "labels"})
    labels = required(folder, "labels.json of Something-Something V2", files.pop("labels", None))
    if not files:
        raise ShardError(f"{folder}: holds none of train.json, validation.json and test.json; name their folder")
    what = "Something-Something's JSON"
    numbers = from_json(labels, what, lambda data: {name: int(number) for name, number in data.items()})
    official = Official(names_by_number(numbers, labels))
    label_of = label_finder(official.names)
    answers: dict[str, str] = {}
    for path in annotation_files(folder, "test-answers.csv"):
        answers |= {video: template for video, _, template in (line.partition(";") for _, line in lines_of(path))}
    for split in ("train", "val", "test"):
        if split not in files:
            continue
        path = files[split]
        videos = from_json(
            path, what, lambda data: [(str(video["id"]), text_of(video.get("template") or "")) for video in data]
        )
        for video, template in videos:
            if label := template or answers.get(video):
                entry = Entry((video,), (label_of(label, f"{path}: {video}"),))
                official.splits.setdefault(split, []).append(entry)
            else:
                official.unlabelled[split] += 1
    return official


def read_charades(folder: Path, _labels: Path | None, _split: int) -> Official:
    """All classes that a video shows, without their times; some videos show none. Its test videos are val."""
    classes = named_file(folder, "Charades_v1_classes.txt")
    numbers: dict[str, int] = {}
    for where, line in lines_of(classes):
        match = re.fullmatch(r"c(\d+)\s+(.+)", line)
        if match is None:
            raise ShardError(f"{where}: {line!r}; expected `c008 Opening a door`")
        numbers[match[2]] = int(match[1])
    official = Official(names_by_number(numbers, classes))
    for split, name in (("train", "Charades_v1_train.csv"), ("val", "Charades_v1_test.csv")):
        official.splits[split] = [
            Entry((row["id"],), tuple(sorted(set(_charades_classes(row["actions"], len(numbers), where)))))
            for where, row in csv_rows(named_file(folder, name), ("id", "actions"))
        ]
    return official


def _charades_classes(actions: str, num_classes: int, where: str) -> Iterator[int]:
    for action in actions.split(";") if actions else ():
        match = re.fullmatch(r"\s*c(\d+)\s+[\d.]+\s+[\d.]+\s*", action)
        if match is None or int(match[1]) >= num_classes:
            raise ShardError(
                f"{where}: the action {action!r}; expected `c092 11.90 21.20`, classes to {num_classes - 1}"
            )
        yield int(match[1])


Reader = Callable[[Path, Path | None, int], Official]


@dataclass(frozen=True)
class DataSet:
    """read: of its annotation files. classes: its class list below configs/classes; None: that of its own files.

    counts: videos of its published lists, by split, one for each of the official splits 1, 2 and 3 where it has them.
    Kinetics has none: its lists lose the videos that leave YouTube, and differ from release to release.
    """

    read: Reader
    classes: str | None = None
    counts: Mapping[str, tuple[int, ...]] = field(default_factory=dict)

    @property
    def num_splits(self) -> int:
        """How many official splits there are; 1 where the data set has one."""
        return max(map(len, self.counts.values()), default=1)


DATASETS = {
    "kinetics400": DataSet(read_kinetics, "kinetics_400.csv"),
    "kinetics600": DataSet(read_kinetics, "kinetics_600.csv"),
    "kinetics700": DataSet(read_kinetics),
    "ucf101": DataSet(read_ucf101, "ucf101.csv", {"train": (9537, 9586, 9624), "val": (3783, 3734, 3696)}),
    "hmdb51": DataSet(read_hmdb51, "hmdb51.csv", {"train": (3570, 3570, 3570), "val": (1530, 1530, 1530)}),
    "activitynet": DataSet(read_activitynet, "activitynet200.csv", {"train": (10024,), "val": (4926,)}),
    "something-v2": DataSet(read_something, None, {"train": (168913,), "val": (24777,), "test": (27157,)}),
    "charades": DataSet(read_charades, None, {"train": (7985,), "val": (1863,)}),
}


def read_official(name: str, folder: Path, class_lists: Path, split: int = 1) -> Official:
    """The official lists of a data set, with a notice of each that is not as long as the published one.

    folder: of its annotation files. class_lists: configs/classes. split: 1 to 3 where it has several. Raises
    ShardError.
    """
    dataset = DATASETS[name]
    official = dataset.read(folder, class_lists / dataset.classes if dataset.classes else None, split)
    for part in ("train", "val", "test"):
        unlabelled = official.unlabelled[part]
        if unlabelled:
            official.notices.append(f"{unlabelled:,} entries of {part} have no label and are left out")
        listed = len(official.splits.get(part, ())) + unlabelled
        published = dataset.counts.get(part)
        if listed and published and listed != published[split - 1]:
            official.notices.append(
                f"the {part} list has {listed:,} videos and not {published[split - 1]:,} as published: look whether "
                f"the files in {folder} are complete"
            )
    return official
