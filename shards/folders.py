"""What a folder of one's own videos holds: videos, classes and splits, and what is left out.

    videos/surfing/a.mp4, videos/ice_skating/b/c.mov …     the folder below the root is the class
    videos/train/surfing/a.mp4, videos/test/surfing/…      existing splits, of any usual name, above or below classes

A file's content says whether it is a video, whatever its name.
"""

from __future__ import annotations

import os
import re
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path, PurePosixPath

from shards.format import ShardError
from shards.list_lines import is_video_file
from shards.video import VideoError, iter_frames
from shards.walk import Listing, file_identity, list_files

SPLITS = ("train", "val", "test")
_SPLIT_NAMES = {
    **dict.fromkeys(("train", "training", "trainval"), "train"),
    **dict.fromkeys(("val", "valid", "validation", "validate", "dev"), "val"),
    **dict.fromkeys(("test", "testing", "eval", "evaluation"), "test"),
}
_SPLIT_WORD = re.compile(rf"(?<![a-z])({'|'.join(_SPLIT_NAMES)})(?:set|split|data|videos?|clips?|list)?(?![a-z])")
_NEUTRAL_WORDS = re.compile(r"(?<![a-z])(?:set|split|part|data|videos?|clips?|list)(?![a-z])|[\W\d_]+")
_PICTURES = (
    ".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff", ".heic", ".heif", ".avif", ".ppm", ".pgm", ".npy",
    ".exr",
)  # fmt: skip
# What cameras write beside a video: the same recording once more, small.
_CAMERA_COPIES = (".lrv", ".lrf", ".thm")
_UNFINISHED = (".part", ".crdownload", ".ytdl", ".aria2", ".download", ".tmp", ".!ut")
_PICTURE_HEADS = re.compile(
    rb"\xff\xd8\xff|\x89PNG|GIF8|BM|II\*\0|MM\0\*|RIFF....WEBP|....ftyp(?:avif|mif1|heic|heix|heim|heis)", re.DOTALL
)
_AMBIGUOUS = (".ts", ".mod", ".rm")  # texts have these names as well: TypeScript, modules, …
_SHOWN = 3


@dataclass(frozen=True)
class Video:
    """A video file below the root, its class as found, its split if one was chosen, and its line in a table.

    label: a tuple of classes, sorted, in a table that names several a video.
    """

    path: str
    label: str | tuple[str, ...]
    split: str | None = None
    line: int | None = field(default=None, compare=False)

    @property
    def labels(self) -> tuple[str, ...]:
        """All classes of the video."""
        return self.label if isinstance(self.label, tuple) else (self.label,)


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
    found, paths, listing = _look_at_all(root, known, workers, progress)
    if not paths:
        raise ShardError(f"{root}: {_no_videos(root, found)}")
    videos = _classify(root, paths, found.notices)
    found.videos = [video for video in videos if video.path not in found.broken]
    empty = sorted(
        {PurePosixPath(path).parts[0] for path in listing.files if "/" in path}
        - {PurePosixPath(path).parts[0] for path in paths}
    )
    if listing.empty_folders:
        count = len(listing.empty_folders)
        found.notices.append(f"{count} empty {_plural(count, 'folder', 'folders')}: {_some(listing.empty_folders)}")
    if empty:
        pictures = {PurePosixPath(path).parts[0] for path in found.left_out.get("picture", ())}
        what = "pictures and no videos" if pictures.issuperset(empty) else "no videos"
        found.notices.append(f"{_some(empty)}: {what} in there, so no {_plural(len(empty), 'class', 'classes')}")
    return found


def find_videos(root: str | Path, *, known: Collection[str] = ()) -> tuple[list[str], dict[str, list[str]]]:
    """Paths of all videos below a folder, sorted, those that do not open too; and what is left out, by reason.

    known: paths that are taken for videos without a look into them.
    """
    found, paths, _ = _look_at_all(Path(root), known, None, None)
    return paths, found.left_out


def _look_at_all(
    root: Path, known: Collection[str], workers: int | None, progress: Callable[[int], object] | None
) -> tuple[Found, list[str], Listing]:
    """Looks at all files: what was found, without classes, the paths of all videos (broken ones too), and all files."""
    listing = list_files(root)
    found = Found([], listing.left_out)
    kinds = {path: _kind_by_name(root, path) for path in listing.files if path not in known}
    unknown = [path for path, kind in kinds.items() if kind is None]
    kinds |= _kinds_by_content(root, unknown, found, workers, progress)
    for path, kind in kinds.items():
        if kind:
            found.left_out[kind].append(path)
    return found, [path for path in listing.files if not kinds.get(path)], listing


def check_videos(root: Path, videos: Sequence[Video], where: str, workers: int | None = None) -> Found:
    """The videos of a table after a look into their files. Raises ShardError for what is missing or no video at all."""
    missing = [video for video in videos if not (root / video.path).is_file()]
    if missing:
        raise ShardError(
            f"{where}:{missing[0].line}: {len(missing)} of {len(videos)} videos are not in {root}: "
            f"{_some(video.path for video in missing)}; correct the paths, or put the files there"
        )
    _refuse_one_file_twice(root, videos, where)
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


def _refuse_one_file_twice(root: Path, videos: Sequence[Video], where: str) -> None:
    """Raises ShardError where links make two paths of one file."""
    first: dict[tuple[int, int], Video] = {}
    for video in videos:
        twin = first.setdefault(file_identity(root / video.path), video)
        if twin is not video:
            raise ShardError(
                f"{where}:{video.line}: {video.path!r} is the file of line {twin.line}, {twin.path!r}; remove one of "
                "the two"
            )


def _kind_by_name(root: Path, path: str) -> str | None:
    """Why a file is left out, as far as its name and size say; None where its content has to."""
    name = path.lower()
    if name.endswith(_PICTURES):
        return "picture"
    if name.endswith(_CAMERA_COPIES):
        return "a camera's small copy"
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
        wanted = 2 if _PICTURE_HEADS.match(_head(path)) else 1
        frames = sum(1 for _ in islice(iter_frames(path), wanted))
    except VideoError as error:
        return str(error)
    except OSError as error:
        raise ShardError(f"{path}: {error.strerror or error}; make the file readable, or move it away") from None
    return "" if frames == wanted else "it is a single picture"


def _may_be_other(path: Path) -> bool:
    """Whether a file with a video's name that is no video may be a picture or a text."""
    head = _head(path)
    return bool(_PICTURE_HEADS.match(head)) or (path.name.lower().endswith(_AMBIGUOUS) and b"\0" not in head)


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
    split, rest = _split_and_rest(name)
    return None if rest else split


def _split_and_rest(name: str) -> tuple[str | None, str]:
    """The split that a name tells, and the words that say something else: `val`, `ucf` of `UCF101_val_videos`."""
    lower = name.lower()
    words = _SPLIT_WORD.findall(lower)
    split = _SPLIT_NAMES[words[0]] if len(words) == 1 else None
    return split, _NEUTRAL_WORDS.sub(" ", _SPLIT_WORD.sub(" ", lower)).strip()


def _ready_splits(names: Collection[str]) -> dict[str, str] | None:
    """Name to split where names differ in the split alone: `train` and `val`, or `ucf_train` and `ucf_test`."""
    told = {name: _split_and_rest(name) for name in names}
    splits = {name: split for name, (split, _) in told.items() if split}
    rests = {rest for _, rest in told.values()}
    if len(splits) < len(told) or len(rests) > 1 or (rests != {""} and len(set(splits.values())) == 1):
        return None
    return splits


def _classify(root: Path, paths: Sequence[str], notices: list[str]) -> list[Video]:
    """Raises ShardError where a video has no class, or folders are half splits and half classes."""
    parts = {path: PurePosixPath(path).parts for path in paths}
    for path in paths:
        if len(parts[path]) == 1:
            raise ShardError(f"{root / path}: lies in no class folder; move it into one, or name its class in a CSV")
    tops = {part[0] for part in parts.values()}
    if above := _ready_splits(tops):
        for path in paths:
            if len(parts[path]) == 2:
                raise ShardError(
                    f"{root / path}: lies in the split {parts[path][0]!r} and in no class folder; expected "
                    f"{parts[path][0]}/CLASS/{parts[path][1]}, or a CSV that names classes and splits"
                )
        if all(split_name(part[1]) for part in parts.values()):
            raise ShardError(
                f"{root / paths[0]}: lies in a split within a split, {'/'.join(parts[paths[0]][:2])!r}; move the class "
                "folders up, so that they lie in the first"
            )
        return _with_notice(
            notices,
            "above",
            above,
            [Video(path, one_spelling(parts[path][1]), above[parts[path][0]]) for path in paths],
        )
    _refuse_half_splits(root, parts.values(), notices)
    second = {path: parts[path][1] if len(parts[path]) > 2 else "" for path in paths}
    if (below := _ready_splits(set(second.values()))) and len(set(below.values())) > 1:
        return _with_notice(
            notices, "below", below, [Video(path, one_spelling(parts[path][0]), below[second[path]]) for path in paths]
        )
    inside = {path: split_name(second[path]) for path in paths}
    if len(set(inside.values()) - {None}) > 1:
        one, other = (next(path for path in paths if bool(inside[path]) is split) for split in (True, False))
        notices.append(
            f"no splits are taken from folders: {one!r} lies in one named like a split, but {other!r} in none"
        )
    return [Video(path, one_spelling(parts[path][0])) for path in paths]


def one_spelling(name: str) -> str:
    """One spelling of a class: macOS writes letters and their accents apart."""
    return unicodedata.normalize("NFC", name)


def _refuse_half_splits(root: Path, parts: Collection[tuple[str, ...]], notices: list[str]) -> None:
    """Raises ShardError where some folders are named like splits and others not, unless these are classes."""
    tops = sorted({part[0] for part in parts})
    splits = [top for top in tops if split_name(top)]
    others = [top for top in tops if top not in splits]
    owners = defaultdict(set)
    for part in parts:
        if len(part) > 2:
            owners[part[1]].add(part[0])
    shared = sorted(name for name, tops_of in owners.items() if len(tops_of) > 1)
    if {split_name(top) for top in splits} - {"train"} or (splits and shared):
        raise ShardError(
            f"{root}: named like a split: {_some(splits)}; beside them, not named like one: {_some(others)}; rename "
            "these `train`, `val` or `test`, move them elsewhere, or name classes and splits in a CSV"
        )
    if splits:
        notices.append(f"{_some(splits)} is taken for a class, for {_some(others)} is no split")
    if shared and not all(map(split_name, shared)):
        notices.append(
            f"{_some(sorted(owners[shared[0]]))} are taken for classes; if these are splits, for {_some(shared)} "
            f"{_plural(len(shared), 'is', 'are')} in several of them, rename them `train`, `val` or `test`"
        )


def _with_notice(notices: list[str], place: str, names: dict[str, str], videos: list[Video]) -> list[Video]:
    shown = ", ".join(f"{name!r} as {split}" for name, split in sorted(names.items()))
    notices.append(f"existing splits {place} the class folders are used: {shown}")
    return videos


def classes_of(videos: Iterable[Video]) -> set[str]:
    """The classes that occur."""
    return {label for video in videos for label in video.labels}


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
    labels = {split: classes_of(video for video in videos if video.split == split) for split in SPLITS}
    everywhere = set().union(*labels.values())
    for split, own in labels.items():
        if own and (lacking := sorted(everywhere - own)):
            what = "a model learns nothing about them" if split == "train" else "nothing is measured for them"
            notices.append(
                f"{len(lacking)} of {len(everywhere)} classes have no video in {split} ({_some(lacking)}): {what}"
            )
    return list(videos)


def _plural(count: int, one: str, many: str) -> str:
    return one if count == 1 else many


def _some(names: Iterable[str]) -> str:
    names = list(names)
    return ", ".join(map(repr, names[:_SHOWN])) + (", …" if len(names) > _SHOWN else "")
