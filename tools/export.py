"""Exports a trained model to one folder: weights (safetensors), configuration, classes and a model card.

Examples:
    python tools/export.py runs/demo --output exported
    python tools/export.py runs/demo --output exported --onnx       # also a graph that runs without torch
    python tools/export.py exported --onnx                          # adds the graph to an export
    python tools/export.py runs/own --output mixed --interpolate 0.5   # half way back to the pre-trained weights

text4vis.load and tools/predict.py open the folder; docs/deployment.md describes its files. The model card quotes the
run's last evaluation, or the report of text4vis/evaluate.py that --report names. A mixture has no evaluation but that
one; tools/interpolate.py measures mixtures.

CHECKPOINT is a run's folder (its best weights are exported), one of its checkpoints, an export, or a .pt file of the
original project, which needs --config and --labels. Exit codes: 0 done, 1 failed, 2 wrong usage, 130 stopped by
Ctrl-C.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from shards.annotations import parse_labels
from shards.format import ShardError
from shards.text import shown
from text4vis import classifier, saved, serving  # faces: they load torch where it is first needed
from text4vis.common.programs import run_program
from text4vis.config.loading import load_config
from text4vis.config.schema import ConfigError


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "checkpoint", type=Path, metavar="CHECKPOINT", help="run, checkpoint, export, or the original's .pt file"
    )
    parser.add_argument("--output", type=Path, help="folder to write; default: the export that is added to")
    parser.add_argument("--config", type=Path, help="recipe of a .pt file")
    parser.add_argument("--labels", type=Path, help="class names (CSV `id,name`) of a .pt file")
    parser.add_argument("--report", type=Path, help="evaluation for the model card; default: the run's last one")
    parser.add_argument("--onnx", action="store_true", help="also write model.onnx (pip install 'text4vis[onnx]')")
    parser.add_argument(
        "--interpolate", type=float, metavar="ALPHA",
        help="export (1 - ALPHA) x the pre-trained weights + ALPHA x the trained ones (WiSE-FT), to keep zero-shot",
    )  # fmt: skip
    arguments = parser.parse_args()
    if arguments.interpolate is not None and not 0 <= arguments.interpolate <= 1:
        parser.error(f"--interpolate: expected a number from 0 to 1, got {arguments.interpolate:g}")
    if not arguments.checkpoint.exists():
        parser.error(f"{arguments.checkpoint}: no such file or folder")
    if arguments.checkpoint.is_file() and not (arguments.config and arguments.labels):
        parser.error(
            f"{arguments.checkpoint}: a .pt file does not hold its recipe and classes; add --config and --labels"
        )
    if arguments.checkpoint.is_dir() and (arguments.config or arguments.labels):
        parser.error(f"{arguments.checkpoint}: a run has its own recipe and classes; leave --config and --labels out")
    return arguments


def trained_model(source: saved.SavedModel, arguments: argparse.Namespace) -> saved.TrainedModel:
    """The model with its own recipe and classes, or for a .pt file with those of --config and --labels."""
    if source.config is not None:
        return source.trained()
    config, names = source.settle(load_config(arguments.config), say=print), parse_labels(arguments.labels)
    model = source.load(config)
    return saved.TrainedModel(model, config, names, classifier.build_classifier(config, model, names), source.card)


def run(arguments: argparse.Namespace) -> None:
    if arguments.onnx:
        serving.require_packages()
    source = saved.open_saved(arguments.checkpoint)
    if arguments.output is None and source.kind != "export":
        raise ConfigError(
            f"--output: name the folder to write; only an export, which {source.path} is not, is added to"
        )
    if arguments.output is None and not (arguments.onnx or arguments.report):
        raise ConfigError(
            f"{source.path}: is an export already; add to it with --onnx or --report, or name an --output"
        )
    trained = trained_model(source, arguments)
    report = arguments.report or serving.last_report(source)
    if arguments.interpolate is not None:
        if arguments.output is None or arguments.output.resolve() == source.path.resolve():
            raise ConfigError("--output: name another folder for the mixture; an export's own weights stay")
        trained, report = saved.Interpolation(source, trained).at(arguments.interpolate), arguments.report
    output = arguments.output or source.path
    if source.kind == "export" and output.resolve() == source.path.resolve():
        graph = serving.add_to_export(output, trained, report=arguments.report, onnx=arguments.onnx)
        print(f"added to {output}")
    else:
        graph = serving.export(output, trained, report=report, onnx=arguments.onnx)
        print(f"exported {len(trained.class_names)} classes to {output}")
    if graph is not None:
        compared = "not compared with PyTorch: onnxruntime is not installed"
        if graph.difference is not None:
            compared = f"its logits differ by at most {graph.difference:.1g} from PyTorch's"
        print(f"{graph.path}: {graph.bytes / 1e6:.1f} MB, {compared}")


def main() -> int:
    arguments = parse_arguments()
    try:
        run(arguments)
    except (ConfigError, ShardError, saved.CheckpointError, OSError) as error:
        print(f"export: error: {shown(error)}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    run_program(main)
