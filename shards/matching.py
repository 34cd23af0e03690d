"""Finds the video files that belong to the entries of a data set's official lists."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from shards.format import ShardError
from shards.list_lines import is_video_file
from shards.official_files import Official, file_stem
from shards.walk import list_files


@dataclass
class Matched:
    """videos: path below the root and labels, in the order of the official list. missing: the likeliest name of each.

    untimed: those of the videos whose names do not say which part of a longer recording they are.
    """

    videos: list[tuple[str, tuple[int, ...]]]
    missing: list[str]
    untimed: list[str]


class VideoFiles:
    """The video files below a folder, by name without ending and by class folder and name.

    A name whose letters differ in case alone is taken where no file has the very name.
    """

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
            stem = file_stem(place.name).lower()
            self._by_key[stem].append(path)
            self._by_key[f"{place.parent.name.lower()}/{stem}"].append(path)

    def find(self, keys: tuple[str, ...], split: str) -> str | None:
        """The file of the first key that has one; of several files, the likeliest by the names of their folders."""
        for key in keys:
            if found := self._by_key.get(key.lower()):
                stem = key.rpartition("/")[2]
                return min(found, key=lambda path: (file_stem(PurePosixPath(path).name) != stem, _rank(path, split)))
        return None


def _rank(path: str, split: str) -> int:
    """Kinetics' replacements for broken files come first, then folders that are named like the split."""
    folders = path.lower().split("/")[:-1]
    for rank, prefix in enumerate(("replacement", split)):
        if any(folder.startswith(prefix) for folder in folders):
            return rank
    return 2


def match_videos(official: Official, files: VideoFiles) -> dict[str, Matched]:
    """The videos of each split that are there. A file belongs to the first split that names it. Raises ShardError."""
    owner: dict[str, str] = {}
    matched: dict[str, Matched] = {}
    for split, entries in official.splits.items():
        matched[split] = found = Matched([], [], [])
        again = 0
        for entry in entries:
            path = files.find(entry.keys, split)
            untimed = path is None and bool(entry.untimed)
            if untimed:
                path = files.find((entry.untimed,), split)
            if path is None:
                found.missing.append(entry.keys[0])
            elif path in owner:
                again += 1
            else:
                owner[path] = split
                found.videos.append((path, entry.labels))
                if untimed:
                    found.untimed.append(path)
        official.notices += _notices(split, found, again)
    if not owner:
        example = next((entry.keys[0] for entries in official.splits.values() for entry in entries), None)
        expected = f"expected e.g. {example}.mp4, in any sub-folder" if example else "the official lists are empty"
        raise ShardError(f"{files.root}: holds none of the videos; {expected}")
    return matched


def _notices(split: str, found: Matched, again: int) -> list[str]:
    notices = []
    if again:
        notices.append(f"{again} entries of {split} name a video that is listed before, and are left out")
    if found.untimed:
        notices.append(
            f"{len(found.untimed)} videos of {split} have no times in their names, such as {found.untimed[0]!r}: they "
            "are taken as cut to the times of the list"
        )
    return notices
