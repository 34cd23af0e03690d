"""Describes this machine as one line of JSON: `python -m text4vis.doctor.probe [PATH …]`.

tools/doctor.py runs it here and, over ssh, on every host of a hostfile, with the same interpreter. A library that
cannot be imported is reported, not raised.
"""

from __future__ import annotations

import json
import os
import platform
import resource
import shutil
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

MODULES = {
    "text4vis": "text4vis", "torch": "torch", "torchvision": "torchvision", "deepspeed": "deepspeed",
    "nvidia-dali-cuda130": "nvidia.dali", "nvidia-dali-cuda120": "nvidia.dali", "open_clip_torch": "open_clip",
    "opencv-python-headless": "cv2", "av": "av", "webdataset": "webdataset", "safetensors": "safetensors",
    "tensorboard": "tensorboard", "numpy": "numpy",
}  # fmt: skip

SHARED_MEMORY = Path("/dev/shm")  # noqa: S108

# Prints each module's name before its import, which may end the process, and again with what it raised.
_IMPORTS = """
import importlib, json, sys
for name, module in json.loads(sys.argv[1]).items():
    print("import:" + json.dumps([name, "hangs, or ends the process"]), flush=True)
    try:
        importlib.import_module(module)
        reason = ""
    except BaseException as error:
        reason = f"{type(error).__name__}: {error}"
    print("import:" + json.dumps([name, reason]), flush=True)
"""
_CUDA = """
import json, torch
count = torch.cuda.device_count() if torch.cuda.is_available() else 0
gpus = [torch.cuda.get_device_properties(number) for number in range(count)]
print(json.dumps({"built_for": torch.version.cuda, "gpus": [
    {"name": gpu.name, "memory": gpu.total_memory, "capability": [gpu.major, gpu.minor]} for gpu in gpus]}))
"""


def probe(paths: list[str]) -> dict[str, Any]:
    """Facts about this machine. paths: files and folders to look for; see "paths" in the result. Sizes in bytes."""
    versions = _versions()
    cuda = _output(_CUDA)
    return {
        "host": platform.node(),
        "python": platform.python_version(),
        "versions": versions,
        "broken": _broken(versions),
        "cores": len(os.sched_getaffinity(0)),
        "memory": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "shared_memory": shutil.disk_usage(SHARED_MEMORY).total if SHARED_MEMORY.is_dir() else 0,
        "open_files": resource.getrlimit(resource.RLIMIT_NOFILE)[0],
        "programs": {name: shutil.which(name) for name in ("ssh", "pdsh", "g++", "nvidia-smi")},
        "driver": _driver(),
        "cuda": json.loads(cuda[-1]) if cuda else {"built_for": None, "gpus": []},
        "paths": {path: Path(path).exists() for path in paths},
    }


def _versions() -> dict[str, str]:
    """Versions by distribution, "" for one that is not installed. Only one of DALI's two builds is expected."""
    found = {}
    for name in MODULES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = ""
    builds = [name for name in MODULES if name.startswith("nvidia-dali")]
    for name in [build for build in builds if not found[build]][: len(builds) - 1]:
        del found[name]
    return found


def _broken(versions: dict[str, str]) -> dict[str, str]:
    """Why distributions cannot be imported, by name. One that ends the process hides those after it."""
    installed = {name: MODULES[name] for name, found in versions.items() if found}
    lines = _output(_IMPORTS, json.dumps(installed))  # libraries print lines of their own
    reasons = dict(json.loads(line[7:]) for line in lines if line.startswith("import:"))
    missing = {name: "not installed" for name, found in versions.items() if not found}
    return missing | {name: reason for name, reason in reasons.items() if reason}


def _output(program: str, *arguments: str) -> list[str]:
    """Runs a Python program and returns the lines that it printed."""
    command = [sys.executable, "-c", program, *arguments]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=False, timeout=300).stdout.splitlines()
    except subprocess.TimeoutExpired as error:
        return (error.stdout or b"").decode(errors="replace").splitlines()


def _driver() -> str | None:
    """The NVIDIA driver's version, if one is loaded."""
    path = Path("/proc/driver/nvidia/version")
    words = path.read_text().split() if path.exists() else []
    return next((word for word in words if "." in word and word.replace(".", "").isdigit()), None)


if __name__ == "__main__":
    print(json.dumps(probe(sys.argv[1:])))
