r"""Evaluates a model on the shards of `data.val`.

Examples:
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

--model: a run's folder (its best weights), a checkpoint, an export, or a .pt file of the original project. Classifier
and sampling are those of --config and --set: a warning names what the model was trained with where that differs.
Exit codes: 0 done, 1 failed, 2 wrong usage.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping
from operator import attrgetter
from pathlib import Path
from typing import TYPE_CHECKING, Any

# Run by path, this folder comes first on sys.path: its rooms would hide installed packages of the same names.
sys.path[:] = [entry for entry in sys.path if Path(entry or ".").resolve() != Path(__file__).resolve().parent]

from shards.files import require_file
from shards.format import ShardError
from shards.text import shown
from text4vis.cluster import distributed
from text4vis.common.console import console, table
from text4vis.config.schema import Config, ConfigError, config_from_dict, load_config
from text4vis.saved import checkpoint
from text4vis.saved.checkpoint import CheckpointError, load_model
from text4vis.saved.weights import EXPORT_FILE, read_export_config

if TYPE_CHECKING:
    from text4vis.model.video_clip import VideoClip

# Keys that decide which frames the model sees, what the model is (an export brings its own), and its classes' rows.
FRAME_KEYS = ("data.num_segments", "data.dense", "data.input_size", "data.scale_size")
MODEL_KEYS = ("network.arch", "network.pretrained", "network.sim_header", "network.tm", "network.joint_st")
CLASSIFIER_KEYS = {
    "text": ("network.template",),
    "random": ("seed",),
    "orthogonal": ("seed",),
    "lda": ("seed", "network.lda_videos", "network.arch", "network.pretrained", "data.train", "data.shot",
            "data.shot_seed"),
    "sentence": ("network.template", "network.sentence_model", "network.sentence_projection"),
    "file": ("network.classifier_file",),
}  # fmt: skip


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

    from text4vis.classifier.embeddings import build_classifier
    from text4vis.data.loader import build_loader, class_names
    from text4vis.evaluation.embedding import class_splits, evaluate, weights_fingerprint
    from text4vis.evaluation.protocols import write_report

    config = load_config(arguments.config, arguments.set)
    ranks = distributed.start()
    distributed.use_cores(config.engine.num_threads)
    if arguments.report:
        distributed.from_main(lambda: require_file(arguments.report, "--report"))
    with build_loader(config, "val", rank=ranks.rank, world_size=ranks.world_size) as loader:
        names = class_names(config, loader.dataset)
        splits = class_splits(config, names, loader.dataset.labels)
        trained = trained_with(arguments.model)
        differing = trained and differences(trained, config, is_export=is_export(arguments.model))
        if differing and ranks.is_main:
            print(f"evaluate: warning: {warning(arguments.model, differing)}", file=sys.stderr)
        model = load_model(arguments.model, config)
        check_frames(model, config)
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
        )
    if report is None:
        return
    show(report)
    if arguments.report:
        write_report(arguments.report, {"model": str(arguments.model), **report})


def is_export(path: Path) -> bool:
    return (path / EXPORT_FILE).is_file()


def trained_with(path: Path) -> Config | None:
    """The configuration that a model records; None for a .pt file, which records none."""
    if path.suffix in {".pt", ".pth"}:
        return None
    values = read_export_config(path) if is_export(path) else checkpoint.read_state(checkpoint.find(path)).config
    return config_from_dict(values, str(path))


def differences(trained: Config, given: Config, *, is_export: bool) -> dict[str, tuple[Any, Any]]:
    """(value in training, value given) of each key that differs and on which the figures depend."""
    keys, network = [*FRAME_KEYS, *(() if is_export else MODEL_KEYS)], trained.network
    if not network.classifier_trainable:  # else the model has the rows
        keys.append("network.classifier")
        if network.classifier == given.network.classifier:
            keys += CLASSIFIER_KEYS[network.classifier]
            keys += ["seed"] if network.classifier == "sentence" and network.sentence_projection else []
    pairs = {key: (attrgetter(key)(trained), attrgetter(key)(given)) for key in keys}
    return {key: (before, now) for key, (before, now) in pairs.items() if before != now}


def warning(path: Path, differing: Mapping[str, tuple[Any, Any]]) -> str:
    pairs = ", ".join(f"{key}: {before!r} -> {now!r}" for key, (before, now) in differing.items())
    return (
        f"{path} was trained with other settings than are given here ({pairs}), so its figures can fall to chance; "
        "give the first ones with --set to measure it as it was trained"
    )


def check_frames(model: VideoClip, config: Config) -> None:
    """Raises ConfigError where a model that brings its own network cannot take the frames of `config`."""
    from text4vis.model.heads import NUM_POSITIONS, TransformerHead

    data = config.data
    if model.image_size != data.input_size:
        raise ConfigError(
            f"data.input_size: {data.input_size}, but the model takes {model.image_size} pixels; "
            f"add --set data.input_size={model.image_size}"
        )
    if model.takes_fixed_frames and model.num_segments != data.num_segments:
        raise ConfigError(
            f"data.num_segments: {data.num_segments}, but the model takes {model.num_segments} frames; "
            f"add --set data.num_segments={model.num_segments}"
        )
    if isinstance(model.fusion_model, TransformerHead) and data.num_segments > NUM_POSITIONS:
        raise ConfigError(
            f"data.num_segments: {data.num_segments}, but the model's head has positions for {NUM_POSITIONS} frames; "
            f"add --set data.num_segments={model.num_segments}"
        )


def show(report: dict[str, Any]) -> None:
    """The main figures, a line for each protocol."""
    rows = table(("",), ("videos", "classes", "top-1 %", "top-5 %"), title=report["data"] or None)
    for row in report["by_views"]:
        counts = (str(report[key]) for key in ("videos", "classes"))
        rows.add_row(f"{row['clips']} x {row['crops']} views", *counts, f"{row['top1']:.2f}", f"{row['top5']:.2f}")
    for key in ("half_classes", "class_splits"):
        if over := report[key]:
            each = over["splits"]
            counts = (f"{sum(split[what] for split in each) / len(each):.0f}" for what in ("videos", "classes"))
            shares = (f"{over[f'{top}_mean']:.2f} ± {over[f'{top}_std']:.2f}" for top in ("top1", "top5"))
            rows.add_row(f"{len(each)} {key.replace('_', ' ')}", *counts, *shares)
    screen = console()
    screen.print(rows)
    for entry in report["skipped"]:
        screen.print(f"left out: {entry['reason']}")
    if report["not_finite"]:
        screen.print(f"counted as wrong: {report['not_finite']} videos whose scores are not finite numbers")
    precision = "" if report["map"] is None else f"mAP {report['map']:.2f} %, "
    screen.print(
        f"mean class accuracy {report['mean_class_accuracy']:.2f} %, {precision}"
        f"chance of top-1 {report['chance']:.2f} %"
    )


def main() -> int:
    arguments = parse_arguments()
    try:
        run(arguments)
    except (ConfigError, ShardError, CheckpointError, OSError) as error:
        print(f"evaluate: error: {shown(error)}", file=sys.stderr)
        return 1
    finally:
        distributed.stop()
    return 0


if __name__ == "__main__":
    sys.exit(main())
