"""Runs all of Text4Vis on drawn people, from making the data to a picture of a prediction. `make demo` calls it.

Examples:
    python tools/demo.py --output demo

Each stage runs the ordinary commands and prints them first. A finished stage is skipped the next time.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path

from rich.table import Table

from shards.text import shown
from text4vis.common.console import console, table
from text4vis.common.programs import run_program
from text4vis.common.stages import Stage, StageError, perform, with_set

ROOT = Path(__file__).resolve().parent.parent
CONFIG = "configs/demo.yaml"
SPLITS = ("train", "val", "unseen")


def stages(folder: Path) -> list[Stage]:
    import torch  # takes seconds: too long for --help

    data, run = folder / "data", folder / "run"
    python, binaries = sys.executable, Path(sys.executable).parent
    launch = [str(binaries / "deepspeed"), "--num_gpus", str(torch.cuda.device_count() or 2)]

    def build(split: str) -> list[str]:
        labels = data / ("unseen_labels.csv" if split == "unseen" else "labels.csv")
        return [
            python, "tools/build_shards.py", "--annotations", f"{data}/{split}.txt", "--root", f"{data}/frames",
            "--labels", str(labels), "--output", f"{folder}/shards/{split}", "--shard-bytes", "32MB",
        ]  # fmt: skip

    shards = [f"data.train={folder}/shards/train", f"data.val={folder}/shards/val"]
    unseen = [f"data.val={folder}/shards/unseen", "data.dataset=unseen"]
    return [
        Stage("data", [[python, "tools/make_demo_data.py", "--output", str(data)]]),
        Stage("shards", [build(split) for split in SPLITS]),
        Stage(
            "training",
            [[*launch, "text4vis/train.py", "--config", CONFIG, "--output", str(run), *with_set(shards)]],
        ),
        Stage(
            "evaluation",
            [
                [*launch, "text4vis/evaluate.py", "--config", CONFIG, "--model", str(run), *with_set(settings),
                 "--report", f"{folder}/{name}.json"]
                for name, settings in (("val", shards), ("unseen", unseen))
            ],
        ),
        Stage("export", [[python, "tools/export.py", str(run), "--output", f"{folder}/exported"]]),
        Stage(
            "prediction",
            [[python, "tools/predict.py", first_video(data), "--model", f"{folder}/exported", "--picture",
              f"{folder}/prediction.png", "--accuracy", "95"]],
        ),
    ]  # fmt: skip


def first_video(data: Path) -> str:
    """Frame folder of the first video in val.txt. Before that list is made, the folder of all frames."""
    annotations = data / "val.txt"
    name = annotations.read_text(encoding="utf-8").split(" ", 1)[0] if annotations.exists() else ""
    return str(data / "frames" / name)


def summary(folder: Path, seconds: dict[str, float]) -> Table:
    manifests = [json.loads((folder / "shards" / split / "manifest.json").read_text("utf-8")) for split in SPLITS]
    shards = [shard for manifest in manifests for shard in manifest["shards"]]
    val, unseen = (json.loads((folder / f"{name}.json").read_text("utf-8")) for name in ("val", "unseen"))
    lines = (folder / "run" / "metrics.jsonl").read_text("utf-8").splitlines()
    rows = table(("", ""), title="Text4Vis demo")
    rows.add_row("videos", " + ".join(f"{m['num_videos']} {s}" for m, s in zip(manifests, SPLITS, strict=True)))
    rows.add_row("shards", f"{len(shards)}, {sum(shard['bytes'] for shard in shards) / 1e6:.0f} MB")
    rows.add_row("training steps", str(json.loads(lines[-1])["step"]))
    rows.add_row("seconds", ", ".join(f"{name} {spent:.0f}" for name, spent in seconds.items()))
    rows.add_row("top-1 on val", f"{val['top1']:.1f} %  ({val['classes']} classes, chance {val['chance']:.1f} %)")
    rows.add_row(
        "zero-shot top-1",
        f"{unseen['top1']:.1f} %  ({unseen['classes']} unseen classes, chance {unseen['chance']:.1f} %; "
        "44 to 53 % on other machines with the same seed)",
    )
    known = val["calibration"]
    sure = next(row for row in known["answers"] if row["accuracy"] == 95)
    rows.add_row(
        "calibration error",
        f"{known['ece']:.1f} %, with a temperature of {known['temperature']:.2f} {known['ece_calibrated']:.1f} %, "
        f"measured on videos that it was not fitted on (right probabilities would show {known['ece_of_chance']:.1f} %)",
    )
    rows.add_row(
        "sure answers, aiming at 95 %",
        f"{sure['answered']:.0f} % of val, right {sure['right_of_answered'] or 0:.1f} %, measured likewise",
    )
    rows.add_row("picture", str(folder / "prediction.png"))
    rows.add_row("curves", f"{Path(sys.executable).parent}/tensorboard --logdir {folder / 'run' / 'tensorboard'}")
    return rows


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("demo"), help="folder for all that it makes")
    folder = Path(os.path.relpath(parser.parse_args().output, ROOT))
    os.chdir(ROOT)  # so that the printed commands work in the project's folder
    seconds: dict[str, float] = {}
    for name in [stage.name for stage in stages(folder)]:
        stage = next(
            stage for stage in stages(folder) if stage.name == name
        )  # later commands depend on earlier results
        try:
            seconds[name] = perform(stage, folder)
        except StageError as error:
            print(f"demo: error: {shown(error)}", file=sys.stderr)
            return 1
    console().print(summary(folder, seconds))
    return 0


if __name__ == "__main__":
    run_program(main)
