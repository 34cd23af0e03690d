"""Tables of videos: CSV files with these columns.

path,label[,split]      one class a video
path,labels[,split]     several classes in a cell, joined by |, or none
"""

from __future__ import annotations

import csv
import io
from collections import Counter
from pathlib import Path

from shards.folders import Video, one_spelling, split_name
from shards.format import ShardError
from shards.list_lines import path_below

_COLUMNS = ("path", "label", "split")
_SEVERAL = "labels"  # the column in place of "label" whose cells name several classes
_JOINT = "|"


def read_table(path: str | Path, root: str | Path | None = None) -> list[Video]:
    """The videos of a CSV (UTF-8; commas, semicolons or tabs) with the columns path, label and, if wanted, split.

    With the column `labels` in place of `label` a cell names several classes, joined by |, or none.
    Raises ShardError, one line of `file:line`, the value and the fix.
    """
    path, root = Path(path), None if root is None else Path(root)
    text = _read_text(path)
    first = text.split("\n", 1)[0]
    delimiter = next((mark for mark in ";\t" if mark in first and "," not in first), ",")
    reader = csv.reader(io.StringIO(text, newline=""), strict=True, delimiter=delimiter, skipinitialspace=True)
    videos: dict[str, Video] = {}
    try:
        header = [column.strip().lower() for column in next(reader, [])]
        named = sorted("label" if column == _SEVERAL else column for column in header)
        if named not in (sorted(_COLUMNS), sorted(_COLUMNS[:2])):
            raise ShardError(
                f"{path}:1: the header is {','.join(header)!r}; the first line must be `path,label` or "
                "`path,label,split`, with `labels` in place of `label` for several a video"
            )
        for row in reader:
            if row:
                video = _read_row(row, header, path, reader.line_num, root)
                if video.path in videos:
                    raise ShardError(
                        f"{path}:{video.line}: {video.path!r} is there twice, first on line {videos[video.path].line}; "
                        f"remove one of the two, or name the column `labels` and join a video's classes by {_JOINT}"
                    )
                videos[video.path] = video
    except csv.Error as error:
        raise ShardError(f"{path}:{reader.line_num}: {error}; quote names that hold commas") from None
    if not videos:
        raise ShardError(f"{path}: no videos below the header; expected lines of `{','.join(header)}`")
    return list(videos.values())


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise ShardError(f"{path}: {error.strerror or error}; give a readable CSV file") from None
    except UnicodeDecodeError as error:
        raise ShardError(f"{path}: not UTF-8 ({error.reason}); save the file as UTF-8") from None


def _read_row(row: list[str], header: list[str], path: Path, line: int, root: Path | None) -> Video:
    where = f"{path}:{line}"
    if len(row) != len(header):
        raise ShardError(f"{where}: {len(row)} columns in {','.join(row)!r}; expected `{','.join(header)}`")
    values = dict(zip(header, (cell.strip() for cell in row), strict=True))
    for column in ("path", "label"):
        if not values.get(column, _SEVERAL in values):
            raise ShardError(f"{where}: no {column}; expected e.g. `surfing/clip.mp4,surfing`")
    split = values.get("split") or None
    if split is not None and split_name(split) is None:
        raise ShardError(f"{where}: split is {split!r}; expected train, val, test or nothing")
    try:
        label = one_spelling(values["label"]) if _SEVERAL not in values else _several(values[_SEVERAL], where)
        return Video(path_below(values["path"], root), label, split and split_name(split), line)
    except ValueError as error:
        raise ShardError(f"{where}: {error}") from None


def _several(cell: str, where: str) -> tuple[str, ...]:
    names = sorted(one_spelling(name.strip()) for name in cell.split(_JOINT)) if cell else []
    for name, count in Counter(names).items():
        if not name or count > 1:
            what = f"{name!r} twice" if name else "an empty name"
            raise ShardError(f"{where}: {what} in {cell!r}; join the classes of a video by {_JOINT}, each once")
    return tuple(names)
