"""Fixtures that several test files use."""

from __future__ import annotations

import io
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from PIL import Image


@dataclass(frozen=True)
class FrameFolders:
    """Frame folders on disk: root, annotation list and class list."""

    root: Path
    annotations: Path
    labels: Path
    names: list[str]


def jpeg(seed: int, width: int = 48, height: int = 32, **options) -> bytes:
    """A small noisy JPEG, another one for each seed."""
    pixels = np.random.default_rng(seed).integers(0, 256, (height // 8, width // 8, 3), np.uint8)
    stream = io.BytesIO()
    image = Image.fromarray(pixels).resize((width, height), Image.Resampling.BICUBIC)
    image.save(stream, "JPEG", quality=85, **options)
    return stream.getvalue()


def make_frame_folders(
    base: Path, counts: Sequence[int], *, num_classes: int = 3, prefix: str = "class/video", first_seed: int = 0
) -> FrameFolders:
    """Folders `prefix_0000` … of `counts` frames named img_00001.jpg …, labels in turn, and the two lists."""
    root = base / "frames"
    lines, names, seed = [], [], first_seed
    for number, count in enumerate(counts):
        name = f"{prefix}_{number:04d}"
        folder = root / name
        folder.mkdir(parents=True)
        for frame in range(1, count + 1):
            (folder / f"img_{frame:05d}.jpg").write_bytes(jpeg(seed))
            seed += 1
        names.append(name)
        lines.append(f"{name} {count} {number % num_classes}")
    annotations, labels = base / f"{root.name}.txt", base / "labels.csv"
    annotations.write_text("\n".join(lines))
    labels.write_text("id,name\n" + "".join(f"{number},class {number}\n" for number in range(num_classes)))
    return FrameFolders(root, annotations, labels, names)


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> None:
    """What programs keep between runs is kept for these tests alone."""
    os.environ["XDG_CACHE_HOME"] = str(tmp_path_factory.mktemp("cache"))


@pytest.fixture(autouse=True)
def own_environment() -> Iterator[None]:
    """A launcher's variables that a test sets, as a job of one rank does, are gone in the next test's jobs."""
    before = dict(os.environ)
    yield
    os.environ.clear()
    os.environ.update(before)


@pytest.fixture(scope="session")
def frame_folders(tmp_path_factory: pytest.TempPathFactory) -> FrameFolders:
    """40 videos of 1 to 9 frames; read only."""
    return make_frame_folders(tmp_path_factory.mktemp("folders"), [1 + number % 9 for number in range(40)])


@pytest.fixture(scope="session")
def project(tmp_path_factory: pytest.TempPathFactory):
    """Shards, a tiny CLIP and a recipe for tests that run the real programs; each run takes a folder of its own."""
    from project import Project

    return Project(tmp_path_factory.mktemp("project"))
