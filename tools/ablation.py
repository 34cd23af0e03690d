"""What the classifier and the temporal head are worth: the table of the README, on the demo's drawings.

Examples:
    python tools/demo.py --output demo          # makes the data
    python tools/ablation.py --data demo/shards --output runs/ablation

Trains configs/demo.yaml shortened (4 frames, 3 epochs) with each classifier and each head, once a seed, and evaluates
the last weights on the classes trained on and on the unseen ones. Unseen classes get their rows from the same kind of
classifier: text reads their names; random and orthogonal draw new rows, so they can only guess; lda would need their
videos, so it has none. Runs that are finished are skipped the next time. OUTPUT holds a run a cell and seed, with its
log, and ablation.json. Deviations are of the population of seeds. Exit codes: 0 done, 1 failed, 2 wrong usage.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from shards.text import shown
from text4vis.common.progress import Progress
from text4vis.common.stages import Stage, StageError, perform, with_set
from text4vis.config.schema import ConfigError
from text4vis.evaluation.comparison import read_report, summarise

ROOT = Path(__file__).resolve().parent.parent
CONFIG = "configs/demo.yaml"
CLASSIFIERS = ("random", "orthogonal", "lda", "text")
HEADS = ("None", "Transf")
SEEDS = (1, 2, 3)
# Minutes a run on one core, and a tower that learns: without a head nothing else can.
SCHEDULE = (
    "data.num_segments=4", "solver.epochs=3", "solver.lr_warmup_step=0.3", "solver.lr=2e-3", "solver.clip_ratio=0.1",
    "logging.eval_freq=3",
)  # fmt: skip


@dataclass(frozen=True)
class Cell:
    """One training run of the table."""

    classifier: str
    head: str
    seed: int

    @property
    def name(self) -> str:
        return f"{self.classifier}-{self.head}-{self.seed}"

    @property
    def knows_unseen_classes(self) -> bool:
        return self.classifier != "lda"

    def stage(self, data: Path, output: Path, threads: int) -> Stage:
        settings = [
            *SCHEDULE, f"seed={self.seed}", f"data.train={data}/train",
            f"network.classifier={self.classifier}", f"network.sim_header={self.head}",
            f"engine.num_threads={threads}", f"data.workers={threads}",
        ]  # fmt: skip
        run = str(output / self.name)
        train = [sys.executable, "text4vis/train.py", "--config", CONFIG, "--output", run]
        evaluate = [sys.executable, "text4vis/evaluate.py", "--config", CONFIG, "--model", run, "--report"]
        commands = [[*train, *with_set([*settings, f"data.val={data}/val"])]]
        if self.knows_unseen_classes:
            commands.append([*evaluate, f"{run}/unseen.json", *with_set([*settings, f"data.val={data}/unseen"])])
        return Stage(self.name, commands)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("demo/shards"), help="folder of train, val and unseen")
    parser.add_argument("--output", type=Path, default=Path("runs/ablation"), help="folder of the runs and the table")
    parser.add_argument("--only", metavar="NAME", help="just this cell, e.g. text-Transf-1")
    parser.add_argument("--jobs", type=int, default=len(os.sched_getaffinity(0)), help="runs at a time; default: cores")
    return parser.parse_args()


def train_all(cells: Sequence[Cell], data: Path, output: Path, jobs: int) -> None:
    threads = max(1, len(os.sched_getaffinity(0)) // jobs)
    progress = Progress(total=len(cells), unit="run")

    def say(line: str) -> None:
        with progress.aside():
            print(line)

    def one(cell: Cell) -> None:
        stage = cell.stage(data, output, threads)
        perform(stage, output, say, log=output / f"{cell.name}.log")
        progress.update()

    with progress, ThreadPoolExecutor(jobs) as pool:
        running = [pool.submit(one, cell) for cell in cells]
        try:
            for run in running:
                run.result()
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def table(output: Path) -> tuple[str, list[dict[str, object]]]:
    """The table in Markdown, and its figures."""
    rows: list[dict[str, object]] = []
    lines = ["| classifier | head | closed set, top-1 % | unseen classes, top-1 % |", "|---|---|---|---|"]
    for classifier, head in itertools.product(CLASSIFIERS, HEADS):
        shown = []
        for kind, name in (("closed", "report.json"), ("unseen", "unseen.json")):
            cells = [Cell(classifier, head, seed) for seed in SEEDS]
            if kind == "unseen" and not cells[0].knows_unseen_classes:
                shown.append("-")
                continue
            reports = [read_report(output / cell.name / name) for cell in cells]
            mean, deviation = summarise(reports)["top1"]
            shown.append(f"{mean:.1f} ± {deviation:.1f}")
            runs = [report["top1"] for report in reports]
            rows.append(
                {"classifier": classifier, "head": head, "classes": kind, "mean": mean, "std": deviation, "runs": runs}
            )
        lines.append(f"| {classifier} | `{head}` | {' | '.join(shown)} |")
    return "\n".join(lines), rows


def run(arguments: argparse.Namespace) -> None:
    data, output = (Path(os.path.relpath(path, ROOT)) for path in (arguments.data, arguments.output))
    os.chdir(ROOT)
    # The same classifier of two heads is built once: heads of one classifier and seed do not start together.
    cells = [Cell(*which) for head in HEADS for which in itertools.product(CLASSIFIERS, (head,), SEEDS)]
    if arguments.only:
        cells = [cell for cell in cells if cell.name == arguments.only]
        if not cells:
            raise ConfigError(f"--only {arguments.only}: no such cell; e.g. text-Transf-1")
    train_all(cells, data, output, arguments.jobs)
    if not arguments.only:
        text, rows = table(output)
        (output / "ablation.json").write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
        print(text)


def main() -> int:
    try:
        run(parse_arguments())
    except (StageError, ConfigError, OSError) as error:
        print(f"ablation: error: {shown(error)}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
