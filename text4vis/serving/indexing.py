"""Builds a search index: embeds the videos that are new or changed, by any number of processes at once.

A file is known by its path, size and time; where these are new, by its content's SHA-256: a file that was moved or
copied takes over the vectors of the first one.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

import numpy as np
import torch

from shards.files import require_folder
from text4vis.cluster.distributed import Ranks, cores_per_rank
from text4vis.data.prefetch import pipelined
from text4vis.saved.checkpoint import sha256_of
from text4vis.serving.footage import PredictionError
from text4vis.serving.index_store import (
    KEY,
    LEAST_SECONDS,
    VIDEOS,
    Catalogue,
    IndexedVideo,
    IndexWriter,
    SearchError,
    Settings,
    adding,
    check_settings,
    is_index,
    needs_tidying,
    read_catalogue,
    remember_model,
    tidy,
)
from text4vis.serving.jobs import WorkList, WorkListError
from text4vis.serving.predictor import Predictor
from text4vis.serving.search import model_facts

# The length of a video in seconds and its windows as unit vectors (W, D), or why it cannot be read.
Embedded: TypeAlias = tuple[float, np.ndarray] | PredictionError
Embed = Callable[[Iterable[str]], Iterable[Embedded]]
DEFAULT_WINDOW = 4.0  # seconds


@dataclass(frozen=True)
class IndexReport:
    """What an index holds after a call.

    new: files that this process embedded. videos, windows: all that can be found. broken: files of the call that cannot
    be read, with the reason. gone: files of the index that are not there any more. removed: whether those were removed.
    """

    new: int
    videos: int
    windows: int
    broken: dict[str, str]
    gone: list[str]
    removed: bool


def index_videos(
    folder: str | Path,
    videos: Sequence[str],
    model: str | Path,
    *,
    window: float | None = None,
    stride: float | None = None,
    batch_size: int = 8,
    remove_gone: bool = False,
    place: Ranks | None = None,
    device: str | torch.device | None = None,
    progress: Callable[[int], object] | None = None,
) -> IndexReport:
    """Adds video files to an index, or begins one, with the windows' embeddings of a model.

    model: an export, a run or a checkpoint. window, stride: seconds; by default those of the index, else 4 and half a
    window. place: of this process among those that build the index. The rest is as of `build_index` and
    `text4vis.load`.
    """
    folder = Path(folder)
    if is_index(folder):
        known = read_catalogue(folder).settings
        window, stride = window or known.window, stride or known.stride
    window = window or DEFAULT_WINDOW
    stride = stride or window / 2
    predictor = Predictor.load(model, device)
    settings = Settings(model_facts(predictor), predictor.model.embed_dim, float(window), float(stride))

    def embed_one(path: str) -> Embedded:
        try:
            return predictor.embed_windows(
                path, window_seconds=settings.window, step_seconds=settings.stride, batch_size=batch_size
            )
        except PredictionError as error:
            return error

    def embed(paths: Iterable[str]) -> Iterator[Embedded]:
        workers = cores_per_rank()
        with ThreadPoolExecutor(workers, thread_name_prefix="video") as pool:
            yield from pipelined(paths, lambda path: pool.submit(embed_one, path), Future.result, workers)

    place = place or Ranks(0, 1, 0, 1)
    report = build_index(
        folder, videos, embed, settings,
        remove_gone=remove_gone, rank=place.rank, world_size=place.world_size, progress=progress,
    )  # fmt: skip
    remember_model(folder, Path(model))
    return report


def build_index(
    folder: str | Path,
    videos: Sequence[str],
    embed: Embed,
    settings: Settings,
    *,
    remove_gone: bool = False,
    rank: int = 0,
    world_size: int = 1,
    progress: Callable[[int], object] | None = None,
) -> IndexReport:
    """Adds video files to an index, or begins one, and returns when all of them are in it, whoever embedded them.

    embed: takes paths and yields what they hold, in order; see `Embed`. settings: those of the index, if there is one.
    remove_gone: removes files that are not there any more. rank, world_size: where each process begins. progress:
    called with the number of the files that are done. Raises SearchError, and OSError where the folder cannot be
    written.
    """
    folder = Path(folder)
    require_folder(folder)
    if min(settings.window, settings.stride) < LEAST_SECONDS:
        raise SearchError(
            f"windows of {settings.window:g} s every {settings.stride:g} s: expected at least {LEAST_SECONDS:g} s"
        )
    paths = list(dict.fromkeys(map(os.path.abspath, videos)))
    missing = {path: f"{path}: no such file" for path in paths if not Path(path).is_file()}
    with adding(folder):
        known = read_catalogue(folder) if is_index(folder) else None
        if known is not None:
            check_settings(known, settings)
        files = {_item(path, known): path for path in paths if path not in missing}
        try:
            with (
                WorkList(folder / VIDEOS, files, settings.to_dict(), key=KEY) as work,
                IndexWriter(folder, work, settings.dims) as writer,
            ):
                new = _Work(work, writer, files, known, settings).run(embed, rank, world_size, progress)
        except WorkListError as error:
            raise SearchError(str(error)) from None
    catalogue = read_catalogue(folder)
    gone = sorted(path for path in (*catalogue.videos, *catalogue.broken) if not os.path.lexists(path))
    broken = {path: str(catalogue.broken[path]["error"]) for path in paths if path in catalogue.broken}
    removing = gone if remove_gone else []
    if removing or needs_tidying(catalogue):
        tidy(folder, removing)  # or the last process that still adds to it does so
        catalogue = read_catalogue(folder)
    return IndexReport(
        new,
        len(catalogue.videos),
        catalogue.num_windows,
        missing | broken,
        gone,
        catalogue.videos.keys().isdisjoint(gone),
    )


def _item(path: str, known: Catalogue | None) -> str:
    """The name of a version of a file: another where its size or time is another than that of its last line."""
    found = Path(path).stat()
    name = f"{path}|{found.st_size}|{found.st_mtime_ns}"
    if known is None:
        return name
    last = known.last.get(path)
    if last is not None and last.split("|#")[0] == name:
        return last
    versions = 0  # of a file that has become what it was before
    while (item := f"{name}|#{versions}" if versions else name) in known.files:
        versions += 1
    return item


class _Work:
    """One process's part of a call."""

    def __init__(
        self, work: WorkList, writer: IndexWriter, files: dict[str, str], known: Catalogue | None, settings: Settings
    ) -> None:
        self.work, self.writer, self.files, self.known, self.settings = work, writer, files, known, settings
        by_digest = {} if known is None else {video.digest: video for video in known.videos.values()}
        self.by_digest: dict[str, IndexedVideo] = by_digest
        self.waiting: deque[tuple[str, str]] = deque()  # files that are being embedded, with their digests
        self.new = 0

    def run(self, embed: Embed, rank: int, world_size: int, progress: Callable[[int], object] | None) -> int:
        """Returns the number of files that this process embedded, when all files are done.

        A file that another process holds is waited for, and taken over if that process dies.
        """
        if progress:
            progress(self.work.num_done)
        while self.work.is_unfinished():
            for result in embed(self._claimed(rank, world_size)):
                self._add(*self.waiting.popleft(), result)
                if progress:
                    progress(self.work.num_done)
            self.writer.flush()
            if progress:
                progress(self.work.num_done)
        return self.new

    def _claimed(self, rank: int, world_size: int) -> Iterator[str]:
        """Paths that have to be embedded."""
        for item in self.work.claim(rank, world_size):
            path = self.files[item]
            try:
                digest = sha256_of(Path(path))
            except OSError as error:
                self.writer.add_broken(path, item, f"{path}: {error.strerror or error}; make the file readable")
                continue
            twin = self.by_digest.get(digest)
            if twin is not None and self.known is not None:
                self.writer.add(path, item, digest, twin.seconds, self.known.vectors(twin))
                continue
            self.waiting.append((item, digest))
            yield path

    def _add(self, item: str, digest: str, result: Embedded) -> None:
        path = self.files[item]
        if isinstance(result, PredictionError):
            self.writer.add_broken(path, item, str(result))
        elif not item.startswith(_item(path, None)):
            self.writer.add_broken(path, item, f"{path}: changed while it was read; index it again")
        else:
            seconds, vectors_WD = result
            assert len(vectors_WD) == self.settings.num_windows(seconds)
            self.writer.add(path, item, digest, seconds, vectors_WD)
            self.new += 1
