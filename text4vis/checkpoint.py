"""Checkpoints of a run: complete or invisible.

    OUT/checkpoints/step-00000120/   engine/            the engine's own files: every rank's optimiser and fp32 state
                                     model.safetensors  the whole model in fp32, for evaluation and export
                                     state.json         position, figures, configuration, class names
    OUT/checkpoints/best/            model.safetensors and state.json of the best evaluation

A checkpoint is written under another name and renamed when all of it is on disk, so a folder of this name is complete.
Only this module, `trainer` and `distributed` know the engine.
"""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from text4vis import distributed
from text4vis.config import Config
from text4vis.model import VideoClip, build_model
from text4vis.weights import load_export, load_text4vis

WEIGHTS = "model.safetensors"
STATE = "state.json"
ENGINE = "engine"


class CheckpointError(Exception):
    """A checkpoint that cannot be used. The message names the path and the fix."""


@dataclass(frozen=True)
class State:
    """What a run needs beside the engine's own files to go on as if it had never stopped."""

    step: int
    consumed: int
    world_size: int
    data_fingerprint: str
    config: dict[str, Any]
    class_names: list[str]
    best_top1: float = -1.0
    figures: dict[str, Any] = field(default_factory=dict)


def save(engine: Any, output: Path, state: State, *, keep: int = 2) -> Path:
    """Writes the checkpoint of this step and removes all but the last `keep`. Collective: every rank calls it."""
    folder = output / "checkpoints"
    final = folder / f"step-{state.step:08d}"
    temporary = folder / f".{final.name}.partial"
    main = distributed.ranks().is_main
    if main:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
    distributed.barrier()
    engine.save_checkpoint(str(temporary), tag=ENGINE, save_latest=False)
    weights = gather_weights(engine)
    distributed.barrier()
    if main:
        _write_model(temporary, weights, state)
        shutil.rmtree(final, ignore_errors=True)
        temporary.rename(final)
        _sync(folder)
        for old in _complete(output)[:-keep]:
            shutil.rmtree(old, ignore_errors=True)
    distributed.barrier()
    return final


def save_best(engine: Any, output: Path, state: State) -> None:
    """Replaces OUT/checkpoints/best by the present weights. Collective."""
    weights = gather_weights(engine)
    if distributed.ranks().is_main:
        folder = output / "checkpoints"
        temporary, final, old = folder / ".best.partial", folder / "best", folder / ".best.old"
        for leftover in (temporary, old):
            shutil.rmtree(leftover, ignore_errors=True)
        temporary.mkdir(parents=True)
        _write_model(temporary, weights, state)
        if final.exists():
            final.rename(old)
        temporary.rename(final)
        _sync(folder)
        shutil.rmtree(old, ignore_errors=True)
    distributed.barrier()


def load(engine: Any, folder: Path) -> State:
    """Restores the engine from a checkpoint of `save`. Collective. Raises CheckpointError."""
    state = read_state(folder)
    if state.world_size != distributed.ranks().world_size:
        raise CheckpointError(
            f"{folder}: written by {state.world_size} ranks, this job has {distributed.ranks().world_size}; "
            f"start it on {state.world_size}, or evaluate and export it on any number"
        )
    loaded, _ = engine.load_checkpoint(str(folder), tag=ENGINE)
    if loaded is None:
        raise CheckpointError(f"{folder}: the engine found no checkpoint in {folder / ENGINE}; delete the folder")
    return state


def latest(output: Path) -> Path | None:
    """The newest complete checkpoint of a run, or None."""
    complete = _complete(output)
    return complete[-1] if complete else None


def find(path: Path) -> Path:
    """The checkpoint meant by `path`: one itself, or a run's best, else its last. Raises CheckpointError."""
    if (path / STATE).is_file():
        return path
    best = path / "checkpoints" / "best"
    found = best if (best / STATE).is_file() else latest(path)
    if found is None:
        raise CheckpointError(f"{path}: neither a checkpoint nor a run with one (no {STATE} in it)")
    return found


def load_model(path: Path, config: Config) -> VideoClip:
    """The model in `path`: a run (its best), a checkpoint, an export, or a .pt file of the original project.

    fp32, on the CPU. An export brings its own network; the others are built from `config.network`. Raises
    CheckpointError or ConfigError.
    """
    if path.suffix in {".pt", ".pth"}:
        return load_text4vis(path, config.network, config.data.num_segments, image_size=config.data.input_size)
    if (path / "export.json").is_file():
        return load_export(path).model
    folder = find(path)
    model = build_model(config.network, config.data.num_segments, image_size=config.data.input_size)
    try:
        model.load_state_dict(load_file(folder / WEIGHTS))
    except (RuntimeError, OSError, SafetensorError) as error:
        raise CheckpointError(f"{folder / WEIGHTS}: does not fit the network of the configuration: {error}") from error
    return model


def read_state(folder: Path) -> State:
    """The state of a complete checkpoint. Raises CheckpointError."""
    try:
        return State(**json.loads((folder / STATE).read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise CheckpointError(f"{folder / STATE}: not a readable checkpoint ({error})") from error


def gather_weights(engine: Any) -> dict[str, torch.Tensor]:
    """The whole model in fp32 on rank 0 (empty elsewhere), whatever the ZeRO stage. Collective."""
    parameters = dict(engine.module.named_parameters())
    weights: dict[str, torch.Tensor] = {}
    for name, parameter in parameters.items():
        value = whole(parameter)
        if distributed.ranks().is_main:
            weights[name] = value.float().cpu().clone()
    if distributed.ranks().is_main:
        buffers = {name: value for name, value in engine.module.state_dict().items() if name not in parameters}
        weights.update({name: value.detach().cpu().clone() for name, value in buffers.items()})
    return weights


def whole(parameter: torch.nn.Parameter) -> torch.Tensor:
    """A parameter's full value: the engine's fp32 master copy where it keeps one. Collective under ZeRO."""
    import deepspeed
    from deepspeed.utils import safe_get_full_fp32_param

    master = safe_get_full_fp32_param(parameter) if parameter.requires_grad else None
    if master is not None:
        return master.detach()
    if hasattr(parameter, "ds_id"):
        with deepspeed.zero.GatheredParameters([parameter]):
            return parameter.detach().clone()
    return parameter.detach()


def _write_model(folder: Path, weights: dict[str, torch.Tensor], state: State) -> None:
    save_file(weights, folder / WEIGHTS)
    text = json.dumps(asdict(state), ensure_ascii=False, indent=1)
    (folder / STATE).write_text(text + "\n", encoding="utf-8")
    for file in folder.rglob("*"):
        _sync(file)


def _complete(output: Path) -> list[Path]:
    return sorted(path for path in (output / "checkpoints").glob("step-*") if (path / STATE).is_file())


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
