"""Videos to folders of frames: in parallel, resumable; a folder is complete or not there."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from contextlib import contextmanager
from pathlib import Path, PurePosixPath

from shards.annotations import Annotation, format_annotation
from shards.files import leftovers, require_folder, try_lock, write_atomically
from shards.format import ShardError
from shards.sources import InputError, SourceOptions, encoded_frames, probe_file, video_positions

ANNOTATIONS = "annotations.txt"
SETTINGS = "extraction.json"
_PARTS = ".extracting"


def extract_frames(
    videos: Sequence[Annotation],
    *,
    root: str | Path,
    output: str | Path,
    short_side: int | None = None,
    quality: int | None = None,
    fps: float | None = None,
    image_template: str = "img_{:05d}.jpg",
    workers: int | None = None,
    progress: Callable[[int, int], None] | None = None,
    list_name: str | Path = "videos",
) -> int:
    """Writes the frames of each video to a folder of its name without extension, and `annotations.txt`.

    Frames count from 1; every line of annotations.txt is `folder frames label`, in the order of the list. Folders that
    an earlier run with the same settings finished are kept. short_side in pixels, fps in frames a second; see
    `SourceOptions`. progress: called with the videos and frames done since its last call. Returns the number of frames.
    Raises ShardError that names the list's line, ValueError for bad settings, OSError from the output folder.
    """
    options = SourceOptions("frames", image_template, None, short_side, quality, fps)
    root, output = Path(root), Path(output)
    folders = _folder_names(videos, list_name)
    if not root.is_dir():
        raise ShardError(f"{root}: no such folder; give the folder that the list's paths begin in as --root")
    require_folder(output)
    report = progress or (lambda videos, frames: None)

    def extract(position: int) -> int:
        folder = output / folders[position]
        part = output / _PARTS / str(position)
        try:
            count = _count_files(folder) if folder.is_dir() else _extract(root, videos[position].name, part, options)
        except InputError as error:
            line = videos[position].line
            raise ShardError(f"{list_name}:{line}: {str(root / error.path)!r}: {error.reason}; {error.fix}") from None
        if part.is_dir():
            folder.parent.mkdir(parents=True, exist_ok=True)
            part.rename(folder)
        report(1, count)
        return count

    with _locked(output, options), ThreadPoolExecutor(workers or len(os.sched_getaffinity(0))) as pool:
        shutil.rmtree(output / _PARTS, ignore_errors=True)
        for left in leftovers(output / ANNOTATIONS):
            left.unlink()
        futures = [pool.submit(extract, position) for position in range(len(videos))]
        try:
            wait(futures, return_when=FIRST_EXCEPTION)
        finally:
            pool.shutdown(cancel_futures=True)
        counts = [future.result() for future in futures if not future.cancelled()]
        rows = zip(folders, counts, videos, strict=True)
        lines = [f"{format_annotation(folder, count, video.label)}\n" for folder, count, video in rows]
        write_atomically(output / ANNOTATIONS, "".join(lines).encode())
        shutil.rmtree(output / _PARTS, ignore_errors=True)
    return sum(counts)


def _folder_names(videos: Sequence[Annotation], list_name: str | Path) -> list[str]:
    first: dict[str, Annotation] = {}
    for video in videos:
        if video.num_frames is not None:
            raise ShardError(
                f"{list_name}:{video.line}: {video.name!r} is a folder of frames; expected `video.mp4 label`"
            )
        folder = str(PurePosixPath(video.name).with_suffix(""))
        if folder in first:
            raise ShardError(
                f"{list_name}:{video.line}: {video.name!r} and {first[folder].name!r} (line {first[folder].line}) "
                f"would both be extracted to {folder!r}; rename one of the two"
            )
        try:
            format_annotation(folder, 1, video.label)
        except ValueError as error:
            raise ShardError(f"{list_name}:{video.line}: {video.name!r}: the folder of its frames: {error}") from None
        first[folder] = video
    return list(first)


def _extract(root: Path, name: str, part: Path, options: SourceOptions) -> int:
    """Writes the frames below `part`; returns their number."""
    part.mkdir(parents=True)
    info = probe_file(name, root / name)
    positions = video_positions(info, options.fps, None)
    frames = encoded_frames(name, root / name, positions, options.short_side, options.quality)
    for number, (data, _, _) in enumerate(frames, start=1):
        path = part / options.image_template.format(number)
        if number == 1:
            path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    return len(positions)


def _count_files(folder: Path) -> int:
    return sum(len(files) for _, _, files in os.walk(folder))


@contextmanager
def _locked(output: Path, options: SourceOptions) -> Iterator[None]:
    """Keeps other processes and other settings out of the folder."""
    path = output / SETTINGS
    if not path.exists() and any(output.iterdir()):
        raise ShardError(f"{output}: holds other files; choose an empty or new folder as --output")
    settings = json.dumps(options.record(), sort_keys=True)
    with path.open("a+") as stream:
        if not try_lock(stream.fileno()):
            raise ShardError(f"{output}: another process extracts here; wait for it, or choose another --output")
        stream.seek(0)
        before = stream.read()
        if before not in ("", settings):
            raise ShardError(f"{output}: was extracted with other settings, {before}; choose another --output")
        if not before:
            stream.write(settings)
            stream.flush()
        yield
