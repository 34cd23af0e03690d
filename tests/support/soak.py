"""Trains for a long time while everything around it fails: no sample may be lost, memory must not grow.

    python tests/support/soak.py --train demo/shards/train --val demo/shards/val --config configs/demo.yaml --minutes 60

The shards are copied, frames of some videos are damaged (`data.on_error: skip`), and a store serves them that sometimes
answers with an error, half a body, nothing or late. Jobs of one, two and four ranks in turn train from it; at a random
step a rank of the job is killed, or the job is asked to stop. When a run is done, one with the next seed follows.

Prints at the end, with exit code 1 if any of the first three is not as promised:

- samples: every step's global batch, as it was trained on, against the plan of an undisturbed job;
- memory, open files, sockets, threads: the slope of each process that lived long enough, from a line through its
  samples;
- skipped videos: those listed against those damaged;
- accuracy of each run. Compare it with `make demo`.

pytest does the same with a small project for a minute (tests/test_soak.py).
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import psutil
from launch import Rank, finish, start
from project import ledger, records
from shard_data import FlakyServer, hang_up_fault, serve, slow_fault, status_fault, truncated_fault

from shards.reader import open_dataset
from text4vis.config.loading import load_config
from text4vis.data.loader import build_loader

SECONDS_TO_WARM_UP = 150  # until buffers and the allocator's pools have reached their final size
SECONDS_FOR_A_SLOPE = 120
RESUME_ME = 75
# A minute, in the median process.
MOST_GROWTH = {
    "resident": ("MB", 5.0),
    "files": ("open files", 0.5),
    "sockets": ("sockets", 0.5),
    "threads": ("threads", 0.5),
}


@dataclass
class Process:
    """What one process held, by seconds since its first step."""

    resident: list[tuple[float, float]] = field(default_factory=list)  # MB
    files: list[tuple[float, float]] = field(default_factory=list)
    sockets: list[tuple[float, float]] = field(default_factory=list)
    threads: list[tuple[float, float]] = field(default_factory=list)

    def look(self, pid: int, seconds: float) -> None:
        """Notes what the process holds now; nothing if it is gone."""
        with suppress(psutil.NoSuchProcess, OSError):
            lives, links = psutil.Process(pid), [link.readlink() for link in Path(f"/proc/{pid}/fd").iterdir()]
            self.resident.append((seconds, lives.memory_info().rss / 1e6))
            self.files.append((seconds, len(links)))
            self.sockets.append((seconds, sum(str(link).startswith("socket:") for link in links)))
            self.threads.append((seconds, lives.num_threads()))


@dataclass
class Soak:
    """train, val: folders of shards. ranks: numbers of ranks to draw from. steps: a job is ended after this many of its
    own, drawn from this range. slow: seconds that each micro batch takes longer, so that a job ends near that step."""

    config: Path
    train: Path
    val: Path
    work: Path
    ranks: Sequence[int]
    steps: tuple[int, int]
    seed: int = 0
    settings: Sequence[str] = ()
    damaged_share: float = 0.01
    slow: float = 0

    def __post_init__(self) -> None:
        self.draw = random.Random(self.seed)
        self.draw_fault = random.Random(self.seed)  # the store's threads draw at any time
        self.processes: list[Process] = []
        self.counts = {"jobs": 0, "killed": 0, "asked to stop": 0, "faults of the store": 0}
        shutil.copytree(self.train, self.work / "store")
        self.damaged = self._damage(self.work / "store")

    def _damage(self, folder: Path) -> list[int]:
        """Flips bits in a third of the frames of some videos; returns their ids."""
        with open_dataset(str(folder)) as dataset:
            chosen = sorted(self.draw.sample(range(len(dataset)), max(1, int(len(dataset) * self.damaged_share))))
            frames = [
                data
                for sample in chosen
                for data in dataset.read(sample, np.arange(0, int(dataset.num_frames[sample]), 3))
            ]
        for path in folder.glob("*.tar"):
            content = bytearray(path.read_bytes())
            for data in frames:
                if (place := content.find(data)) >= 0:
                    content[place + len(data) // 2] ^= 0xFF
            path.write_bytes(content)
        return chosen

    def arguments(self, run: int, address: str) -> list[object]:
        settings = [
            f"data.train={address}", f"data.val={self.val}", "data.on_error=skip", "data.max_bad_share=0.1",
            f"seed={self.seed + run}", "logging.save_steps=20", *self.settings,
        ]  # fmt: skip
        return ["--config", self.config, "--output", self.output(run), *(f"--set={setting}" for setting in settings)]

    def output(self, run: int) -> Path:
        return self.work / f"run-{run}"

    def ledger_folder(self, run: int) -> Path:
        return self.work / f"ledger-{run}"

    def run(self, minutes: float) -> int:
        """Trains, one run after another, until the time is up and a run is done. Returns how many are done."""
        deadline, done = time.monotonic() + 60 * minutes, 0
        with serve(self.work / "store") as store:
            store.fault = self._fault
            while time.monotonic() < deadline or not done:
                done += self._job(done, store)
        return done

    def _fault(self, path: str, count: int):
        if self.draw_fault.random() > 0.02:
            return None
        self.counts["faults of the store"] += 1
        return self.draw_fault.choice(
            [status_fault(500), status_fault(503), status_fault(429), truncated_fault, hang_up_fault, slow_fault(1)]
        )

    def _job(self, run: int, store: FlakyServer) -> bool:
        """One job; True when the run is done."""
        ranks = self.draw.choice(self.ranks)
        options = ["--ledger", self.ledger_folder(run), "--slow", self.slow]
        job = start("tests/support/train_with.py", *options, "--", *self.arguments(run, store.address), ranks=ranks)
        self.counts["jobs"] += 1
        watched = [Process() for _ in job]
        self.processes += watched
        ledger = self.ledger_folder(run) / "0.jsonl"
        begins_at = ledger.stat().st_size if ledger.exists() else 0
        killed = self._watch(job, watched, lambda: steps_since(ledger, begins_at), self.draw.randint(*self.steps))
        results = finish(job)
        codes = {code for code, _ in results}
        if codes == {0}:
            return True
        expected = {-signal.SIGKILL, 1, 0} if killed else {RESUME_ME}  # 0: killed when others had ended
        assert codes <= expected, "\n".join([f"exit codes {codes}", *(output for _, output in results)])
        return False

    def _watch(self, job: list[Rank], watched: list[Process], steps_taken: Callable[[], int], steps: int) -> bool:
        """Samples memory and open files until the job has taken its steps, then ends it. True if a rank was killed."""
        began = sampled = 0.0
        while (taken := steps_taken()) < steps:
            if all(process.poll() is not None for process in job):
                return False
            if taken and time.monotonic() > sampled + 1:
                sampled = time.monotonic()
                began = began or sampled
                for process, figures in zip(job, watched, strict=True):
                    figures.look(process.pid, sampled - began)
            time.sleep(0.05)
        victim, kills = self.draw.choice(job), self.draw.random() < 0.7
        with suppress(ProcessLookupError):
            os.kill(victim.pid, signal.SIGKILL if kills else signal.SIGTERM)
            self.counts["killed" if kills else "asked to stop"] += 1
        return kills

    def samples_as_planned(self, run: int) -> tuple[int, bool, bool]:
        """Steps taken, whether each one's global batch is that of an undisturbed single process, and whether the videos
        that were replaced in them are listed."""
        seen = ledger(self.ledger_folder(run))
        text = (self.output(run) / "checkpoints").glob("step-*/state.json")
        global_batch = json.loads(next(iter(text)).read_text())["global_batch"]
        overrides = [str(word).removeprefix("--set=") for word in self.arguments(run, str(self.work / "store"))[4:]]
        config = load_config(self.config, [*overrides, f"data.batch_size={global_batch}"])
        with build_loader(config, "train") as loader:
            batches, drawn = iter(loader), loader.planner.batches()
            planned: dict[int, list[int]] = {}
            replaced: set[int] = set()
            for step in range(1, max(seen) + 1):
                planned[step] = next(batches).ids.tolist()
                pairs = zip(next(drawn)[0].tolist(), planned[step], strict=True)
                replaced |= {before for before, after in pairs if before != after}
        same = {step: sorted(ids) for step, ids in seen.items()} == {step: sorted(ids) for step, ids in planned.items()}
        return len(seen), same, replaced <= self.skipped(run)

    def skipped(self, run: int) -> set[int]:
        """Videos of data.train that the run has listed."""
        path = self.output(run) / "skipped.jsonl"
        entries = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
        return {entry["id"] for entry in entries if entry["split"] == "train"}

    def accuracy(self, run: int) -> float:
        return [record["top1"] for record in records(self.output(run)) if record["kind"] == "val"][-1]

    def slopes(self, what: str) -> list[float]:
        """Growth a minute of each process that lived long enough, after it had warmed up."""
        slopes = []
        for process in self.processes:
            figures = [point for point in getattr(process, what) if point[0] > SECONDS_TO_WARM_UP]
            if figures and figures[-1][0] - figures[0][0] > SECONDS_FOR_A_SLOPE:
                seconds, values = np.array(figures).T
                slopes.append(float(np.polyfit(seconds / 60, values, 1)[0]))
        return slopes


def steps_since(ledger: Path, offset: int) -> int:
    """Steps that a rank has begun, by the lines of its ledger from this byte on."""
    if not ledger.exists():
        return 0
    with ledger.open() as file:
        file.seek(offset)
        return len({line.split('"step": ', 1)[1].split(",", 1)[0] for line in file if '"step": ' in line})


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, required=True)
    parser.add_argument("--train", type=Path, required=True, help="a folder of shards; copied")
    parser.add_argument("--val", type=Path, required=True)
    parser.add_argument("--minutes", type=float, default=60)
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 2, 4])
    parser.add_argument("--steps", type=int, nargs=2, default=(20, 400), help="a job's life")
    parser.add_argument("--set", action="append", default=[], metavar="SECTION.KEY=VALUE")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        soak = Soak(
            arguments.config, arguments.train, arguments.val, Path(folder), arguments.ranks, tuple(arguments.steps),
            arguments.seed, arguments.set,
        )  # fmt: skip
        return 0 if report(soak, soak.run(arguments.minutes)) else 1


def report(soak: Soak, runs: int) -> bool:
    """Prints what so many runs have shown; returns whether all is as promised."""
    print(", ".join(f"{name}: {count}" for name, count in soak.counts.items()))
    as_promised = True
    for run in range(runs):
        steps, as_planned, all_listed = soak.samples_as_planned(run)
        as_promised &= as_planned and all_listed and soak.skipped(run) <= set(soak.damaged)
        print(
            f"run {run}: {steps} steps, samples as planned: {as_planned}; {len(soak.skipped(run))} videos listed, "
            f"all that were replaced: {all_listed}; {len(soak.damaged)} are damaged; "
            f"top-1 {soak.accuracy(run):.2f} %"
        )
    for what, (unit, most) in MOST_GROWTH.items():
        slopes = soak.slopes(what)
        if slopes:
            as_promised &= statistics.median(slopes) <= most
            print(
                f"{what}: {len(slopes)} processes, {statistics.median(slopes):+.2f} {unit} a minute (median), "
                f"{min(slopes):+.2f} to {max(slopes):+.2f}"
            )
    return as_promised


if __name__ == "__main__":
    sys.exit(main())
