"""Where programs keep what they can fetch or compute again: remote indexes and shards, class embeddings."""

from __future__ import annotations

import functools
import logging
import os
import stat
import tempfile
from contextlib import suppress
from pathlib import Path

from text4vis.config.schema import Config

logger = logging.getLogger("text4vis")


def cache_dir(config: Config) -> Path:
    """`data.cache_dir`, or the first of $XDG_CACHE_HOME/text4vis and ~/.cache/text4vis that can be written.

    Where neither can, as without a home, it is a folder of this user below the one for temporary files; a warning says
    so once.
    """
    return Path(config.data.cache_dir) if config.data.cache_dir is not None else _default()


@functools.cache
def _default() -> Path:
    wanted = _usual_folders()
    for folder in wanted:
        if _can_be_written(folder):
            return folder
    folder = _temporary_folder()
    reason = f"{wanted[0]} cannot be written" if wanted else "there is no home (HOME is not set)"
    logger.warning("cache: %s; using %s: name a folder in data.cache_dir to keep it", reason, folder)
    return folder


def _usual_folders() -> list[Path]:
    bases = [Path(os.environ["XDG_CACHE_HOME"])] if os.environ.get("XDG_CACHE_HOME") else []
    with suppress(RuntimeError):  # no HOME, and a user without an entry in the system's list
        bases.append(Path.home() / ".cache")
    return [base / "text4vis" for base in bases if base.is_absolute()]


def _can_be_written(folder: Path) -> bool:
    """Whether the folder takes files, or can be made."""
    there = next(path for path in (folder, *folder.parents) if path.exists())
    return there.is_dir() and os.access(there, os.W_OK | os.X_OK)


def _temporary_folder() -> Path:
    """A folder that this user alone writes: what others might have put there is never read."""
    shared = Path(tempfile.gettempdir()) / f"text4vis-{os.getuid()}"
    with suppress(OSError):
        shared.mkdir(mode=0o700, exist_ok=True)
        status = shared.lstat()
        writers = status.st_mode & (stat.S_IWGRP | stat.S_IWOTH)
        if stat.S_ISDIR(status.st_mode) and status.st_uid == os.getuid() and not writers:
            return shared
    return Path(tempfile.mkdtemp(prefix="text4vis-"))
