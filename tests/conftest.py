"""Fixtures that several test files use."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
from frame_folders import FrameFolders, make_frame_folders


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Hides GPUs, so that all machines test the same, unless only tests of GPUs are chosen: `pytest -m gpu`."""
    of_gpu = [item for item in items if item.get_closest_marker("gpu")]
    if len(of_gpu) < len(items):
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
        for item in of_gpu:
            item.add_marker(pytest.mark.skip(reason="other tests hide the GPU; run these alone: pytest -m gpu"))


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
