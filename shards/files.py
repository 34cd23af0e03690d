"""Writes files and folders so that nobody sees half of one, and locks files."""

from __future__ import annotations

import fcntl
import glob
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO


def require_folder(path: str | Path, option: str = "--output") -> None:
    """Makes a folder and checks that it can be written. Raises OSError that names the option, the folder and the fix.

    Programs call this before their work, not after hours of it.
    """
    try:
        Path(path).mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=path).close()
    except OSError as error:
        raise OSError(
            f"{option}: the folder {path} cannot be written ({error.strerror}); name one that you may write, below no "
            "file"
        ) from None


def require_file(path: str | Path, option: str) -> None:
    """`require_folder` for the folder of a file that will be written."""
    require_folder(Path(path).parent, option)
    if Path(path).is_dir():
        raise OSError(f"{option}: {path} is a folder; name a file in it")


@contextmanager
def replacing_path(path: Path) -> Iterator[Path]:
    """Atomic replace: the file that this yields takes the place of `path` at the end, or `path` stays as it was.

    Readers see the old file or the new one, never a mix, and the new one survives a power cut. The yielded file lies
    beside `path` under a name of this process; a killed process leaves it behind (`leftovers`).
    """
    temporary = path.with_name(_temporary_name(path.name, str(os.getpid())))
    try:
        yield temporary
        sync(temporary)
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync(path.parent)


def leftovers(path: Path) -> list[Path]:
    """What killed processes left of `replacing_path(path)`, and what living ones are writing."""
    return sorted(path.parent.glob(_temporary_name(glob.escape(path.name), "*")))


def _temporary_name(name: str, process: str) -> str:
    return f".{name}.{process}.part"


@contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """`replacing_path` for what is written to a stream."""
    with replacing_path(path) as temporary, temporary.open("wb") as stream:
        yield stream


def write_atomically(path: Path, data: bytes) -> None:
    """`replacing` for a file whose content is there already."""
    with replacing(path) as stream:
        stream.write(data)


def sync(path: Path) -> None:
    """Makes a file's content, or renames in a folder, survive a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def try_lock(descriptor: int) -> bool:
    """Takes the exclusive lock of an open file without waiting. False: somebody else who opened the file has it.

    The lock ends with the descriptor, so a killed process holds none. Raises OSError where file systems have no locks.
    """
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def is_at(descriptor: int, path: Path) -> bool:
    """Whether the open file is the one that lies at `path` now."""
    try:
        there = path.stat()
    except FileNotFoundError:
        return False
    return os.path.samestat(os.fstat(descriptor), there)
