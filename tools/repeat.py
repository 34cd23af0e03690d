"""Trains one recipe with several seeds and shows the mean and standard deviation of the results.

Examples:
    python tools/repeat.py --config configs/demo.yaml --seeds 1,2,3 --output runs/demo-seeds
    python tools/repeat.py --config C.yaml --seeds 1,2,3 --output runs/4-shot --set data.shot=4 \
        --launcher 'deepspeed --hostfile hosts'

A seed decides the order, the augmentation, the head's first weights and, with data.shot, which videos are chosen; to
keep the videos, set data.shot_seed. text4vis/train.py runs once per seed, in OUTPUT/seed-N; the next time, finished
runs are skipped and interrupted ones resumed. OUTPUT/summary.json holds the results of the last evaluations, their
means and standard deviations (of the population: divided by the number of seeds). Exit codes: 0 done, 1 failed,
2 wrong usage, or the exit code of the run that failed.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from shards.text import shown
from text4vis.common.console import console, table
from text4vis.common.programs import run_program
from text4vis.common.stages import Stage, StageError, perform, with_set
from text4vis.config.loading import load_config
from text4vis.config.schema import ConfigError
from text4vis.evaluation.comparison import read_report, summarise
from text4vis.evaluation.protocols import is_multi_label

TRAIN = Path(__file__).resolve().parent.parent / "text4vis" / "train.py"
METRICS = {"top1": "top-1 %", "top5": "top-5 %", "mean_class_accuracy": "mean class %"}
METRICS_OF_SEVERAL = {"map": "mAP %", "f1": "F1 %", "top1": "top-1 %", "top5": "top-5 %"}  # labels a video


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", required=True, help="recipe, e.g. configs/demo.yaml")
    parser.add_argument("--seeds", required=True, type=numbers, metavar="N,N,…", help="e.g. 1,2,3")
    parser.add_argument("--output", required=True, type=Path, help="folder of the runs and the summary")
    parser.add_argument("--set", action="append", default=[], metavar="SECTION.KEY=VALUE", help="overrides one key")
    parser.add_argument(
        "--launcher", type=shlex.split, help="command that starts text4vis/train.py; default: deepspeed, all GPUs"
    )
    return parser.parse_args()


def numbers(text: str) -> list[int]:
    seeds = [int(word) for word in text.split(",")]
    if len(set(seeds)) < len(seeds) or min(seeds) < 0:
        raise ValueError
    return seeds


def all_gpus() -> list[str]:
    import torch

    return [str(Path(sys.executable).with_name("deepspeed")), "--num_gpus", str(max(1, torch.cuda.device_count()))]


def stage_of(arguments: argparse.Namespace, seed: int) -> Stage:
    output = arguments.output / f"seed-{seed}"
    settings = [*arguments.set, f"seed={seed}"]
    command = [*(arguments.launcher or all_gpus()), str(TRAIN), "--config", arguments.config, "--output", str(output)]
    recipe = load_config(arguments.config, settings).to_yaml()
    return Stage(f"seed-{seed}", [[*command, *with_set(settings)]], recipe)


def columns(reports: Mapping[int, Any]) -> dict[str, str]:
    """{key: heading} of the figures that all reports hold."""
    several = all(map(is_multi_label, reports.values()))
    names = METRICS_OF_SEVERAL if several else METRICS
    return {key: name for key, name in names.items() if all(report[key] is not None for report in reports.values())}


def show(reports: Mapping[int, Any], means: Mapping[str, tuple[float, float]]) -> None:
    names = columns(reports)
    rows = table(("seed",), tuple(names.values()))
    for seed, report in reports.items():
        rows.add_row(str(seed), *(f"{report[key]:.2f}" for key in names))
    rows.add_section()
    rows.add_row("mean ± deviation", *("{:.2f} ± {:.2f}".format(*means[key]) for key in names))
    console().print(rows)


def run(arguments: argparse.Namespace, seeds: Sequence[int]) -> None:
    stages = [stage_of(arguments, seed) for seed in seeds]  # reports a mistake before the first run starts
    for stage in stages:
        perform(stage, arguments.output)
    reports = {seed: read_report(arguments.output / f"seed-{seed}" / "report.json") for seed in seeds}
    means = summarise(list(reports.values()))
    summary = {
        "config": arguments.config,
        "set": [shown(setting) for setting in arguments.set],
        "runs": [{"seed": seed, **{key: report[key] for key in columns(reports)}} for seed, report in reports.items()],
        "mean": {key: mean for key, (mean, _) in means.items()},
        "std": {key: deviation for key, (_, deviation) in means.items()},
    }
    (arguments.output / "summary.json").write_text(json.dumps(summary, ensure_ascii=False, indent=1) + "\n", "utf-8")
    show(reports, means)


def main() -> int:
    arguments = parse_arguments()
    try:
        run(arguments, arguments.seeds)
    except StageError as error:
        print(f"repeat: error: {shown(error)}", file=sys.stderr)
        return error.code
    except (ConfigError, OSError) as error:
        print(f"repeat: error: {shown(error)}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    run_program(main)
