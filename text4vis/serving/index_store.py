"""A search index on disk: the windows of videos as unit vectors, and which window of which video each of them is.

    INDEX/videos.jsonl        the settings, then a line for each file that was looked at (`serving.jobs`); of several
                              lines about a file the last one counts
    INDEX/vectors/NAME.f16    rows of D little-endian float16; every process that adds to an index writes one of its own
    INDEX/model.json          where the model lay when the index was made

Vectors are on disk before the line that names them, so a killed process leaves at most rows that no line names. An
index of any origin is safe to open: it is JSON and numbers, and every line is compared with the size of its vectors.

D embedding width, W windows of a video, N rows of all vectors.
"""

from __future__ import annotations

import fcntl
import json
import math
import os
import re
import time
import uuid
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, TypeAlias

import numpy as np

from shards.files import sync, write_atomically
from text4vis.serving.jobs import WorkList, disk_errors

VIDEOS, VECTORS, MODEL = "videos.jsonl", "vectors", "model.json"
KEY = "file"
FORMAT = 1
FLUSH_SECONDS, FLUSH_ROWS = 5.0, 8192  # a killed process loses as much work at most
_PART = re.compile(r"[0-9a-f]{32}\.f16")
_MOST_PARTS = 32
_COPY_ROWS = 65536
_MOST_DIMS = 1 << 16
_LONGEST_LINE = 1 << 20
LEAST_SECONDS = 1e-3  # of windows and strides

Record: TypeAlias = dict[str, Any]


class SearchError(Exception):
    """An index that cannot be opened, or a question that it cannot answer. The message names the fix."""


@dataclass(frozen=True)
class Settings:
    """What all windows of an index have in common.

    model: what tells the model from others, in JSON values. dims: D. window, stride: seconds.
    """

    model: Mapping[str, Any]
    dims: int
    window: float
    stride: float

    def to_dict(self) -> dict[str, Any]:
        """In JSON values, as the index's first line holds them."""
        return {"format": FORMAT, **vars(self)}

    @classmethod
    def of(cls, values: Any, where: str) -> Settings:
        """Settings that somebody may have damaged. Raises SearchError."""
        if not isinstance(values, dict) or values.get("format") != FORMAT:
            raise SearchError(f"{where}: no search index of format {FORMAT}; build it with tools/search.py index")
        get: Callable[[str], Any] = values.get
        model, dims, window, stride = map(get, ("model", "dims", "window", "stride"))
        sound = isinstance(model, dict) and _is_count(dims) and 0 < dims <= _MOST_DIMS
        if not sound or not all(_is_number(value) and value >= LEAST_SECONDS for value in (window, stride)):
            raise SearchError(f"{where}: its settings are damaged; build the index anew")
        return cls(model, dims, float(window), float(stride))

    def num_windows(self, seconds: float) -> int:
        """Windows of a video of this length: one every `stride`, and one that ends with the video."""
        return math.ceil(max(0.0, seconds - self.window) / self.stride) + 1

    def span(self, seconds: float, number: int) -> tuple[float, float]:
        """Start and end in seconds of a window of a video that lasts `seconds`."""
        start = min(number * self.stride, max(0.0, seconds - self.window))
        return start, min(start + self.window, seconds)


@dataclass(frozen=True, slots=True)
class IndexedVideo:
    """A file with its windows: rows `row` to `row + windows` of the vectors in `part`. seconds: length of the video."""

    path: str
    file: str
    digest: str
    seconds: float
    part: str
    row: int
    windows: int

    def record(self) -> Record:
        """The line of the index about it."""
        return {name: getattr(self, name) for name in self.__slots__}


@dataclass(frozen=True)
class Catalogue:
    """What the lines of an index say. videos, broken (path to the error's line): files by their path.

    last: the version (`file`) of each path that its last line is about. files: all versions that lines are about.
    parts: vectors by name, each (rows, D) float16, mapped.
    """

    folder: Path
    settings: Settings
    videos: dict[str, IndexedVideo] = field(default_factory=dict)
    broken: dict[str, Record] = field(default_factory=dict)
    last: dict[str, str] = field(default_factory=dict)
    files: set[str] = field(default_factory=set)
    parts: dict[str, np.ndarray] = field(default_factory=dict)

    @property
    def num_windows(self) -> int:
        """Windows that can be found."""
        return sum(video.windows for video in self.videos.values())

    @property
    def num_dead(self) -> int:
        """Rows that belong to no window: of earlier versions of files, or left by killed processes."""
        return sum(map(len, self.parts.values())) - self.num_windows

    def vectors(self, video: IndexedVideo) -> np.ndarray:
        """The windows (W, D) float16 of a video."""
        return self.parts[video.part][video.row : video.row + video.windows]


def is_index(folder: Path) -> bool:
    """Whether an index was begun in this folder."""
    path = folder / VIDEOS
    return path.is_file() and next(_complete_lines(path), None) is not None


def indexed_paths(folder: Path) -> list[str]:
    """The absolute paths of an index's videos; none where there is no index. Raises SearchError."""
    return list(read_catalogue(folder).videos) if is_index(folder) else []


def read_catalogue(folder: Path) -> Catalogue:
    """What an index holds now; others may be adding to it. Raises SearchError."""
    if not (folder / VIDEOS).is_file():
        raise SearchError(f"{folder}: no search index; build one with tools/search.py index")
    for _ in range(3):
        try:
            return _read(folder)
        except FileNotFoundError as error:  # another process has just joined the parts into one: read anew
            missing = error.filename
    raise SearchError(f"{missing}: not found; copy the whole index again, or build it anew")


def _read(folder: Path) -> Catalogue:
    path = folder / VIDEOS
    lines = _complete_lines(path)
    catalogue = Catalogue(folder, Settings.of(next(lines, (0, {}))[1].get("settings"), str(path)))
    for number, record in lines:
        name, file = record.get("path"), record.get(KEY)
        if not isinstance(name, str) or not isinstance(file, str):
            raise SearchError(f"{path}:{number}: names no file; the index is damaged, build it anew")
        catalogue.videos.pop(name, None)
        catalogue.broken.pop(name, None)
        catalogue.last[name] = file
        catalogue.files.add(file)
        if isinstance(record.get("error"), str):
            catalogue.broken[name] = record
        else:
            catalogue.videos[name] = _video(record, catalogue, f"{path}:{number}")
    return catalogue


def _complete_lines(path: Path) -> Iterator[tuple[int, Record]]:
    """Numbers and objects of the lines, without one that is being written."""
    with path.open("rb") as stream:
        number = 0
        while line := stream.readline(_LONGEST_LINE):
            number += 1
            if not line.endswith(b"\n") and len(line) < _LONGEST_LINE:
                return
            try:
                record = json.loads(line)
            except (ValueError, RecursionError):
                record = None
            if not isinstance(record, dict):
                raise SearchError(f"{path}:{number}: no JSON object; delete the line, and its video is indexed again")
            yield number, record


def _video(record: Record, catalogue: Catalogue, where: str) -> IndexedVideo:
    """Raises SearchError unless the line describes rows that are there."""
    settings, parts = catalogue.settings, catalogue.parts
    get: Callable[[str], Any] = record.get
    part, row, windows, seconds, digest = map(get, ("part", "row", "windows", "seconds", "digest"))
    if not isinstance(part, str) or not _PART.fullmatch(part):
        raise SearchError(f"{where}: names no vectors; the index is damaged, build it anew")
    if part not in parts:
        parts[part] = _map_part(catalogue.folder / VECTORS / part, settings.dims)
    sound = _is_count(row) and _is_count(windows) and windows > 0 and isinstance(digest, str)
    if not sound or not _is_number(seconds) or not 0 <= seconds <= 1e9:
        raise SearchError(f"{where}: is damaged; build the index anew")
    if row + windows > len(parts[part]):
        raise SearchError(
            f"{where}: its vectors end at row {row + windows}, those of {part} at {len(parts[part])}; copy the whole "
            "index again, or build it anew"
        )
    if windows != settings.num_windows(seconds):
        raise SearchError(
            f"{where}: {windows} windows, but {seconds:g} s have {settings.num_windows(seconds)}; build the index anew"
        )
    return IndexedVideo(record["path"], record[KEY], digest, float(seconds), part, row, windows)


def _map_part(path: Path, dims: int) -> np.ndarray:
    """The rows of a file that are complete. Mapped privately: nothing that is done to the array reaches the file."""
    rows = path.stat().st_size // (2 * dims)
    if not path.is_file() or not rows:
        return np.empty((0, dims), np.float16)
    return np.memmap(path, np.dtype("<f2"), "c", shape=(rows, dims))


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 1 << 48


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def check_settings(known: Catalogue, settings: Settings) -> None:
    """Raises SearchError where an index was begun with other settings."""
    before = known.settings
    different = [name for name in settings.model if before.model.get(name) != settings.model[name]]
    if different or before.dims != settings.dims:
        raise SearchError(
            f"{known.folder}: was made with another model (other {', '.join(different) or 'width'}); name that model "
            "with --model, or begin an index for this one with another --output"
        )
    if (before.window, before.stride) != (settings.window, settings.stride):
        raise SearchError(
            f"{known.folder}: has windows of {before.window:g} s every {before.stride:g} s, not of "
            f"{settings.window:g} s every {settings.stride:g} s; leave --window and --stride out, or begin another "
            "index with another --output"
        )


@contextmanager
def adding(folder: Path) -> Iterator[None]:
    """While this lasts, no other process joins or removes what is in the index; any number may add to it."""
    with (folder / ".lock").open("ab") as file:
        fcntl.flock(file, fcntl.LOCK_SH)
        yield


class IndexWriter:
    """Adds videos to an index, in step with the `WorkList` of its lines. A context manager, used within `adding`.

    Videos are written a few at a time: within FLUSH_SECONDS, unless the process is killed.
    """

    def __init__(self, folder: Path, work: WorkList, dims: int) -> None:
        self._folder, self._work, self._dims = folder / VECTORS, work, dims
        self._part = f"{uuid.uuid4().hex}.f16"
        self._stream: BinaryIO | None = None
        self._num_rows = 0  # on disk
        self._records: list[Record] = []
        self._pending: list[np.ndarray] = []
        self._last_flush = time.monotonic()

    def add(self, path: str, file: str, digest: str, seconds: float, vectors_WD: np.ndarray) -> None:
        """A video's windows: unit vectors (W, D) of a floating type."""
        assert vectors_WD.shape[1] == self._dims
        row = self._num_rows + sum(map(len, self._pending))
        video = IndexedVideo(path, file, digest, seconds, self._part, row, len(vectors_WD))
        self._pending.append(vectors_WD.astype("<f2"))
        self._append(video.record())

    def add_broken(self, path: str, file: str, error: str) -> None:
        """A file that cannot be read."""
        self._append({"path": path, KEY: file, "error": error})

    def _append(self, record: Record) -> None:
        self._records.append(record)
        num_rows = sum(map(len, self._pending))
        if num_rows >= FLUSH_ROWS or time.monotonic() - self._last_flush >= FLUSH_SECONDS:
            self.flush()

    def flush(self) -> None:
        """Writes what was added: first the vectors, then the lines that name them.

        After an error it is not tried again: rows may be missing on the disk, and the lines would name others.
        """
        pending, records = self._pending, self._records
        self._pending, self._records, self._last_flush = [], [], time.monotonic()
        if pending:
            if self._stream is None:
                self._folder.mkdir(exist_ok=True)
                self._stream = (self._folder / self._part).open("xb")
                sync(self._folder)
            with disk_errors(self._folder / self._part):
                for vectors_WD in pending:
                    self._stream.write(vectors_WD.data)
                    self._num_rows += len(vectors_WD)
                self._stream.flush()
                os.fsync(self._stream.fileno())
        self._work.append(records)

    def __enter__(self) -> IndexWriter:
        return self

    def __exit__(self, *_: object) -> None:
        """After an error or Ctrl-C too: videos that were finished stay."""
        try:
            self.flush()
        finally:
            if self._stream is not None:
                with disk_errors(self._folder / self._part):
                    self._stream.close()


def needs_tidying(catalogue: Catalogue) -> bool:
    """Whether a tenth of the rows is dead, or the index lies in many parts."""
    return catalogue.num_dead * 10 > catalogue.num_windows or len(catalogue.parts) > _MOST_PARTS


def tidy(folder: Path, remove: Collection[str] = ()) -> bool:
    """Rewrites an index without the files `remove` and without dead rows, as one part. False: others are adding to it.

    Whoever reads the index meanwhile sees it as it was before or as it is afterwards.
    """
    with (folder / ".lock").open("ab") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        catalogue = read_catalogue(folder)
        keep = [video for path, video in sorted(catalogue.videos.items()) if path not in remove]
        records = [record for path, record in catalogue.broken.items() if path not in remove]
        part = f"{uuid.uuid4().hex}.f16"
        with (folder / VECTORS / part).open("xb") as stream:
            row = 0
            for video in keep:
                vectors_WD = catalogue.vectors(video)
                for begin in range(0, len(vectors_WD), _COPY_ROWS):
                    stream.write(np.ascontiguousarray(vectors_WD[begin : begin + _COPY_ROWS]).data)
                records.append({**video.record(), "part": part, "row": row})
                row += video.windows
            stream.flush()
            os.fsync(stream.fileno())
        sync(folder / VECTORS)
        _replace_lines(folder, catalogue.settings, records)
        for path in (folder / VECTORS).glob("*.f16"):
            if path.name != part or not keep:
                with suppress(FileNotFoundError):
                    path.unlink()
        return True


def _replace_lines(folder: Path, settings: Settings, records: list[Record]) -> None:
    new = folder / f"{VIDEOS}.new"  # of a tidying that was killed, perhaps
    new.unlink(missing_ok=True)
    with WorkList(new, (), settings.to_dict(), key=KEY) as lines:
        lines.append(records)
    new.replace(folder / VIDEOS)
    sync(folder)


def remember_model(folder: Path, path: Path) -> None:
    """Notes where the model lies that the index was made with."""
    text = json.dumps({"path": str(path.absolute())})
    write_atomically(folder / MODEL, text.encode())


def remembered_model(folder: Path) -> Path | None:
    """Where the index's model lay; None where nothing tells."""
    try:
        values = json.loads((folder / MODEL).read_bytes())
    except (OSError, ValueError, RecursionError):
        return None
    path = values.get("path") if isinstance(values, dict) else None
    return Path(path) if isinstance(path, str) and "\0" not in path else None
