"""Builds the class embeddings that a recipe asks for, and lists the classes whose embeddings are closest.

Examples:
    python tools/build_classifier.py --config runs/own/config.yaml --output classes.safetensors
    python tools/build_classifier.py --config C.yaml --set network.classifier=lda --output lda.safetensors

The class names come from data.label_list, or else from the shards of data.train or data.val. To train with the file,
--set network.classifier=file --set network.classifier_file=classes.safetensors. Exit codes: 0 done, 1 failed, 2 wrong
usage.
"""

from __future__ import annotations

import argparse
import csv
import json
import sys
from dataclasses import asdict
from pathlib import Path

from shards.annotations import parse_labels
from shards.files import require_file
from shards.format import ShardError
from shards.text import shown
from text4vis import classifier, data, model  # faces: they load torch where it is first needed
from text4vis.common.console import console, table
from text4vis.common.programs import run_program
from text4vis.config.loading import Origins, resolve_config
from text4vis.config.schema import Config, ConfigError
from text4vis.config.templates import prompts


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", required=True, help="recipe, e.g. configs/demo.yaml")
    parser.add_argument("--set", action="append", default=[], metavar="SECTION.KEY=VALUE", help="overrides one key")
    parser.add_argument("--output", required=True, type=Path, help="file to write, .safetensors")
    parser.add_argument("--confusable", type=int, default=20, metavar="N", help="closest pairs to show; default: 20")
    parser.add_argument("--pairs", type=Path, metavar="FILE", help="write these pairs here, as .json or .csv")
    arguments = parser.parse_args()
    if arguments.output.suffix != ".safetensors":
        parser.error("--output must end in .safetensors")
    if arguments.pairs and arguments.pairs.suffix not in {".json", ".csv"}:
        parser.error("--pairs must end in .json or .csv")
    return arguments


def names_of(config: Config) -> list[str]:
    if config.data.label_list is not None:
        return parse_labels(config.data.label_list)
    with data.open_split(config, "train" if config.data.train else "val") as dataset:
        return list(dataset.classes)


def show(pairs: list[classifier.Pair]) -> None:
    rows = table(("class", "class"), ("cosine",), title="the classes closest to each other")
    for pair in pairs:
        rows.add_row(pair.first, pair.second, f"{pair.cosine:.3f}")
    console().print(rows)


def write_pairs(path: Path, pairs: list[classifier.Pair]) -> None:
    rows = [asdict(pair) for pair in pairs]
    with path.open("w", encoding="utf-8", newline="") as file:
        if path.suffix == ".json":
            json.dump(rows, file, ensure_ascii=False, indent=1)
        else:
            writer = csv.DictWriter(file, ["first", "second", "cosine"])
            writer.writeheader()
            writer.writerows(rows)


def run(arguments: argparse.Namespace, config: Config) -> None:
    config = model.settle(config, say=print)
    for option in ("output", "pairs"):
        if path := getattr(arguments, option):
            require_file(path, f"--{option}")
    names = names_of(config)
    clip = model.build_model(config.network, config.data.num_segments, image_size=config.data.input_size)
    classes_CD = classifier.build_classifier(config, clip, names)
    recipe = {
        "kind": config.network.classifier,
        "prompts": prompts(config.network.template),
        "seed": config.seed,
        "network": config.to_dict()["network"],
    }
    classifier.save_classifier(arguments.output, classes_CD, names, recipe)
    pairs = classifier.confusable_pairs(classes_CD, names, arguments.confusable)
    show(pairs)
    if arguments.pairs:
        write_pairs(arguments.pairs, pairs)
    print(f"wrote {len(names)} classes, {classes_CD.shape[1]} wide, to {arguments.output}")


def main() -> int:
    arguments = parse_arguments()
    origins = Origins({})
    try:
        config, origins = resolve_config(arguments.config, arguments.set)
        run(arguments, config)
    except (ConfigError, ShardError, OSError) as error:
        print(f"build_classifier: error: {shown(origins.explain(error))}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    run_program(main)
