"""Everything at once, for hours: training, prediction, search and evaluation while all around them fails.

    python tests/support/long_run.py --minutes 120

Trains as soak.py does: from a far store with faults, damaged videos, killed and stopped jobs of one, two and three
ranks, and checkpoints that are written in the background every few steps. Beside it, one after another and again and
again: a list of videos is recognised, videos are put into a search index, and the far shards are evaluated through a
cache; each is killed at a random moment and called again until it is done.

Exit code 0 if all of this holds, and the figures:

- every step's global batch is the plan's, and all videos that were replaced are listed;
- losses, and the last evaluation, are those of a job of one rank that was left alone;
- every list has one answer a video, every index one entry a video, and both are those of an undisturbed program;
- every evaluation gives the figures of an undisturbed one;
- memory, open files, sockets and threads of the ranks do not grow;
- at the end no process is left, and no file in the folder for temporary files.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import threading
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from fail_disk import answers, windows
from launch import finish, run, start_rank
from project import EVALUATE, TRAIN, Project, losses, records
from shard_data import serve
from soak import Soak, report
from tiny import write_export
from videos import write_video

SETTINGS = ("solver.global_batch=6", "data.batch_size=1", "logging.save_steps=20", "logging.eval_freq=20",
            "logging.pictures=0", "engine.precision=fp32", "engine.zero_stage=1",
            "solver.lr=1e-4")  # fmt: skip  # with 2e-3 two undisturbed runs of one and two ranks part after 700 steps
NUM_CLIPS = 24
CLOSE = 1e-5  # relative: sums over other numbers of ranks round otherwise, by 3e-7 in 2,000 undisturbed steps


@dataclass
class Beside:
    """Calls programs that are killed at random, again and again, while something else runs.

    Each is a name, its command and what it leaves in its output folder, which must be what an undisturbed one leaves.
    """

    work: Path
    seed: int
    counts: Counter[str] = field(default_factory=Counter)
    mistakes: list[str] = field(default_factory=list)
    stop: threading.Event = field(default_factory=threading.Event)

    def __post_init__(self) -> None:
        self.draw = random.Random(self.seed)
        self.programs: dict[str, tuple[list[object], Callable[[Path], object]]] = {}
        self.expected: dict[str, object] = {}

    def add(self, name: str, command: list[object], result: Callable[[Path], object]) -> None:
        """command: OUTPUT in it is a folder. Runs it undisturbed."""
        self.programs[name] = command, result
        output = self._empty(f"calm-{name}")
        run(*self._words(name, output))
        self.expected[name] = result(output)

    def _empty(self, name: str) -> Path:
        folder = self.work / name
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        return folder

    def _words(self, name: str, output: Path) -> list[str]:
        return [str(word).replace("OUTPUT", str(output)) for word in self.programs[name][0]]

    def go_on(self) -> None:
        """Until `stop` is set, for a thread."""
        while not self.stop.is_set():
            for name in self.programs:
                try:
                    self._finish(name)
                except Exception as error:  # a thread's error must not be lost
                    self.mistakes.append(f"{name}: {type(error).__name__}: {error}")

    def _finish(self, name: str) -> None:
        """Calls a program until it is done, killed up to three times, and compares."""
        output, kills = self._empty(name), self.draw.randrange(4)
        while not self.stop.is_set():
            process = start_rank(*self._words(name, output))
            if kills:
                kills -= 1
                self.stop.wait(self.draw.uniform(1, 30))
                with suppress(ProcessLookupError):
                    os.kill(process.pid, signal.SIGKILL)
            ((code, text),) = finish([process], timeout=900)
            if code == -signal.SIGKILL:
                self.counts[f"{name}, killed"] += 1
            elif code:
                self.mistakes.append(f"{name}: exit code {code}: {text[-800:]}")
                return
            else:
                self.counts[f"{name}, done"] += 1
                if self.programs[name][1](output) != self.expected[name]:
                    self.mistakes.append(f"{name}: another result than an undisturbed program's")
                return


def measured(report_file: Path) -> object:
    found = json.loads(report_file.read_text())
    return {key: found[key] for key in ("top1", "top5", "videos") if key in found}


def as_left_alone(soak: Soak, number: int, project: Project, calm: Path) -> tuple[bool, str]:
    """Compares the losses and last evaluation of a run with those of one rank that nobody disturbed."""
    words = [str(word) for word in soak.arguments(number, str(soak.work / "store"))]
    words[words.index("--output") + 1] = str(calm)
    run(TRAIN, *words)
    ours, theirs = losses(soak.output(number)), losses(calm)
    apart = max(abs(ours[step] - theirs[step]) / max(abs(theirs[step]), 1e-3) for step in theirs)
    last = [record["top1"] for record in records(calm) if record["kind"] == "val"][-1]
    text = f"run {number}: losses apart by at most {apart:.1e}; top-1 {soak.accuracy(number):.2f} and {last:.2f} %"
    return ours.keys() == theirs.keys() and apart < CLOSE and abs(soak.accuracy(number) - last) < 0.01, text


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=120)
    parser.add_argument("--videos", type=int, default=120, help="of the data set that is made")
    parser.add_argument("--epochs", type=int, default=100, help="of a run")
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--steps", type=int, nargs=2, default=(60, 600), help="a job's life")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        base = Path(folder)
        os.environ["TMPDIR"] = str(base / "tmp")  # of the programs; this one has taken its own
        os.environ["XDG_CACHE_HOME"] = str(base / "cache")
        (base / "tmp").mkdir()
        return 0 if everything(arguments, base) else 1


def everything(arguments: argparse.Namespace, base: Path) -> bool:
    """Whether all is as promised."""
    project = Project(base / "project", num_videos=arguments.videos)
    export = write_export(base, project.classes)
    clips = base / "clips"
    clips.mkdir()
    for number in range(NUM_CLIPS):
        write_video(clips / f"clip{number}.mp4", 6 + number, number)
    beside = Beside(base / "beside", arguments.seed)
    settings = (*SETTINGS, f"solver.epochs={arguments.epochs}")
    soak = Soak(project.config, project.shards, project.shards, base, arguments.ranks, tuple(arguments.steps),
                arguments.seed, settings, damaged_share=0.03)  # fmt: skip
    with serve(project.shards) as store:
        beside.add("list", ["tools/predict.py", clips, "--model", export, "--jsonl", "OUTPUT/all.jsonl"],
                   lambda output: answers(output / "all.jsonl"))  # fmt: skip
        beside.add("index", ["tools/search.py", "index", clips, "--model", export, "--output", "OUTPUT/index"],
                   lambda output: windows(output / "index"))  # fmt: skip
        beside.add("evaluation", [EVALUATE, "--config", project.config, "--model", export, "--report",
                   "OUTPUT/report.json", f"--set=data.val={store.address}", "--set=data.cache_bytes=1000000"],
                   lambda output: measured(output / "report.json"))  # fmt: skip
        thread = threading.Thread(target=beside.go_on)
        thread.start()
        try:
            runs = soak.run(arguments.minutes)
        finally:
            beside.stop.set()
            thread.join()
    as_promised = report(soak, runs)
    print(", ".join(f"{name}: {count}" for name, count in sorted(beside.counts.items())))
    for mistake in beside.mistakes:
        print(mistake)
    equal, text = as_left_alone(soak, 0, project, base / "calm")
    print(text)
    left = leftovers(base / "tmp")
    print(f"left in the folder for temporary files: {left or 'nothing'}")
    return as_promised and equal and not beside.mistakes and not left


def leftovers(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if not path.name.startswith("pymp-"))


if __name__ == "__main__":
    sys.exit(main())
