"""Checks that a job makes before it begins a run or goes on with one."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from text4vis.cluster.distributed import Ranks, from_main
from text4vis.config.schema import Config, ConfigError
from text4vis.data.loader import Loader
from text4vis.model.preprocessing import settle
from text4vis.model.video_clip import VideoClip
from text4vis.saved.checkpoint import CheckpointError, State
from text4vis.saved.inputs import TOKENIZER, digests, tokenizer_digest
from text4vis.saved.opening import SavedRun
from text4vis.saved.runs import check_same_run, check_same_tokenizer

logger = logging.getLogger("text4vis")


def check_world_size(config: Config, world_size: int) -> None:
    """Raises ConfigError where the job has another number of ranks than engine.world_size."""
    expected = config.engine.world_size
    if expected is not None and expected != world_size:
        raise ConfigError(
            f"engine.world_size: expected {expected} ranks, the job has {world_size}. `deepspeed` starts on this "
            "machine alone when it does not find the file after --hostfile: check its path, its hosts and their slots"
        )


def settled(config: Config, start_from: Path | None) -> Config:
    """The configuration with pixels and activation as the run has them, or as the model of a new run needs them.

    start_from: the checkpoint that the run goes on from. Raises ConfigError that names the keys to give.
    """
    return settle(config) if start_from is None else SavedRun(start_from).settle(config, say=logger.info)


def first_state(config: Config, loader: Loader, class_names: list[str], global_batch: int) -> State:
    """The state of a run before its first step, but for the tokenizer. Collective."""
    return State(
        step=0,
        consumed=0,
        global_batch=global_batch,
        data_fingerprint=loader.dataset.fingerprint,
        config=config.to_dict(),
        class_names=class_names,
        inputs=from_main(lambda: digests(config)),
        mixture=loader.planner.order.mixture,
    )


def with_tokenizer(state: State, model: VideoClip, output: Path) -> State:
    """The state with what the tokenizer does. Raises CheckpointError where the run began with another."""
    check_same_tokenizer(state, model, output)
    return replace(state, inputs={**state.inputs, TOKENIZER: tokenizer_digest(model)})


def check_joins(  # noqa: PLR0917
    found: State, config: Config, loader: Loader, inputs: Mapping[str, str], checkpoint: Path, few_shot_list: Path
) -> None:
    """The checkpoint is of the run that the job wants: its data, mixture, few-shot videos and settings.

    inputs: the `digests` of the configuration. Raises CheckpointError.
    """
    planner = loader.planner
    check_same_run(found, config, loader.dataset.fingerprint, planner.order.mixture, inputs, checkpoint)
    _check_few_shot(few_shot_list, planner.few_shot_list())


def _check_few_shot(path: Path, wanted: str) -> None:
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


def check_streams(num_streams: int, global_batch: int, place: Ranks) -> None:
    """Each global batch has equally many videos of all streams, and the rank's host has whole streams.

    Raises ConfigError.
    """
    if num_streams == 1:
        return
    if global_batch % num_streams:
        below = global_batch // num_streams * num_streams
        batches = f"{below} or {below + num_streams}" if below else f"{num_streams}"
        fitting = max(number for number in range(1, num_streams) if global_batch % number == 0)
        raise ConfigError(
            f"data.streams: a global batch of {global_batch} videos cannot be taken equally from {num_streams} "
            f"streams; in a new run set data.streams to {fitting}, or solver.global_batch to {batches}"
        )
    first = place.rank - place.local_rank
    edges = first, first + place.local_world_size
    if any(num_streams * edge % place.world_size for edge in edges):
        num_hosts = -(-place.world_size // place.local_world_size)
        fits = [hosts for hosts in range(1, num_streams + 1) if num_streams % hosts == 0]
        raise ConfigError(
            f"data.streams: {num_streams} streams cannot be shared equally by {num_hosts} hosts (this one has "
            f"{place.local_world_size} of {place.world_size} ranks); start {' or '.join(map(str, fits))} hosts with "
            f"equally many ranks each, or in a new run set data.streams to a multiple of {num_hosts}"
        )
