"""Files and folders that are written."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO


def require_folder(path: str | Path, option: str = "--output") -> None:
    """Makes a folder and makes sure that it takes files. Raises OSError that names the option, the folder and the fix.

    Programs ask this before their work, not after hours of it.
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
def replacing(path: Path) -> Iterator[BinaryIO]:
    """The file holds all that is written to the stream or is as it was before, whatever happens meanwhile."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        with temporary.open("wb") as stream:
            yield stream
            stream.flush()
            os.fsync(stream.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync(path.parent)


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
