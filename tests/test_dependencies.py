"""Every import is of the standard library, of this project, or of a package declared in pyproject.toml."""

import ast
import re
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest

tomllib = pytest.importorskip("tomllib", reason="Python 3.11")

ROOT = Path(__file__).resolve().parent.parent
OURS = {"shards", "text4vis", "benchmarks", "drawings", *(path.stem for path in (ROOT / "tools").glob("*.py"))}
# Installed by a declared package of another name, and by no release of its own that one would declare.
WITHIN = {"onnx_ir": "onnxscript"}
# Distributions that install the module under a name of their own; pip may install one or the other.
KNOWN = {
    "cv2": "opencv-python-headless",
    "decord": "decord2",
    "megatron": "megatron-energon",
    "nvidia": "nvidia-dali-cuda130",
    "open_clip": "open_clip_torch",
    "spdl": "spdl",
    "streaming": "mosaicml-streaming",
}


def normalised(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def imported() -> dict[str, str]:
    """Top-level names of imported modules, and a file that imports each."""
    names = {}
    for folder in ("shards", "text4vis", "tools"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if isinstance(node, ast.Import):
                    found = [alias.name for alias in node.names]
                else:
                    found = [node.module] if isinstance(node, ast.ImportFrom) and node.module and not node.level else []
                names |= {name.partition(".")[0]: str(path.relative_to(ROOT)) for name in found}
    return names


def test_what_is_imported_is_declared():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    optional = [line for part in project["optional-dependencies"].values() for line in part]
    declared = {normalised(re.match(r"[\w.-]+", line)[0]) for line in [*project["dependencies"], *optional]}
    installs = metadata.packages_distributions()
    missing = {}
    for name, path in imported().items():
        if name in sys.stdlib_module_names or name in OURS:
            continue
        packages = {KNOWN.get(name), WITHIN.get(name), *installs.get(name, [name])} - {None}
        if not declared & {normalised(package) for package in packages}:
            missing[name] = path
    assert missing == {}


def test_the_exact_versions_are_those_that_are_allowed():
    """constraints.txt names a version of everything that the programs and their tests need, within its bounds."""
    requirements = pytest.importorskip("packaging.requirements")
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    exact = [requirements.Requirement(line) for line in lines if not line.startswith("#")]
    versions = {normalised(one.name): next(iter(one.specifier)).version for one in exact}
    assert len(versions) == len(exact)
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    for line in [*project["dependencies"], *project["optional-dependencies"]["dev"]]:
        needed = requirements.Requirement(line)
        assert needed.specifier.contains(versions[normalised(needed.name)]), line


def test_no_name_or_syntax_is_newer_than_the_oldest_python():
    """Vermin finds what needs a newer Python than `requires-python`, such as enum.StrEnum of 3.11."""
    pytest.importorskip("vermin", reason="pip install -e '.[dev]'")
    oldest = re.search(r'^requires-python = ">=(.*)"', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)[1]
    folders = ("shards", "text4vis", "tools", "tests")
    command = [
        sys.executable,
        "-c",
        "import vermin; vermin.main()",
        f"-t={oldest}-",
        "--violations",
        "--no-tips",
        *folders,
    ]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout
