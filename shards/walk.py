"""Lists the files of a folder, each once: nothing hidden, no link followed twice, a reason for each file left out."""

from __future__ import annotations

import os
from collections import defaultdict, deque
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

from shards.format import ShardError

# What systems and programs leave beside people's files. A name that begins with a dot is hidden too: `._a.mp4` is
# what macOS keeps about `a.mp4` on other disks.
_SYSTEM_NAMES = frozenset((
    "__macosx", "@eadir", "thumbs.db", "ehthumbs.db", "desktop.ini", "lost+found", "$recycle.bin", "#recycle",
    "@recycle", "#snapshot", "system volume information",
))  # fmt: skip
HIDDEN = "hidden"
LINK_AGAIN = "linked twice"
LINK_ABOVE = "linked to a folder above"
LINK_BROKEN = "linked to nothing"
NO_FILE = "no regular file"
_SHOWN = 3


@dataclass
class Listing:
    """files: paths below the root, sorted, every real file once. left_out: reason to paths.

    empty_folders: those that hold nothing, or nothing but what is hidden.
    """

    files: list[str]
    left_out: dict[str, list[str]] = field(default_factory=lambda: defaultdict(list))
    empty_folders: list[str] = field(default_factory=list)


def is_hidden(name: str) -> bool:
    """Whether systems or programs, rather than users, make files or folders of this name."""
    return name.startswith(".") or name.lower() in _SYSTEM_NAMES


def list_files(root: str | Path) -> Listing:
    """All files below a folder. Links are followed, to each folder and file once.

    A file that several names lead to is listed under its own name before that of a link, else under the first.
    Raises ShardError for a folder that cannot be read.
    """
    walk = _Walk(Path(root))
    walk.visit("")
    while walk.links:
        walk.follow(walk.links.popleft())
    return Listing(sorted(walk.files.values()), walk.left_out, sorted(walk.empty_folders))


class _Walk:
    """The state of a walk: folders and files seen so far, by identity, and links that are still to be followed."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.above = {file_identity(path) for path in root.resolve().parents}
        self.folders = {file_identity(root)}
        self.files: dict[tuple[int, int], str] = {}
        self.links: deque[str] = deque()
        self.left_out: dict[str, list[str]] = defaultdict(list)
        self.empty_folders: list[str] = []

    def visit(self, start: str) -> None:
        """The real folders and files below `start`; what links lead to comes later."""
        waiting = [start]
        while waiting:
            place = waiting.pop()
            inner: list[str] = []
            entries = _entries(self.root / place)
            if place and all(is_hidden(entry.name) for entry in entries):
                self.empty_folders.append(place)
            for entry in entries:
                path = f"{place}/{entry.name}" if place else entry.name
                is_folder = entry.is_dir(follow_symlinks=False)
                if is_hidden(entry.name):
                    self.left_out[HIDDEN] += _all_below(self.root, path) if is_folder else [path]
                elif entry.is_symlink():
                    self.links.append(path)
                elif is_folder:
                    if self._is_new_folder(path):
                        inner.append(path)
                elif entry.is_file(follow_symlinks=False):
                    self._add_file(path)
                else:
                    self.left_out[NO_FILE].append(path)
            waiting += reversed(inner)

    def follow(self, link: str) -> None:
        path = self.root / link
        try:
            identity = file_identity(path)
        except OSError:
            self.left_out[LINK_BROKEN].append(link)
            return
        if path.is_file():
            self._add_file(link)
        elif not path.is_dir():
            self.left_out[NO_FILE].append(link)
        elif identity in self.above:
            self.left_out[LINK_ABOVE].append(link)
        elif self._is_new_folder(link):
            self.visit(link)
        else:
            self.left_out[LINK_AGAIN].append(link)

    def _is_new_folder(self, path: str) -> bool:
        identity = file_identity(self.root / path)
        is_new = identity not in self.folders
        self.folders.add(identity)
        return is_new

    def _add_file(self, path: str) -> None:
        first = self.files.setdefault(file_identity(self.root / path), path)
        if first != path:
            self.left_out[LINK_AGAIN].append(f"{path} = {first}")


def _entries(folder: Path) -> list[os.DirEntry[str]]:
    try:
        with os.scandir(folder) as entries:
            return sorted(entries, key=lambda entry: entry.name)
    except OSError as error:
        raise ShardError(f"{folder}: {error.strerror or error}; make the folder readable, or move it away") from None


def file_identity(path: Path) -> tuple[int, int]:
    """What tells one file from another, whatever the path to it. Raises OSError."""
    found = path.stat()
    return found.st_dev, found.st_ino


def _all_below(root: Path, path: str) -> list[str]:
    below = [
        str(PurePosixPath(Path(folder).relative_to(root)) / name)
        for folder, _, names in os.walk(root / path)
        for name in names
    ]
    return sorted(below) or [f"{path}/"]


def describe(left_out: Mapping[str, list[str]]) -> str:
    """`12 files left out: 7 hidden (a/.x, …), 2 empty (b.mp4)`; empty if nothing was."""
    total = sum(map(len, left_out.values()))
    return f"{total} {'file' if total == 1 else 'files'} left out: {', '.join(_reasons(left_out))}" if total else ""


def _reasons(left_out: Mapping[str, list[str]]) -> Iterator[str]:
    for reason, paths in left_out.items():
        if paths:
            more = ", …" if len(paths) > _SHOWN else ""
            yield f"{len(paths)} {reason} ({', '.join(map(repr, paths[:_SHOWN]))}{more})"
