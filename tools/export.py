"""Exports a trained model: one folder with weights (safetensors), configuration and classes, for tools/predict.py.

    python tools/export.py runs/demo --output exported

CHECKPOINT: a run's folder (its best weights) or one of its checkpoints. A .pt file of the original project needs
--config and --labels beside it. Exit codes: 0 done, 1 failed, 2 wrong usage.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from shards.annotations import parse_labels
from shards.format import ShardError
from text4vis import checkpoint
from text4vis.checkpoint import CheckpointError
from text4vis.classifier import build_classifier
from text4vis.config import ConfigError, load_config
from text4vis.predictor import Trained, open_run
from text4vis.weights import export_model


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "checkpoint", type=Path, metavar="CHECKPOINT", help="run, checkpoint, or the original's .pt file"
    )
    parser.add_argument("--output", required=True, type=Path, help="folder to write")
    parser.add_argument("--config", type=Path, help="recipe of a .pt file")
    parser.add_argument("--labels", type=Path, help="class names (CSV `id,name`) of a .pt file")
    arguments = parser.parse_args()
    if arguments.checkpoint.is_file() != bool(arguments.config and arguments.labels):
        parser.error("--config and --labels go with a .pt file, and with nothing else")
    return arguments


def run(arguments: argparse.Namespace) -> None:
    if arguments.checkpoint.is_file():
        config, names = load_config(arguments.config), parse_labels(arguments.labels)
        model = checkpoint.load_model(arguments.checkpoint, config)
        card = {"source": arguments.checkpoint.name}
        trained = Trained(model, config, names, build_classifier(config, model, names), card)
    else:
        trained = open_run(arguments.checkpoint)
    export_model(
        arguments.output,
        trained.model,
        trained.config.network,
        trained.config.to_dict(),
        trained.class_names,
        trained.class_embeddings_CD,
        trained.card,
    )
    print(f"exported {len(trained.class_names)} classes to {arguments.output}")


def main() -> int:
    arguments = parse_arguments()
    try:
        run(arguments)
    except (ConfigError, ShardError, CheckpointError, OSError) as error:
        print(f"export: error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
