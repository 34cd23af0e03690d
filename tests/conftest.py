"""Fixtures that several test files use."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator

import hypothesis
import pytest

# OpenMP threads that wait for each other in a busy loop take the cores from the threads they wait for: a step of two
# threads beside other tests took up to 36 times longer. Read when torch is imported, here and in all programs.
os.environ.setdefault("GOMP_SPINCOUNT", "0")

from frame_folders import FrameFolders, make_frame_folders

# How long an example takes says how busy the machine is. In CI the examples follow from the code alone, so that a
# commit has one result; elsewhere each run tries others.
hypothesis.settings.register_profile("text4vis", deadline=None, derandomize="CI" in os.environ)
hypothesis.settings.load_profile("text4vis")


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Hides GPUs so that all machines test the same, unless only GPU tests are chosen: `pytest -m gpu`."""
    gpu_items = [item for item in items if item.get_closest_marker("gpu")]
    if len(gpu_items) < len(items):
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
        for item in gpu_items:
            item.add_marker(pytest.mark.skip(reason="other tests hide the GPU; run these alone: pytest -m gpu"))


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Gives the programs a cache folder that only these tests use."""
    os.environ["XDG_CACHE_HOME"] = str(tmp_path_factory.mktemp("cache"))


@pytest.fixture(autouse=True)
def own_environment() -> Iterator[None]:
    """Restores the environment after each test, so that a launcher's variables do not reach the next test's jobs."""
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


@pytest.fixture(scope="session")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator:
    """A headless Chromium."""
    chromium, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if not (chromium and driver):
        pytest.skip("needs the Debian packages chromium and chromium-driver")
    webdriver = pytest.importorskip("selenium.webdriver", reason="pip install -e '.[dev]'")
    from selenium.webdriver.chrome.service import Service

    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    profile = tmp_path_factory.mktemp("chromium")
    for switch in ("headless", "no-sandbox", "disable-gpu", "disable-quic", "no-first-run", "disable-dev-shm-usage",
                   "disable-background-networking", "disable-component-update", "disable-sync",
                   f"user-data-dir={profile}"):  # fmt: skip
        options.add_argument(f"--{switch}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    started = webdriver.Chrome(options, Service(driver))
    yield started
    started.quit()


@pytest.fixture(scope="session")
def process_group() -> Iterator[dict[str, str]]:
    """Makes this process a job of one rank; gives the variables that a launcher would have set.

    Once for all tests: DeepSpeed keeps its first process groups for good. The variables are not left in the
    environment, because the programs that other tests start are jobs of their own.
    """
    from text4vis.cluster import distributed

    before = dict(os.environ)
    distributed.start()
    variables = {name: value for name, value in os.environ.items() if before.get(name) != value}
    os.environ.clear()
    os.environ.update(before)
    yield variables
    distributed.stop()


@pytest.fixture(scope="module")
def one_rank(process_group: dict[str, str]) -> Iterator[None]:
    """The tests of a file run as rank 0 of a job of one rank."""
    import torch

    before, linear = dict(os.environ), torch.nn.functional.linear
    os.environ.update(process_group)
    yield
    torch.nn.functional.linear = linear  # ZeRO-3 replaces it for good
    os.environ.clear()
    os.environ.update(before)
