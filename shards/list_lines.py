"""How a line of an annotation list spells its path, and what a line that does not parse was probably meant to be."""

from __future__ import annotations

import os
import re
from pathlib import Path

from shards.format import CONTROL_CHARACTER, ShardError

# What PyAV's demuxers read under such a name. A file's content decides; a list is read without its files.
VIDEO_EXTENSIONS = (
    ".mp4", ".avi", ".mkv", ".webm", ".mov", ".m4v", ".mpg", ".mpeg", ".wmv", ".flv", ".3gp", ".ts", ".mts", ".m2ts",
    ".m2t", ".m2v", ".mpe", ".mpv", ".mod", ".tod", ".vob", ".ogv", ".ogm", ".gif", ".f4v", ".3g2", ".qt", ".asf",
    ".divx", ".dv", ".mxf", ".rm", ".rmvb", ".y4m", ".h264", ".264", ".h265", ".265", ".hevc",
    ".ivf", ".nut", ".wtv", ".dav",
)  # fmt: skip
LAYOUT = "expected `folder frames label`, `video.mp4 label`, or `path - label` for a video of another name"
_DRIVE = re.compile(r"[A-Za-z]:[\\/]|\\\\")
_NUMBERS = re.compile(r"(.*?)((?:[ \t]+\d+)+)")
_EXTENSION = "|".join(re.escape(extension) for extension in VIDEO_EXTENSIONS)
_AFTER_VIDEO = re.compile(rf"(.*?(?:{_EXTENSION}))[ \t]+(.*)", re.IGNORECASE)
_HEADER = re.compile(
    r"(video|file|folder|frame|clip)?_?s?_?(path|name|id|dir|file|video)s?\b.*(label|class|frames)", re.I
)


def is_video_file(name: str) -> bool:
    """Whether a name of an annotation list means a video file."""
    return name.lower().endswith(VIDEO_EXTENSIONS)


def lines_with_paths(path: Path) -> list[str]:
    """The lines of a file with a path on each, without the empty ones. Bytes that are not UTF-8 are part of a name.

    Raises ShardError for a NUL byte, which no path holds; OSError.
    """
    lines = path.read_text(encoding="utf-8-sig", errors="surrogateescape").split("\n")
    for number, line in enumerate(lines, start=1):
        if "\0" in line:
            raise ShardError(f"{path}:{number}: holds a NUL byte, as UTF-16 does; save the file as UTF-8")
    return [line for line in lines if line.strip()]


def path_below(name: str, root: Path | None) -> str:
    """The one spelling of a path below `root`: `./a`, `b/../a`, `a//` and `/root/a` are all `a`.

    `..` takes back the name before it, without a look at links. With a root, `sub\\a.mp4` is taken as Windows means
    it, unless a file has that very name. Raises ValueError with the value and the fix.
    """
    if not name.isprintable() and CONTROL_CHARACTER.search(name):
        fix = "end lines with LF or CRLF" if "\r" in name else "rename the file"
        raise ValueError(f"the path {name!r} holds a control character; {fix}")
    written = name
    if root is not None and "\\" in name and not os.path.lexists(root / name):
        name = name.replace("\\", "/")
    if root is not None and _DRIVE.match(written) and not os.path.lexists(root / written):
        raise ValueError(f"the path {written!r} begins with a drive of Windows; give paths below --root, with `/`")
    if name[0] == "/":
        name = _relative(name, root)
    if root is not None:
        _refuse_root_twice(name, root)
    if name[0] != "/" and "./" not in name and "//" not in name and name[-1] not in "/.":
        return name
    parts: list[str] = []
    for part in name.split("/"):
        if part == "..":
            if not parts:
                raise ValueError(f"the path {written!r} leaves the root folder; give paths below --root")
            parts.pop()
        elif part not in ("", "."):
            parts.append(part)
    if not parts:
        raise ValueError(f"the path {written!r} names the root folder itself; give a path below it")
    return "/".join(parts)


def _relative(name: str, root: Path | None) -> str:
    """Raises ValueError unless the absolute path lies below the root."""
    normal = os.path.normpath(name)
    for base in () if root is None else (os.path.abspath(root), os.path.realpath(root)):  # noqa: PTH100
        if normal.startswith(f"{base.rstrip('/')}/"):
            return normal[len(base.rstrip("/")) + 1 :]
    place = "the root folder" if root is None else f"--root {root}"
    raise ValueError(f"the path {name!r} leaves the root folder: it does not lie below {place}; give paths below it")


def _refuse_root_twice(name: str, root: Path) -> None:
    """Raises ValueError for a path that begins with the root's own name, and is there without it only."""
    first, _, rest = name.removeprefix("./").partition("/")
    if rest and first == root.name and not os.path.lexists(root / name) and os.path.lexists(root / rest):
        raise ValueError(f"the path {name!r} begins with the name of --root itself; give --root {root.parent}")


def refuse_more_numbers(name: str, num_frames: int | None, root: Path) -> None:
    """Raises ValueError where a line has a start, times or labels side by side that would pass as part of the name.

    The files decide, for names may end in numbers: `clip 3 30 0` are 30 frames where there is a folder `clip 3`.
    """
    if num_frames is None:
        return
    if is_video_file(name) and (root / name).is_file():
        head, count = name, 2
    else:
        match = _NUMBERS.fullmatch(name)
        if match is None or (root / name).is_dir() or not (is_video_file(match[1]) or (root / match[1]).exists()):
            return
        head, count = match[1], 2 + len(match[2].split())
    raise ValueError(
        f"{count} numbers follow {head!r}; {LAYOUT}. A list has no place for offsets or times: cut clips out "
        "beforehand (ffmpeg -ss START -to END); several labels are joined by commas: 3,17,42"
    )


def hint(line: str) -> str:
    """What a line that does not parse was probably meant to be, in brackets; empty if nothing comes to mind."""
    fields = line.split()
    video = _AFTER_VIDEO.fullmatch(line)
    if line[0] == "#":
        reason = "a comment begins with `# `"
    elif _HEADER.match(line) and not any(character.isdigit() for character in line):
        reason = "a list has no header: remove this line"
    elif line[0] in "\"'":
        reason = "quotes count as part of the name: remove them, names may hold spaces"
    elif re.fullmatch(r"\[?\d+(?:[,;|]\d+)+\]?,?", fields[-1]) and (video or len(fields) > 2):
        reason = "several labels are joined by commas: 3,17,42"
    elif re.search(r"[,;]", line) and (len(fields) == 1 or re.search(r"[,;]\s*[\w ]*$", line)):
        reason = "the fields are separated by commas or the like: separate them by spaces"
    elif video and re.fullmatch(r"-?[\d.:]+[ \t].*", video[2]):
        reason = "times or offsets: cut clips out beforehand, e.g. ffmpeg -ss START -to END"
    elif (video and not any(character.isdigit() for character in video[2])) or fields[-1].isalpha():
        reason = "a label is the number of a class: its id in the class list"
    elif is_video_file(line):
        reason = "the label is missing"
    else:
        return ""
    return f" ({reason})"
