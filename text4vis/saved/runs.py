"""How a job joins a run: which checkpoint it goes on from, and whether it is the same run."""

from __future__ import annotations

import logging
import os
import platform
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from shards.files import require_folder, try_lock
from text4vis.config.retired import FORMER
from text4vis.config.schema import Config, schema
from text4vis.saved import checkpoint
from text4vis.saved.checkpoint import CheckpointError, State
from text4vis.saved.inputs import digests, fixed_paths, same_path

logger = logging.getLogger("text4vis")


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


def check_same_run(  # noqa: PLR0917
    found: State,
    config: Config,
    data_fingerprint: str,
    mixture: list[tuple[int, float]],
    inputs: Mapping[str, str],
    folder: Path,
) -> None:
    """A run goes on only with the data and the settings it began with. Raises CheckpointError.

    mixture: videos and weight of each source, empty without weights. inputs: the `digests` of the configuration.
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
    if config.solver.global_batch not in (None, found.global_batch):
        raise CheckpointError(
            f"{folder}: was trained with a global batch of {found.global_batch}, solver.global_batch is "
            f"{config.solver.global_batch}; undo the change or give another --output"
        )
    # A run that began before a key existed did what its default does.
    before, now = _flatten(Config().to_dict()) | _flatten(found.config), _flatten(config.to_dict())
    free = {key.name for key in schema() if key.role.may_change} | set(FORMER)
    paths = fixed_paths()
    changed = [
        key
        for key in sorted(before | now)
        if key not in free
        and not (
            same_path(key, before.get(key), now.get(key), found.inputs, inputs)
            if key in paths
            else before.get(key) == now.get(key)
        )
    ]
    if changed:
        values = ", ".join(
            f"{key}: {before.get(key)!r} -> {now.get(key)!r}"
            if before.get(key) != now.get(key)
            else f"{key}: {now[key]!r} holds something else than when the run began"
            for key in changed
        )
        raise CheckpointError(
            f"{folder}: the configuration differs ({values}); undo the change or give another --output, and "
            f"--set pretrain={folder} if it is to begin with these weights"
        )


def _mixture_words(mixture: list[tuple[int, float]]) -> str:
    return ", ".join(f"{videos} videos with weight {weight:g}" for videos, weight in mixture) or "no weights"


def check_same_classes(found: State, config: Config, folder: Path) -> None:
    """Raises CheckpointError where the file of the class embeddings has other bytes than when the run began."""
    key = "network.classifier_file"
    if key in found.inputs and found.inputs[key] != digests(config).get(key):
        raise CheckpointError(
            f"{folder}: was trained with other class embeddings than {config.network.classifier_file} "
            "(network.classifier_file) holds now; give it the first ones again"
        )


def _flatten(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        flat.update(_flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value})
    return flat
