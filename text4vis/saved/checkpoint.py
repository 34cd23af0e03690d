"""Checkpoints of a run: complete or invisible, checked when read, the same for every engine.

    OUT/checkpoints/step-00000120/   model.safetensors       the whole model in fp32, also for evaluation and export
                                     exp_avg.safetensors     the optimiser's moments in fp32, by parameter name
                                     exp_avg_sq.safetensors
                                     state.json              position, figures, configuration, SHA-256 of all this
    OUT/checkpoints/best/            model.safetensors and state.json of the best evaluation

A checkpoint is written under another name and renamed when all of it is on disk, so a folder of this name is complete.
It holds no trace of the number of ranks or the ZeRO stage: any job can go on with it. Rank 0 writes, one file in memory
at a time, and every rank reads.
"""

from __future__ import annotations

import functools
import hashlib
import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any

from pydantic import StringConstraints, TypeAdapter
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor

from shards.files import sync
from text4vis.cluster import distributed
from text4vis.config.schema import Config, ConfigError
from text4vis.model.tensors import write_tensors
from text4vis.model.video_clip import VideoClip, build_model
from text4vis.saved.weights import (
    EXPORT_FILE,
    Parts,
    load_export,
    load_parts,
    load_text4vis,
    read_export,
    read_text4vis,
    start_from,
)
from text4vis.training.engine import (
    loss_scaler_state,
    moment_names,
    named_moments,
    named_weights,
    restore,
    restore_loss_scaler,
    state_bytes,
)

FileName = Annotated[str, StringConstraints(pattern=r"^[a-z_]+\.safetensors\z")]  # beside state.json, nowhere else
Files = dict[str, Callable[[], Iterator[tuple[str, Tensor]]]]  # by name: what gives the tensors, collectively

WEIGHTS = "model.safetensors"
STATE = "state.json"
SPARE_BYTES = 1 << 20  # for logs, metrics and state.json


class CheckpointError(Exception):
    """A checkpoint that cannot be used or written. The message names the path and the fix."""


@dataclass(frozen=True)
class State:
    """What a run needs beside the tensors to go on as if it had never stopped.

    step: optimiser steps taken, updates: those that changed the weights (the others were skipped), consumed: videos of
    the stream, evaluated_step: step of the last evaluation, files: SHA-256 by file name, classifier_file: that of
    `network.classifier_file`, empty without one, mixture: [videos, weight] of each source of a mixture.
    """

    step: int
    consumed: int
    global_batch: int
    data_fingerprint: str
    config: dict[str, Any]
    class_names: list[str]
    updates: int = 0
    evaluated_step: int = 0
    best_top1: float = -1.0
    figures: dict[str, Any] = field(default_factory=dict)
    loss_scaler: dict[str, float] = field(default_factory=dict)
    files: dict[FileName, str] = field(default_factory=dict)
    classifier_file: str = ""
    mixture: list[tuple[int, float]] = field(default_factory=list)


_STATE = TypeAdapter(State)


def save(engine: Any, output: Path, state: State, *, keep: int = 2) -> Path:
    """Writes the checkpoint of this step and removes all but the last `keep`. Collective. Raises CheckpointError."""
    final = output / "checkpoints" / f"step-{state.step:08d}"
    files: Files = {WEIGHTS: lambda: named_weights(engine)}
    files |= {_file(key): functools.partial(named_moments, engine, key) for key in moment_names(engine)}
    _write(final, files, replace(state, loss_scaler=loss_scaler_state(engine)), sum(state_bytes(engine)))
    if distributed.ranks().is_main:
        for old in _complete(output)[:-keep]:
            shutil.rmtree(old, ignore_errors=True)
    distributed.barrier()
    return final


def save_best(engine: Any, output: Path, state: State) -> None:
    """Replaces OUT/checkpoints/best by the present weights. Collective. Raises CheckpointError."""
    files: Files = {WEIGHTS: lambda: named_weights(engine)}
    _write(output / "checkpoints" / "best", files, state, state_bytes(engine)[0])
    distributed.barrier()


def load(engine: Any, folder: Path, state: State) -> None:
    """Gives the engine the fp32 weights and moments of a checkpoint of `save`. Every rank calls it and reads."""
    opened = {name: safe_open(str(folder / _file(name)), "pt") for name in ("model", *moment_names(engine))}
    restore(engine, opened["model"].get_tensor, lambda key, name: opened[key].get_tensor(name), state.updates)
    restore_loss_scaler(engine, state.loss_scaler)


def check_room(output: Path, keep: int, weights: int, moments: int) -> None:
    """Raises CheckpointError when the disk has no room for `keep` checkpoints, the best, and one unfinished.

    weights, moments: their bytes in fp32.
    """
    missing = max(0, keep - len(_complete(output))) + 1
    has_best = (output / "checkpoints" / "best").exists()
    _require_room(output, missing * (weights + moments) + (0 if has_best else weights), f"{missing} more checkpoints")


def latest(output: Path) -> Path | None:
    """The newest complete checkpoint of a run, or None."""
    complete = _complete(output)
    return complete[-1] if complete else None


def latest_sound(output: Path, warn: Callable[[str], None]) -> Path | None:
    """The newest complete checkpoint that holds what was written, or None. Tells `warn` what is wrong with others."""
    for folder in reversed(_complete(output)):
        try:
            verify(folder)
            return folder
        except CheckpointError as error:
            warn(f"{error}; going back to the one before")
    return None


def verify(folder: Path) -> State:
    """The state of a checkpoint whose every file has the bytes that were written. Raises CheckpointError."""
    state = read_state(folder)
    for name, digest in state.files.items():
        try:
            found = _sha256(folder / name)
        except OSError as error:
            raise CheckpointError(f"{folder / name}: cannot be read ({error}); delete {folder}") from error
        if found != digest:
            raise CheckpointError(f"{folder / name}: damaged, its bytes are not those written; delete {folder}")
    return state


def find(path: Path) -> Path:
    """The checkpoint meant by `path`: one itself, or a run's best, else its last. Raises CheckpointError."""
    if (path / STATE).is_file():
        return path
    best = path / "checkpoints" / "best"
    found = best if (best / STATE).is_file() else latest(path)
    if found is None:
        if path.is_dir():
            raise CheckpointError(f"{path}: neither an export nor a checkpoint nor a run with one (no {STATE} in it)")
        what = (
            "a file; a .pt file of the original is exported first, see tools/export.py"
            if path.exists()
            else "not there"
        )
        raise CheckpointError(f"{path}: {what}; name the folder of an export, a run or a checkpoint")
    return found


def load_model(path: Path, config: Config) -> VideoClip:
    """The model in `path`: a run (its best), a checkpoint, an export, or a .pt file of the original project.

    fp32, on the CPU. An export brings its own network; the others are built from `config.network`. Raises
    CheckpointError or ConfigError.
    """
    if path.suffix in {".pt", ".pth"}:
        return load_text4vis(path, config.network, config.data.num_segments, image_size=config.data.input_size)
    if (path / EXPORT_FILE).is_file():
        return load_export(path).model
    folder = find(path)
    network = replace(config.network, fix_text=True)  # type: ignore[type-var]
    model = build_model(network, config.data.num_segments, image_size=config.data.input_size)
    verify(folder)
    load_checkpoint(model, folder)
    return model


def load_checkpoint(model: VideoClip, folder: Path) -> None:
    """Gives the model the weights of a checkpoint, its trained classifier and text tower too if it has them.

    Raises CheckpointError or ConfigError.
    """
    parts = _read_parts(folder)
    load_parts(
        model, parts, str(folder / WEIGHTS), "; the network of the configuration is not the one it was trained with"
    )
    if parts.classifier is not None:
        model.set_classifier(parts.classifier, read_state(folder).class_names)


def load_pretrained(model: VideoClip, path: Path) -> None:
    """Starts the model from the weights in `path`, which is any that `load_model` takes. Raises ConfigError."""
    try:
        if path.suffix in {".pt", ".pth"}:
            parts = read_text4vis(path, "pretrain")
        elif (path / EXPORT_FILE).is_file():
            parts = read_export(path)
        else:
            parts = _read_parts(find(path))
    except CheckpointError as error:
        raise ConfigError(f"pretrain: {error}") from None
    start_from(model, parts, f"pretrain: {path}")


def _read_parts(folder: Path) -> Parts:
    try:
        return Parts.of(load_file(folder / WEIGHTS))
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{folder / WEIGHTS}: cannot be read ({error}); delete {folder}") from error


def read_state(folder: Path) -> State:
    """The state of a complete checkpoint, checked against its own SHA-256. Raises CheckpointError."""
    path = folder / STATE
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        digest = values.pop("sha256")
        state = _STATE.validate_python(values)
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise CheckpointError(f"{path}: not a readable checkpoint ({reason[:200]}); delete {folder}") from error
    if digest != _digest(values):
        raise CheckpointError(f"{path}: damaged, its content is not what was written; delete {folder}")
    return state


def gather_weights(engine: Any) -> dict[str, Tensor]:
    """The whole model in fp32 on rank 0 (empty elsewhere), whatever the ZeRO stage. Collective."""
    return _gather(named_weights(engine))


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
            digests[name] = _sha256(temporary / name)
    if main:
        values = asdict(replace(state, files=digests))
        text = json.dumps({**values, "sha256": _digest(values)}, ensure_ascii=False, indent=1)
        (temporary / STATE).write_text(text + "\n", encoding="utf-8")
        for file in temporary.iterdir():
            sync(file)
        old = final.with_name(f".{final.name}.old")
        if final.exists():
            final.rename(old)
        temporary.rename(final)
        sync(final.parent)
        shutil.rmtree(old, ignore_errors=True)


def _clear_leftovers(folder: Path) -> None:
    """What a job leaves that is killed while it writes: unfinished folders, or an old one that lost its name."""
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


def _file(key: str) -> str:
    return f"{key}.safetensors"


def _complete(output: Path) -> list[Path]:
    return sorted(path for path in (output / "checkpoints").glob("step-*") if (path / STATE).is_file())


def _digest(values: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True, ensure_ascii=False).encode()).hexdigest()


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()
