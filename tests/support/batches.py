"""Small data sets, their configuration, and the batches of a loader as values that can be compared."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import torch
from read_stream import identify

from shards.annotations import parse_annotations, parse_labels
from shards.writer import build_shards
from text4vis.config.loading import config_from_dict
from text4vis.config.schema import Config
from text4vis.data.loader import Loader, build_loader


def build(annotations: Path, root: Path, labels: Path, output: Path) -> Path:
    """Shards of 30 kB; returns their folder."""
    names = parse_labels(labels)
    build_shards(parse_annotations(annotations), root=root, labels=names, output=output, shard_bytes=30_000)
    return output


def settings(folder: Path, **data: Any) -> Config:
    """Both splits from `folder`: two videos a batch, four frames of 24 x 24, decoded on the CPU."""
    base = {"train": [str(folder)], "val": [str(folder)], "batch_size": 2, "num_segments": 4, "input_size": 24}
    base |= {"scale_size": 28, "workers": 2, "decode": "cpu"}
    return config_from_dict({"seed": 5, "data": base | data}, "test")


def take(config: Config, split: str, count: int | None = None, **place: int) -> list[list[tuple[int, int, str]]]:
    """(id, label, hash of the pixels) of each video of the first `count` batches, batch by batch."""
    with build_loader(config, split, **place) as loader:
        return [identify(batch) for batch in itertools.islice(loader, count)]


def build_graph_loader(config: Config, split: str) -> Loader:
    """A loader that takes a GPU's way on the CPU: the same graphs, with DALI's operators for the CPU."""
    loader = build_loader(config, split)
    loader.device = torch.device("cuda")  # the way; the graphs run where the batches go, which is the CPU
    return loader
