"""Measures what each classifier and each temporal head contributes, on the demo data: a table of docs/results.md.

Examples:
    python tools/demo.py --output demo          # makes the data
    python tools/ablation.py --data demo/shards --output runs/ablation

Trains a shortened configs/demo.yaml (4 frames, 3 epochs) with each classifier, head and seed, and evaluates the last
weights on the training classes and on unseen classes. The same kind of classifier embeds the unseen classes: text uses
their names; random and orthogonal draw new embeddings, so they can only guess; lda would need their videos and is left
out. Finished runs are skipped the next time. OUTPUT holds a run with its log for each classifier, head and seed, and
ablation.json. Standard deviations are those of the population of seeds. Exit codes: 0 done, 1 failed, 2 wrong
usage, 130 stopped by Ctrl-C.
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
from text4vis.common.programs import run_program
from text4vis.common.progress import Progress
from text4vis.common.stages import Stage, StageError, perform, with_set
from text4vis.config.schema import ConfigError
from text4vis.evaluation.comparison import read_report, summarise

ROOT = Path(__file__).resolve().parent.parent
CONFIG = "configs/demo.yaml"
CLASSIFIERS = ("random", "orthogonal", "lda", "text")
HEADS = ("None", "Transf")
SEEDS = (1, 2, 3)
# A run takes minutes on one core. The tower is trained too: without a head there is nothing else to train.
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
    parser.add_argument("--only", metavar="NAME", help="train only this run, e.g. text-Transf-1")
    parser.add_argument("--jobs", type=int, default=len(os.sched_getaffinity(0)), help="runs at a time (the cores)")
    return parser.parse_args()


def train_all(cells: Sequence[Cell], data: Path, output: Path, jobs: int) -> None:
    threads = max(1, len(os.sched_getaffinity(0)) // jobs)
    progress = Progress(total=len(cells), unit="run")

    def print_line(line: str) -> None:
        with progress.aside():
            print(line)

    def train(cell: Cell) -> None:
        stage = cell.stage(data, output, threads)
        perform(stage, output, print_line, log=output / f"{cell.name}.log")
        progress.update()

    with progress, ThreadPoolExecutor(jobs) as pool:
        running = [pool.submit(train, cell) for cell in cells]
        try:
            for run in running:
                run.result()
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def results(output: Path) -> tuple[str, list[dict[str, object]]]:
    """The results as a Markdown table and as rows for JSON."""
    rows: list[dict[str, object]] = []
    lines = ["| classifier | head | closed set, top-1 % | unseen classes, top-1 % |", "|---|---|---|---|"]
    for classifier, head in itertools.product(CLASSIFIERS, HEADS):
        columns = []
        for kind, name in (("closed", "report.json"), ("unseen", "unseen.json")):
            cells = [Cell(classifier, head, seed) for seed in SEEDS]
            if kind == "unseen" and not cells[0].knows_unseen_classes:
                columns.append("-")
                continue
            reports = [read_report(output / cell.name / name) for cell in cells]
            mean, deviation = summarise(reports)["top1"]
            columns.append(f"{mean:.1f} ± {deviation:.1f}")
            runs = [report["top1"] for report in reports]
            rows.append(
                {"classifier": classifier, "head": head, "classes": kind, "mean": mean, "std": deviation, "runs": runs}
            )
        lines.append(f"| {classifier} | `{head}` | {' | '.join(columns)} |")
    return "\n".join(lines), rows


def run(arguments: argparse.Namespace) -> None:
    data, output = (Path(os.path.relpath(path, ROOT)) for path in (arguments.data, arguments.output))
    os.chdir(ROOT)
    # Ordered by head: the second run with a classifier and seed finds the class embeddings of the first.
    cells = [Cell(classifier, head, seed) for head, classifier, seed in itertools.product(HEADS, CLASSIFIERS, SEEDS)]
    if arguments.only:
        cells = [cell for cell in cells if cell.name == arguments.only]
        if not cells:
            raise ConfigError(f"--only {arguments.only}: no such run; e.g. text-Transf-1")
    train_all(cells, data, output, arguments.jobs)
    if not arguments.only:
        text, rows = results(output)
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
    run_program(main)
