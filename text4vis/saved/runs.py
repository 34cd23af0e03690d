"""How a job joins a run: which checkpoint it goes on from, whether it is the same run, how it cuts the global batch."""

from __future__ import annotations

import logging
import os
import platform
from dataclasses import replace
from pathlib import Path
from typing import Any

from shards.files import require_folder, try_lock
from text4vis.classifier.embeddings import file_digest
from text4vis.cluster.distributed import Ranks
from text4vis.config.schema import Config, ConfigError
from text4vis.saved import checkpoint
from text4vis.saved.checkpoint import CheckpointError, State

logger = logging.getLogger("text4vis")

# Keys that change how a run is carried out, not what it computes: they may differ when a run goes on. The global batch
# stays what it was, however the number of ranks and these keys cut it.
FREE_ON_RESUME = (
    "logging.", "data.train", "data.val", "data.workers", "data.io_threads", "data.prefetch", "data.decode",
    "data.cache_", "data.verify", "data.on_error", "data.max_bad_share", "data.class_splits", "data.batch_size",
    "solver.grad_accumulation_steps", "solver.global_batch", "solver.on_nonfinite", "engine.num_threads",
    "engine.zero_stage", "engine.offload", "engine.activation_checkpointing", "engine.compile", "engine.world_size",
    "engine.wall_minutes", "engine.silence_seconds",
)  # fmt: skip


def claim(output: Path) -> int | None:
    """Keeps the run's folder for this process as long as it lives. Returns the lock's open file; do not close it.

    Two jobs must never write one run: a scheduler that starts a job again before the old one is gone, or ranks that do
    not know of each other. None where the file system has no locks. Raises CheckpointError when another job holds it,
    OSError when it cannot be made.
    """
    require_folder(output)
    descriptor = os.open(output / ".running", os.O_RDWR | os.O_CREAT, 0o666)
    try:
        locked = try_lock(descriptor)
    except OSError:
        os.close(descriptor)
        return None
    if not locked:
        holder = os.read(descriptor, 200).decode(errors="replace").strip()
        os.close(descriptor)
        raise CheckpointError(
            f"{output}: another job is writing this run ({holder}); stop it or give another --output. If the ranks of "
            "this job do not know of each other, start them with a launcher that sets RANK and WORLD_SIZE"
        )
    os.ftruncate(descriptor, 0)
    os.write(descriptor, f"process {os.getpid()} on {platform.node()}\n".encode())
    return descriptor


def find_start(output: Path, resume: str) -> Path | None:
    """The checkpoint meant by --resume: the run's last sound one ("auto"), none ("never"), or the one named.

    Raises CheckpointError: a damaged one was named, or `output` holds a run that "never" would mix with a new one.
    """
    if resume == "auto":
        start = checkpoint.latest_sound(output, logger.warning)
        if start is None and checkpoint.latest(output):
            raise CheckpointError(f"{output}: every checkpoint is damaged; give another --output to start again")
        return start
    if resume != "never":
        start = checkpoint.find(Path(resume))
        checkpoint.verify(start)
        return start
    if checkpoint.latest(output):
        raise CheckpointError(
            f"{output}: holds a run already; give another --output, or --resume auto to go on with it"
        )
    return None


def check_same_run(
    found: State, config: Config, data_fingerprint: str, mixture: list[tuple[int, float]], folder: Path
) -> None:
    """A run goes on only with the data and the settings it began with. Raises CheckpointError.

    mixture: videos and weight of each source, empty without weights.
    """
    if found.data_fingerprint != data_fingerprint:
        raise CheckpointError(
            f"{folder}: was trained on other data (fingerprint {found.data_fingerprint[:12]}, data.train has "
            f"{data_fingerprint[:12]}); give the original shards or another --output"
        )
    if found.mixture != mixture:
        raise CheckpointError(
            f"{folder}: was trained on another mixture ({_mixture_words(found.mixture)}), data.train now has "
            f"{_mixture_words(mixture)}; undo the change or give another --output"
        )
    check_same_classes(found, config, folder)
    if config.solver.global_batch not in (None, found.global_batch):
        raise CheckpointError(
            f"{folder}: was trained with a global batch of {found.global_batch}, solver.global_batch is "
            f"{config.solver.global_batch}; undo the change or give another --output"
        )
    # A key that is newer than the run has had its default's effect.
    before, now = _flatten(Config().to_dict()) | _flatten(found.config), _flatten(config.to_dict())
    changed = [key for key in sorted(before | now) if before.get(key) != now.get(key)]
    changed = [key for key in changed if not key.startswith(FREE_ON_RESUME)]
    if changed:
        values = ", ".join(f"{key}: {before.get(key)!r} -> {now.get(key)!r}" for key in changed)
        raise CheckpointError(
            f"{folder}: the configuration differs ({values}); undo the change or give another --output, and "
            f"--set pretrain={folder} if it is to begin with these weights"
        )


def _mixture_words(mixture: list[tuple[int, float]]) -> str:
    return ", ".join(f"{videos} videos with weight {weight:g}" for videos, weight in mixture) or "no weights"


def check_same_classes(found: State, config: Config, folder: Path) -> None:
    """Raises CheckpointError where the file of the class embeddings has other bytes than when the run began."""
    if found.classifier_file and found.classifier_file != file_digest(config.network):
        raise CheckpointError(
            f"{folder}: was trained with other class embeddings than {config.network.classifier_file} "
            "(network.classifier_file) holds now; give it the first ones again"
        )


def cut_global_batch(config: Config, world_size: int, global_batch: int | None = None) -> Config:
    """The configuration whose micro batch and accumulation give every step its global batch on so many ranks.

    The global batch is that of the run that goes on, else solver.global_batch, else what the other keys make. A micro
    batch is the largest part of a rank's share that data.batch_size allows. Raises ConfigError if ranks cannot share
    the global batch equally.
    """
    micro = config.data.batch_size
    total = global_batch or config.solver.global_batch or micro * config.solver.grad_accumulation_steps * world_size
    if total % world_size:
        below = total // world_size * world_size
        fits = f"{below} or {below + world_size}" if below else f"{world_size}"
        ranks = [ranks for ranks in range(max(1, world_size - 8), world_size) if total % ranks == 0]
        raise ConfigError(
            f"solver.global_batch: {total} videos cannot be shared equally by {world_size} ranks; {fits} can, "
            f"or start {ranks[-1] if ranks else 1} ranks"
        )
    share = total // world_size
    micro = max(size for size in range(1, min(micro, share) + 1) if share % size == 0)
    return replace(  # type: ignore[type-var]
        config,
        data=replace(config.data, batch_size=micro),  # type: ignore[type-var]
        solver=replace(config.solver, global_batch=total, grad_accumulation_steps=share // micro),  # type: ignore[type-var]
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


def _flatten(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        flat.update(_flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value})
    return flat
