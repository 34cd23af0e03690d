"""What a folder of one's own videos, or a table of them, holds: videos, classes and splits, and what is left out.

    videos/surfing/a.mp4, videos/ice_skating/b/c.mov …     the folder below the root is the class
    videos/train/surfing/a.mp4, videos/test/surfing/…      existing splits, of any usual name, above or below classes
    path,label[,split]                                     or a CSV with these columns

A file's content says whether it is a video, whatever its name.
"""

from __future__ import annotations

import csv
import io
import os
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path, PurePosixPath

from shards.format import ShardError
from shards.list_lines import is_video_file, path_below
from shards.video import VideoError, iter_frames
from shards.walk import list_files

SPLITS = ("train", "val", "test")
_SPLIT_NAMES = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("val", "valid", "validation", "validate", "dev"), "val"),
    **dict.fromkeys(("test", "testing", "eval", "evaluation"), "test"),
}
_PICTURES = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff", ".heic", ".ppm", ".pgm", ".npy", ".exr")
_UNFINISHED = (".part", ".crdownload", ".ytdl", ".aria2", ".download", ".tmp", ".!ut")
_PICTURE_HEADS = (b"\xff\xd8\xff", b"\x89PNG", b"GIF8", b"BM", b"II*\0", b"MM\0*")
_AMBIGUOUS = (".ts", ".mod", ".rm")  # texts have these names as well: TypeScript, modules, …
_TABLE_COLUMNS = ("path", "label", "split")
_SHOWN = 3


@dataclass(frozen=True)
class Video:
    """A video file below the root, its class as found, its split if one was chosen, and its line in a table."""

    path: str
    label: str
    split: str | None = None
    line: int | None = field(default=None, compare=False)


@dataclass
class Found:
    """left_out: reason to paths. broken: videos that do not open, with the reason. notices: what was decided."""

    videos: list[Video]
    left_out: dict[str, list[str]] = field(default_factory=lambda: defaultdict(list))
    broken: dict[str, str] = field(default_factory=dict)
    notices: list[str] = field(default_factory=list)


def scan_folders(
    root: str | Path,
    *,
    known: Collection[str] = (),
    workers: int | None = None,
    progress: Callable[[int], object] | None = None,
) -> Found:
    """Every video in the sub-folders of `root`, sorted. Links are followed, each folder and file is taken once.

    known: paths that are taken for videos without a look into them. progress: called with the number of files looked
    at since its last call. Raises ShardError if there are no videos, or one lies in no class folder.
    """
    root = Path(root)
    if not root.is_dir():
        raise ShardError(f"{root}: no such folder; give the folder that holds a sub-folder of videos for each class")
    found, paths, files = _look_at_all(root, known, workers, progress)
    if not paths:
        raise ShardError(f"{root}: {_no_videos(root, found)}")
    videos = _classify(root, paths, found.notices)
    found.videos = [video for video in videos if video.path not in found.broken]
    empty = sorted(
        {PurePosixPath(path).parts[0] for path in files if "/" in path}
        - {PurePosixPath(path).parts[0] for path in paths}
    )
    if empty:
        pictures = {PurePosixPath(path).parts[0] for path in found.left_out.get("picture", ())}
        what = "pictures and no videos" if pictures.issuperset(empty) else "no videos"
        found.notices.append(f"{_some(empty)}: {what} in there, so no {_plural(len(empty), 'class', 'classes')}")
    return found


def find_videos(root: str | Path) -> tuple[list[str], dict[str, list[str]]]:
    """Paths of all videos below a folder, sorted, those that do not open too; and what is left out, by reason."""
    found, paths, _ = _look_at_all(Path(root), (), None, None)
    return paths, found.left_out


def _look_at_all(
    root: Path, known: Collection[str], workers: int | None, progress: Callable[[int], object] | None
) -> tuple[Found, list[str], list[str]]:
    """Looks at all files: what was found, without classes, and the paths of all videos (broken ones too) and files."""
    listing = list_files(root)
    found = Found([], listing.left_out)
    kinds = {path: _kind_by_name(root, path) for path in listing.files if path not in known}
    unknown = [path for path, kind in kinds.items() if kind is None]
    kinds |= _kinds_by_content(root, unknown, found, workers, progress)
    for path, kind in kinds.items():
        if kind:
            found.left_out[kind].append(path)
    return found, [path for path in listing.files if not kinds.get(path)], listing.files


def check_videos(root: Path, videos: Sequence[Video], where: str, workers: int | None = None) -> Found:
    """The videos of a table after a look into their files. Raises ShardError for what is missing or no video at all."""
    missing = [video for video in videos if not (root / video.path).is_file()]
    if missing:
        raise ShardError(
            f"{where}:{missing[0].line}: {len(missing)} of {len(videos)} videos are not in {root}: "
            f"{_some(video.path for video in missing)}; correct the paths, or put the files there"
        )
    found = Found([])
    kinds = {video.path: _kind_by_name(root, video.path) for video in videos}
    unknown = [path for path, kind in kinds.items() if kind is None]
    kinds |= _kinds_by_content(root, unknown, found, workers, None)
    for video in videos:
        if kinds[video.path]:
            raise ShardError(
                f"{where}:{video.line}: {video.path!r} is no video (counted as: {kinds[video.path]}); remove the line "
                "or replace the file"
            )
        if video.path not in found.broken:
            found.videos.append(video)
    return found


def _kind_by_name(root: Path, path: str) -> str | None:
    """Why a file is left out, as far as its name and size say; None where its content has to."""
    name = path.lower()
    if name.endswith(_PICTURES):
        return "picture"
    if name.endswith(_UNFINISHED):
        return "unfinished download"
    return "empty" if (root / path).stat().st_size == 0 else None


def _kinds_by_content(
    root: Path,
    paths: Sequence[str],
    found: Found,
    workers: int | None,
    progress: Callable[[int], object] | None,
) -> dict[str, str]:
    """Why each file is left out; empty for videos, and for broken ones, which `found` takes."""
    kinds: dict[str, str] = {}
    with ThreadPoolExecutor(workers or len(os.sched_getaffinity(0))) as pool:
        for path, reason in zip(paths, pool.map(lambda path: _why_no_video(root / path), paths), strict=True):
            kinds[path] = ""
            if reason and is_video_file(path) and not _may_be_other(root / path):
                found.broken[path] = reason
            elif reason:
                kinds[path] = "no video"
            if progress:
                progress(1)
    return kinds


def _why_no_video(path: Path) -> str:
    """Why a file is no video; empty if it opens and has a frame. A file that begins like a picture needs two frames."""
    try:
        wanted = 2 if _head(path).startswith(_PICTURE_HEADS) else 1
        frames = sum(1 for _ in islice(iter_frames(path), wanted))
    except VideoError as error:
        return str(error)
    except OSError as error:
        raise ShardError(f"{path}: {error.strerror or error}; make the file readable, or move it away") from None
    return "" if frames == wanted else "it is a single picture"


def _may_be_other(path: Path) -> bool:
    """Whether a file with a video's name that is no video may be a picture or a text."""
    head = _head(path)
    return head.startswith(_PICTURE_HEADS) or (path.name.lower().endswith(_AMBIGUOUS) and b"\0" not in head)


def _head(path: Path) -> bytes:
    with path.open("rb") as stream:
        return stream.read(4096)


def _no_videos(root: Path, found: Found) -> str:
    folders = Counter(str(PurePosixPath(path).parent) for path in found.left_out.get("picture", ()))
    frames = [folder for folder in folders if folder != "."]
    if frames:
        first = frames[0]
        return (
            f"holds {len(frames)} {_plural(len(frames), 'folder', 'folders')} of pictures (e.g. {first!r} with "
            f"{folders[first]}) and no videos. Frames are packed from a list: lines of `folder frames label`, such as "
            f"`{first} {folders[first]} 0`, as --annotations of build_shards, with --image-template as they are named"
        )
    return f"no videos in its sub-folders; expected e.g. {root / 'surfing' / 'clip.mp4'}"


def split_name(name: str) -> str | None:
    """train, val or test for a name of that split, such as `Train`, `validation`, `test_set` or `val_256`."""
    match = re.fullmatch(r"([a-z]+?)(?:[-_ ]?(?:set|split|data|videos?|\d+))?", name.lower())
    return _SPLIT_NAMES.get(match[1]) if match else None


def _classify(root: Path, paths: Sequence[str], notices: list[str]) -> list[Video]:
    """Raises ShardError where a video has no class, or folders are half splits and half classes."""
    parts = {path: PurePosixPath(path).parts for path in paths}
    for path in paths:
        if len(parts[path]) == 1:
            raise ShardError(f"{root / path}: lies in no class folder; move it into one, or name its class in a CSV")
    top = {part[0]: split_name(part[0]) for part in parts.values()}
    splits = {split for split in top.values() if split}
    others = [name for name, split in top.items() if not split]
    if splits and not others:
        for path in paths:
            if len(parts[path]) == 2:
                raise ShardError(
                    f"{root / path}: lies in the split {parts[path][0]!r} and in no class folder; expected "
                    f"{parts[path][0]}/CLASS/{parts[path][1]}, or a CSV that names classes and splits"
                )
        return _noted(notices, "above", top, [Video(path, parts[path][1], top[parts[path][0]]) for path in paths])
    if splits - {"train"}:
        named = _some(name for name, split in top.items() if split)
        raise ShardError(
            f"{root}: named like a split: {named}; beside them, not named like one: {_some(others)}; move one kind "
            "elsewhere, or name classes and splits in a CSV"
        )
    if splits:
        notices.append(
            f"{_some(name for name in top if top[name])} is taken for a class, for {_some(others)} is no split"
        )
    second = {path: split_name(parts[path][1]) if len(parts[path]) > 2 else None for path in paths}
    if all(second.values()) and len(set(second.values())) > 1:
        names = {parts[path][1]: second[path] for path in paths}
        return _noted(notices, "below", names, [Video(path, parts[path][0], second[path]) for path in paths])
    if len(set(second.values()) - {None}) > 1:
        inside, outside = (next(path for path in paths if bool(second[path]) is split) for split in (True, False))
        notices.append(
            f"no splits are taken from folders: {inside!r} lies in one named like a split, but {outside!r} in none"
        )
    return [Video(path, parts[path][0]) for path in paths]


def _noted(notices: list[str], place: str, names: dict[str, str | None], videos: list[Video]) -> list[Video]:
    shown = ", ".join(f"{name!r} as {split}" for name, split in names.items())
    notices.append(f"existing splits {place} the class folders are used: {shown}")
    return videos


def settle_splits(videos: Sequence[Video], notices: list[str]) -> list[Video]:
    """Completes existing splits: without val, test becomes val, or a share of train is drawn for it later.

    Either all videos have a split or none has. Notices tell what was done, and which classes a split lacks. Raises
    ShardError.
    """
    counts = Counter(video.split for video in videos)
    if set(counts) == {None}:
        return list(videos)
    if None in counts:
        missing = next(video for video in videos if not video.split)
        raise ShardError(f"{missing.path!r} has no split while others have one; fill the column or leave it out")
    if not counts["train"]:
        raise ShardError(f"all videos are in {_some(filter(None, counts))}, none to train on; name a split `train`")
    if not counts["val"] and counts["test"]:
        notices.append(f"there is no val: the {counts['test']} videos of test are taken for it")
        videos = [replace(video, split="val") if video.split == "test" else video for video in videos]
    elif not counts["val"]:
        notices.append("there is a train split alone: a share of it is drawn for val")
        return [replace(video, split=None) for video in videos]
    labels = {split: {video.label for video in videos if video.split == split} for split in SPLITS}
    everywhere = set().union(*labels.values())
    for split, own in labels.items():
        if own and (lacking := sorted(everywhere - own)):
            what = "a model learns nothing about them" if split == "train" else "nothing is measured for them"
            notices.append(
                f"{len(lacking)} of {len(everywhere)} classes have no video in {split} ({_some(lacking)}): {what}"
            )
    return list(videos)


def read_table(path: str | Path, root: str | Path | None = None) -> list[Video]:
    """The videos of a CSV (UTF-8; commas, semicolons or tabs) with the columns path, label and, if wanted, split.

    Raises ShardError, one line of `file:line`, the value and the fix.
    """
    path, root = Path(path), None if root is None else Path(root)
    text = _read_text(path)
    first = text.split("\n", 1)[0]
    delimiter = next((mark for mark in ";\t" if mark in first and "," not in first), ",")
    reader = csv.reader(io.StringIO(text, newline=""), strict=True, delimiter=delimiter)
    videos: dict[str, Video] = {}
    try:
        header = [column.strip().lower() for column in next(reader, [])]
        if sorted(header) not in (sorted(_TABLE_COLUMNS), sorted(_TABLE_COLUMNS[:2])):
            raise ShardError(
                f"{path}:1: the header is {','.join(header)!r}; the first line must be `path,label` or "
                "`path,label,split`"
            )
        for row in reader:
            if row:
                video = _read_row(row, header, path, reader.line_num, root)
                if video.path in videos:
                    raise ShardError(
                        f"{path}:{video.line}: {video.path!r} is there twice, first on line {videos[video.path].line}; "
                        "remove one of the two"
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
        if not values[column]:
            raise ShardError(f"{where}: no {column}; expected e.g. `surfing/clip.mp4,surfing`")
    split = values.get("split") or None
    if split is not None and split_name(split) is None:
        raise ShardError(f"{where}: split is {split!r}; expected train, val, test or nothing")
    try:
        return Video(path_below(values["path"], root), values["label"], split and split_name(split), line)
    except ValueError as error:
        raise ShardError(f"{where}: {error}") from None


def _plural(count: int, one: str, many: str) -> str:
    return one if count == 1 else many


def _some(names: Iterable[str]) -> str:
    names = list(names)
    return ", ".join(map(repr, names[:_SHOWN])) + (", …" if len(names) > _SHOWN else "")
