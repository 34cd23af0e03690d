"""Figures and how they are measured: in turns, in processes of their own, with a description of the machine."""

from __future__ import annotations

import multiprocessing
import os
import platform
import statistics
from collections.abc import Callable, Mapping
from concurrent.futures import ProcessPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, TypeVar

import psutil

from text4vis.common.progress import Progress

Value = TypeVar("Value")

_PACKAGES = (
    "text4vis", "numpy", "torch", "torchvision", "nvidia-dali-cuda130", "nvidia-dali-cuda120",
    "opencv-python-headless", "pillow", "webdataset", "av",
)  # fmt: skip
_LIBRARIES = (
    "torch._dynamo", "torchvision", "transformers", "open_clip", "deepspeed", "nvidia.dali.fn", "webdataset", "cv2",
    "scipy.optimize",
)  # fmt: skip


@dataclass(frozen=True)
class Figure:
    """One line of the result.

    values: one per round. ratios: each round's value divided by the other contender's, see `against`; None if there is
    no other. target: what the project promises about the figure; may be empty.
    """

    benchmark: str
    what: str
    unit: str
    values: list[float]
    ratios: list[float] | None = None
    target: str = ""

    @property
    def median(self) -> float:
        return statistics.median(self.values)

    @property
    def ratio(self) -> float | None:
        """Median of the rounds' ratios: it does not shift when the machine becomes slower between rounds."""
        return None if self.ratios is None else statistics.median(self.ratios)

    def to_dict(self) -> dict[str, Any]:
        return {
            "benchmark": self.benchmark,
            "what": self.what,
            "unit": self.unit,
            "median": self.median,
            "min": min(self.values),
            "max": max(self.values),
            "values": self.values,
            "ratio": self.ratio,
            "ratios": self.ratios,
            "target": self.target,
        }


def against(ours: list[float], other: list[float]) -> list[float]:
    """Our values divided by the other contender's, round by round."""
    return [mine / theirs for mine, theirs in zip(ours, other, strict=True)]


def compared(
    benchmark: str, unit: str, values: Mapping[str, list[float]], targets: Mapping[str, str] | None = None
) -> list[Figure]:
    """A figure for each contender. The first is ours; the ratios of the others are ours divided by theirs."""
    ours, *_ = values.values()
    return [
        Figure(
            benchmark,
            what,
            unit,
            series,
            None if series is ours else against(ours, series),
            (targets or {}).get(what, ""),
        )
        for what, series in values.items()
    ]


def interleaved(benchmark: str, contenders: Mapping[str, Callable[[], Value]], rounds: int) -> dict[str, list[Value]]:
    """Runs A B C, A B C, …, so that other load on the machine affects all contenders alike."""
    values: dict[str, list[Value]] = {name: [] for name in contenders}
    with Progress(benchmark, rounds * len(contenders), unit="run") as bar:
        for _ in range(rounds):
            for name, contender in contenders.items():
                values[name].append(contender())
                bar.update(note=name)
    return values


class Processes:
    """Helper processes by name, started when first used and kept. Use it as a context manager.

    Loaders with threads and loaders that fork need different processes: forking a process with threads is not safe.
    """

    def __init__(self) -> None:
        self._pools: dict[str, ProcessPoolExecutor] = {}

    def run(self, name: str, function: Callable[..., Value], *arguments: Any) -> Value:
        """Calls function(*arguments) in the process `name`."""
        if name not in self._pools:
            self._pools[name] = _process()
        return self._pools[name].submit(function, *arguments).result()

    def __enter__(self) -> Processes:
        return self

    def __exit__(self, *_: object) -> None:
        for pool in self._pools.values():
            pool.shutdown()


def run_fresh(function: Callable[..., Value], *arguments: Any, imported: bool = True) -> Value:
    """Calls function(*arguments) in a new process. imported: the process starts with the libraries imported."""
    with _process(imported) as pool:
        return pool.submit(function, *arguments).result()


def forks() -> Any:
    """A context that forks processes from one that has only imported the libraries: imports take seconds.

    Modules of this folder can't be among them: a fork server does not get this process's `sys.path`, and ignores what
    it does not find.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(list(_LIBRARIES))
    return context


def _process(imported: bool = True) -> ProcessPoolExecutor:
    return ProcessPoolExecutor(1, forks() if imported else multiprocessing.get_context("spawn"))


def bytes_read_by_process() -> int:
    """Bytes that this process has read with system calls so far, counted by the kernel. Mapped files do not count."""
    counters = dict(line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())
    return int(counters["rchar"])


def pss_of_tree(pid: int) -> int:
    """Bytes of memory of a process and all that it has started; what n processes share counts as an n-th of each."""
    total = 0
    process = psutil.Process(pid)
    for each in (process, *process.children(recursive=True)):
        with suppress(psutil.NoSuchProcess):  # it has just ended
            total += each.memory_full_info().pss
    return total


def forget_peak_memory() -> None:
    Path("/proc/self/clear_refs").write_text("5")


def machine() -> dict[str, Any]:
    """Processor, cores, memory, system and versions. No names of hosts or users."""
    model = next(
        (
            line.split(":", 1)[1].strip()
            for line in Path("/proc/cpuinfo").read_text().splitlines()
            if "model name" in line
        ),
        platform.machine(),
    )
    versions = {}
    for package in _PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            continue
    return {
        "date": datetime.now(timezone.utc).date().isoformat(),
        "processor": model,
        "cores": len(os.sched_getaffinity(0)),
        "memory_GB": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9, 1),
        "load_average": os.getloadavg()[0],
        "system": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        "packages": versions,
    }
