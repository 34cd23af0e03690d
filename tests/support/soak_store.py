"""Loads batches for a long time from a store that fails: every batch must be right, and nothing may grow.

    python tests/support/soak_store.py --minutes 30

A store in a process of its own answers after 30 ms. It cuts connections, sends half a body, a body of a wrong length or
of another range, and refuses hundreds of requests in a row with 503 or 429. Four loaders read from it side by side:
stored frames by ranges, whole shards in windows through a cache that holds a part of them, stored videos in parts, and
a loader that is opened anew all the time with nothing kept, so that it fetches the index and its rows again. A loader
of the same local files says what each batch must be, bit for bit.

Now and then no batch is taken until nothing is under way any more; then the process's sockets, asyncio tasks, threads,
open files and memory are counted. After a warm-up, a line through the counts (least squares) tells how much each grows
in a minute. Exit code 1 if a batch is wrong or one grows by more than its limit.

pytest does the same for a few batches, and compares the counts before and after (tests/test_soak_store.py).
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import NamedTuple
from unittest.mock import patch

import numpy as np
import psutil
import torch
from batches import build, settings
from frame_folders import make_frame_folders
from shard_data import Fault, hang_up_fault, serve, status_fault, truncated_fault
from videos import encode, pictures

import shards.ahead
import shards.cached
import shards.opening
import shards.remote
from shards.annotations import parse_annotations
from shards.writer import build_shards
from text4vis.data.loader import Batch, Loader, build_loader

# Growth a minute that is still taken for noise. One leaked by each failed request would be some twenty.
LIMITS = {"sockets": 2.0, "tasks": 0.5, "threads": 0.1, "files": 0.1, "memory_MB": 1.0}
WARM_UP_SHARE = 0.25
ROUNDS_BETWEEN_LOOKS = 20
QUIET_SECONDS = 30.0
REQUESTS_OF_PEACE = 30
_CACHE_SHARE = 0.6


# The store


def _wrong_length(handler: BaseHTTPRequestHandler, body: bytes) -> bool:
    """A complete answer, but of fewer bytes than were asked for."""
    asked = handler.headers.get("Range")
    headers = {"Content-Range": f"{asked.replace('=', ' ')}/*"} if asked else {}
    handler.answer(206 if asked else 200, body[: len(body) // 3], headers)  # type: ignore[attr-defined]
    return True


def _other_range(handler: BaseHTTPRequestHandler, body: bytes) -> bool:
    """The bytes that were asked for, said to be others."""
    range_ = f"bytes 1-{len(body)}/{2 * len(body) + 2}"
    handler.answer(206, body, {"Content-Range": range_})  # type: ignore[attr-defined]
    return True


FAULTS: dict[str, Fault] = {
    "cut": hang_up_fault,
    "half a body": truncated_fault,
    "wrong length": _wrong_length,
    "other range": _other_range,
    "503": status_fault(503),
    "429": status_fault(429),
}


@dataclass
class Weather:
    """Which requests of a store fail, and how. share: of the requests that fail by themselves.

    burst_requests, calm_requests: so many requests in a row are refused, so many in a row are not. most_in_a_row: the
    same bytes are refused at most so often; the next REQUESTS_OF_PEACE for them are not, so that the attempts of all
    who ask for them at the same time suffice.
    """

    share: float
    burst_requests: int
    calm_requests: int
    most_in_a_row: int
    pause_seconds: float
    draw: random.Random = field(default_factory=lambda: random.Random(0))
    counts: Counter[str] = field(default_factory=Counter)
    asked: Counter[str] = field(default_factory=Counter)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def answer(self, handler: BaseHTTPRequestHandler, body: bytes) -> bool:
        """Pauses, and sends something else if this request is to fail. Implements Fault."""
        time.sleep(self.pause_seconds)
        name = self._fault(f"{handler.path} {handler.headers.get('Range', '').rpartition('-')[2]}")
        return name is not None and FAULTS[name](handler, body)

    def _fault(self, wanted: str) -> str | None:
        with self.lock:
            self.counts["requests"] += 1
            cycle, place = divmod(self.counts["requests"], self.burst_requests + self.calm_requests)
            name = None
            if place >= self.calm_requests:
                name = ("503", "429")[cycle % 2]
            elif self.draw.random() < self.share:
                name = self.draw.choice(list(FAULTS))
            asked = self.asked[wanted]
            if name is not None or asked:
                self.asked[wanted] = (asked + 1) % (self.most_in_a_row + REQUESTS_OF_PEACE)
            if name is None or asked >= self.most_in_a_row:
                return None
            self.counts[name] += 1
            return name


def serve_until_told(folder: Path, weather: Weather) -> None:
    """The store's process: prints its address, and when its input is closed what it did."""
    with serve(folder) as server:
        server.fault = lambda path, count: weather.answer
        print(server.address, flush=True)
        sys.stdin.read()
        print(json.dumps(weather.counts), flush=True)


@contextmanager
def store(folder: Path, **weather: float) -> Iterator[tuple[str, Counter[str]]]:
    """Its address, and a counter that is filled when the store has ended."""
    command = [sys.executable, __file__, "--serve", str(folder), json.dumps(weather)]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdin is not None and process.stdout is not None
    counts: Counter[str] = Counter()
    try:
        yield process.stdout.readline().strip(), counts
        process.stdin.close()
        counts.update(json.loads(process.stdout.readline()))
    finally:
        process.stdin.close()
        process.wait()
        process.stdout.close()


# What is read


def make_data(folder: Path, num_frame_videos: int = 40, num_videos: int = 9) -> None:
    """Shards of stored frames and of stored videos below `folder`/served."""
    base, served = folder / "made", folder / "served"
    folders = make_frame_folders(base, [1 + 3 * number % 20 for number in range(num_frame_videos)])
    build(folders.annotations, folders.root, folders.labels, served / "frames")
    for number in range(num_videos):
        images = pictures(40 + number, 96, 64)
        encode(base / f"clip{number}.mp4", images=images, options={"g": "8", "bf": "2"})
    (base / "videos.txt").write_text("".join(f"clip{number}.mp4 {number % 3}\n" for number in range(num_videos)))
    annotations = parse_annotations(base / "videos.txt")
    build_shards(annotations, root=base, labels=list("abc"), output=served / "videos", store="video",
                 shard_bytes=40_000)  # fmt: skip


@contextmanager
def small_limits() -> Iterator[None]:
    """Makes small data behave as large data do: rows of frames are far, a shard comes in parts, and what a reader
    needs of one that is on its way comes by ranges."""
    with ExitStack() as stack:
        for module, name, value in (
            (shards.opening, "WHOLE_TABLE_BYTES", 0),
            (shards.remote, "PART_BYTES", 8000),
            (shards.cached, "PART_BYTES", 8000),
            (shards.cached, "_MEANWHILE_SHARE", 0.5),
            (shards.ahead, "_ROWS_AHEAD_SAMPLES", 8),
        ):
            stack.enter_context(patch.object(module, name, value))
        yield


class Scene(NamedTuple):
    """A data set and how it is read. reopen: every so many batches it is opened anew, with an empty cache folder."""

    name: str
    data: str
    options: dict[str, object]
    reopen: int = 0


def scenes(served: Path) -> list[Scene]:
    total = sum(path.stat().st_size for path in (served / "frames").glob("*.tar"))
    windows = {"shuffle": "shards:2", "cache_bytes": int(total * _CACHE_SHARE)}
    return [
        Scene("ranges", "frames", {"shuffle": "global"}),
        Scene("windows of whole shards", "frames", windows),
        Scene("stored videos", "videos", {"shuffle": "global"}),
        Scene("opened anew", "frames", {"shuffle": "global"}, reopen=ROUNDS_BETWEEN_LOOKS // 2),
    ]


class Reader:
    """The far loader of a scene beside the local one."""

    def __init__(self, scene: Scene, served: Path, address: str, cache: Path) -> None:
        self.scene, self._cache = scene, cache
        local = dict(scene.options)
        local.pop("cache_bytes", None)
        self._local = settings(served / scene.data, **local)
        # The query tells the store who asks: it counts what it refuses for each reader.
        far = {"train": [f"{address}/{scene.data}?reader={cache.name}"], "cache_dir": str(cache)}
        self._far = settings(served / scene.data, **scene.options, **far)
        self._taken = 0
        self._expected = build_loader(self._local, "train")
        self._expected_batches = iter(self._expected)
        self._open()

    def _open(self) -> None:
        self.loader: Loader = build_loader(self._far, "train", consumed=2 * self._taken)
        self._batches = iter(self.loader)

    def check_next(self) -> str | None:
        """Takes a batch; what is wrong with it."""
        if self.scene.reopen and self._taken % self.scene.reopen == self.scene.reopen - 1:
            self.loader.close()
            shutil.rmtree(self._cache, ignore_errors=True)
            self._open()
        self._taken += 1
        return difference(next(self._batches), next(self._expected_batches))

    @property
    def tasks(self) -> int:
        """asyncio tasks of the loop that fetches."""
        running = self.loader.dataset._transfers._running
        return 0 if running is None else len(asyncio.all_tasks(running.loop))

    def close(self) -> None:
        self.loader.close()
        self._expected.close()


def difference(got: Batch, expected: Batch) -> str | None:
    """How two batches differ; None if they are the same to the bit."""
    if got.ids.tolist() != expected.ids.tolist():
        return f"videos {got.ids.tolist()} in place of {expected.ids.tolist()}"
    if not torch.equal(got.labels, expected.labels):
        return f"labels of {got.ids.tolist()}"
    return None if torch.equal(got.frames, expected.frames) else f"pixels of {got.ids.tolist()}"


# What must not grow


def open_files() -> list[str]:
    """What this process's descriptors lead to, sorted; of sockets only that they are some."""
    links = []
    for path in Path("/proc/self/fd").iterdir():
        with suppress(OSError):  # closed meanwhile
            links.append(str(path.readlink()).partition(":[")[0])
    return sorted(links)


def counted(readers: list[Reader]) -> dict[str, float]:
    """What this process holds."""
    links = open_files()
    sockets = sum(link == "socket" for link in links)
    return {
        "sockets": sockets,
        "tasks": sum(reader.tasks for reader in readers),
        "threads": threading.active_count(),
        "files": len(links) - sockets,
        "memory_MB": psutil.Process().memory_info().rss / 1e6,
    }


def wait_until_quiet(readers: list[Reader]) -> None:
    """Waits until no request is under way and no shard is being fetched."""
    deadline = time.monotonic() + QUIET_SECONDS
    while time.monotonic() < deadline:
        fetching = any(thread.name == "shards-fetch" for thread in threading.enumerate())
        if not fetching and not any(reader.tasks for reader in readers):
            return
        time.sleep(0.1)


class Soak:
    """Readers of all scenes. wrong: the batches that were not as they should be."""

    def __init__(self, served: Path, address: str, caches: Path) -> None:
        self.readers = [
            Reader(scene, served, address, caches / f"cache-{number}") for number, scene in enumerate(scenes(served))
        ]
        self.batches = 0
        self.wrong: list[str] = []
        self.looks: list[tuple[float, dict[str, float]]] = []  # seconds, counts

    def round(self) -> None:
        """A batch of each reader."""
        for reader in self.readers:
            problem = reader.check_next()
            self.batches += 1
            if problem is not None:
                self.wrong.append(f"{reader.scene.name}: {problem}")

    def look(self, seconds: float) -> None:
        wait_until_quiet(self.readers)
        self.looks.append((seconds, counted(self.readers)))

    def slopes(self) -> dict[str, float]:
        """Growth a minute after the warm-up."""
        last = self.looks[-1][0]
        used = [(seconds, counts) for seconds, counts in self.looks if seconds >= WARM_UP_SHARE * last]
        minutes = np.array([seconds for seconds, _ in used]) / 60
        return {
            name: float(np.polyfit(minutes, [counts[name] for _, counts in used], 1)[0])
            for name in LIMITS
        }  # fmt: skip

    def close(self) -> None:
        for reader in self.readers:
            reader.close()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=30)
    parser.add_argument("--pause", type=float, default=0.03, help="seconds before an answer begins")
    parser.add_argument("--share", type=float, default=0.03, help="of the requests that fail by themselves")
    parser.add_argument("--serve", nargs=2, metavar=("FOLDER", "WEATHER"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.serve:
        serve_until_told(Path(arguments.serve[0]), Weather(**json.loads(arguments.serve[1])))
        return 0
    with tempfile.TemporaryDirectory() as name, small_limits():
        folder = Path(name)
        make_data(folder)
        weather = {"share": arguments.share, "burst_requests": 200, "calm_requests": 3000, "most_in_a_row": 2}
        with store(folder / "served", **weather, pause_seconds=arguments.pause) as (address, faults):
            soak = Soak(folder / "served", address, folder)
            began = time.monotonic()
            while (seconds := time.monotonic() - began) < 60 * arguments.minutes:
                for _ in range(ROUNDS_BETWEEN_LOOKS):
                    soak.round()
                soak.look(seconds)
                print(f"{seconds:.0f} s, {soak.batches} batches, {len(soak.wrong)} wrong: {soak.looks[-1][1]}",
                      flush=True)  # fmt: skip
            soak.close()
    return report(soak, faults)


def report(soak: Soak, faults: Counter[str]) -> int:
    """Prints what was found; 1 if something is not as promised."""
    print(", ".join(f"{name}: {count}" for name, count in faults.items()))
    print(f"{soak.batches} batches, wrong: {len(soak.wrong)}")
    for problem in soak.wrong[:10]:
        print(f"  {problem}")
    slopes = soak.slopes()
    for name, slope in slopes.items():
        print(f"{name}: {slope:+.3f} a minute, at most {LIMITS[name]}; {soak.looks[-1][1][name]:.0f} at the end")
    return 1 if soak.wrong or any(slopes[name] > limit for name, limit in LIMITS.items()) else 0


if __name__ == "__main__":
    sys.exit(main())
