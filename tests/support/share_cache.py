"""Four processes read two far data sets through one cache that is too small, for a long time: all must get all bytes.

    nice python tests/support/share_cache.py --minutes 5 [--seed 0]

In each round the cache takes from less than one shard to a data set. In half of the rounds one process is
killed, in a third the cache's folder is removed under all of them. Each process compares every frame with the local
files. Exit code 1 if one gets other bytes, ends with an error or does not end.

pytest does a few seconds of it (tests/shards/test_share_cache.py).
"""

from __future__ import annotations

import argparse
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections import deque
from pathlib import Path

import numpy as np
from shard_data import make_dataset, serve

from shards.reader import Reading, open_dataset

LIMITS = (60_000, 90_000, 130_000, 170_000, 300_000, 600_000)  # bytes; a shard has 75,000, a data set 600,000
JOB_SECONDS = 6.0
HANGING_SECONDS = 60.0
DATASETS = ("a", "a", "b", "b")
BATCH, AHEAD, FRAMES = 4, 3, 3


def read(address: str, local: str, cache: str, cache_bytes: int, seed: int, seconds: float) -> None:
    """Passes over a far data set in random orders; raises AssertionError where bytes are not those of the local one."""
    draw, end = np.random.default_rng(seed), time.monotonic() + seconds
    under_way: deque[tuple[list[tuple[int, np.ndarray]], Reading]] = deque()
    with (
        open_dataset(local) as expected,
        open_dataset(address, cache_dir=cache, cache_bytes=cache_bytes, retries=2, timeout_seconds=10) as dataset,
    ):
        while time.monotonic() < end:
            order = draw.permutation(len(dataset))
            batches = (order[first : first + BATCH].tolist() for first in range(0, len(order), BATCH))
            for batch in dataset.ahead(batches, lambda batch: batch):
                requests = [(video, np.arange(min(FRAMES, int(dataset.num_frames[video])))) for video in batch]
                under_way.append((requests, dataset.start(requests)))
                while len(under_way) > AHEAD:
                    requests, reading = under_way.popleft()
                    for (video, frames), found in zip(requests, reading.result(), strict=True):
                        assert list(found) == list(expected.read(video, frames)), f"video {video}: other bytes"


def one_round(data: Path, address: str, cache: Path, draw: random.Random, seconds: float) -> list[str]:
    """What went wrong."""
    limit = draw.choice(LIMITS)
    processes = [
        subprocess.Popen(
            [sys.executable, __file__, "--read", f"{address}/{name}", str(data / name), str(cache), str(limit),
             str(draw.randrange(1000)), str(seconds)],
            stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
        )
        for name in DATASETS
    ]  # fmt: skip
    time.sleep(draw.uniform(0.5, 1.3) * seconds)
    killed = processes[:1] if draw.random() < 0.5 else []
    for process in killed:
        process.kill()
    if draw.random() < 0.3:
        shutil.rmtree(cache, ignore_errors=True)
    mistakes = []
    for process in processes:
        try:
            _, messages = process.communicate(timeout=HANGING_SECONDS + seconds)
            if (process.returncode and process not in killed) or "Traceback" in messages:
                mistakes.append(f"limit {limit}, exit code {process.returncode}: {messages[-1500:]}")
        except subprocess.TimeoutExpired:
            process.kill()
            process.communicate()
            mistakes.append(f"limit {limit}: a process does not end")
    shutil.rmtree(cache, ignore_errors=True)
    return mistakes


def share(folder: Path, seed: int, *, minutes: float, rounds: int | None = None, seconds: float = JOB_SECONDS) -> int:
    """Rounds for so long, or so many; returns the number of mistakes, and prints them."""
    for number, name in enumerate(sorted(set(DATASETS))):
        make_dataset(folder / "data" / name, [6] * 24, frame_bytes=3000, seed=number)
    draw, end, done, mistakes = random.Random(seed), time.monotonic() + 60 * minutes, 0, 0
    with serve(folder / "data") as store:
        while time.monotonic() < end and done != rounds:
            found = one_round(folder / "data", store.address, folder / f"cache{done}", draw, seconds)
            done, mistakes = done + 1, mistakes + len(found)
            for mistake in found:
                print(f"round {done}: {mistake}", flush=True)
    print(f"{done} rounds of {len(DATASETS)} processes, {mistakes} mistakes", flush=True)
    return mistakes


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=5)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--read", nargs=6, help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    if chosen.read:
        address, local, cache, limit, seed, seconds = chosen.read
        read(address, local, cache, int(limit), int(seed), float(seconds))
        return 0
    with tempfile.TemporaryDirectory() as folder:
        return 1 if share(Path(folder), chosen.seed, minutes=chosen.minutes) else 0


if __name__ == "__main__":
    sys.exit(main())
