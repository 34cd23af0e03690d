"""The wheel holds all that the library and its two programs need, and they work without the checkout."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from launch import ROOT
from make_fixtures import kept_video

FIXTURES = ROOT / "tests" / "fixtures" / "v0.1"
PREDICT = """
import numpy as np, shards, text4vis
frames = np.random.default_rng(5).integers(0, 256, {shape}, np.uint8)
print(text4vis.__file__, shards.__file__, text4vis.load({export!r}, device="cpu").predict(frames).top[0][0])
"""
DATA = (".py", ".pyi", ".j2", ".js")


@pytest.fixture(scope="module")
def installed(tmp_path_factory) -> Path:
    """A folder as pip fills it from the wheel, which is built from a copy of the tree."""
    base = tmp_path_factory.mktemp("wheel")
    pytest.importorskip("setuptools", minversion="77")
    code = "import sys; from setuptools.build_meta import build_wheel; print(build_wheel(sys.argv[1]))"
    tree = base / "tree"
    for folder in ("shards", "text4vis", "tools"):
        copy_sources(ROOT / folder, tree / folder)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        (tree / name).write_bytes((ROOT / name).read_bytes())
    built = subprocess.run(
        [sys.executable, "-c", code, str(base)], cwd=tree, capture_output=True, text=True, timeout=300, check=False
    )
    assert built.returncode == 0, built.stderr
    with zipfile.ZipFile(base / built.stdout.split()[-1]) as wheel:
        for member in wheel.infolist():
            assert not member.filename.startswith(("/", "..")), member.filename
            target = base / "site" / member.filename
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(wheel.read(member))
    return base / "site"


def copy_sources(source: Path, target: Path) -> None:
    for path in source.rglob("*"):
        if path.is_file() and path.suffix in DATA:
            place = target / path.relative_to(source)
            place.parent.mkdir(parents=True, exist_ok=True)
            place.write_bytes(path.read_bytes())


def call(installed: Path, folder: Path, *words: object) -> subprocess.CompletedProcess[str]:
    """Runs Python in a folder that is no checkout; what is installed comes first."""
    environment = os.environ | {"PYTHONPATH": str(installed), "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.run(
        [sys.executable, *map(str, words)],
        cwd=folder, env=environment, capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip


def test_every_module_and_template_is_in_it_and_nothing_else(installed):
    expected = {
        str(path.relative_to(ROOT))
        for room in ("shards", "text4vis")
        for path in (ROOT / room).rglob("*")
        if path.suffix in DATA
    }
    found = {str(path.relative_to(installed)) for path in installed.rglob("*") if path.is_file()}
    assert {name for name in found if ".dist-info/" not in name} == expected
    assert any(name.endswith("LICENSE") for name in found)


def test_the_version_is_that_of_the_project(installed):
    (metadata,) = installed.glob("*.dist-info/METADATA")
    version = re.search(r'^version = "(.*)"', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)[1]
    assert f"\nVersion: {version}\n" in metadata.read_text()


@pytest.mark.parametrize("program", ["text4vis.train", "text4vis.evaluate"])
def test_the_programs_run_as_modules(installed, tmp_path, program):
    done = call(installed, tmp_path, "-m", program, "--help")
    assert done.returncode == 0 and "--config" in done.stdout, done.stderr
    model = ["--model", "none"] if program.endswith("evaluate") else []
    done = call(installed, tmp_path, "-m", program, "--config", "no.yaml", *model)
    assert done.returncode == 1 and "Traceback" not in done.stderr and "no.yaml" in done.stderr


@pytest.mark.slow
def test_a_model_predicts(installed, tmp_path):
    code = PREDICT.format(shape=kept_video().shape, export=str(FIXTURES / "export"))
    done = call(installed, tmp_path, "-c", code)
    assert done.returncode == 0, done.stderr
    first, second, best = done.stdout.split(maxsplit=2)
    assert Path(first).is_relative_to(installed) and Path(second).is_relative_to(installed)
    assert best.startswith("class ")
