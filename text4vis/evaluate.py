"""Evaluates a model on the shards of `data.val`.

    deepspeed text4vis/evaluate.py --config configs/demo.yaml --model runs/demo
    python text4vis/evaluate.py --config configs/demo.yaml --model exported \
        --set data.val=shards/unseen --set data.label_list=unseen.csv --report unseen.json

--model: a run's folder (its best weights), a checkpoint, an export, or a .pt file of the original project.
Exit codes: 0 done, 1 failed, 2 wrong usage.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from rich.console import Console
from rich.table import Table

from shards.format import ShardError
from text4vis import distributed
from text4vis.checkpoint import CheckpointError, load_model
from text4vis.config import ConfigError, load_config


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", required=True, help="recipe, e.g. configs/demo.yaml")
    parser.add_argument("--model", required=True, type=Path, help="run, checkpoint, export, or the original's .pt file")
    parser.add_argument("--set", action="append", default=[], metavar="SECTION.KEY=VALUE", help="overrides one key")
    parser.add_argument("--report", type=Path, help="write the report as JSON")
    parser.add_argument("--local_rank", type=int, default=0, help=argparse.SUPPRESS)  # the deepspeed launcher adds it
    return parser.parse_args()


def run(arguments: argparse.Namespace) -> None:
    import torch

    from text4vis.classifier import build_classifier
    from text4vis.evaluation import evaluate
    from text4vis.pipeline import build_loader, class_names
    from text4vis.trainer import write_report

    config = load_config(arguments.config, arguments.set)
    ranks = distributed.start()
    distributed.use_cores(config.engine.num_threads)
    with build_loader(config, "val", rank=ranks.rank, world_size=ranks.world_size) as loader:
        names = class_names(config, loader.dataset)
        model = load_model(arguments.model, config)
        classes_CD = build_classifier(config, model, names)
        dtype = torch.bfloat16 if config.engine.precision == "bf16" else torch.float32
        model = model.to(distributed.device(), dtype)
        report = evaluate(model, classes_CD, names, loader, progress=ranks.is_main and sys.stderr.isatty())
    if report is None:
        return
    if arguments.report:
        write_report(arguments.report, {"model": str(arguments.model), **report})
    show(report)


def show(report: dict) -> None:
    table = Table(title=report["data"] or None)
    for column in ("videos", "classes", "top-1 %", "top-5 %", "mean class %", "chance %"):
        table.add_column(column, justify="right")
    table.add_row(
        str(report["videos"]),
        str(report["classes"]),
        *(f"{report[key]:.2f}" for key in ("top1", "top5", "mean_class_accuracy", "chance")),
    )
    Console().print(table)


def main() -> int:
    arguments = parse_arguments()
    try:
        run(arguments)
    except (ConfigError, ShardError, CheckpointError, OSError) as error:
        print(f"evaluate: error: {error}", file=sys.stderr)
        return 1
    finally:
        distributed.stop()
    return 0


if __name__ == "__main__":
    sys.exit(main())
