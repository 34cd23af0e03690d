"""A small project for tests that run the real programs: shards, a tiny CLIP, a recipe; and what a run left."""

from __future__ import annotations

import json
from pathlib import Path

import yaml
from frame_folders import make_frame_folders
from launch import finish, run, start
from safetensors.torch import load_file
from tiny import write_clip

from shards.annotations import parse_annotations, parse_labels
from shards.writer import build_shards

TRAIN, EVALUATE, TRAIN_WITH = "text4vis/train.py", "text4vis/evaluate.py", "tests/support/train_with.py"
NUM_VIDEOS = 26
STEPS_PER_EPOCH = 7  # of global batches of 4


class Project:
    """Shards of small frame folders, a tiny CLIP and a recipe."""

    def __init__(self, base: Path, num_videos: int = NUM_VIDEOS) -> None:
        folders = make_frame_folders(base, [3 + i % 10 for i in range(num_videos)])
        self.base, self.frames, self.names = base, folders.root, folders.names
        self.shards = base / "shards"
        self.classes = names = parse_labels(folders.labels)
        annotations = parse_annotations(folders.annotations)
        build_shards(annotations, root=folders.root, labels=names, output=self.shards, shard_bytes=200_000)
        self.config = base / "tiny.yaml"
        recipe = {
            "seed": 3,
            "data": {"train": str(self.shards), "val": str(self.shards), "batch_size": 2, "num_segments": 4,
                     "input_size": 32, "scale_size": 36, "dataset": "tiny"},
            "network": {"arch": str(write_clip(base / "clip"))},
            "solver": {"epochs": 3, "lr": 2e-3, "lr_warmup_step": 0.5, "clip_gradient": 1.0},
            "engine": {"precision": "bf16", "zero_stage": 1},
            "logging": {"print_freq": 1},
        }  # fmt: skip
        self.config.write_text(yaml.safe_dump(recipe))

    def train(self, output: Path, *settings: str, ranks: int = 2) -> str:
        return run(TRAIN, *self.arguments(output, *settings), ranks=ranks)

    def arguments(self, output: Path, *settings: str) -> list[object]:
        return ["--config", self.config, "--output", output, *(f"--set={setting}" for setting in settings)]

    def start_with(self, output: Path, options: str, *settings: str, ranks: int = 2) -> list:
        """A job of tests/support/train_with.py with these options."""
        return start(TRAIN_WITH, *options.split(), "--", *self.arguments(output, *settings), ranks=ranks)

    def train_with(self, output: Path, options: str, *settings: str, ranks: int = 2) -> list[tuple[int, str]]:
        """(exit code, output) of each rank."""
        return finish(self.start_with(output, options, *settings, ranks=ranks))


def losses(output: Path) -> dict[int, float]:
    records = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    steps = [record["step"] for record in records if record["kind"] == "train"]
    assert steps == sorted(set(steps)), "a step was logged twice or out of order"
    return {record["step"]: record["loss"] for record in records if record["kind"] == "train"}


def weights(output: Path) -> dict:
    return load_file(sorted(output.glob("checkpoints/step-*"))[-1] / "model.safetensors")


def records(output: Path) -> list[dict]:
    return [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]


def last_line(output: Path) -> str:
    return (output / "log.txt").read_text().rstrip().splitlines()[-1]


def ledger(folder: Path) -> dict[int, list[int]]:
    """Ids of each step's global batch in stream order, as the last job that took the step saw them."""
    seen: dict[int, dict[str, list]] = {}
    for path in sorted(folder.glob("*.jsonl"), key=lambda path: int(path.stem)):
        for line in path.read_text().splitlines():
            record = json.loads(line)
            seen.setdefault(record["step"], {}).setdefault(record["job"], []).append((record["time"], record["ids"]))
    batches = {}
    for step, jobs in seen.items():
        last = max(jobs.values(), key=lambda micro_batches: max(time for time, _ in micro_batches))
        batches[step] = [sample for _, ids in last for sample in ids]
    return batches
