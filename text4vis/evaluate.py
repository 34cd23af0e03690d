r"""Evaluates a model on the shards of `data.val`.

    deepspeed text4vis/evaluate.py --config configs/demo.yaml --model runs/demo
    python text4vis/evaluate.py --config configs/demo.yaml --model exported \
        --set data.val=shards/unseen --set data.label_list=unseen.csv --report unseen.json
    python text4vis/evaluate.py --config configs/demo.yaml --model exported --features val.safetensors \
        --set data.test_clips=4 --set data.test_crops=3
    python text4vis/evaluate.py --config k600.yaml --model exported \
        --set 'data.class_splits=[split1.csv,split2.csv,split3.csv]'

Every video is embedded once. From that follow all protocols: one view and several, all classes, the zero-shot halves
of the classes, the lists of `data.class_splits`, mean average precision, the table of classes, the confusion matrix.
With --features the embeddings are kept, and another classifier, template or class list costs seconds. The report
names what it was measured with; tools/compare_reports.py compares two.

--model: a run's folder (its best weights), a checkpoint, an export, or a .pt file of the original project.
Exit codes: 0 done, 1 failed, 2 wrong usage.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

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
    parser.add_argument("--features", type=Path, help="file that keeps the videos' embeddings, read if up to date")
    parser.add_argument("--local_rank", type=int, default=0, help=argparse.SUPPRESS)  # the deepspeed launcher adds it
    return parser.parse_args()


def run(arguments: argparse.Namespace) -> None:
    import torch

    from text4vis.classifier import build_classifier
    from text4vis.evaluation import class_splits, evaluate, weights_fingerprint
    from text4vis.pipeline import build_loader, class_names
    from text4vis.protocols import write_report

    config = load_config(arguments.config, arguments.set)
    ranks = distributed.start()
    distributed.use_cores(config.engine.num_threads)
    with build_loader(config, "val", rank=ranks.rank, world_size=ranks.world_size) as loader:
        names = class_names(config, loader.dataset)
        splits = class_splits(config, names, loader.dataset.labels)
        model = load_model(arguments.model, config)
        classes_CD = build_classifier(config, model, names)
        weights = weights_fingerprint(model.state_dict()) if ranks.is_main else ""
        dtype = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[config.engine.precision]
        report = evaluate(
            model.to(distributed.device(), dtype),
            classes_CD,
            names,
            loader,
            weights=weights,
            splits=splits,
            features=arguments.features,
            progress=ranks.is_main and sys.stderr.isatty(),
        )
    if report is None:
        return
    if arguments.report:
        write_report(arguments.report, {"model": str(arguments.model), **report})
    show(report)


def show(report: dict[str, Any]) -> None:
    """The main figures, a line for each protocol."""
    table = Table("", title=report["data"] or None)
    for column in ("videos", "classes", "top-1 %", "top-5 %"):
        table.add_column(column, justify="right", no_wrap=True)
    for row in report["by_views"]:
        counts = (str(report[key]) for key in ("videos", "classes"))
        table.add_row(f"{row['clips']} x {row['crops']} views", *counts, f"{row['top1']:.2f}", f"{row['top5']:.2f}")
    for key in ("half_classes", "class_splits"):
        if over := report[key]:
            each = over["splits"]
            counts = (f"{sum(split[what] for split in each) / len(each):.0f}" for what in ("videos", "classes"))
            shares = (f"{over[f'{top}_mean']:.2f} ± {over[f'{top}_std']:.2f}" for top in ("top1", "top5"))
            table.add_row(f"{len(each)} {key.replace('_', ' ')}", *counts, *shares)
    console = Console(highlight=False)
    console.print(table)
    precision = "" if report["map"] is None else f"mAP {report['map']:.2f} %, "
    console.print(
        f"mean class accuracy {report['mean_class_accuracy']:.2f} %, {precision}chance {report['chance']:.2f} %"
    )


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
