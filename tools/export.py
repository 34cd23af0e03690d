"""Exports a trained model: one folder with weights (safetensors), configuration, classes and a model card.

Examples:
    python tools/export.py runs/demo --output exported
    python tools/export.py runs/demo --output exported --onnx       # and a graph that runs without torch

text4vis.load and tools/predict.py open the folder; docs/deployment.md tells what is in it. The model card quotes the
run's last evaluation, or the --report of text4vis/evaluate.py that is given.

CHECKPOINT: a run's folder (its best weights) or one of its checkpoints. A .pt file of the original project needs
--config and --labels beside it. Exit codes: 0 done, 1 failed, 2 wrong usage.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from shards.annotations import parse_labels
from shards.format import ShardError
from shards.text import shown
from text4vis.classifier.embeddings import build_classifier
from text4vis.config.loading import load_config
from text4vis.config.schema import ConfigError
from text4vis.model.preprocessing import settle
from text4vis.saved.checkpoint import CheckpointError
from text4vis.saved.opening import SavedModel, TrainedModel, open_saved
from text4vis.serving.exporting import export, last_report
from text4vis.serving.onnx_graph import require_packages


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "checkpoint", type=Path, metavar="CHECKPOINT", help="run, checkpoint, or the original's .pt file"
    )
    parser.add_argument("--output", required=True, type=Path, help="folder to write")
    parser.add_argument("--config", type=Path, help="recipe of a .pt file")
    parser.add_argument("--labels", type=Path, help="class names (CSV `id,name`) of a .pt file")
    parser.add_argument("--report", type=Path, help="evaluation for the model card; default: the run's last one")
    parser.add_argument("--onnx", action="store_true", help="also write model.onnx (pip install 'text4vis[onnx]')")
    arguments = parser.parse_args()
    if not arguments.checkpoint.exists():
        parser.error(f"{arguments.checkpoint}: no such file or folder")
    if arguments.checkpoint.is_file() and not (arguments.config and arguments.labels):
        parser.error(
            f"{arguments.checkpoint}: a .pt file does not tell its recipe and classes; add --config and --labels"
        )
    if arguments.checkpoint.is_dir() and (arguments.config or arguments.labels):
        parser.error(f"{arguments.checkpoint}: a run has its own recipe and classes; leave --config and --labels out")
    return arguments


def trained_model(saved: SavedModel, arguments: argparse.Namespace) -> TrainedModel:
    """The model with its recipe and classes: the recorded ones, or those of --config and --labels."""
    if saved.config is not None:
        return saved.trained()
    config, names = settle(load_config(arguments.config), say=print), parse_labels(arguments.labels)
    model = saved.load(config)
    return TrainedModel(model, config, names, build_classifier(config, model, names), saved.card)


def run(arguments: argparse.Namespace) -> None:
    if arguments.onnx:
        require_packages()
    saved = open_saved(arguments.checkpoint)
    trained = trained_model(saved, arguments)
    graph = export(arguments.output, trained, report=arguments.report or last_report(saved), onnx=arguments.onnx)
    print(f"exported {len(trained.class_names)} classes to {arguments.output}")
    if graph is not None:
        compared = "not compared with PyTorch: onnxruntime is not installed"
        if graph.difference is not None:
            compared = f"its logits differ by at most {graph.difference:.1g} from PyTorch's"
        print(f"{graph.path}: {graph.bytes / 1e6:.1f} MB, {compared}")


def main() -> int:
    arguments = parse_arguments()
    try:
        run(arguments)
    except (ConfigError, ShardError, CheckpointError, OSError) as error:
        print(f"export: error: {shown(error)}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
