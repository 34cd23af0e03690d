"""The typed configuration of a run: every key with its type, default, role and meaning.

A configuration is a tree of frozen dataclasses, one for each section of a recipe. `loading` reads one from YAML,
`contradictions` refuses values that exclude each other, `page` shows it.
"""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

import yaml
from pydantic import BeforeValidator, Field, StrictInt, StrictStr, TypeAdapter

from shards.text import redact
from text4vis.config.network import NetworkConfig
from text4vis.config.roles import Role, key, section
from text4vis.config.sources import TrainSources
from text4vis.config.values import (
    Bool,
    Count,
    Float,
    Natural,
    NonNegative,
    OptionalStr,
    Positive,
    Probability,
    Rate,
    Share,
    Sources,
    Str,
    number,
    pair,
    pairs,
    whole_number,
)

DENSE_WINDOW = 128  # frames of the window that data.dense samples from


class ConfigError(Exception):
    """A configuration that cannot be used. The message names the key, the value, its origin and the fix."""


MULTI_LABEL_LOSSES = ("BCE", "ASL")


@section
class RandAugConfig:
    """RandAugment (Cubuk et al., 2020) over the frames of a video."""

    N: Natural | None = key(
        None, Role.AUGMENTATION, "RandAugment operations per video; default: 2 with data.augmentation paper, else 0"
    )
    M: Annotated[float, Field(ge=0, le=30), BeforeValidator(number)] = key(
        9, Role.AUGMENTATION, "strength of RandAugment's operations, 0 to 30"
    )


@section
class DataConfig:
    """Which videos, and how they are read, sampled and augmented."""

    dataset: Str = key("", Role.DATA, "name of the data set, for titles and reports")
    train: TrainSources = key(
        (),
        Role.PLACE,
        "training shards: a folder, an address, or a list of them; a list of {path, weight}: each has this share of "
        "the samples",
        classifiers=("lda",),
        path="path",
    )
    val: Sources = key((), Role.PLACE, "evaluation shards, like data.train", path="path")
    label_list: OptionalStr = key(
        None, Role.DATA, "CSV `id,name`; default: the class names stored in the shards", path="path"
    )
    num_segments: Count = key(8, Role.FRAMES, "frames sampled from a video, T")
    dense: Bool = key(False, Role.FRAMES, "sample inside a window of 128 frames instead of over the whole video")
    batch_size: Count = key(32, Role.BATCH, "videos per rank and micro batch")
    val_batch_size: Count | None = key(
        None, Role.EXECUTION, "views of videos per rank and forward pass in evaluation; default: a micro batch"
    )
    input_size: Count = key(224, Role.FRAMES, "side of the square that the model sees, pixels")
    scale_size: Count | None = key(
        None, Role.FRAMES, "short side before cropping, pixels; default: 256 at input_size 224, else input_size"
    )
    resize: Literal["shortest", "squash", "longest"] | None = key(
        None,
        Role.FRAMES,
        "frames before cropping, where none are drawn; shortest: short side to scale_size; squash: to the square, "
        "whatever their shape; longest: long side to the square's, black around; default: the model's own",
    )
    interpolation: Literal["bicubic", "bilinear"] | None = key(
        None, Role.FRAMES, "of data.resize, with antialias; default: the model's own"
    )
    shot: Natural | None = key(
        None,
        Role.DATA,
        "few-shot: train on this many videos of each class; 0 or none: on all",
        classifiers=("lda",),
        on_card=True,
    )
    shot_seed: Natural | None = key(
        None, Role.DATA, "which videos data.shot chooses; default: seed", classifiers=("lda",)
    )
    augmentation: Literal["released", "paper", "something", "none"] = key(
        "released",
        Role.AUGMENTATION,
        "released: random resized crop, flip, grey; paper: RandAugment before them; something: multi-scale "
        "crop, grey, flip that swaps labels; none: the evaluation's centre crop",
        on_card=True,
    )
    randaug: RandAugConfig = Field(default_factory=RandAugConfig)
    crop_area: Annotated[tuple[Float, Float], BeforeValidator(pair)] = key(
        (0.08, 1.0), Role.AUGMENTATION, "range of the random crop's share of the frame's area"
    )
    flip: Probability = key(0.5, Role.AUGMENTATION, "probability of a horizontal flip; 0 where left and right matter")
    flip_swaps: Annotated[tuple[tuple[StrictInt, StrictInt], ...] | None, BeforeValidator(pairs)] = key(
        None,
        Role.AUGMENTATION,
        "pairs of labels that a flip turns into each other; default: Something-Something's with "
        "data.augmentation something, else none",
    )
    grey: Probability = key(0.2, Role.AUGMENTATION, "probability that a video turns grey")
    blur: Probability = key(0.0, Role.AUGMENTATION, "probability of a Gaussian blur, of 0.1 to 2 pixels of the view")
    solarize: Probability = key(0.0, Role.AUGMENTATION, "probability that values from 128 up are inverted")
    test_clips: Count = key(1, Role.VIEWS, "temporal clips per video in evaluation")
    test_crops: Annotated[Literal[1, 3, 5, 10], BeforeValidator(whole_number)] = key(
        1, Role.VIEWS, "spatial crops per clip in evaluation"
    )
    class_splits: Sources = key(
        (),
        Role.REPORTING,
        "class lists (CSV `id,name`) that evaluate.py reports one by one, with mean and deviation; "
        "Kinetics-600's three, say",
        path="path",
    )
    shuffle: Annotated[StrictStr, Field(pattern=r"^(global|shards:[1-9][0-9]{0,8})$")] = key(
        "global", Role.DATA, "global: any order; shards:K: a window of K shards at a time, for remote stores and disks"
    )
    streams: Annotated[StrictInt, Field(ge=1, le=1 << 16)] = key(
        1,
        Role.DATA,
        "with data.shuffle shards:K: deal the shards to this many streams, so that each host fetches only its own; a "
        "multiple of the number of hosts",
    )
    decode: Literal["auto", "cpu", "gpu"] = key(
        "auto", Role.EXECUTION, "where frames are decoded; auto: gpu if there is one, with RandAugment cpu"
    )
    workers: Natural = key(0, Role.EXECUTION, "decoding threads per rank; 0: the cores that the rank owns")
    requests_in_flight: Count = key(
        512,
        Role.EXECUTION,
        "requests per rank to remote shards at the same time, at most; several batches share them; never more than a "
        "quarter of the files that a process may open (ulimit -n)",
    )
    bytes_in_flight: Count = key(
        256 << 20,
        Role.EXECUTION,
        "bytes per rank of remote shards that are being fetched or wait to be decoded, at most",
    )
    prefetch: Count = key(3, Role.EXECUTION, "batches prepared ahead of the step")
    verify: Bool = key(True, Role.EXECUTION, "check each frame's CRC-32 as it is read")
    on_error: Literal["fail", "skip"] = key(
        "fail",
        Role.EXECUTION,
        "a video that cannot be used; fail: name it and stop, skip: list it, and train on another in its "
        "place or evaluate without it",
    )
    max_bad_share: Rate = key(
        0.01, Role.EXECUTION, "data.on_error skip: largest share of the videos that a job may skip before it fails"
    )
    cache_dir: OptionalStr = key(
        None,
        Role.EXECUTION,
        "node-wide folder for remote indexes, shards and class embeddings; default: ~/.cache/text4vis",
        path="path",
    )
    cache_bytes: Natural = key(
        0, Role.EXECUTION, "keep whole remote shards in cache_dir up to this many bytes; 0: range requests only"
    )
    synthetic: Bool = key(False, Role.FRAMES, "synthetic frames instead of decoded ones: shows the loader's cost")


@section
class SolverConfig:
    """The optimiser, its schedule and the loss."""

    type: Literal["cosine", "multistep"] = key(
        "cosine",
        Role.TRAINING,
        "schedule after the warm-up: half a cosine to 0, or a tenth at each lr_decay_step",
        on_card=True,
    )
    epochs: Count = key(30, Role.TRAINING, "passes over the training videos", on_card=True)
    optim: Literal["adamw", "adam", "sgd"] = key("adamw", Role.TRAINING, "optimiser", on_card=True)
    lr: Positive = key(5e-5, Role.TRAINING, "peak learning rate of the head", on_card=True)
    clip_ratio: NonNegative = key(
        0.1, Role.TRAINING, "learning rate of the visual tower and logit scale, as a share of lr", on_card=True
    )
    layer_decay: Share = key(
        1.0,
        Role.TRAINING,
        "layer-wise decay: each block of the visual tower learns at this share of the rate of the block after it",
        on_card=True,
    )
    lr_warmup_step: NonNegative = key(5, Role.TRAINING, "epochs of linear warm-up from 0", on_card=True)
    weight_decay: NonNegative = key(
        0.2,
        Role.TRAINING,
        "weight decay of the optimiser: decoupled in AdamW, a part of the gradient in Adam and SGD",
        on_card=True,
    )
    betas: Annotated[tuple[Float, Float], BeforeValidator(pair)] = key(
        (0.9, 0.999), Role.TRAINING, "AdamW's and Adam's"
    )
    momentum: Rate = key(0.9, Role.TRAINING, "SGD's")
    lr_decay_step: Annotated[Count | tuple[Count, ...], BeforeValidator(pair)] = key(
        (), Role.TRAINING, "multistep: epochs at which the rate falls to a tenth, or their period"
    )
    global_batch: Count | None = key(
        None, Role.BATCH, "videos per optimiser step over all ranks; default: data.batch_size x ranks x accumulation"
    )
    grad_accumulation_steps: Count = key(
        1, Role.BATCH, "micro batches per optimiser step; follows from solver.global_batch where that is given"
    )
    clip_gradient: NonNegative = key(0.0, Role.TRAINING, "largest gradient norm; 0: no clipping")
    ema: Rate = key(
        0.0,
        Role.TRAINING,
        "decay of a moving average of the weights, which is what is evaluated and exported; 0: the weights themselves",
        on_card=True,
    )
    on_nonfinite: Literal["stop", "skip"] = key(
        "stop",
        Role.EXECUTION,
        "a loss or gradient that is not finite: stop and name the videos, or skip the step and count it",
    )
    loss_type: Literal["CE", "NCE", "DS", "BCE", "ASL"] = key(
        "CE",
        Role.TRAINING,
        "CE: cross entropy over all classes; NCE: videos against the batch's texts; DS: dual softmax; for videos with "
        "several labels BCE: binary cross entropy of each class, or ASL: asymmetric loss",
        on_card=True,
    )
    asl_gammas: Annotated[tuple[NonNegative, NonNegative], BeforeValidator(pair)] = key(
        (0.0, 4.0), Role.TRAINING, "ASL: how much easy positives and easy negatives are played down"
    )
    asl_margin: Rate = key(0.05, Role.TRAINING, "ASL: negatives below this probability cost nothing")
    smoothing: Rate = key(0.0, Role.TRAINING, "label smoothing of the cross entropy", on_card=True)
    mixup: NonNegative = key(
        0.0, Role.TRAINING, "blend pairs of videos, shares from Beta(mixup, mixup); 0: off", on_card=True
    )
    cutmix: NonNegative = key(
        0.0, Role.TRAINING, "paste boxes between pairs of videos, areas from Beta; 0: off", on_card=True
    )

    @property
    def multi_label(self) -> bool:
        """Whether the loss decides on each class by itself, so that a video may have several."""
        return self.loss_type in MULTI_LABEL_LOSSES


@section
class EngineConfig:
    """How DeepSpeed and the ranks carry out the steps."""

    precision: Literal["bf16", "fp16", "amp", "fp32"] = key(
        "bf16",
        Role.TRAINING,
        "arithmetic of the step; amp: fp32 weights under fp16 autocast, as the original; master weights stay fp32, "
        "fp16 and amp scale the loss",
        on_card=True,
    )
    tf32: Bool = key(False, Role.TRAINING, "GPUs may compute fp32 products in TF32: faster, three decimal digits")
    zero_stage: Annotated[Literal[0, 1, 2, 3], BeforeValidator(whole_number)] = key(
        1, Role.EXECUTION, "DeepSpeed ZeRO stage"
    )
    offload: Literal["none", "optimizer", "parameters"] = key(
        "none", Role.EXECUTION, "kept in the host's memory: AdamW's state (ZeRO 1 to 3), or parameters too (ZeRO 3)"
    )
    communication_data_type: Literal["bf16", "fp16", "fp32"] | None = key(
        None, Role.EXECUTION, "type in which gradients are summed over ranks; default: that of the weights"
    )
    activation_checkpointing: Bool = key(
        False,
        Role.EXECUTION,
        "compute the visual tower's activations again in the backward pass: less memory, more time",
    )
    compile: Bool = key(False, Role.EXECUTION, "torch.compile the model")
    num_threads: Natural = key(0, Role.EXECUTION, "CPU threads of the model per rank; 0: the cores that the rank owns")
    world_size: Count | None = key(None, Role.EXECUTION, "expected number of ranks, an error otherwise; default: any")
    wall_minutes: Positive | None = key(
        None, Role.EXECUTION, "save and exit with code 75 (resume me) after this many minutes; default: no limit"
    )
    silence_seconds: Annotated[float, Field(ge=5), BeforeValidator(number)] = key(
        60, Role.EXECUTION, "a rank that is silent for this long ends the job on all ranks"
    )


@section
class LoggingConfig:
    """What a run logs, evaluates and keeps."""

    print_freq: Count = key(10, Role.REPORTING, "optimiser steps between log lines")
    eval_freq: Count = key(1, Role.REPORTING, "epochs between evaluations")
    save_steps: Count | None = key(
        None, Role.REPORTING, "optimiser steps between checkpoints; default: each evaluation"
    )
    save_minutes: Positive | None = key(None, Role.REPORTING, "minutes between checkpoints; default: each evaluation")
    keep_checkpoints: Count = key(
        2, Role.REPORTING, "last checkpoints kept; the best evaluation's weights are kept too"
    )
    pictures: Annotated[StrictInt, Field(ge=0, le=32)] = key(
        4,
        Role.REPORTING,
        "TensorBoard: clips in each picture of training videos, best and worst predictions; 0: nothing but scalars",
    )


@section
class Config:
    """The configuration of a run: frozen, compared by value; made by `load_config`."""

    seed: Natural = key(
        1024,
        Role.DATA,
        "decides order, sampling, augmentation and initial weights",
        classifiers=(
            "random",
            "orthogonal",
            "lda",
            "sentence",
        ),
        on_card=True,
    )
    pretrain: OptionalStr = key(
        None,
        Role.TRAINING,
        "start from the weights of a run, checkpoint, export or .pt file, whatever its classes",
        on_card=True,
        path="path",
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
        """Plain lists, numbers and strings, ready for YAML or JSON.

        Addresses lose the user, password and query that they may hold, since others may read what a run keeps.
        """
        return _without_secrets(TypeAdapter(Config).dump_python(self, mode="json"))

    def to_yaml(self) -> str:
        """The configuration as YAML, every key with its value; secrets in addresses are left out."""
        return yaml.safe_dump(self.to_dict(), sort_keys=False, allow_unicode=True)


def _without_secrets(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_secrets(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_without_secrets(inner) for inner in value]
    # `#` alone is no secret, and may be part of a key in a store.
    return redact(value) if isinstance(value, str) and "://" in value and re.search("[@?]", value) else value


def decay_epochs(solver: SolverConfig) -> tuple[int, ...]:
    """The epochs of `solver.lr_decay_step`, within the run if it is a period."""
    step = solver.lr_decay_step
    return step if isinstance(step, tuple) else tuple(range(step, solver.epochs, step))
