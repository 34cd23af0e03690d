"""Refuses configurations whose keys contradict each other."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from text4vis.config.schema import DENSE_WINDOW, MULTI_LABEL_LOSSES, Config, ConfigError, decay_epochs
from text4vis.config.sources import WeightedSource
from text4vis.config.templates import TEMPLATE_SETS, prompts


def check(config: Config, origin: Mapping[str, str], where: str) -> Config:
    """Returns the configuration. Raises ConfigError where keys contradict each other."""

    def fail(key: str, reason: str) -> None:
        raise ConfigError(f"{key}: {reason} (from {origin.get(key, where)})")

    _check_data(config, fail)
    if config.solver.global_batch and config.solver.grad_accumulation_steps > 1:
        fail("solver.grad_accumulation_steps", "follows from solver.global_batch; give only one of them")
    if config.engine.offload == "optimizer" and config.engine.zero_stage == 0:
        fail("engine.offload", "optimizer needs engine.zero_stage 1, 2 or 3")
    if config.engine.offload == "parameters" and config.engine.zero_stage != 3:
        fail("engine.offload", f"parameters needs engine.zero_stage 3, got {config.engine.zero_stage}")
    if config.engine.precision == "amp" and (config.engine.zero_stage == 3 or config.engine.offload != "none"):
        fail("engine.precision", "amp needs engine.zero_stage 0, 1 or 2 and engine.offload none; or take bf16")
    _check_network(config, fail)
    _check_tuning(config, fail)
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


def _check_tuning(config: Config, fail: Callable[[str, str], None]) -> None:
    """What trains of the towers, and at which rate."""
    network, defaults = config.network, Config().network
    if network.fix_video:
        frozen = "network.fix_video freezes the visual tower"
        if network.freeze_blocks:
            fail("network.freeze_blocks", f"{network.freeze_blocks} blocks are frozen already: {frozen}")
        if config.solver.layer_decay < 1:
            fail("solver.layer_decay", f"has no blocks to act on: {frozen}")
        if network.adapter and network.fix_text:
            fail("network.adapter", f"{network.adapter} has no tower to train in: {frozen}; delete one of the two")
    if network.adapter and network.freeze_blocks:
        fail("network.freeze_blocks", "an adapter freezes all of CLIP's own weights (network.adapter); delete one")
    if network.adapter and not network.init and not config.pretrain:
        fail("network.adapter", f"{network.adapter} adapts trained weights, but network.init is false")
    for key in ("adapter_rank", "adapter_alpha", "adapter_targets"):
        if not network.adapter and getattr(network, key) != getattr(defaults, key):
            fail(f"network.{key}", "is of network.adapter: lora, which is not set")


def _check_solver(config: Config, fail: Callable[[str, str], None]) -> None:
    solver = config.solver
    if not all(0 <= beta < 1 for beta in solver.betas):
        fail("solver.betas", f"expected two numbers in [0, 1), got {list(solver.betas)}")
    for key, losses in (
        ("mixup", ("CE", *MULTI_LABEL_LOSSES)), ("cutmix", ("CE", *MULTI_LABEL_LOSSES)), ("smoothing", ("CE",))
    ):  # fmt: skip
        if getattr(solver, key) and solver.loss_type not in losses:
            why = "decides on each class by itself" if solver.multi_label else "has soft targets of its own"
            fail(f"solver.{key}", f"needs solver.loss_type {' or '.join(losses)}; {solver.loss_type} {why}")
    for key, default in (("asl_gammas", (0.0, 4.0)), ("asl_margin", 0.05)):
        if getattr(solver, key) != default and solver.loss_type != "ASL":
            fail(f"solver.{key}", f"is of solver.loss_type ASL, but that is {solver.loss_type}")
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
    if data.resize in {"squash", "longest"}:
        if data.scale_size is not None:
            fail("data.scale_size", f"nothing is cropped with data.resize {data.resize}; delete it, or set shortest")
        if data.test_crops > 1:
            fail("data.test_crops", f"{data.test_crops} crops of a frame need data.resize shortest, not {data.resize}")
    for key, value in (("randaug.N", data.randaug.N), ("blur", data.blur), ("solarize", data.solarize)):
        if value and data.augmentation == "none":
            fail(f"data.{key}", f"{value} has nothing to act on with data.augmentation none; choose another preset")
    swapped = [label for pair in data.flip_swaps or () for label in pair]
    if len(set(swapped)) < len(swapped) or min(swapped, default=0) < 0:
        fail(
            "data.flip_swaps",
            f"expected pairs of labels, each label once, got {list(map(list, data.flip_swaps or ()))}",
        )
