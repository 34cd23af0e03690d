"""Runs recipes one after another in this process, each with a tiny tower: two optimiser steps and an evaluation.

Arguments: a folder for the runs, shards, a small CLIP, then the recipes. Writes what each run counted to
FOLDER/results.json, by recipe: figures of its report.json, or {"error": …}.
"""

import json
import sys
import traceback
from pathlib import Path

from text4vis.cluster import distributed
from text4vis.cluster.stop import StopRequest
from text4vis.config.loading import load_config
from text4vis.training.trainer import Trainer


def main() -> None:
    folder, shards, model, *recipes = sys.argv[1:]
    distributed.start()
    results, pretrained = {}, None
    for recipe in recipes:
        output = Path(folder) / Path(recipe).stem
        output.mkdir()
        settings = [
            *(f"data.{split}={shards}" for split in ("train", "val")),
            "data.input_size=32",
            "data.scale_size=36",
            "data.batch_size=2",
            "solver.global_batch=2",
            "solver.epochs=1",
            f"network.arch={model}",
            "engine.precision=fp32",  # bf16 is slow on a CPU
            "engine.num_threads=1",
        ]
        if load_config(recipe).pretrain:
            settings.append(f"pretrain={pretrained}")
        try:
            trainer = Trainer(load_config(recipe, settings), output, StopRequest(), "never")
            trainer.fit()
            report = json.loads((output / "report.json").read_text())
            results[recipe] = {key: report[key] for key in ("step", "videos", "classes", "top1")}
        except Exception:
            results[recipe] = {"error": traceback.format_exc()}
        pretrained = pretrained or output
    (Path(folder) / "results.json").write_text(json.dumps(results))
    distributed.stop()


if __name__ == "__main__":
    main()
