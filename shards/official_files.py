"""What the readers of official lists share: entries, finding and reading annotation files, class names as spelled."""

from __future__ import annotations

import csv
import io
import json
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from pathlib import Path
from typing import Any, TypeVar

from shards.format import ShardError
from shards.list_lines import is_video_file
from shards.walk import list_files

T = TypeVar("T")

# Names in the files of the data sets, and as the class lists spell them.
_SPELLED = {
    "moopingfloor": "moppingfloor", "plataformdiving": "platformdiving", "playingflauta": "playingflute",
    "playingguitarra": "playingguitar", "polishingforniture": "polishingfurniture",
}  # fmt: skip


@dataclass(frozen=True)
class Entry:
    """One video of an official list.

    keys: names that its file may have, without ending, the likeliest first. labels: ascending; where the data set
    gives a video several classes, it may also be none. untimed: a last name to try, which does not say which part of
    a longer recording the file holds; empty for no such name.
    """

    keys: tuple[str, ...]
    labels: tuple[int, ...]
    untimed: str = ""


@dataclass
class Official:
    """names: classes by id. splits: train, val, test as far as they are there.

    unlabelled: entries that were passed over, by split. notices: what else was.
    """

    names: list[str]
    splits: dict[str, list[Entry]] = field(default_factory=dict)
    unlabelled: Counter[str] = field(default_factory=Counter)
    notices: list[str] = field(default_factory=list)


def label_finder(names: Sequence[str]) -> Callable[[str, str], int]:
    """Class number by a name that may differ in case, spaces, punctuation and known misspellings."""
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


def names_by_number(numbers: Mapping[str, int], path: Path) -> list[str]:
    """Class names in the order of their numbers. Raises ShardError unless these are 0 to C-1, each once."""
    names = sorted(numbers, key=lambda name: numbers[name])
    if not names or [numbers[name] for name in names] != list(range(len(names))):
        raise ShardError(f"{path}: the {len(names)} classes are not numbered 0 to {len(names) - 1}; download it again")
    return names


def file_stem(name: str) -> str:
    """A file's name without the ending of a video."""
    return name[: name.rindex(".")] if is_video_file(name) else name


def annotation_files(folder: Path, ending: str) -> list[Path]:
    """The files below a folder that end so, or the one file that was named in place of a folder."""
    if folder.is_file():
        return [folder]
    if not folder.is_dir():
        raise ShardError(f"{folder}: no such folder; give the folder of the annotation files as --annotations")
    return [folder / path for path in list_files(folder).files if path.lower().endswith(ending)]


def files_by_role(folder: Path, ending: str, pattern: str, roles: Mapping[str, str]) -> dict[str, Path]:
    """Role to file. The first group of `pattern`, matched with a name without its ending, is a key of `roles`."""
    files: dict[str, Path] = {}
    for path in annotation_files(folder, ending):
        match = re.fullmatch(pattern, path.stem.lower())
        role = roles.get(match[1]) if match else None
        if role and role in files:
            raise ShardError(f"{path}: {files[role]} lists {role} too; name the folder of one data set's files")
        if role:
            files[role] = path
    return files


def named_file(folder: Path, name: str) -> Path:
    """The file of this name below a folder, letters' case ignored. Raises ShardError if there is none."""
    found = (path for path in annotation_files(folder, name.lower()) if path.name.lower() == name.lower())
    return required(folder, name, next(found, None))


def required(folder: Path, name: str, path: Path | None) -> Path:
    """The path. Raises ShardError, which names the folder and the file, for None."""
    if path is None:
        raise ShardError(f"{folder}: holds no {name}; give the folder of the annotation files as --annotations")
    return path


def lines_of(path: Path) -> Iterator[tuple[str, str]]:
    """Place and text of each line that is not empty."""
    for number, line in enumerate(_text(path).split("\n"), start=1):
        if line.strip():
            yield f"{path}:{number}", line.strip()


def csv_rows(path: Path, columns: Sequence[str]) -> Iterator[tuple[str, dict[str, str]]]:
    """Place and fields of each row below the header, which must have these columns."""
    # strict: a quote that is never closed would swallow the rows behind it
    reader = csv.DictReader(io.StringIO(_text(path), newline=""), strict=True)
    try:
        if missing := [column for column in columns if column not in (reader.fieldnames or ())]:
            raise ShardError(f"{path}:1: no column {missing[0]!r}; expected the header {','.join(columns)},…")
        for row in reader:
            yield f"{path}:{reader.line_num}", {name: (text or "").strip() for name, text in row.items() if name}
    except csv.Error as error:
        raise ShardError(f"{path}:{reader.line_num + 1}: {error}; download it again") from None


def from_json(path: Path, what: str, extract: Callable[[Any], T]) -> T:
    """What `extract` takes out of a JSON file; ShardError where it finds another structure than it expects."""
    text = _text(path)
    try:
        return extract(json.loads(text))
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError) as error:
        raise ShardError(f"{path}: not {what} ({type(error).__name__}: {error}); download it again") from None


def text_of(value: object) -> str:
    """A text of a JSON file. Raises TypeError for another value, ValueError for half a letter."""
    if not isinstance(value, str):
        raise TypeError(f"expected a text, got {value!r:.80}")
    value.encode()
    return value


def _text(path: Path) -> str:
    try:
        return path.read_bytes().decode("utf-8-sig")
    except OSError as error:
        raise ShardError(f"{path}: {error.strerror or error}; make the file readable") from None
    except UnicodeDecodeError as error:
        raise ShardError(f"{path}: not UTF-8 ({error.reason}); download it again") from None
