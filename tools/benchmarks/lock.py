"""What the loader costs the process that trains: time under Python's lock, hand-offs of the lock, and memory.

Each measurement is a process of its own, which has imported nothing but the loader: this file is the program.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from benchmarks.contenders import Setup
    from benchmarks.figures import Figure

_PAUSES_MS = (0, 30)
_WARM_UP_BATCHES = 16
_MOST_MILLISECONDS, _MOST_MEGABYTES = 0.6, 700

Cost = dict[str, float]


def lock(setup: Setup, work: Path, *, rounds: int, seconds: float) -> list[Figure]:
    """The loader from local shards and over HTTP with pauses before the first byte, with the released recipe."""
    from benchmarks.figures import Figure, interleaved
    from benchmarks.lock_time import preloaded
    from benchmarks.store import far_store

    folder = setup.workload.shards
    environment = preloaded(work / "lock")
    with far_store(folder.parent, work / "lock-store", _PAUSES_MS) as store:
        places = {"local": str(folder)}
        places |= {f"HTTP, {pause} ms": f"{address}/{folder.name}" for pause, address in store.addresses.items()}
        runs: dict[str, Callable[[], Cost]] = {}
        for name, address in places.items():
            config = setup.config(train=address, cache_dir=str(work / "index-cache"))
            runs[name] = partial(_run, config.to_yaml(), seconds, environment)
        results = interleaved("lock", runs, rounds)
    figures = []
    for name, series in results.items():
        limit = f"at most {_MOST_MILLISECONDS}" if name != "local" else ""
        memory = f"at most {_MOST_MEGABYTES}" if name == "local" else ""
        figures += [
            Figure("lock", f"{name}: time under the lock", "ms/video", [one["lock_ms"] for one in series], None, limit),
            Figure("lock", f"{name}: times the lock is taken", "/video", [one["takes"] for one in series]),
            Figure("lock", f"{name}: memory (PSS)", "MB", [one["megabytes"] for one in series], None, memory),
        ]
    return figures


def _run(config: str, seconds: float, environment: dict[str, str]) -> Cost:
    done = subprocess.run(
        [sys.executable, __file__, str(seconds)], input=config, env=environment, stdout=subprocess.PIPE, text=True,
        check=True,
    )  # fmt: skip
    cost: Cost = json.loads(done.stdout.splitlines()[-1])
    return cost


def measure(config_yaml: str, seconds: float) -> Cost:
    """Milliseconds of processor time under the lock and times that it was taken, both a video; and the memory.

    megabytes: the most that this process and its children had while batches were taken as fast as they came, or at
    the end, when the loader had worked as far ahead as it may.
    """
    import yaml

    from benchmarks.figures import pss_of_tree
    from benchmarks.lock_time import lock_time
    from text4vis.config.loading import config_from_dict
    from text4vis.data.loader import build_loader
    from text4vis.data.prefetch import settled

    config = config_from_dict(yaml.safe_load(config_yaml), "benchmark")
    with build_loader(config, "train") as loader, settled():
        batches = iter(loader)
        for _ in range(_WARM_UP_BATCHES):
            next(batches)
        videos, pss = 0, [pss_of_tree(os.getpid())]
        with lock_time() as held:
            started = time.perf_counter()
            while time.perf_counter() - started < seconds or not videos:
                videos += len(next(batches).ids)
        pss.append(pss_of_tree(os.getpid()))
        time.sleep(min(seconds, 2))
        pss.append(pss_of_tree(os.getpid()))
    return {"lock_ms": 1e3 * held.seconds / videos, "takes": held.takes / videos, "megabytes": max(pss) / 1e6}


if __name__ == "__main__":
    tools = Path(__file__).resolve().parent.parent
    sys.path[:1] = [str(tools), str(tools.parent)]  # not this folder: its modules would hide others
    print(json.dumps(measure(sys.stdin.read(), float(sys.argv[1]))))
