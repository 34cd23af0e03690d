"""The typed configuration of a run: declared here, read from YAML, overridden by `section.key=value`.

A configuration is a tree of frozen dataclasses. An unknown key, a wrong type or a value out of range raises
ConfigError, which names the key, the value, where it came from and the nearest valid name. Imports nothing of
text4vis but the prompts and the sampling; everything else may import it.
"""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import (
    BeforeValidator,
    ConfigDict,
    Discriminator,
    Field,
    StrictBool,
    StrictInt,
    StrictStr,
    Tag,
    TypeAdapter,
    ValidationError,
)
from pydantic.dataclasses import dataclass

from shards.text import redact
from text4vis.config.templates import TEMPLATE_SETS, prompts
from text4vis.data.sampling import DENSE_WINDOW

# Far above any recipe: the largest that ships has 2 kB.
MAX_YAML_BYTES = 1 << 20
# Deeper than any key: data.randaug.N has two.
MAX_SECTIONS = 8


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


def _whole_number(value: Any) -> Any:
    """To a Literal of numbers `true` is 1 and `1.0` is too."""
    if isinstance(value, (bool, float)):
        raise ValueError("expected a whole number")
    return value


def _one_or_many(value: Any) -> Any:
    return (value,) if isinstance(value, str) else tuple(value) if isinstance(value, list) else value


def _false_is_none(value: Any) -> Any:
    return None if value is False else value


def _pair(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def _pairs(value: Any) -> Any:
    return tuple(map(_pair, value)) if isinstance(value, list) else value


Float = Annotated[float, BeforeValidator(_number)]
Int = StrictInt
Bool = StrictBool
Str = StrictStr
# `--set key=` takes a value back that a recipe gives.
OptionalStr = Annotated[StrictStr | None, BeforeValidator(lambda value: None if value == "" else value)]
Probability = Annotated[float, Field(ge=0, le=1), BeforeValidator(_number)]
Rate = Annotated[float, Field(ge=0, lt=1), BeforeValidator(_number)]
NonNegative = Annotated[float, Field(ge=0), BeforeValidator(_number)]
Count = Annotated[StrictInt, Field(ge=1)]
Sources = Annotated[tuple[StrictStr, ...], BeforeValidator(_one_or_many)]

_section = dataclass(frozen=True, kw_only=True, config=ConfigDict(extra="forbid"))


@_section
class RandAugConfig:
    N: Annotated[StrictInt, Field(ge=0)] | None = Field(
        None, description="RandAugment operations per video; default: 2 with data.augmentation paper, else 0"
    )
    M: Annotated[float, Field(ge=0, le=30), BeforeValidator(_number)] = Field(
        9, description="strength of RandAugment's operations, 0 to 30"
    )


@_section
class WeightedSource:
    """One entry of `data.train` in a mixture."""

    path: Sources
    weight: Annotated[float, Field(gt=0, allow_inf_nan=False), BeforeValidator(_number)]


def _path_or_weighted(value: Any) -> Any:
    if isinstance(value, str | WeightedSource) or (isinstance(value, dict) and value.keys() == {"path", "weight"}):
        return value
    raise ValueError("expected a path or {path, weight}")


TrainSource = Annotated[
    Annotated[StrictStr, Tag("path")] | Annotated[WeightedSource, Tag("weighted")],
    Discriminator(lambda value: "path" if isinstance(value, str) else "weighted"),
    BeforeValidator(_path_or_weighted),
]


@_section
class DataConfig:
    dataset: Str = Field("", description="name of the data set, for titles and reports")
    train: Annotated[tuple[TrainSource, ...], BeforeValidator(_one_or_many)] = Field(
        (),
        description="training shards: a folder, an address, or a list of them; a list of {path, weight}: each has this "
        "share of the samples",
    )
    val: Sources = Field((), description="evaluation shards, like data.train")
    label_list: OptionalStr = Field(None, description="CSV `id,name`; default: the class names stored in the shards")
    num_segments: Count = Field(8, description="frames sampled from a video, T")
    dense: Bool = Field(False, description="sample inside a window of 128 frames instead of over the whole video")
    batch_size: Count = Field(32, description="videos per rank and micro batch")
    input_size: Count = Field(224, description="side of the square that the model sees, pixels")
    scale_size: Count | None = Field(
        None, description="short side before cropping, pixels; default: 256 at input_size 224, else input_size"
    )
    shot: Annotated[StrictInt, Field(ge=0)] | None = Field(
        None, description="few-shot: train on this many videos of each class; 0 or none: on all"
    )
    shot_seed: Annotated[StrictInt, Field(ge=0)] | None = Field(
        None, description="which videos data.shot chooses; default: seed"
    )
    augmentation: Literal["released", "paper", "something", "none"] = Field(
        "released",
        description="released: random resized crop, flip, grey; paper: RandAugment before them; something: multi-scale "
        "crop, grey, flip that swaps labels; none: the evaluation's centre crop",
    )
    randaug: RandAugConfig = Field(default_factory=RandAugConfig)
    crop_area: Annotated[tuple[Float, Float], BeforeValidator(_pair)] = Field(
        (0.08, 1.0), description="range of the random crop's share of the frame's area"
    )
    flip: Probability = Field(0.5, description="probability of a horizontal flip; 0 where left and right matter")
    flip_swaps: Annotated[tuple[tuple[StrictInt, StrictInt], ...] | None, BeforeValidator(_pairs)] = Field(
        None,
        description="pairs of labels that a flip turns into each other; default: Something-Something's with "
        "data.augmentation something, else none",
    )
    grey: Probability = Field(0.2, description="probability that a video turns grey")
    blur: Probability = Field(0.0, description="probability of a Gaussian blur, of 0.1 to 2 pixels of the view")
    solarize: Probability = Field(0.0, description="probability that values from 128 up are inverted")
    test_clips: Count = Field(1, description="temporal clips per video in evaluation")
    test_crops: Annotated[Literal[1, 3, 5, 10], BeforeValidator(_whole_number)] = Field(
        1, description="spatial crops per clip in evaluation"
    )
    class_splits: Sources = Field(
        (),
        description="class lists (CSV `id,name`) that evaluate.py reports one by one, with mean and deviation; "
        "Kinetics-600's three, say",
    )
    shuffle: Annotated[StrictStr, Field(pattern=r"^(global|shards:[1-9][0-9]*)$")] = Field(
        "global", description="global: any order; shards:K: a window of K shards at a time, for remote stores and disks"
    )
    streams: Annotated[StrictInt, Field(ge=1, le=1 << 16)] = Field(
        1,
        description="with data.shuffle shards:K: deal the shards to so many streams, so that each host fetches only "
        "its own; a multiple of the number of hosts",
    )
    decode: Literal["auto", "cpu", "gpu"] = Field(
        "auto", description="where frames are decoded; auto: gpu if there is one"
    )
    workers: Annotated[StrictInt, Field(ge=0)] = Field(
        0, description="decoding threads per rank; 0: the cores that the rank owns"
    )
    io_threads: Annotated[StrictInt, Field(ge=0)] = Field(
        0, description="reading threads per rank; 0: 1 for local folders, 16 for remote ones"
    )
    prefetch: Count = Field(3, description="batches prepared ahead of the step")
    verify: Bool = Field(True, description="check each frame's CRC-32 as it is read")
    on_error: Literal["fail", "skip"] = Field(
        "fail",
        description="a video that cannot be used; fail: name it and stop, skip: list it, and train on another in its "
        "place or evaluate without it",
    )
    max_bad_share: Rate = Field(
        0.01, description="data.on_error skip: largest share of the videos that a job may skip before it fails"
    )
    cache_dir: OptionalStr = Field(None, description="node-wide folder for remote indexes and shards")
    cache_bytes: Annotated[StrictInt, Field(ge=0)] = Field(
        0, description="keep whole remote shards in cache_dir up to this many bytes; 0: range requests only"
    )
    synthetic: Bool = Field(False, description="made-up frames instead of decoded ones: shows the loader's cost")


@_section
class NetworkConfig:
    arch: Str = Field(
        "ViT-B/16", description="CLIP or open_clip name, a model JSON, or a weights file in OpenAI's layout"
    )
    pretrained: OptionalStr = Field(
        None, description="open_clip tag or weights file; default: `openai` for CLIP's names, the file beside a JSON"
    )
    init: Bool = Field(True, description="start from pre-trained weights; false: random ones")
    sim_header: Literal["None", "Transf", "Transf_cls", "LSTM", "Conv_1D"] = Field(
        "Transf", description="temporal head; None: mean of frames, Transf: transformer, others: ActionCLIP's"
    )
    tm: Annotated[Literal["tsm", "tokenshift", "tokent1d"] | None, BeforeValidator(_false_is_none)] = Field(
        None, description="temporal modelling in the visual tower; tsm: shift patches' channels, others: class token's"
    )
    joint_st: Bool = Field(False, description="attention over all frames' patches at once; needs sim_header: None")
    drop_out: Rate = Field(
        0.0,
        description="dropout of the visual tower's branches and attention: rate of the last block, from 0 in the first",
    )
    emb_dropout: Rate = Field(0.0, description="dropout of the visual tower's embedded patches")
    classifier: Literal["text", "random", "orthogonal", "lda", "sentence", "file"] = Field(
        "text",
        description="where the frozen class embeddings come from; text: CLIP's text tower, random and orthogonal: the "
        "seed, lda: videos of data.train, sentence: another text encoder, file: classifier_file",
    )
    template: Annotated[StrictStr | tuple[StrictStr, ...], BeforeValidator(_pair)] = Field(
        "a video of a person {}.",
        description="prompt around a class name, a list of prompts (their mean), or a set: actionclip-16, kinetics-28",
    )
    classifier_file: OptionalStr = Field(
        None, description="class embeddings (C, D): .safetensors, .npy or .pt; tools/build_classifier.py writes one"
    )
    lda_videos: Annotated[StrictInt, Field(ge=2)] = Field(60, description="lda: training videos a class, at most")
    sentence_model: OptionalStr = Field(None, description="sentence: folder of a Hugging Face text encoder")
    sentence_projection: Bool = Field(
        False, description="sentence: bring its width to CLIP's by a fixed orthogonal projection"
    )
    fix_video: Bool = Field(False, description="freeze the visual tower")
    fix_text: Bool = Field(
        True, description="freeze the text tower; false: it trains, and encodes the prompts of the step's classes"
    )
    classifier_trainable: Bool = Field(False, description="train the class embeddings, from those of the classifier")


@_section
class SolverConfig:
    type: Literal["cosine", "multistep"] = Field(
        "cosine", description="schedule after the warm-up: half a cosine to 0, or a tenth at each lr_decay_step"
    )
    epochs: Count = Field(30, description="passes over the training videos")
    optim: Literal["adamw", "adam", "sgd"] = Field("adamw", description="optimiser")
    lr: Annotated[float, Field(gt=0), BeforeValidator(_number)] = Field(
        5e-5, description="peak learning rate of the head"
    )
    clip_ratio: Annotated[float, Field(ge=0), BeforeValidator(_number)] = Field(
        0.1, description="learning rate of the visual tower and logit scale, as a share of lr"
    )
    lr_warmup_step: Annotated[float, Field(ge=0), BeforeValidator(_number)] = Field(
        5, description="epochs of linear warm-up from 0"
    )
    weight_decay: Annotated[float, Field(ge=0), BeforeValidator(_number)] = Field(
        0.2, description="weight decay of the optimiser: decoupled in AdamW, a part of the gradient in Adam and SGD"
    )
    betas: Annotated[tuple[Float, Float], BeforeValidator(_pair)] = Field(
        (0.9, 0.999), description="AdamW's and Adam's"
    )
    momentum: Rate = Field(0.9, description="SGD's")
    lr_decay_step: Annotated[Count | tuple[Count, ...], BeforeValidator(_pair)] = Field(
        (), description="multistep: epochs at which the rate falls to a tenth, or their period"
    )
    global_batch: Count | None = Field(
        None, description="videos per optimiser step over all ranks; default: data.batch_size x ranks x accumulation"
    )
    grad_accumulation_steps: Count = Field(
        1, description="micro batches per optimiser step; follows from solver.global_batch where that is given"
    )
    clip_gradient: Annotated[float, Field(ge=0), BeforeValidator(_number)] = Field(
        0.0, description="largest gradient norm; 0: no clipping"
    )
    on_nonfinite: Literal["stop", "skip"] = Field(
        "stop",
        description="a loss or gradient that is not finite: stop and name the videos, or skip the step and count it",
    )
    loss_type: Literal["CE", "NCE", "DS"] = Field(
        "CE", description="CE: cross entropy over all classes; NCE: videos against the batch's texts; DS: dual softmax"
    )
    smoothing: Rate = Field(0.0, description="label smoothing of the cross entropy")
    mixup: NonNegative = Field(0.0, description="blend pairs of videos, shares from Beta(mixup, mixup); 0: off")
    cutmix: NonNegative = Field(0.0, description="paste boxes between pairs of videos, areas from Beta; 0: off")


@_section
class EngineConfig:
    precision: Literal["bf16", "fp16", "fp32"] = Field(
        "bf16", description="arithmetic of the step; master weights stay fp32, fp16 scales the loss"
    )
    zero_stage: Annotated[Literal[0, 1, 2, 3], BeforeValidator(_whole_number)] = Field(
        1, description="DeepSpeed ZeRO stage"
    )
    offload: Literal["none", "optimizer", "parameters"] = Field(
        "none", description="kept in the host's memory: AdamW's state (ZeRO 1 to 3), or parameters too (ZeRO 3)"
    )
    activation_checkpointing: Bool = Field(
        False, description="compute the visual tower's activations again in the backward pass: less memory, more time"
    )
    compile: Bool = Field(False, description="torch.compile the model")
    num_threads: Annotated[StrictInt, Field(ge=0)] = Field(
        0, description="CPU threads of the model per rank; 0: the cores that the rank owns"
    )
    world_size: Count | None = Field(None, description="expected number of ranks, an error otherwise; default: any")
    wall_minutes: Annotated[float, Field(gt=0), BeforeValidator(_number)] | None = Field(
        None, description="save and exit with code 75 (resume me) after so many minutes; default: no limit"
    )
    silence_seconds: Annotated[float, Field(ge=5), BeforeValidator(_number)] = Field(
        60, description="a rank that gives no sign of life for so long ends the job on all ranks"
    )


@_section
class LoggingConfig:
    print_freq: Count = Field(10, description="optimiser steps between log lines")
    eval_freq: Count = Field(1, description="epochs between evaluations")
    save_steps: Count | None = Field(None, description="optimiser steps between checkpoints; default: each evaluation")
    save_minutes: Annotated[float, Field(gt=0), BeforeValidator(_number)] | None = Field(
        None, description="minutes between checkpoints; default: each evaluation"
    )
    keep_checkpoints: Count = Field(2, description="last checkpoints kept; the best evaluation's weights are kept too")
    pictures: Annotated[StrictInt, Field(ge=0, le=32)] = Field(
        4,
        description="TensorBoard: clips in each picture of training videos, best and worst predictions; 0: nothing "
        "but scalars",
    )


@_section
class Config:
    seed: Annotated[StrictInt, Field(ge=0)] = Field(
        1024, description="of order, sampling, augmentation and initial weights"
    )
    pretrain: OptionalStr = Field(
        None, description="start from the weights of a run, checkpoint, export or .pt file, whatever its classes"
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
        """Plain lists, numbers and strings, ready for YAML or JSON. What is kept goes round: addresses come without
        the user, password and query that they may hold."""
        return _without_secrets(TypeAdapter(Config).dump_python(self, mode="json"))

    def to_yaml(self) -> str:
        return yaml.safe_dump(self.to_dict(), sort_keys=False, allow_unicode=True)


def _without_secrets(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_secrets(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_without_secrets(inner) for inner in value]
    # `#` alone is no secret, and may be part of a key in a store.
    return redact(value) if isinstance(value, str) and "://" in value and re.search("[@?]", value) else value


def addresses(sources: Sequence[str | WeightedSource]) -> list[str]:
    """All folders and addresses that `data.train` or `data.val` names, in order."""
    return [path for source in sources for path in ((source,) if isinstance(source, str) else source.path)]


def decay_epochs(solver: SolverConfig) -> tuple[int, ...]:
    """The epochs of `solver.lr_decay_step`, within the run if it is a period."""
    step = solver.lr_decay_step
    return step if isinstance(step, tuple) else tuple(range(step, solver.epochs, step))


# Keys of the original project's YAML files that have no meaning here, and what to do instead.
RETIRED = {
    "data.train_root": "build shards with tools/build_shards.py --root and name them in data.train",
    "data.train_list": "build shards with tools/build_shards.py --annotations and name them in data.train",
    "data.val_root": "build shards with tools/build_shards.py --root and name them in data.val",
    "data.val_list": "build shards with tools/build_shards.py --annotations and name them in data.val",
    "data.image_tmpl": "give it to tools/build_shards.py --image-template",
    "data.index_bias": "delete it: the number of the first frame is found",
    "data.num_classes": "delete it: the number of classes follows from the class names",
    "data.modality": "delete it: all is RGB; lists of videos are built too, see --store video of tools/build_shards.py",
    "data.seg_length": "delete it: one frame is drawn from each segment",
    "data.random_shift": "delete it: training always draws a random frame from each segment",
    "network.type": "delete it: results go to --output",
    "network.describe": "delete it: results go to --output",
    "network.drop": "delete it: the original never read it",
    "solver.start_epoch": "delete it: a run goes on by itself, see --resume",
    "solver.epoch_offset": "delete it: a run goes on by itself, see --resume",
    "solver.evaluate": "use text4vis/evaluate.py",
    "resume": "use --resume",
}


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Reads `path` and applies overrides of the form `section.key=value` (value in YAML), the last one winning.

    A file may start from another with `base: other.yaml` (relative to itself). Environment variables in values are
    expanded (`$DATA/k400`). Raises ConfigError.
    """
    return resolve_config(path, overrides)[0]


def resolve_config(path: str | Path, overrides: Sequence[str] = ()) -> tuple[Config, dict[str, str]]:
    """`load_config`, and for each key that was given the file it came from, or "--set"."""
    values, origin = _read_yaml(Path(path))
    for override in overrides:
        key, equals, text = override.partition("=")
        if not equals or not key:
            raise ConfigError(f"--set {override!r}: expected section.key=value, e.g. --set data.batch_size=8")
        try:
            value = _parse_yaml(text) if text else ""
        except ValueError as error:
            hint = '; quote a text with braces, e.g. "a video of {}."' if "{}" in text else ""
            raise ConfigError(f"--set {override!r}: the value is not valid YAML ({error}){hint}") from None
        _assign(values, key.strip(), value)
        origin[key.strip()] = "--set"
    return _validate(_expand(values, origin, str(path)), origin, str(path)), origin


def config_from_dict(values: Mapping[str, Any], where: str) -> Config:
    """The inverse of `Config.to_dict`; `where` names the source in errors. Raises ConfigError."""
    return _validate(dict(values), {}, where)


def _read_yaml(path: Path, including: tuple[Path, ...] = ()) -> tuple[dict[str, Any], dict[str, str]]:
    """Values of a file laid over those of its `base`, and the file that each dotted key came from."""
    if path.resolve() in including:
        raise ConfigError(f"{path}: base files include each other: {' -> '.join(map(str, (*including, path)))}")
    try:
        if path.stat().st_size > MAX_YAML_BYTES:
            raise ConfigError(f"{path}: has more than {MAX_YAML_BYTES} bytes; give a recipe, such as those in configs/")
        values = _parse_yaml(path.read_text(encoding="utf-8-sig"))
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such file; the recipes that ship are in configs/") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read as UTF-8 text ({error})") from None
    except ValueError as error:
        raise ConfigError(f"{path}: not valid YAML ({error})") from None
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


class _PlainLoader(yaml.SafeLoader):
    """YAML's plain values. No aliases: a few lines of them stand for more values than any memory holds."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            event = self.get_event()
            raise yaml.composer.ComposerError(
                None, None, "aliases (*name) are not read; write it out", event.start_mark
            )
        return super().compose_node(parent, index)


def _parse_yaml(text: str) -> Any:
    """The plain values of one YAML document. Raises ValueError that says what is wrong."""
    try:
        loader = _PlainLoader(text)
        try:
            return loader.get_single_data()
        finally:
            loader.dispose()
    except yaml.YAMLError as error:
        raise ValueError(_yaml_reason(error)) from None
    except RecursionError:
        raise ValueError("nested too deeply") from None
    except (ValueError, LookupError, TypeError, AttributeError, OverflowError) as error:
        # What looks like a date or a number and is none, or is tagged as one, fails within the parser.
        raise ValueError(f"a value is not what it looks like or is tagged as: {error}") from None


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
    if len(sections) > MAX_SECTIONS:
        raise ConfigError(f"{dotted[:80]!r}: sections within sections, more than any recipe has; keys are section.key")
    for section in sections:
        inner = values.setdefault(section, {})
        if not isinstance(inner, dict):
            raise ConfigError(f"{dotted}: {section} is a value ({inner!r}), not a section")
        values = inner
    values[key] = value


def _expand(value: Any, origin: Mapping[str, str], where: str, key: str = "") -> Any:
    if isinstance(value, dict):
        keys = {name: f"{key}.{name}" if key else str(name) for name in value}
        return {name: _expand(inner, origin, where, keys[name]) for name, inner in value.items()}
    if isinstance(value, list):  # the sections within, as those of data.train, have no dotted keys
        return [
            {name: _expand(part, origin, where, key) for name, part in inner.items()}
            if isinstance(inner, dict)
            else _expand(inner, origin, where, key)
            for inner in value
        ]
    if not isinstance(value, str):
        return value
    expanded = os.path.expandvars(value)
    if unknown := re.search(r"\$([A-Za-z_]\w*|\{[A-Za-z_]\w*\})", expanded):
        name = unknown[1].strip("{}")
        raise ConfigError(
            f"{key}: the environment variable {name} in {value!r} is not set (from {origin.get(key, where)}); "
            f"export {name}=/folder, or --set {key}=/path"
        )
    return expanded


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
    source = next((place for given, place in origin.items() if f"{given}.".startswith(f"{key}.")), where)
    if problem["type"] == "unexpected_keyword_argument":
        if key in RETIRED:
            return f"{key}: not used here (from {source}); {RETIRED[key]}"
        section, _, last = key.rpartition(".")
        names = [*known, *dict.fromkeys(name.rpartition(".")[0] for name in known if "." in name)]
        for keys in ([name for name in names if name.rpartition(".")[0] == section], names):  # or in another section
            by_name = {name.rpartition(".")[2]: name for name in keys}
            if near := difflib.get_close_matches(last, by_name, n=1, cutoff=0.7):
                break
        hint = f"; did you mean {by_name[near[0]]}?" if near else "; docs/config.md lists all keys"
        return f"{key}: unknown key (from {source}){hint}"
    value = problem["input"]
    return f"{key}: {_lower_first(problem['msg'].removeprefix('Value error, '))}, got {value!r} (from {source})"


def _lower_first(text: str) -> str:
    return text[:1].lower() + text[1:]


def _check(config: Config, origin: Mapping[str, str], where: str) -> Config:
    """Contradictions between keys."""

    def fail(key: str, reason: str) -> None:
        raise ConfigError(f"{key}: {reason} (from {origin.get(key, where)})")

    _check_data(config, fail)
    if config.solver.global_batch and config.solver.grad_accumulation_steps > 1:
        fail("solver.grad_accumulation_steps", "follows from solver.global_batch; give only one of them")
    if config.engine.offload == "optimizer" and config.engine.zero_stage == 0:
        fail("engine.offload", "optimizer needs engine.zero_stage 1, 2 or 3")
    if config.engine.offload == "parameters" and config.engine.zero_stage != 3:
        fail("engine.offload", f"parameters needs engine.zero_stage 3, got {config.engine.zero_stage}")
    _check_network(config, fail)
    _check_solver(config, fail)
    return config


def _check_network(config: Config, fail: Callable[[str, str], None]) -> None:
    network = config.network
    texts = prompts(network.template)
    if not texts or any(text.count("{}") != 1 for text in texts):
        wrong: Any = next((text for text in texts if text.count("{}") != 1), [])
        sets = ", ".join(TEMPLATE_SETS)
        fail("network.template", f"expected exactly one {{}} for the class name, or a set ({sets}), got {wrong!r}")
    if network.joint_st and network.tm:
        fail("network.tm", f"{network.tm!r} moves channels between frames, but network.joint_st joins the frames")
    if not network.fix_text and network.classifier != "text":
        fail("network.fix_text", f"a text tower that trains makes the classifier, but it is {network.classifier!r}")
    if not network.fix_text and network.classifier_trainable:
        fail("network.classifier_trainable", "the classes come from the text tower, which trains (network.fix_text)")
    if network.joint_st and network.sim_header != "None":
        fail("network.sim_header", f"{network.sim_header!r} has nothing to fuse with network.joint_st; set it to None")
    if network.tm and config.data.num_segments == 1:
        fail("network.tm", f"{network.tm!r} needs more than one frame, but data.num_segments is 1")
    if network.fix_video and (network.drop_out or network.emb_dropout):
        key = "network.drop_out" if network.drop_out else "network.emb_dropout"
        fail(key, "acts while the visual tower trains, but network.fix_video freezes it")
    if network.classifier == "file" and not network.classifier_file:
        fail("network.classifier", "file needs network.classifier_file, which tools/build_classifier.py writes")
    if network.classifier == "sentence" and not network.sentence_model:
        fail("network.classifier", "sentence needs network.sentence_model, the folder of a text encoder")
    if network.classifier == "lda" and not network.init:
        fail("network.classifier", "lda needs CLIP's weights, but network.init is false")


def _check_solver(config: Config, fail: Callable[[str, str], None]) -> None:
    solver = config.solver
    if not all(0 <= beta < 1 for beta in solver.betas):
        fail("solver.betas", f"expected two numbers in [0, 1), got {list(solver.betas)}")
    for key in ("mixup", "cutmix", "smoothing"):
        if getattr(solver, key) and solver.loss_type != "CE":
            fail(f"solver.{key}", f"needs solver.loss_type CE; {solver.loss_type} has soft targets of its own")
    milestones = decay_epochs(solver)
    if solver.type == "multistep" and not milestones:
        fail(
            "solver.lr_decay_step", "solver.type multistep needs epochs, e.g. [10, 20], or a period below solver.epochs"
        )
    if solver.type == "multistep" and (
        list(milestones) != sorted(set(milestones)) or milestones[0] <= solver.lr_warmup_step
    ):
        fail("solver.lr_decay_step", f"expected rising epochs after solver.lr_warmup_step, got {list(milestones)}")


def _check_data(config: Config, fail: Callable[[str, str], None]) -> None:
    data = config.data
    weighted = [source for source in data.train if isinstance(source, WeightedSource)]
    if weighted and len(weighted) < len(data.train):
        fail("data.train", "expected a {path, weight} for each source or for none, got both kinds")
    if any(not source.path for source in weighted):
        fail("data.train", "a source with a weight names no path")
    if data.streams > 1 and data.shuffle == "global":
        fail("data.streams", f"{data.streams} streams need data.shuffle shards:K; global has no shards to deal")
    low, high = data.crop_area
    if not 0 < low <= high <= 1:
        fail("data.crop_area", f"expected 0 < low <= high <= 1, got {[low, high]}")
    if data.dense and data.num_segments > DENSE_WINDOW:
        fail("data.num_segments", f"{data.num_segments} frames do not fit into data.dense's window of {DENSE_WINDOW}")
    if config.scale_size < data.input_size:
        fail("data.scale_size", f"{config.scale_size} is smaller than data.input_size {data.input_size}")
    for key, value in (("randaug.N", data.randaug.N), ("blur", data.blur), ("solarize", data.solarize)):
        if value and data.augmentation == "none":
            fail(f"data.{key}", f"{value} has nothing to act on with data.augmentation none; choose another preset")
    swapped = [label for pair in data.flip_swaps or () for label in pair]
    if len(set(swapped)) < len(swapped) or min(swapped, default=0) < 0:
        fail(
            "data.flip_swaps",
            f"expected pairs of labels, each label once, got {list(map(list, data.flip_swaps or ()))}",
        )


def schema() -> Iterator[tuple[str, tuple[str, Any]]]:
    """Every key in order, with its (one-line meaning, default)."""
    yield from _keys(Config(), "")


def _keys(section: Any, prefix: str) -> Iterator[tuple[str, tuple[str, Any]]]:
    for key in fields(section):
        value = getattr(section, key.name)
        if is_dataclass(value):
            yield from _keys(value, f"{prefix}{key.name}.")
        else:
            yield f"{prefix}{key.name}", (_meaning(type(section), key.name), value)


def _meaning(kind: type, name: str) -> str:
    return kind.__pydantic_fields__[name].description or ""  # type: ignore[attr-defined]
