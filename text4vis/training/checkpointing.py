"""Writes the checkpoints of a run and restores them into the engine. `saved.checkpoint` shows the files and reads them.

A checkpoint is written under another name and renamed when all of it is on disk. Rank 0 writes, with one file's tensors
in memory at a time; every rank reads.
"""

from __future__ import annotations

import functools
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

from safetensors import SafetensorError, safe_open
from torch import Tensor

from shards.files import sync
from text4vis.cluster import distributed
from text4vis.model.tensors import write_tensors
from text4vis.saved.checkpoint import BEST, STATE, WEIGHTS, CheckpointError, State, complete, sha256_of, tensor_file
from text4vis.training.engine import Engine

Files = dict[str, Callable[[], Iterator[tuple[str, Tensor]]]]  # by name: what gives the tensors, collectively

SPARE_BYTES = 1 << 20  # for logs, metrics and state.json


def save(engine: Engine, output: Path, state: State, *, keep: int = 2) -> Path:
    """Writes the checkpoint of this step and removes all but the last `keep`. Collective. Raises CheckpointError."""
    final = output / "checkpoints" / f"step-{state.step:08d}"
    files: Files = {WEIGHTS: engine.named_weights}
    files |= {tensor_file(key): functools.partial(engine.named_moments, key) for key in engine.moment_names}
    _write(final, files, replace(state, loss_scaler=engine.loss_scaler_state()), sum(engine.state_bytes()))
    if distributed.ranks().is_main:
        for old in complete(output)[:-keep]:
            shutil.rmtree(old, ignore_errors=True)
    distributed.barrier()
    return final


def save_best(engine: Engine, output: Path, state: State) -> None:
    """Replaces OUT/checkpoints/best by the present weights, or their average with solver.ema. Collective. Raises
    CheckpointError."""
    files: Files = {WEIGHTS: engine.named_results}
    _write(output / "checkpoints" / BEST, files, state, engine.state_bytes()[0])
    distributed.barrier()


def load(engine: Engine, folder: Path, state: State) -> None:
    """Gives the engine the fp32 weights and moments of a checkpoint of `save`. Every rank calls it and reads."""
    opened = {name: safe_open(str(folder / tensor_file(name)), "pt") for name in ("model", *engine.moment_names)}
    engine.restore(opened["model"].get_tensor, lambda key, name: opened[key].get_tensor(name), state.updates)
    engine.restore_loss_scaler(state.loss_scaler)


def check_room(output: Path, keep: int, weights: int, moments: int) -> None:
    """Raises CheckpointError when the disk has no room for `keep` checkpoints, the best, and one unfinished.

    weights, moments: their bytes in fp32.
    """
    missing = max(0, keep - len(complete(output))) + 1
    has_best = (output / "checkpoints" / BEST).exists()
    _require_room(output, missing * (weights + moments) + (0 if has_best else weights), f"{missing} more checkpoints")


def gather_weights(engine: Engine) -> dict[str, Tensor]:
    """The whole model in fp32 on rank 0 (empty elsewhere), whatever the ZeRO stage; with solver.ema the averages.
    Collective."""
    return _gather(engine.named_results())


def _gather(tensors: Iterator[tuple[str, Tensor]]) -> dict[str, Tensor]:
    main = distributed.ranks().is_main
    return {name: tensor.cpu().clone() for name, tensor in tensors if main}


def _write(final: Path, files: Files, state: State, size: int) -> None:
    """Rank 0 writes the files under another name, then renames. Collective, since the tensors are."""
    temporary = final.with_name(f".{final.name}.partial")
    main = distributed.ranks().is_main
    if main:
        _clear_leftovers(final.parent)
        temporary.mkdir(parents=True)
        _require_room(temporary, size, f"{final.name}")
    digests = {}
    for name, tensors in files.items():
        own = _gather(tensors())
        if main:
            try:
                write_tensors(temporary / name, own)
            except SafetensorError as error:
                raise CheckpointError(
                    f"{temporary / name}: cannot be written ({error}); free space on the disk"
                ) from None
            digests[name] = sha256_of(temporary / name)
    if main:
        (temporary / STATE).write_text(replace(state, files=digests).to_json(), encoding="utf-8")
        _replace_folder(temporary, final)


def _replace_folder(temporary: Path, final: Path) -> None:
    """Makes the finished folder durable and gives it its name; an older folder of that name is removed."""
    for file in temporary.iterdir():
        sync(file)
    old = final.with_name(f".{final.name}.old")
    if final.exists():
        final.rename(old)
    temporary.rename(final)
    sync(final.parent)
    shutil.rmtree(old, ignore_errors=True)


def _clear_leftovers(folder: Path) -> None:
    """Removes what a job leaves that is killed while it writes: unfinished folders, and an old one that was replaced.

    An old folder whose successor did not get the name yet gets its name back.
    """
    for partial in folder.glob(".*.partial"):
        shutil.rmtree(partial, ignore_errors=True)
    for old in folder.glob(".*.old"):
        final = old.with_name(old.name[1 : -len(".old")])
        if final.exists():
            shutil.rmtree(old, ignore_errors=True)
        else:
            old.rename(final)


def _require_room(place: Path, size: int, what: str) -> None:
    while not place.exists():
        place = place.parent
    free = shutil.disk_usage(place).free
    if free < size + SPARE_BYTES:
        raise CheckpointError(
            f"{place}: {what} need {(size + SPARE_BYTES) / 1e9:.3g} GB, {free / 1e9:.3g} GB are free; free some, lower "
            "logging.keep_checkpoints, or give another --output"
        )
