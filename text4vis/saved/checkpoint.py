"""Reads the checkpoints of a run: finds them, checks them, gives their state and their tensors.

    OUT/checkpoints/step-00000120/   model.safetensors       the whole model in fp32, also for evaluation and export
                                     exp_avg.safetensors     the optimiser's moments in fp32, by parameter name
                                     exp_avg_sq.safetensors
                                     ema.safetensors         with solver.ema: the average of what trains
                                     state.json              position, figures, configuration, SHA-256 of all this
    OUT/checkpoints/best/            model.safetensors and state.json of the best evaluation

The writer renames a folder to such a name when all of it is on disk, so a folder with this name is complete. A
checkpoint does not depend on the number of ranks or the ZeRO stage: any job can go on with it. `model` has the tensors
of adapters under their own names. What opens a trained model gets them merged, and the average where there is one.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Collection
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any

from pydantic import StringConstraints, TypeAdapter
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from text4vis.model.adapters import merged
from text4vis.model.video_clip import VideoClip
from text4vis.saved.weights import Parts, load_parts

Digests = str | list[tuple[int, str]]  # SHA-256 in hex: of a whole file, or of (byte where a part ends, that part)
FileName = Annotated[str, StringConstraints(pattern=r"^[a-z_]+\.safetensors\z")]  # beside state.json, nowhere else

WEIGHTS = "model.safetensors"
AVERAGE = "ema.safetensors"
STATE = "state.json"
BEST = "best"


class CheckpointError(Exception):
    """A checkpoint that cannot be used or written. The message names the path and the fix."""


@dataclass(frozen=True)
class State:
    """What a run needs beside the tensors to go on as if it had never stopped.

    step: optimiser steps taken. updates: those of them that changed the weights; the others were skipped. consumed:
    videos of the stream. evaluated_step: step of the last evaluation. best_top1: per cent, -1 before the first
    evaluation; the best mAP where videos have several labels. figures: of the last evaluation. files: SHA-256 of the
    parts of each file, by its name; earlier ones have that of the whole file. inputs: what the files hold that decide
    the run, by key (`saved.inputs.digests`), and what the tokenizer does, by TOKENIZER. mixture: [videos, weight] of
    each source of a mixture. logit_bias: what losses of many labels add to the logits, None before the first step.
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
    files: dict[FileName, Digests] = field(default_factory=dict)
    inputs: dict[str, str] = field(default_factory=dict)
    mixture: list[tuple[int, float]] = field(default_factory=list)
    logit_bias: float | None = None

    def to_json(self) -> str:
        """The content of state.json, with its own SHA-256."""
        values = asdict(self)
        return json.dumps({**values, "sha256": _digest(values)}, ensure_ascii=False, indent=1) + "\n"


_STATE = TypeAdapter(State)


def tensor_file(name: str) -> str:
    """The file of a checkpoint that holds `model` or one of the optimiser's moments, such as `exp_avg`."""
    return f"{name}.safetensors"


def complete(output: Path) -> list[Path]:
    """The complete checkpoints of the run in `output`, the oldest first; `best` is not among them."""
    return sorted(path for path in (output / "checkpoints").glob("step-*") if (path / STATE).is_file())


def latest(output: Path) -> Path | None:
    """The newest complete checkpoint of a run, or None."""
    found = complete(output)
    return found[-1] if found else None


def latest_sound(output: Path, warn: Callable[[str], None]) -> Path | None:
    """The newest complete checkpoint whose bytes are those that were written, or None.

    warn: called with what is wrong with each newer one.
    """
    for folder in reversed(complete(output)):
        try:
            verify(folder)
            return folder
        except CheckpointError as error:
            warn(f"{error}; going back to the one before")
    return None


def find(path: Path) -> Path:
    """The checkpoint that `path` stands for: a checkpoint stands for itself, a run for its best one, or else its last.

    Raises CheckpointError.
    """
    if (path / STATE).is_file():
        return path
    best = path / "checkpoints" / BEST
    found = best if (best / STATE).is_file() else latest(path)
    if found is None:
        if path.is_dir():
            raise CheckpointError(f"{path}: neither an export nor a checkpoint nor a run with one (no {STATE} in it)")
        what = "a file" if path.exists() else "not there"
        raise CheckpointError(f"{path}: {what}; name the folder of an export, a run or a checkpoint")
    return found


def read_state(folder: Path) -> State:
    """The state of a complete checkpoint, checked against its own SHA-256. Raises CheckpointError."""
    path = folder / STATE
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        digest = values.pop("sha256")
        state = _STATE.validate_python(_renamed(values))
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise CheckpointError(f"{path}: not a readable checkpoint ({reason[:200]}); delete {folder}") from error
    if digest != _digest(values):
        raise CheckpointError(f"{path}: damaged, its content is not what was written; delete {folder}")
    return state


def verify(folder: Path, only: Collection[str] | None = None) -> State:
    """The state of a checkpoint, after comparing the bytes of its files with the SHA-256 recorded there.

    only: names of the files to compare; default: all. Raises CheckpointError naming the file that is damaged.
    """
    state = read_state(folder)
    for name, digests in state.files.items():
        if only is not None and name not in only:
            continue
        try:
            sound = _is_sound(folder / name, digests)
        except OSError as error:
            raise CheckpointError(f"{folder / name}: cannot be read ({error}); delete {folder}") from error
        if not sound:
            raise CheckpointError(f"{folder / name}: damaged, its bytes are not those written; delete {folder}")
    return state


def read_parts(folder: Path) -> Parts:
    """The tensors of what a checkpoint's training has made: fp32 on the CPU, averaged where solver.ema says so, and
    with merged adapters. Only `verify` checks bytes. Raises CheckpointError."""
    state = _read(folder / WEIGHTS)
    if (folder / AVERAGE).exists():
        state |= _read(folder / AVERAGE)
    try:
        return Parts.of(merged(state, read_state(folder).config))
    except (LookupError, TypeError, ArithmeticError, RuntimeError) as error:  # what a stranger's settings may cause
        reason = " ".join(str(error).split())[:200]
        raise CheckpointError(f"{folder}: its adapters cannot be merged ({reason}); delete {folder}") from None


def _read(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path}: cannot be read ({error}); delete {path.parent}") from None


def load_checkpoint(model: VideoClip, folder: Path) -> None:
    """Gives the model the weights of a checkpoint, with its trained classifier and text tower if it has them.

    Raises CheckpointError, or ConfigError where the model is of another network.
    """
    _load(model, read_parts(folder), folder)


def load_to_train(model: VideoClip, folder: Path) -> None:
    """Gives the model, with its adapters, the weights that a training goes on from. Raises as `load_checkpoint`."""
    _load(model, Parts.of(_read(folder / WEIGHTS)), folder)


def _load(model: VideoClip, parts: Parts, folder: Path) -> None:
    load_parts(
        model, parts, str(folder / WEIGHTS), "; the network of the configuration is not the one it was trained with"
    )
    if parts.classifier is not None:
        model.set_classifier(parts.classifier, read_state(folder).class_names)


def sha256_of(path: Path) -> str:
    """SHA-256 of a file's bytes, in hex. Raises OSError."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()


def _is_sound(path: Path, digests: Digests) -> bool:
    """Whether a file's bytes are those of the digests, none too few and none too many. Raises OSError."""
    if isinstance(digests, str):
        return sha256_of(path) == digests
    at = 0
    with path.open("rb") as file:
        for stop, expected in digests:
            digest = hashlib.sha256()
            while block := file.read(max(0, min(stop - at, 1 << 22))):
                digest.update(block)
                at += len(block)
            if at != stop or digest.hexdigest() != expected:
                return False
        return not file.read(1)


def _renamed(values: dict[str, Any]) -> dict[str, Any]:
    """Version 0.1 recorded one input alone, under a name of its own."""
    digest = values.get("classifier_file")
    return {**values, "inputs": {"network.classifier_file": digest}} if digest else values


def _digest(values: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True, ensure_ascii=False).encode()).hexdigest()
