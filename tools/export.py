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
from text4vis.config import ConfigError, config_from_dict, load_config
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
        config = load_config(arguments.config)
        names = parse_labels(arguments.labels)
        card = {"source": arguments.checkpoint.name}
    else:
        state = checkpoint.read_state(checkpoint.find(arguments.checkpoint))
        config = config_from_dict(state.config, str(arguments.checkpoint))
        names = state.class_names
        card = {"step": state.step, "data_fingerprint": state.data_fingerprint, **state.figures}
    model = checkpoint.load_model(arguments.checkpoint, config)
    classes_CD = build_classifier(config, model, names)
    export_model(arguments.output, model, config.network, config.to_dict(), names, classes_CD, card)
    print(f"exported {len(names)} classes to {arguments.output}")


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
