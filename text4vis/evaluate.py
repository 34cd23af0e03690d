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
Exit codes: 0 done, 1 failed, 2 wrong usage, 130 stopped by Ctrl-C.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
import traceback
from collections.abc import Collection, Mapping
from operator import attrgetter
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # until `main` runs, Ctrl-C ends the program without a traceback

# Run by path, this folder comes first on sys.path: its rooms would hide installed packages of the same names.
sys.path[:] = [entry for entry in sys.path if Path(entry or ".").resolve() != Path(__file__).resolve().parent]

from shards.files import require_file
from shards.format import ShardError
from shards.text import shown
from text4vis.cluster import interrupt
from text4vis.cluster.interrupt import Interrupts
from text4vis.common.console import console, table
from text4vis.common.programs import prepare_output, unnameable
from text4vis.config.keys import classifier_keys, keys_of, schema
from text4vis.config.loading import Origins, resolve_config
from text4vis.config.paths import same_path
from text4vis.config.roles import Role
from text4vis.config.schema import Config, ConfigError


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", required=True, help="recipe, e.g. configs/demo.yaml")
    parser.add_argument("--model", required=True, type=Path, help="run, checkpoint, export, or the original's .pt file")
    parser.add_argument("--set", action="append", default=[], metavar="SECTION.KEY=VALUE", help="overrides one key")
    parser.add_argument("--report", type=Path, help="write the report as JSON")
    parser.add_argument("--features", type=Path, help="file that keeps the videos' embeddings, read if up to date")
    parser.add_argument("--local_rank", type=int, default=0, help=argparse.SUPPRESS)  # the deepspeed launcher adds it
    return parser.parse_args()


def measure(arguments: argparse.Namespace, config: Config) -> None:
    """Embeds the videos, writes the report and shows its main figures.

    Raises ConfigError, ShardError, CheckpointError, OSError.
    """
    import numpy as np

    from text4vis.classifier.embeddings import build_classifier
    from text4vis.cluster import distributed
    from text4vis.data.datasets import class_names
    from text4vis.data.loader import build_loader
    from text4vis.evaluation.embedding import class_splits, evaluate
    from text4vis.evaluation.protocols import write_report
    from text4vis.model.preprocessing import KEYS, settle
    from text4vis.model.video_clip import WEIGHTS_DTYPE
    from text4vis.saved.opening import open_saved
    from text4vis.saved.weights import weights_fingerprint

    ranks = distributed.ranks()
    distributed.use_cores(config.engine.num_threads)
    distributed.use_tf32(config.engine.tf32)
    if arguments.report:
        distributed.from_main(lambda: require_file(arguments.report, "--report"))
    saved = open_saved(arguments.model)
    config = saved.settle(config, say=lambda line: print(line) if ranks.is_main else None)
    with build_loader(config, "val", rank=ranks.rank, world_size=ranks.world_size) as loader:
        is_its_list = saved.config is not None and saved.config.data.label_list == config.data.label_list
        names = class_names(config, loader.dataset, recorded=saved.class_names if is_its_list else None)
        splits = class_splits(config, names, np.flatnonzero(loader.dataset.class_counts()))
        differing = {}
        if saved.config is not None:
            unsettled = [key for key in KEYS if key not in saved.settled]  # and some that it does not record
            trained = settle(saved.config, config, keys=unsettled, say=lambda _: None)
            differing = differences(trained, config, saved.settled)
        if differing and ranks.is_main:
            print(f"evaluate: warning: {warning(arguments.model, differing)}", file=sys.stderr)
        model = saved.load(config)
        model.check_frames(config.data)
        # The recorded classes need nothing that they were made from; other names or settings give others.
        decisive = {"network.classifier", *classifier_keys(config.network.classifier)}
        is_recorded = names == saved.class_names and decisive.isdisjoint(differing) and model.classifier is None
        classes_CD = saved.class_embeddings_CD if is_recorded else None
        if classes_CD is None:
            classes_CD = build_classifier(config, model, names)
        weights = weights_fingerprint(model.state_dict()) if ranks.is_main else ""
        model.autocast = config.engine.precision == "amp"
        report = evaluate(
            model.to(distributed.device(), WEIGHTS_DTYPE[config.engine.precision]),
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


def differences(trained: Config, given: Config, settled: Collection[str]) -> dict[str, tuple[Any, Any]]:
    """(value in training, value given) of each key that differs and on which the figures depend.

    settled: keys whose values the model brings itself.
    """
    network = trained.network
    keys = keys_of(Role.FRAMES) + tuple(key for key in keys_of(Role.MODEL) if key not in settled)
    if not network.classifier_trainable:  # else the model has the classes' embeddings
        keys += ("network.classifier",)
        if network.classifier == given.network.classifier:
            unused = {"seed"} if network.classifier == "sentence" and not network.sentence_projection else set()
            keys += tuple(key for key in classifier_keys(network.classifier) if key not in unused)
    pairs = {key: (attrgetter(key)(trained), attrgetter(key)(given)) for key in keys}
    paths = {declared.name for declared in schema() if declared.path != "no"}
    return {
        key: (before, now)
        for key, (before, now) in pairs.items()
        if before != now and not (key in paths and same_path(before, now))
    }


def warning(path: Path, differing: Mapping[str, tuple[Any, Any]]) -> str:
    """The warning that a model is evaluated with other settings than it was trained with."""
    pairs = ", ".join(f"{key}: {before!r} -> {now!r}" for key, (before, now) in differing.items())
    return (
        f"{path} was trained with other settings than are given here ({pairs}), so its figures can fall to chance; "
        "give those of the training with --set to measure it as it was trained"
    )


def show(report: dict[str, Any]) -> None:
    """The main figures, a line for each protocol."""
    from text4vis.evaluation.protocols import is_multi_label

    several = is_multi_label(report)
    shares = {"mAP %": "map"} if several else {}
    shares |= {"top-1 %": "top1", "top-5 %": "top5"}
    rows = table(("",), ("videos", "classes", *shares), title=report["data"] or None)
    for row in report["by_views"]:
        counts = (str(report[key]) for key in ("videos", "classes"))
        figures = ("-" if row[key] is None else f"{row[key]:.2f}" for key in shares.values())
        rows.add_row(f"{row['clips']} x {row['crops']} views", *counts, *figures)
    for key in ("half_classes", "class_splits"):
        if over := report[key]:
            each = over["splits"]
            counts = (f"{sum(split[what] for split in each) / len(each):.0f}" for what in ("videos", "classes"))
            spreads = (f"{over[f'{top}_mean']:.2f} ± {over[f'{top}_std']:.2f}" for top in ("top1", "top5"))
            rows.add_row(f"{len(each)} {key.replace('_', ' ')}", *counts, *spreads)
    screen = console()
    screen.print(rows)
    for entry in report["skipped"]:
        screen.print(f"left out: {entry['reason']}")
    if report["not_finite"]:
        screen.print(f"counted as wrong: {report['not_finite']} videos whose scores are not finite numbers")
    if known := report["calibration"]:
        best = next(row for row in known["answers"] if row["accuracy"] == 95)
        screen.print(
            f"calibration error of one view {known['ece']:.1f} %, at temperature {known['temperature']:.2f} "
            f"{known['ece_calibrated']:.1f} % (chance alone {known['ece_of_chance']:.1f} %); answers that aim at 95 % "
            f"right: {best['answered']:.0f} % of videos"
            + ("" if best["right_of_answered"] is None else f", {best['right_of_answered']:.1f} % of them right")
        )
    if several:
        screen.print(several_words(report))
        return
    precision = "" if report["map"] is None else f"mAP {report['map']:.2f} %, "
    screen.print(
        f"mean class accuracy {report['mean_class_accuracy']:.2f} %, {precision}"
        f"chance of top-1 {report['chance']:.2f} %"
    )


def several_words(report: dict[str, Any]) -> str:
    """What a report says of the thresholds of classes where videos have several labels."""
    left_out = f"{report['unlabelled']} videos without a label count for F1 alone; " if report["unlabelled"] else ""
    f1 = "too few videos to measure F1"
    if report["f1"] is not None:
        f1 = f"F1 at each class's threshold {report['f1']:.2f} %, of all pairs {report['f1_micro']:.2f} %"
    return f"{left_out}{f1}; chance {report['chance']:.2f} %"


def main() -> int:
    """Returns the exit code."""
    prepare_output()
    arguments = parse_arguments()
    try:
        config, origins = resolve_config(arguments.config, arguments.set)
    except UnicodeEncodeError as error:
        return fail(unnameable(error))
    except (ConfigError, OSError) as error:
        return fail(str(error))
    return run(arguments, config, origins)


def run(arguments: argparse.Namespace, config: Config, origins: Origins) -> int:
    """Joins the job, evaluates and leaves it. Returns the exit code."""
    # These load torch, which takes seconds: too long for --help or for the answer to a wrong recipe.
    from text4vis.cluster import distributed
    from text4vis.cluster.watch import Watch
    from text4vis.saved.checkpoint import CheckpointError

    signal.signal(signal.SIGINT, signal.default_int_handler)
    interrupts = Interrupts("")
    try:
        distributed.start()
    except OSError as error:
        return fail(str(error))
    except KeyboardInterrupt:
        return interrupt.EXIT_CODE
    watch = Watch(config.engine.silence_seconds, lambda cause: end(cause, interrupts))
    try:
        measure(arguments, config)
    except KeyboardInterrupt:
        watch.fail("stopped by Ctrl-C; no report was written")
    except (ConfigError, ShardError, CheckpointError, OSError) as error:
        watch.fail(origins.explain(error))
    except UnicodeEncodeError as error:
        watch.fail(unnameable(error))
    except Exception as error:
        print(shown(traceback.format_exc()), file=sys.stderr)
        watch.fail(f"{type(error).__name__}: {error}", sure=not distributed.is_consequence(error))
    watch.close()
    distributed.stop()
    return 0


def end(cause: str, interrupts: Interrupts) -> None:
    """Ends this process at once, from any thread: the main one may wait for a rank that is gone."""
    fail(cause)
    sys.stderr.flush()
    os._exit(interrupt.EXIT_CODE if interrupts.happened else 1)


def fail(reason: str) -> int:
    """Prints what went wrong to standard error. Returns the exit code."""
    print(f"evaluate: error: {shown(reason)}", file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main())
