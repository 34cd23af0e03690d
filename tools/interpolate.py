"""Evaluates mixtures of a model's pre-trained and its trained weights (WiSE-FT), on its own classes and on others.

Examples:
    python tools/interpolate.py runs/own --report curve.json --picture curve.png
    python tools/interpolate.py runs/own --other configs/k600/k600-zero-shot-split1.yaml --alphas 0,0.25,0.5,0.75,1

The first data set is data.val of the run; --config gives another recipe for it. --other is a recipe whose data.val has
classes that the model was not trained on. Each video is decoded once and embedded with the weights of every alpha: 0 is
pre-trained, 1 trained. Choose an alpha on data that the model is not judged by later, then export the mixture:
tools/export.py runs/own --interpolate 0.5 --output exported

Exit codes: 0 done, 1 failed, 2 wrong usage, 130 stopped by Ctrl-C.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from shards.files import require_file
from shards.format import ShardError
from shards.text import shown
from text4vis.common.console import console, table
from text4vis.common.programs import run_program
from text4vis.config.loading import load_config
from text4vis.config.schema import ConfigError

ALPHAS = "0,0.25,0.5,0.75,1"


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, metavar="MODEL", help="run, checkpoint or export")
    parser.add_argument("--config", type=Path, help="recipe of the first data set; default: the run's own")
    parser.add_argument("--other", type=Path, help="recipe of a second data set")
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="SECTION.KEY=VALUE",
        help="overrides a key of --config and --other",
    )
    parser.add_argument("--alphas", default=ALPHAS, help=f"shares of the trained weights, 0 to 1; default: {ALPHAS}")
    parser.add_argument("--report", type=Path, metavar="FILE", help="write the figures here as JSON")
    parser.add_argument("--picture", type=Path, metavar="FILE", help="draw them here (PNG, SVG or PDF)")
    arguments = parser.parse_args()
    try:
        arguments.alphas = sorted({float(alpha) for alpha in arguments.alphas.split(",")})
    except ValueError:
        parser.error(f"--alphas: expected numbers such as {ALPHAS}, got {arguments.alphas}")
    if not all(0 <= alpha <= 1 for alpha in arguments.alphas):
        parser.error(f"--alphas: expected numbers from 0 to 1, got {arguments.alphas}")
    return arguments


def run(arguments: argparse.Namespace) -> None:
    from text4vis.evaluation.mixtures import accuracies, draw  # this loads torch, too long for --help
    from text4vis.saved.interpolation import Interpolation
    from text4vis.saved.opening import open_saved

    for option in ("report", "picture"):
        if (path := getattr(arguments, option)) is not None:
            require_file(path, f"--{option}")
    saved = open_saved(arguments.model)
    line = Interpolation(saved, saved.trained())
    recipes = [path for path in (arguments.config, arguments.other) if path is not None]
    configs = [saved.settle(load_config(recipe, arguments.set)) for recipe in recipes]
    if arguments.config is None:
        configs.insert(0, line.trained.config)
    sets = [accuracies(line, arguments.alphas, config) for config in configs]
    show(sets)
    if arguments.report:
        content = {"model": str(arguments.model), "sets": sets}
        arguments.report.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    if arguments.picture:
        draw(sets, arguments.picture)


def show(sets: Sequence[Mapping[str, Any]]) -> None:
    """One row for each alpha."""
    halves = "half_classes_top1" in sets[0]["rows"][0]
    titles = [f"{each['data'] or 'data'}, {each['classes']} classes: {each['rows'][0]['is']} %" for each in sets]
    rows = table(("alpha",), (*titles, *(["among half of the classes %"] if halves else [])))
    for same in zip(*(each["rows"] for each in sets), strict=True):
        figures = [f"{row['figure']:.2f}" for row in same]
        rows.add_row(f"{same[0]['alpha']:g}", *figures, *([f"{same[0]['half_classes_top1']:.2f}"] if halves else []))
    console().print(rows)


def main() -> int:
    arguments = parse_arguments()
    from text4vis.saved.checkpoint import CheckpointError

    try:
        run(arguments)
    except (ConfigError, ShardError, CheckpointError, OSError) as error:
        print(f"interpolate: error: {shown(error)}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    run_program(main)
