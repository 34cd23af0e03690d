"""Indexes of stub files, whose windows are made from their content instead of a model's embedding.

As a program it is one of the processes that build an index together, for tests that kill some of them.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np

from text4vis.serving.footage import PredictionError
from text4vis.serving.index_store import Settings
from text4vis.serving.indexing import Embed, Embedded, IndexReport, build_index

WINDOW, STRIDE = 4.0, 2.0


def settings(dims: int = 8, **changes: object) -> Settings:
    return Settings(**{"model": {"weights": "a"}, "dims": dims, "window": WINDOW, "stride": STRIDE, **changes})


def vectors(seed: int, windows: int, dims: int) -> np.ndarray:
    """Random unit vectors (W, D) float32."""
    vectors_WD = np.random.default_rng(seed).standard_normal((windows, dims), dtype=np.float32)
    return vectors_WD / np.linalg.norm(vectors_WD, axis=1, keepdims=True)


def write_stub(path: Path, seed: int, windows: int = 3) -> None:
    path.write_text(f"{seed} {windows}")


class StubEmbed:
    """Reads `SEED WINDOWS` from files; what holds something else is broken. Notes which files it was given.

    pause: seconds that a file takes.
    """

    def __init__(self, dims: int = 8, pause: float = 0.0) -> None:
        self.dims, self.pause, self.asked = dims, pause, list[str]()

    def __call__(self, paths: Iterable[str]) -> Iterator[Embedded]:
        for path in paths:
            self.asked.append(Path(path).name)
            time.sleep(self.pause)
            try:
                seed, windows = map(int, Path(path).read_text().split())
            except ValueError:
                yield PredictionError(f"{path}: no stub")
            else:
                yield WINDOW + STRIDE * (windows - 1), vectors(seed, windows, self.dims)


def build(folder: Path, files: Path | list[str], embed: Embed | None = None, **options) -> IndexReport:
    """Indexes all files of a folder, or those listed."""
    paths = files if isinstance(files, list) else sorted(map(str, files.iterdir()))
    embed = embed or StubEmbed()
    options = {"settings": settings(getattr(embed, "dims", 8)), **options}
    return build_index(folder, paths, embed, **options)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--files", type=Path, required=True)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--dims", type=int, default=8)
    parser.add_argument("--pause", type=float, default=0.0)
    arguments = parser.parse_args()
    place = {"rank": int(os.environ.get("RANK", "0")), "world_size": int(os.environ.get("WORLD_SIZE", "1"))}
    report = build(arguments.output, arguments.files, StubEmbed(arguments.dims, arguments.pause), **place)
    print(report)
    return 0


if __name__ == "__main__":
    sys.exit(main())
