"""Lists for one's own videos: class names, and which videos train, validate and test; and the shards of a list.

The lists are plain text files that people may edit. Until the shards are finished, lists that nobody has edited follow
the input: a video that was corrected, removed or added changes its own line and no other.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
import re
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePosixPath
from typing import Any

from shards.annotations import Annotation, Label, format_annotation, parse_annotations, parse_labels
from shards.files import require_folder, write_atomically
from shards.folders import SPLITS, Found, Video, check_videos, classes_of, scan_folders, settle_splits
from shards.format import MANIFEST, ShardError
from shards.plan import epoch_order
from shards.tables import read_table
from shards.walk import describe
from shards.writer import build_shards

LABELS = "labels.csv"
_RECORD = "prepared.json"  # the input of the lists and their checksums, which show whether they were edited
_SHOWN = 3


@dataclass
class Prepared:
    """lists: split to its videos; val and train always, test where there is one. notices: one line each."""

    labels: list[str]
    lists: dict[str, list[Annotation]]
    made: bool
    notices: list[str] = field(default_factory=list)


def list_file(split: str) -> str:
    """File name of the annotation list of a split."""
    return f"{split}.txt"


def shards_folder(output: str | Path, split: str) -> Path:
    """Where the shards of a split lie below the output folder."""
    return Path(output) / "shards" / split


def prepare_lists(
    root: str | Path,
    output: str | Path,
    *,
    table: str | Path | None = None,
    val_share: float = 0.2,
    seed: int = 0,
    skip_broken: bool = False,
    workers: int | None = None,
    progress: Callable[[int], object] | None = None,
) -> Prepared:
    """Makes or reads labels.csv, train.txt, val.txt (and test.txt) in `output` for the videos below `root`.

    Everything is looked at before anything is written: each video is opened. skip_broken: videos that do not open are
    left out instead of an error. table: see `read_table`. Raises ShardError, ValueError for a bad val_share.
    """
    root, output = Path(root), Path(output)
    settings = {"val_share": val_share, "seed": seed}
    present = [name for name in (LABELS, *map(list_file, SPLITS)) if (output / name).exists()]
    required = [LABELS, list_file("train"), list_file("val")]
    if present and (missing := [name for name in required if name not in present]):
        raise ShardError(f"{output / missing[0]}: missing beside {present[0]}; delete the lists to have them made anew")
    finished = [split for split in SPLITS if (shards_folder(output, split) / MANIFEST).exists()]
    lists = _read_lists(root, output) if present else {}
    record = _read_record(output)
    edited = bool(present) and record.get("lists") != _checksums(output)
    if present and (edited or all(split in finished for split in lists)):
        _refuse_missing(root, output, {split: lists[split] for split in lists if split not in finished}, skip_broken)
        prepared = Prepared(parse_labels(output / LABELS), lists, made=False)
        prepared.notices += _unlisted(root, output, table, lists)
        return prepared
    known = [item.name for split in finished for item in lists.get(split, ())]
    if table is None:
        found = scan_folders(root, known=known, workers=workers, progress=progress)
    else:
        found = check_videos(root, read_table(table, root), str(table), workers)
    _settle_broken(root, found, skip_broken)
    videos = settle_splits(found.videos, found.notices)
    if table is None:
        _refuse_root_above(root, videos, found.notices)
    kept = _kept_splits(lists) if finished or record.get("settings") == settings else {}
    videos = split_videos(videos, val_share, seed, kept=kept, closed=finished)
    if finished:
        _refuse_other_classes(output, videos, finished[0])
    left = [video.path for video in videos if video.split is None]
    open_lists = {split: listed for split, listed in lists.items() if split not in finished}
    changed = _changes(open_lists, [video for video in videos if video.split not in finished])
    write_lists([video for video in videos if video.split], output, finished=finished)
    write_atomically(
        output / _RECORD, json.dumps({"settings": settings, "lists": _checksums(output)}, indent=1).encode()
    )
    prepared = Prepared(parse_labels(output / LABELS), _read_lists(root, output), made=True)
    prepared.notices += [*filter(None, [describe(found.left_out)]), *found.notices]
    if lists and changed:
        prepared.notices.append(f"the lists were made anew, as nobody has edited them: {changed}")
    if left:
        prepared.notices.append(_left_of_finished(output, left, finished))
    return prepared


def _refuse_other_classes(output: Path, videos: Sequence[Video], finished: str) -> None:
    """Raises ShardError if the classes are no longer those of the split `finished`, whose shards are built."""
    if readable_names(videos) != parse_labels(output / LABELS):
        raise ShardError(
            f"{output}: the classes are others than when {shards_folder(output, finished)} was built; put the videos "
            f"back, or delete {output} and run again"
        )


def _settle_broken(root: Path, found: Found, skip_broken: bool) -> None:
    """Videos that do not open are an error, or left out."""
    if found.broken and not skip_broken:
        first, reason = next(iter(found.broken.items()))
        others = [*found.broken][1:]
        more = f"; {len(others)} more do not open: {_some(others)}" if others else ""
        raise ShardError(
            f"{str(root / first)!r}: {reason}{more}. Nothing was written; replace or remove such videos, or leave them "
            "out with --on-error skip"
        )
    found.left_out["video that does not open"] = [*found.broken]
    if not found.videos:
        first = next(iter(found.broken))
        raise ShardError(f"{root}: none of the {len(found.broken)} videos opens, the first is {first!r}")


def _refuse_root_above(root: Path, videos: Sequence[Video], notices: list[str]) -> None:
    """A root one folder too high makes one class of everything, and its model is always right and of no use."""
    labels = {video.label for video in videos}
    if len(labels) > 1:
        return
    notices.append(f"all {len(videos)} videos are of one class, {labels.pop()!r}: a model needs two to tell apart")
    tops = {PurePosixPath(video.path).parts[0] for video in videos}
    below = {PurePosixPath(video.path).parts[1] for video in videos if video.path.count("/") > 1}
    if len(tops) == 1 and len(below) > 1:
        raise ShardError(
            f"{root}: {notices[-1]}; if the folders in it are classes or splits ({_some(sorted(below))}), give "
            f"{root / tops.pop()}"
        )


def split_videos(
    videos: Sequence[Video],
    val_share: float,
    seed: int,
    *,
    kept: Mapping[str, str] | None = None,
    closed: Collection[str] = (),
) -> list[Video]:
    """The same videos, each with a split: `val_share` of every class validates, drawn by `seed`.

    Of videos with several classes `val_share` of all validates: no draw gives every class its share.
    A class keeps at least one video to train on, and gives at least one to val where it has two. Splits that somebody
    chose stay. kept: paths to the splits that they have already. closed: splits that take no more videos; a video
    that would go there gets None. Raises ValueError.
    """
    if not 0 < val_share < 1:
        raise ValueError(f"val share: expected a number between 0 and 1, got {val_share}")
    kept = kept or {}
    splits: dict[str, str | None] = {video.path: video.split for video in videos}
    group = {video.path: video.label if isinstance(video.label, str) else "" for video in videos}
    for number, label in enumerate(sorted(set(group.values()))):
        own = [video.path for video in videos if group[video.path] == label and video.split is None]
        if not own:
            continue
        wanted = min(max(1, round(val_share * len(own))), len(own) - 1)
        order = [own[position] for position in epoch_order(len(own), seed, number).tolist()]
        have = sum(kept.get(path) == "val" for path in order)
        for path in order:
            if path not in kept:
                splits[path] = "val" if have < wanted else "train"
                have += splits[path] == "val"
            else:
                splits[path] = kept[path]
    return [
        replace(video, split=splits[video.path] if splits[video.path] not in closed or video.path in kept else None)
        for video in videos
    ]


def readable(label: str) -> str:
    """A class name as words, for the text tower: `IceSkating` and `ice_skating` become `ice skating`.

    Words in capitals (`TV`) stay as they are.
    """
    spaced = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", " ", re.sub(r"[_\-.]+", " ", label))
    words = spaced.split()
    return " ".join(word if word.isupper() and len(word) > 1 else word.lower() for word in words) or label


def readable_names(videos: Sequence[Video]) -> list[str]:
    """Class names by label, in the order of the classes. Raises ShardError when two would read the same."""
    labels = sorted(classes_of(videos))
    names = [readable(label) for label in labels]
    twice = [name for name, count in Counter(names).items() if count > 1]
    if twice:
        same = [label for label, name in zip(labels, names, strict=True) if name == twice[0]]
        raise ShardError(f"the classes {', '.join(map(repr, same))} all read {twice[0]!r}; rename or join the folders")
    return names


def write_lists(videos: Sequence[Video], output: str | Path, *, finished: Collection[str] = ()) -> dict[str, int]:
    """Writes labels.csv and a list for each split into `output`; returns the videos of each split.

    Nothing is written before everything is checked. Labels are numbered in the order of the classes' names. The lists
    of `finished` splits stay as they are. Raises ShardError when two classes would read the same, a name cannot stand
    in a list, or train or val stays empty.
    """
    output = Path(output)
    names = readable_names(videos)
    numbers = {label: number for number, label in enumerate(sorted(classes_of(videos)))}
    counts = {split: sum(video.split == split for video in videos) for split in SPLITS}
    for split in SPLITS[:2]:
        if not counts[split]:
            raise ShardError(f"no video is left for {split}; add videos: a class needs two to have one in each split")
    lists: dict[str, bytes] = {}
    try:
        for split in SPLITS:
            own = [video for video in videos if video.split == split]
            lines = [f"{format_annotation(video.path, None, _label(video, numbers))}\n" for video in own]
            if lines and split not in finished:
                lists[list_file(split)] = "".join(lines).encode()
    except ValueError as error:
        raise ShardError(f"{error}; nothing was written") from None
    lists[LABELS] = format_labels(names)
    require_folder(output)
    for name, content in lists.items():
        write_atomically(output / name, content)
    if not counts["test"] and "test" not in finished:
        (output / list_file("test")).unlink(missing_ok=True)
    return {split: count for split, count in counts.items() if count}


def _label(video: Video, numbers: Mapping[str, int]) -> Label:
    labels = tuple(numbers[label] for label in video.labels)
    return labels[0] if len(labels) == 1 else labels


def format_labels(names: Sequence[str]) -> bytes:
    """A class list of these names."""
    table = io.StringIO(newline="")
    csv.writer(table, lineterminator="\n").writerows([("id", "name"), *enumerate(names)])
    return table.getvalue().encode()


def pack_split(
    videos: Sequence[Annotation],
    output: Path,
    *,
    short_side: int,
    store: str,
    progress: Callable[[int], object],
    **settings: Any,
) -> str:
    """Builds the shards of one split in `output`, and returns a line about them.

    short_side: for frames; stored videos keep their size. progress: called with the videos added since its last call.
    settings: other arguments of `build_shards`, whose errors are raised. Replaces an unfinished build of other input.
    """
    manifest = build_shards(
        videos,
        output=output,
        short_side=short_side if store == "frames" else None,
        store=store,
        replace_unfinished=True,
        progress=lambda num_videos, *_: progress(num_videos),
        **settings,
    )
    skipped = f", {len(manifest.skipped)} skipped" if manifest.skipped else ""
    return f"{output}: {manifest.num_videos} videos{skipped}"


def _read_lists(root: Path, output: Path) -> dict[str, list[Annotation]]:
    """Raises ShardError for a bad line, and for a video in two lists."""
    classes = len(parse_labels(output / LABELS))
    lists = {
        split: parse_annotations(output / list_file(split), classes, labels_file=output / LABELS, root=root)
        for split in SPLITS
        if (output / list_file(split)).exists()
    }
    owner: dict[str, str] = {}
    for split, videos in lists.items():
        if both := [one for one in videos if one.name in owner]:
            raise ShardError(
                f"{output / list_file(split)}:{both[0].line}: {both[0].name!r} is in {list_file(owner[both[0].name])} "
                f"too, and {len(both) - 1} more are; a model must be measured on videos that it has not seen: remove "
                "them from one of the lists"
            )
        owner |= {one.name: split for one in videos}
    return lists


def _refuse_missing(root: Path, output: Path, lists: Mapping[str, Sequence[Annotation]], skip_broken: bool) -> None:
    for split, videos in lists.items():
        gone = [one for one in videos if not (root / one.name).exists()]
        if gone and not skip_broken:
            raise ShardError(
                f"{output / list_file(split)}:{gone[0].line}: {len(gone)} of {len(videos)} videos are not in {root}: "
                f"{_some([one.name for one in gone])}; put them back or remove their lines, or delete {LABELS} and "
                "the lists to have them made anew"
            )


def _unlisted(
    root: Path, output: Path, table: str | Path | None, lists: Mapping[str, Sequence[Annotation]]
) -> list[str]:
    """A notice if there are videos in no list: edited lists are not extended."""
    known = {one.name for videos in lists.values() for one in videos}
    try:
        videos = read_table(table, root) if table else scan_folders(root, known=known).videos
    except ShardError:  # e.g. no class folders, because the lists were made from a table
        return []
    new = [video.path for video in videos if video.path not in known]
    if not new:
        return []
    return [
        f"{len(new)} of {len(videos)} videos are in no list and left out, the first is {new[0]!r}. Add lines for them, "
        f"or delete {LABELS} and the lists to have them made anew; either way delete {output / 'shards'} as well"
    ]


def _left_of_finished(output: Path, left: Sequence[str], finished: Sequence[str]) -> str:
    return (
        f"{len(left)} new videos would belong to {' or '.join(finished)}, which is built already, and are left out: "
        f"{_some(left)}; delete {output} and run again to have them"
    )


def _kept_splits(lists: Mapping[str, Sequence[Annotation]]) -> dict[str, str]:
    return {one.name: split for split, videos in lists.items() for one in videos}


def _changes(lists: Mapping[str, Sequence[Annotation]], videos: Sequence[Video]) -> str:
    """How the videos differ from those of the lists, in words; empty if they do not."""
    before, now = set(_kept_splits(lists)), {video.path for video in videos if video.split}
    parts = [f"{len(names)} {what} ({_some(sorted(names))})" for what, names in
             (("gone", before - now), ("new", now - before)) if names]  # fmt: skip
    return ", ".join(parts)


def _read_record(output: Path) -> dict[str, object]:
    try:
        record = json.loads((output / _RECORD).read_bytes())
    except (OSError, ValueError):
        return {}
    return record if isinstance(record, dict) else {}


def _checksums(output: Path) -> dict[str, str]:
    files = [output / name for name in (LABELS, *map(list_file, SPLITS))]
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in files if path.exists()}


def _some(names: Sequence[str]) -> str:
    return ", ".join(map(repr, names[:_SHOWN])) + (", …" if len(names) > _SHOWN else "")
