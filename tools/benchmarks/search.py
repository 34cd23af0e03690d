"""Benchmark of finding: an index of random unit vectors, opened and asked as tools/search.py does."""

from __future__ import annotations

import shutil
import time
from pathlib import Path

import numpy as np

from benchmarks.figures import Figure, Processes, interleaved
from text4vis.serving.index_store import KEY, VIDEOS, IndexWriter, Settings, adding, is_index
from text4vis.serving.jobs import WorkList
from text4vis.serving.search import SearchIndex

DIMS, WINDOWS_OF_A_VIDEO = 512, 20
_SETTINGS = Settings({"weights": "random"}, DIMS, window=4.0, stride=2.0)
_QUESTIONS = 10
_opened: dict[Path, SearchIndex] = {}


def make_index(work: Path, num_windows: int) -> Path:
    """An index of videos of 20 windows each, made once."""
    folder = work / f"index-{num_windows}"
    if is_index(folder):
        return folder
    making = work / "index-part"
    shutil.rmtree(making, ignore_errors=True)
    making.mkdir()
    rng = np.random.default_rng(0)
    sizes = [min(WINDOWS_OF_A_VIDEO, num_windows - begin) for begin in range(0, num_windows, WINDOWS_OF_A_VIDEO)]
    names = [f"/videos/{number:07}.mp4" for number in range(len(sizes))]
    with (
        adding(making),
        WorkList(making / VIDEOS, names, _SETTINGS.to_dict(), key=KEY) as work_list,
        IndexWriter(making, work_list, DIMS) as writer,
    ):
        for name, windows in zip(names, sizes, strict=True):
            vectors_WD = rng.standard_normal((windows, DIMS), dtype=np.float32)
            vectors_WD /= np.linalg.norm(vectors_WD, axis=1, keepdims=True)
            writer.add(name, name, "", _SETTINGS.window + _SETTINGS.stride * (windows - 1), vectors_WD)
    making.replace(folder)
    return folder


def open_seconds(folder: Path) -> float:
    """Seconds to open the index, with a first question, which reads the vectors from the page cache."""
    started = time.perf_counter()
    _opened[folder] = SearchIndex.open(folder)
    _ask(_opened[folder], seed=0)
    return time.perf_counter() - started


def find_seconds(folder: Path) -> float:
    """Seconds of a question to an opened index: the median of some."""
    index = _opened[folder]
    return float(np.median([_ask(index, seed) for seed in range(1, 1 + _QUESTIONS)]))


def _ask(index: SearchIndex, seed: int) -> float:
    question_D = np.random.default_rng(seed).standard_normal(DIMS).astype(np.float32)
    started = time.perf_counter()
    index.nearest(question_D / np.linalg.norm(question_D), top=20)
    return time.perf_counter() - started


def search(work: Path, num_windows: int, processes: Processes, rounds: int) -> list[Figure]:
    """Seconds to open an index and to find 20 moments in it."""
    folder = make_index(work, num_windows)
    size = f"{num_windows:,} windows of {DIMS}"
    runs = {
        f"{size}: to the first answer": lambda: processes.run("threads", open_seconds, folder),
        f"{size}: each further answer": lambda: processes.run("threads", find_seconds, folder),
    }
    values = interleaved("search", runs, rounds)
    targets = ("", "at most 0.3")
    return [
        Figure("search", what, "s", values[what], target=target) for what, target in zip(runs, targets, strict=True)
    ]
