"""Checks that a job makes before it begins a run or goes on with one."""

from __future__ import annotations

import itertools
from pathlib import Path

from text4vis.config.schema import Config, ConfigError
from text4vis.saved.checkpoint import CheckpointError


def check_same_classes(config: Config, train: list[str], val: list[str]) -> None:
    """Labels of both splits mean the same classes. Raises ConfigError."""
    if config.data.label_list is None and train != val:
        raise ConfigError(
            f"data.val: its shards name {len(val)} classes that are not the {len(train)} of data.train in their order; "
            "build both with one --labels file, name data.label_list, or evaluate other classes with evaluate.py"
        )


def check_world_size(config: Config, world_size: int) -> None:
    """Raises ConfigError where the job has another number of ranks than engine.world_size."""
    expected = config.engine.world_size
    if expected is not None and expected != world_size:
        raise ConfigError(
            f"engine.world_size: expected {expected} ranks, the job has {world_size}. `deepspeed` starts on this "
            "machine alone when it does not find the file after --hostfile: check its path, its hosts and their slots"
        )


def check_few_shot(path: Path, wanted: str) -> None:
    """The videos that a few-shot run began with are those it goes on with. Raises CheckpointError."""
    if path.exists() and (found := path.read_text(encoding="utf-8")) != wanted:
        line, before, now = next(
            (number, *pair)
            for number, pair in enumerate(itertools.zip_longest(found.split("\n"), wanted.split("\n")), start=1)
            if pair[0] != pair[1]
        )
        raise CheckpointError(
            f"{path}:{line}: the run began with {before!r}, data.shot now chooses {now!r}; "
            "bring the file back as it was, or give another --output"
        )
