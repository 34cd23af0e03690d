"""Annotation lists and class lists: parsing, with every bad line named.

An annotation list holds one video a line, the fields separated by spaces or tabs, names relative to a root folder:

    path/to/folder frames label     a folder of frames
    path/to/video.mp4 label         a video file, known by the extension at the end of the path
    path/to/video - label           a video file whatever its name

The label is the number of a class, or several joined by commas, `3,17,42`, or `-` for none of the classes.

Names are split off from the right, so they may hold spaces. One path has one spelling: `./a`, `b/../a`, `a//` and,
below the root, `/root/a` are read as `a`. Empty lines are skipped, and so are comments: lines that begin with `# ` or
`##`, or hold `#` alone. (`#name 30 4` is a video: real data sets have names that begin with `#`.)

A class list is a CSV file with the header `id,name`; ids are 0..C-1, in any order.
"""

from __future__ import annotations

import csv
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO

import numpy as np

from shards.format import CONTROL_CHARACTER, MAX_FRAMES, ShardError
from shards.list_lines import LAYOUT, hint, is_video_file, path_below, refuse_more_numbers

Label = int | tuple[int, ...]

_LABEL_LAYOUT = "expected `id,name`, names with commas quoted"
_MAX_LABEL = 2**31 - 1


@dataclass(frozen=True, slots=True)
class Annotation:
    """One video of a list. num_frames is None for a video file; line counts from 1.

    label: the video's class, or a tuple of its classes, ascending, where it has several or none.

    num_frames may be 0: published lists hold such lines, for videos that failed to extract. The list is valid; the
    builder reports the video.
    """

    name: str
    num_frames: int | None
    label: Label
    line: int

    @property
    def labels(self) -> tuple[int, ...]:
        """All labels of the video."""
        return self.label if isinstance(self.label, tuple) else (self.label,)


def parse_annotations(
    path: str | Path,
    num_classes: int | None = None,
    *,
    labels_file: str | Path | None = None,
    root: str | Path | None = None,
) -> list[Annotation]:
    """Reads an annotation list (UTF-8, with or without byte-order mark, LF or CRLF).

    num_classes: labels must be below it; labels_file names the class list in that error. root: the folder that the
    paths begin in; absolute paths below it and paths as Windows writes them are understood then, and lines with more
    numbers than a list has are told from names that end in numbers.
    Raises ShardError, one line of `file:line`, the value and the fix.
    """
    path = Path(path)
    root = None if root is None else Path(root)
    annotations: list[Annotation] = []
    limit = _MAX_LABEL + 1 if num_classes is None else num_classes
    with _open_text(path, newline="\n") as lines:
        for number, raw in _numbered(path, lines):
            line = raw.rstrip(" \t\r\n")
            if not line or line.isspace() or _is_comment(line):
                continue
            try:
                annotation = _parse_line(line, number, root)
            except ValueError as error:
                raise ShardError(f"{path}:{number}: {error}") from None
            if (largest := max(annotation.labels, default=0)) >= limit:
                classes = f"the class list {labels_file}" if labels_file else "the class list"
                raise ShardError(
                    f"{path}:{number}: label {largest} of {annotation.name!r} has no class: {classes} has "
                    f"the ids 0 to {limit - 1}; correct the label or add id {largest} to the class list"
                    + ("; where labels count from 1, subtract 1 from each" if largest == limit else "")
                )
            annotations.append(annotation)
    if not annotations:
        raise ShardError(f"{path}: no annotations in this file; {LAYOUT} on each line")
    _refuse_duplicates(path, annotations, root)
    return annotations


def parse_labels(path: str | Path) -> list[str]:
    """Class names of a class list by id. Raises ShardError, one line of `file:line`, the value and the fix."""
    path = Path(path)
    names: dict[int, tuple[str, int]] = {}
    with _open_text(path, newline="") as stream:
        reader = csv.reader(stream, strict=True, skipinitialspace=True)
        try:
            header = next(reader, [])
            if [column.strip().lower() for column in header] != ["id", "name"]:
                raise ShardError(f"{path}:1: the header is {','.join(header)!r}; the first line must be `id,name`")
            for row in reader:
                if row:
                    _add_label(names, row, f"{path}:{reader.line_num}", reader.line_num)
        except csv.Error as error:
            raise ShardError(f"{path}:{reader.line_num}: {error}; {_LABEL_LAYOUT}") from None
        except UnicodeDecodeError as error:
            raise _not_utf8(path, error) from None
    if not names:
        raise ShardError(f"{path}: no classes in this file; expected lines of `id,name` below the header")
    for number in range(len(names)):
        if number not in names:
            largest = max(names)
            raise ShardError(
                f"{path}:{names[largest][1]}: id {largest} but no id {number}: ids must be 0 to C-1, each once; add a "
                f"line for {number} or renumber the classes"
            )
    first: dict[str, int] = {}
    for number in range(len(names)):
        name, line = names[number]
        if first.setdefault(name, number) != number:
            raise ShardError(f"{path}:{line}: class {first[name]} is named {name!r} too; name them apart")
    return list(first)


def format_annotation(name: str, num_frames: int | None, label: Label) -> str:
    """The line of a list, without its end, that parses to this. Raises ValueError for a name that no line can hold."""
    count = "" if num_frames is None and is_video_file(name) else f" {'-' if num_frames is None else num_frames}"
    labels = (",".join(map(str, label)) or "-") if isinstance(label, tuple) else label
    line = f"{'./' if name[:1] == '#' else ''}{name}{count} {labels}"
    try:
        line.encode()
        if "\n" not in name and _parse_line(line, 0) == Annotation(name, num_frames, label, 0):
            return line
    except UnicodeEncodeError:
        raise ValueError(f"the name {name!r} is not UTF-8; rename the file (convmv -f latin1 -t utf8)") from None
    raise ValueError(f"the name {name!r} cannot stand in a list; rename the file, without spaces at its ends")


def _is_comment(line: str) -> bool:
    return line[0] == "#" and (len(line) == 1 or line[1] in "# \t")


def _parse_line(line: str, number: int, root: Path | None = None) -> Annotation:
    """Raises ValueError with the value and the fix."""
    head, _, last = line.rpartition(" ")
    if "\t" in last:
        head, last = line.rsplit(None, 1)
    if not head:
        raise ValueError(f"{line!r} has one column; {LAYOUT}{hint(line)}")
    num_frames: int | None = None
    if is_video_file(head := head.rstrip(" \t")):
        name = head
    else:
        name, _, count = head.rpartition(" ")
        if "\t" in count:
            name, count = head.rsplit(None, 1) if len(head.split(None, 1)) == 2 else ("", head)
        name = name.rstrip(" \t")
        if not name:
            raise ValueError(f"{line!r} has two columns and its path is no video file; {LAYOUT}{hint(line)}")
        if count != "-":
            num_frames = _integer(count, "frames", line)
            if not 0 <= num_frames <= MAX_FRAMES:
                raise ValueError(f"frames is {num_frames}; it must be 1 to {MAX_FRAMES}: remove or correct the line")
    label = _label(last, line)
    name = path_below(name, root)
    if root is not None:
        refuse_more_numbers(name, num_frames, root)
    return Annotation(name, num_frames, label, number)


def _label(text: str, line: str) -> Label:
    if text == "-":
        return ()
    labels = sorted(_integer(part, "label", line) for part in text.split(","))
    for label, following in zip(labels, [*labels[1:], -1], strict=True):
        if not 0 <= label <= _MAX_LABEL:
            raise ValueError(f"label is {label}; labels are 0 to C-1: correct the line")
        if label == following:
            raise ValueError(f"label {label} is in {text!r} twice; name it once")
    return tuple(labels) if len(labels) > 1 else labels[0]


def _integer(text: str, column: str, line: str) -> int:
    digits = text[1:] if text[:1] in ("+", "-") else text
    if not (digits.isascii() and digits.isdigit()) or len(digits) > 18:
        raise ValueError(f"{column} is {text!r}, not a whole number; {LAYOUT}{hint(line)}")
    return int(text)


def _refuse_duplicates(path: Path, annotations: list[Annotation], root: Path | None) -> None:
    """With a root, names that differ in case alone are compared as files: some file systems do not tell them apart."""
    # Sorted hashes take 8 bytes a line where a dictionary takes a hundred; lists run to millions of lines.
    keys = (item.name if root is None else item.name.casefold() for item in annotations)
    hashes = np.fromiter(map(hash, keys), np.int64, len(annotations))
    order = np.argsort(hashes, kind="stable")
    equal = np.flatnonzero(np.diff(hashes[order]) == 0)
    suspects = sorted(set(order[equal].tolist()) | set(order[equal + 1].tolist()))
    first: dict[str, Annotation] = {}
    for position in suspects:
        annotation = annotations[position]
        twin = first.setdefault(annotation.name, annotation)
        if twin is annotation and root is not None:
            others = (other for other in first.values() if other.name.casefold() == annotation.name.casefold())
            twin = next((other for other in others if _same_file(root, other.name, annotation.name)), annotation)
        if twin is not annotation:
            spelled = "" if twin.name == annotation.name else f", spelled {twin.name!r}"
            raise ShardError(
                f"{path}:{annotation.line}: {annotation.name!r} is already on line {twin.line}{spelled}; remove one of "
                "the two"
            )


def _same_file(root: Path, name: str, other: str) -> bool:
    try:
        return name != other and (root / name).samefile(root / other)
    except (OSError, ValueError):
        return False


def _add_label(names: dict[int, tuple[str, int]], row: list[str], where: str, line: int) -> None:
    if len(row) != 2:
        raise ShardError(f"{where}: {len(row)} columns in {','.join(row)!r}; {_LABEL_LAYOUT}")
    number, name = row[0].strip(), row[1].strip()
    if not (number.isascii() and number.isdigit()) or len(number) > 9:
        raise ShardError(f"{where}: id is {row[0]!r}; ids must be the whole numbers 0 to C-1, each once")
    if not name:
        raise ShardError(f"{where}: class {number} has no name; write one: it becomes the text of the classifier")
    if CONTROL_CHARACTER.search(name):
        raise ShardError(f"{where}: the name {name!r} of class {number} holds a control character; remove it")
    if int(number) in names:
        raise ShardError(
            f"{where}: id {number} is already on line {names[int(number)][1]}; ids must be 0 to C-1, each once"
        )
    names[int(number)] = (name, line)


def _open_text(path: Path, newline: str) -> TextIO:
    try:
        return path.open(encoding="utf-8-sig", newline=newline)
    except OSError as error:
        raise ShardError(f"{path}: {error.strerror or error}; give a readable text file") from None


def _numbered(path: Path, lines: TextIO) -> Iterator[tuple[int, str]]:
    try:
        yield from enumerate(lines, start=1)
    except UnicodeDecodeError as error:
        raise _not_utf8(path, error) from None


def _not_utf8(path: Path, error: UnicodeDecodeError) -> ShardError:
    """The decoder works on blocks and knows no line: look for the line that it stumbled over."""
    with path.open(encoding="utf-8", errors="surrogateescape", newline="\n") as stream:
        for number, line in enumerate(stream, start=1):
            for character in line:
                if "\udc80" <= character <= "\udcff":
                    byte = ord(character) - 0xDC00
                    return ShardError(f"{path}:{number}: byte 0x{byte:02x} is not UTF-8; save the file as UTF-8")
    return ShardError(f"{path}: not UTF-8 ({error.reason}); save the file as UTF-8")
