"""The typed configuration of a run: declared here, read from YAML, overridden by `section.key=value`.

A configuration is a tree of frozen dataclasses. An unknown key, a wrong type or a value out of range raises
ConfigError, which names the key, the value, where it came from and the nearest valid name. Imports nothing of
text4vis; everything else may import it.
"""

from __future__ import annotations

import difflib
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, fields, is_dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BeforeValidator, ConfigDict, Field, StrictBool, StrictInt, StrictStr, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass


class ConfigError(Exception):
    """A configuration that cannot be used. The message names the key, the value, its origin and the fix."""


def _number(value: Any) -> Any:
    """YAML 1.1 reads `5e-5` (no dot) as a string; a number is a number however it is written. Booleans are not."""
    if isinstance(value, bool):
        raise ValueError("expected a number")
    if isinstance(value, str):
        try:
            return float(value)
        except ValueError:
            raise ValueError("expected a number") from None
    return value


def _one_or_many(value: Any) -> Any:
    return (value,) if isinstance(value, str) else tuple(value) if isinstance(value, list) else value


def _pair(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


Float = Annotated[float, BeforeValidator(_number)]
Int = StrictInt
Bool = StrictBool
Str = StrictStr
Probability = Annotated[float, BeforeValidator(_number), Field(ge=0, le=1)]
Count = Annotated[StrictInt, Field(ge=1)]
Sources = Annotated[tuple[StrictStr, ...], BeforeValidator(_one_or_many)]

_section = dataclass(frozen=True, kw_only=True, config=ConfigDict(extra="forbid"))


@_section
class DataConfig:
    dataset: Str = Field("", description="name of the data set, for titles and reports")
    train: Sources = Field((), description="training shards: a folder, an address, or a list of them")
    val: Sources = Field((), description="evaluation shards, like data.train")
    label_list: Str | None = Field(None, description="CSV `id,name`; default: the class names stored in the shards")
    num_segments: Count = Field(8, description="frames sampled from a video, T")
    dense: Bool = Field(False, description="sample inside a window of 128 frames instead of over the whole video")
    batch_size: Count = Field(32, description="videos per rank and micro batch")
    input_size: Count = Field(224, description="side of the square that the model sees, pixels")
    scale_size: Count | None = Field(
        None, description="short side before cropping, pixels; default: 256 at input_size 224, else input_size"
    )
    augmentation: Literal["released", "none"] = Field(
        "released", description="released: random resized crop, flip, grey; none: the evaluation's centre crop"
    )
    crop_area: Annotated[tuple[Float, Float], BeforeValidator(_pair)] = Field(
        (0.08, 1.0), description="range of the random crop's share of the frame's area"
    )
    flip: Probability = Field(0.5, description="probability of a horizontal flip; 0 where left and right matter")
    grey: Probability = Field(0.2, description="probability that a video turns grey")
    test_clips: Count = Field(1, description="temporal clips per video in evaluation")
    test_crops: Literal[1, 3, 5, 10] = Field(1, description="spatial crops per clip in evaluation")
    shuffle: Annotated[StrictStr, Field(pattern=r"^(global|shards:[1-9][0-9]*)$")] = Field(
        "global", description="global: any order; shards:K: a window of K shards at a time, for remote stores and disks"
    )
    decode: Literal["auto", "cpu", "gpu"] = Field(
        "auto", description="where frames are decoded; auto: gpu if there is one"
    )
    workers: Annotated[StrictInt, Field(ge=0)] = Field(
        0, description="decoding threads per rank; 0: the cores that the rank owns"
    )
    io_threads: Annotated[StrictInt, Field(ge=0)] = Field(
        0, description="reading threads per rank; 0: the rank's cores for local folders, 16 for remote ones"
    )
    prefetch: Count = Field(3, description="batches prepared ahead of the step")
    verify: Bool = Field(True, description="check each frame's CRC-32 as it is read")
    cache_dir: Str | None = Field(None, description="node-wide folder for remote indexes and shards")
    cache_bytes: Annotated[StrictInt, Field(ge=0)] = Field(
        0, description="keep whole remote shards in cache_dir up to this many bytes; 0: range requests only"
    )
    synthetic: Bool = Field(False, description="made-up frames instead of decoded ones: shows the loader's cost")


@_section
class NetworkConfig:
    arch: Str = Field(
        "ViT-B/16", description="CLIP or open_clip name, a model JSON, or a weights file in OpenAI's layout"
    )
    pretrained: Str | None = Field(
        None, description="open_clip tag or weights file; default: `openai` for CLIP's names, the file beside a JSON"
    )
    init: Bool = Field(True, description="start from pre-trained weights; false: random ones")
    sim_header: Literal["None", "Transf", "Transf_cls", "LSTM", "Conv_1D"] = Field(
        "Transf", description="temporal head; None: mean of frames, Transf: transformer, others: ActionCLIP's"
    )
    template: Str = Field("a video of a person {}.", description="prompt around a class name")
    fix_video: Bool = Field(False, description="freeze the visual tower")


@_section
class SolverConfig:
    type: Literal["cosine"] = Field("cosine", description="schedule after the warm-up")
    epochs: Count = Field(30, description="passes over the training videos")
    optim: Literal["adamw"] = Field("adamw", description="optimiser")
    lr: Annotated[float, BeforeValidator(_number), Field(gt=0)] = Field(
        5e-5, description="peak learning rate of the head"
    )
    clip_ratio: Annotated[float, BeforeValidator(_number), Field(ge=0)] = Field(
        0.1, description="learning rate of the visual tower and logit scale, as a share of lr"
    )
    lr_warmup_step: Annotated[float, BeforeValidator(_number), Field(ge=0)] = Field(
        5, description="epochs of linear warm-up from 0"
    )
    weight_decay: Annotated[float, BeforeValidator(_number), Field(ge=0)] = Field(0.2, description="AdamW weight decay")
    betas: Annotated[tuple[Float, Float], BeforeValidator(_pair)] = Field((0.9, 0.999), description="AdamW betas")
    grad_accumulation_steps: Count = Field(1, description="micro batches per optimiser step")
    clip_gradient: Annotated[float, BeforeValidator(_number), Field(ge=0)] = Field(
        0.0, description="largest gradient norm; 0: no clipping"
    )
    loss_type: Literal["CE"] = Field("CE", description="cross entropy of exp(logit_scale) * cosine")


@_section
class EngineConfig:
    precision: Literal["bf16", "fp32"] = Field("bf16", description="arithmetic of the step; master weights stay fp32")
    zero_stage: Literal[0, 1, 2, 3] = Field(1, description="DeepSpeed ZeRO stage")
    num_threads: Annotated[StrictInt, Field(ge=0)] = Field(
        0, description="CPU threads of the model per rank; 0: the cores that the rank owns"
    )


@_section
class LoggingConfig:
    print_freq: Count = Field(10, description="optimiser steps between log lines")
    eval_freq: Count = Field(1, description="epochs between evaluations")


@_section
class Config:
    seed: Annotated[StrictInt, Field(ge=0)] = Field(
        1024, description="of order, sampling, augmentation and initial weights"
    )
    data: DataConfig = Field(default_factory=DataConfig)
    network: NetworkConfig = Field(default_factory=NetworkConfig)
    solver: SolverConfig = Field(default_factory=SolverConfig)
    engine: EngineConfig = Field(default_factory=EngineConfig)
    logging: LoggingConfig = Field(default_factory=LoggingConfig)

    @property
    def scale_size(self) -> int:
        """Short side of a frame before cropping, pixels (the original's rule unless data.scale_size says otherwise)."""
        return self.data.scale_size or (256 if self.data.input_size == 224 else self.data.input_size)

    def to_dict(self) -> dict[str, Any]:
        """Plain lists, numbers and strings, ready for YAML or JSON."""
        return TypeAdapter(Config).dump_python(self, mode="json")

    def to_yaml(self) -> str:
        return yaml.safe_dump(self.to_dict(), sort_keys=False, allow_unicode=True)


# Keys of the original project's YAML files that have no meaning here, and what to do instead.
RETIRED = {
    "data.train_root": "build shards with tools/build_shards.py --root and name them in data.train",
    "data.train_list": "build shards with tools/build_shards.py --annotations and name them in data.train",
    "data.val_root": "build shards with tools/build_shards.py --root and name them in data.val",
    "data.val_list": "build shards with tools/build_shards.py --annotations and name them in data.val",
    "data.image_tmpl": "give it to tools/build_shards.py --image-template",
    "data.index_bias": "give it to tools/build_shards.py within --image-template",
    "data.num_classes": "delete it: the number of classes follows from the class names",
    "data.modality": "delete it: frames are RGB",
    "data.seg_length": "delete it: one frame is drawn from each segment",
    "data.random_shift": "delete it: training always draws a random frame from each segment",
    "network.type": "delete it: results go to --output",
    "network.describe": "delete it: results go to --output",
    "network.drop": "delete it: the original never read it",
    "solver.start_epoch": "use --resume",
    "solver.epoch_offset": "use --resume",
    "solver.evaluate": "use text4vis/evaluate.py",
    "resume": "use --resume",
}


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Reads `path` and applies overrides of the form `section.key=value` (value in YAML), the last one winning.

    A file may start from another with `base: other.yaml` (relative to itself). Environment variables in values are
    expanded (`$DATA/k400`). Raises ConfigError.
    """
    values, origin = _read_yaml(Path(path))
    for override in overrides:
        key, equals, text = override.partition("=")
        if not equals or not key:
            raise ConfigError(f"--set {override!r}: expected section.key=value, e.g. --set data.batch_size=8")
        try:
            value = yaml.safe_load(text) if text else ""
        except yaml.YAMLError as error:
            raise ConfigError(f"--set {override!r}: the value is not valid YAML ({_yaml_reason(error)})") from None
        _assign(values, key.strip(), value)
        origin[key.strip()] = "--set"
    return _validate(_expand(values), origin, str(path))


def config_from_dict(values: Mapping[str, Any], where: str) -> Config:
    """The inverse of `Config.to_dict`; `where` names the source in errors. Raises ConfigError."""
    return _validate(dict(values), {}, where)


def _read_yaml(path: Path, including: tuple[Path, ...] = ()) -> tuple[dict[str, Any], dict[str, str]]:
    """Values of a file laid over those of its `base`, and the file that each dotted key came from."""
    if path.resolve() in including:
        raise ConfigError(f"{path}: base files include each other: {' -> '.join(map(str, (*including, path)))}")
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8-sig"))
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such file; the recipes that ship are in configs/") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read as UTF-8 text ({error})") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"{path}: not valid YAML ({_yaml_reason(error)})") from None
    values = {} if values is None else values
    if not isinstance(values, dict):
        raise ConfigError(f"{path}: expected sections such as `data:`, got {type(values).__name__}")
    base = values.pop("base", None)
    merged: dict[str, Any] = {}
    origin: dict[str, str] = {}
    if base is not None:
        if not isinstance(base, str):
            raise ConfigError(f"{path}: base: expected a file name, got {base!r}")
        merged, origin = _read_yaml(path.parent / base, (*including, path.resolve()))
    for key, value in _leaves(values):
        _assign(merged, key, value)
        origin[key] = str(path)
    return merged, origin


def _yaml_reason(error: yaml.YAMLError) -> str:
    mark = getattr(error, "problem_mark", None)
    place = f"line {mark.line + 1}: " if mark else ""
    return place + str(getattr(error, "problem", error)).replace("\n", " ")


def _leaves(values: Mapping[Any, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        if isinstance(value, dict) and value:
            yield from _leaves(value, f"{prefix}{key}.")
        elif value is not None or prefix:
            yield f"{prefix}{key}", value


def _assign(values: dict[str, Any], dotted: str, value: Any) -> None:
    *sections, key = dotted.split(".")
    for section in sections:
        inner = values.setdefault(section, {})
        if not isinstance(inner, dict):
            raise ConfigError(f"{dotted}: {section} is a value ({inner!r}), not a section")
        values = inner
    values[key] = value


def _expand(value: Any) -> Any:
    if isinstance(value, str):
        return os.path.expandvars(value)
    if isinstance(value, dict):
        return {key: _expand(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_expand(inner) for inner in value]
    return value


def _validate(values: dict[str, Any], origin: Mapping[str, str], where: str) -> Config:
    try:
        return _check(TypeAdapter(Config).validate_python(values), origin, where)
    except ValidationError as error:
        lines = [_explain(problem, origin, where) for problem in error.errors()]
        raise ConfigError("\n".join(dict.fromkeys(lines))) from None


def _explain(problem: Any, origin: Mapping[str, str], where: str) -> str:
    """One line for one of pydantic's errors: key, what was expected, value, origin, nearest name."""
    path = [part for part in problem["loc"] if isinstance(part, str) and "[" not in part]
    known = dict(schema())
    # pydantic adds the branch of a union to the location: the key is the longest prefix that is declared
    key = next((".".join(path[:n]) for n in range(len(path), 0, -1) if ".".join(path[:n]) in known), ".".join(path))
    source = origin.get(key, where)
    if problem["type"] == "unexpected_keyword_argument":
        if key in RETIRED:
            return f"{key}: not used here (from {source}); {RETIRED[key]}"
        near = difflib.get_close_matches(key, known, n=1, cutoff=0.6)
        if not near:  # the right key in the wrong section, or without one
            by_name = {name.split(".")[-1]: name for name in known}
            near = [by_name[name] for name in difflib.get_close_matches(key.split(".")[-1], by_name, n=1, cutoff=0.7)]
        hint = f"; did you mean {near[0]}?" if near else ""
        return f"{key}: unknown key (from {source}){hint}"
    value = problem["input"]
    return f"{key}: {_lower_first(problem['msg'].removeprefix('Value error, '))}, got {value!r} (from {source})"


def _lower_first(text: str) -> str:
    return text[:1].lower() + text[1:]


def _check(config: Config, origin: Mapping[str, str], where: str) -> Config:
    """Contradictions between keys."""

    def fail(key: str, reason: str) -> None:
        raise ConfigError(f"{key}: {reason} (from {origin.get(key, where)})")

    low, high = config.data.crop_area
    if not 0 < low <= high <= 1:
        fail("data.crop_area", f"expected 0 < low <= high <= 1, got {[low, high]}")
    if config.scale_size < config.data.input_size:
        fail("data.scale_size", f"{config.scale_size} is smaller than data.input_size {config.data.input_size}")
    if not all(0 <= beta < 1 for beta in config.solver.betas):
        fail("solver.betas", f"expected two numbers in [0, 1), got {list(config.solver.betas)}")
    if config.network.template.count("{}") != 1:
        fail("network.template", f"expected exactly one {{}} for the class name, got {config.network.template!r}")
    return config


def schema() -> Iterator[tuple[str, tuple[str, Any]]]:
    """Every key in order, with its (one-line meaning, default)."""
    default = asdict(Config())  # type: ignore[call-overload]
    yield "seed", (_meaning(Config, "seed"), default["seed"])
    for section in fields(Config):  # type: ignore[arg-type]
        if is_dataclass(getattr(Config(), section.name)):
            kind = type(getattr(Config(), section.name))
            for key in fields(kind):
                yield f"{section.name}.{key.name}", (_meaning(kind, key.name), default[section.name][key.name])


def _meaning(kind: type, name: str) -> str:
    return kind.__pydantic_fields__[name].description or ""  # type: ignore[attr-defined]
