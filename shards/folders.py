"""Lists for a folder of one's own videos: class names, and which videos train and which validate.

    videos/surfing/a.mp4, videos/ice_skating/b/c.mov …     the folder below the root is the class
    path,label[,split]                                     or a CSV with that header; split is train or val

The lists are plain text files, made once and then their owner's to edit.
"""

from __future__ import annotations

import csv
import io
import os
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from shards.annotations import is_video_file
from shards.files import require_folder, write_atomically
from shards.format import ShardError
from shards.plan import epoch_order

LABELS, SPLITS = "labels.csv", {"train": "train.txt", "val": "val.txt"}
_HEADERS = (["path", "label"], ["path", "label", "split"])


@dataclass(frozen=True)
class Video:
    """A video file below the root, its class as found, and its split if somebody has chosen one."""

    path: str
    label: str
    split: str | None = None


def scan_folders(root: str | Path) -> list[Video]:
    """Every video file in the sub-folders of `root`, sorted; the first folder names the class. Follows links.

    Raises ShardError if there are none, or a video lies in no sub-folder.
    """
    root = Path(root)
    if not root.is_dir():
        raise ShardError(f"{root}: no such folder; give the folder that holds a sub-folder of videos for each class")
    found = []
    for folder, folders, files in os.walk(root, followlinks=True):
        folders.sort()
        place = PurePosixPath(Path(folder).relative_to(root))
        found += [place / name for name in sorted(files) if is_video_file(name) and not name.startswith(".")]
    outside = [path for path in found if len(path.parts) == 1]
    if outside:
        raise ShardError(f"{root / outside[0]}: lies in no class folder; move it into one, or name its class in a CSV")
    if not found:
        raise ShardError(f"{root}: no videos in its sub-folders; expected e.g. {root / 'surfing' / 'clip.mp4'}")
    return [Video(str(path), path.parts[0]) for path in found]


def read_table(path: str | Path) -> list[Video]:
    """The videos of a CSV (UTF-8) with the header `path,label` or `path,label,split`.

    Raises ShardError, one line of `file:line`, the value and the fix.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise ShardError(f"{path}: {error.strerror or error}; give a readable CSV file") from None
    except UnicodeDecodeError as error:
        raise ShardError(f"{path}: not UTF-8 ({error.reason}); save the file as UTF-8") from None
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    videos: dict[str, Video] = {}
    try:
        header = [column.strip().lower() for column in next(reader, [])]
        if header not in _HEADERS:
            raise ShardError(
                f"{path}:1: the header is {','.join(header)!r}; the first line must be `path,label` or "
                "`path,label,split`"
            )
        for row in reader:
            if row:
                video = _read_row(row, header, f"{path}:{reader.line_num}")
                if video.path in videos:
                    raise ShardError(f"{path}:{reader.line_num}: {video.path!r} is there twice; remove one of the two")
                videos[video.path] = video
    except csv.Error as error:
        raise ShardError(f"{path}:{reader.line_num}: {error}; quote names that hold commas") from None
    if not videos:
        raise ShardError(f"{path}: no videos below the header; expected lines of `{','.join(header)}`")
    return list(videos.values())


def _read_row(row: list[str], header: list[str], where: str) -> Video:
    if len(row) != len(header):
        raise ShardError(f"{where}: {len(row)} columns in {','.join(row)!r}; expected `{','.join(header)}`")
    values = dict(zip(header, (cell.strip() for cell in row), strict=True))
    if not values["label"] or not is_video_file(values["path"]):
        what = "no label" if not values["label"] else f"{values['path']!r}, which is no video file's name"
        raise ShardError(f"{where}: {what}; expected e.g. `surfing/clip.mp4,surfing`")
    split = values.get("split") or None
    if split is not None and split not in SPLITS:
        raise ShardError(f"{where}: split is {split!r}; expected train, val or nothing")
    return Video(values["path"], values["label"], split)


def split_videos(videos: Sequence[Video], val_share: float, seed: int) -> list[Video]:
    """The same videos, each with a split: `val_share` of every class validates, drawn by `seed`.

    A class keeps at least one video to train on, and gives at least one to val where it has two. Splits that somebody
    chose stay, and a table that names one is taken at its word: it must name all. Raises ShardError, ValueError.
    """
    if not 0 < val_share < 1:
        raise ValueError(f"val share: expected a number between 0 and 1, got {val_share}")
    chosen = [video for video in videos if video.split]
    if chosen:
        missing = next((video for video in videos if not video.split), None)
        if missing:
            raise ShardError(f"{missing.path!r} has no split while others have one; fill the column or leave it out")
        return list(videos)
    splits: dict[str, str] = {}
    for number, label in enumerate(sorted({video.label for video in videos})):
        own = [video.path for video in videos if video.label == label]
        count = min(max(1, round(val_share * len(own))), len(own) - 1)
        for rank, position in enumerate(epoch_order(len(own), seed, number).tolist()):
            splits[own[position]] = "val" if rank < count else "train"
    return [Video(video.path, video.label, splits[video.path]) for video in videos]


def readable(label: str) -> str:
    """A class name as a text tower likes it: `IceSkating` and `ice_skating` become `ice skating`.

    Words in capitals (`TV`) stay as they are.
    """
    spaced = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", " ", re.sub(r"[_\-.]+", " ", label))
    words = spaced.split()
    return " ".join(word if word.isupper() and len(word) > 1 else word.lower() for word in words) or label


def write_lists(videos: Sequence[Video], output: str | Path) -> dict[str, int]:
    """Writes labels.csv, train.txt and val.txt into `output`, whole or not at all; returns the videos of each split.

    Labels are numbered in the order of the classes' names. Raises ShardError when two classes would read the same or a
    split stays empty.
    """
    output = Path(output)
    labels = sorted({video.label for video in videos})
    names = [readable(label) for label in labels]
    twice = [name for name, count in Counter(names).items() if count > 1]
    if twice:
        same = [label for label, name in zip(labels, names, strict=True) if name == twice[0]]
        raise ShardError(f"the classes {', '.join(map(repr, same))} all read {twice[0]!r}; rename or join the folders")
    counts = Counter(video.split for video in videos)
    for split in SPLITS:
        if not counts[split]:
            raise ShardError(f"no video is left for {split}; add videos: a class needs two to have one in each split")
    table = io.StringIO(newline="")
    csv.writer(table, lineterminator="\n").writerows([("id", "name"), *enumerate(names)])
    require_folder(output)
    for split, file in SPLITS.items():
        lines = [f"{video.path} {labels.index(video.label)}\n" for video in videos if video.split == split]
        write_atomically(output / file, "".join(lines).encode())
    write_atomically(output / LABELS, table.getvalue().encode())
    return {split: counts[split] for split in SPLITS}
