"""The learning-rate schedules, the optimisers and their parameter groups."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from text4vis.config.schema import SolverConfig, decay_epochs
from text4vis.model.blocks import depths

CLIP_PARAMETERS = ("visual.", "text_tower.", "logit_scale")
EPSILON = 1e-8


def learning_rate(epoch: float, base_lr: float, epochs: float, warmup_epochs: float) -> float:
    """Rate at a fractional epoch: linear from 0 to `base_lr` over the warm-up, then a half cosine to 0 at `epochs`.

        lr = base_lr * epoch / warmup_epochs                                                       epoch < warmup_epochs
        lr = base_lr * (1 + cos(pi * (epoch - warmup_epochs) / (epochs - warmup_epochs))) / 2      otherwise

    The cosine spans the epochs left after the warm-up, and stays at 0 after `epochs`. Source: the Text4Vis release's
    `WarmupCosineAnnealingLR`. A run that is no longer than its warm-up never leaves it.
    """
    if epoch < warmup_epochs:
        return base_lr * epoch / warmup_epochs
    if epoch >= epochs:
        return 0.0
    return base_lr * (1 + math.cos(math.pi * (epoch - warmup_epochs) / (epochs - warmup_epochs))) / 2


def multistep_rate(epoch: float, base_lr: float, milestones: Sequence[float], warmup_epochs: float) -> float:
    """Rate at a fractional epoch: linear from 0 to `base_lr` over the warm-up, a tenth of it from each milestone on.

    `milestones` rise and lie after the warm-up. Source: the Text4Vis release's `WarmupMultiStepLR`.
    """
    if epoch < warmup_epochs:
        return base_lr * epoch / warmup_epochs
    return base_lr * 0.1 ** bisect_right(milestones, epoch)


def scheduled_rate(epoch: float, base_lr: float, solver: SolverConfig) -> float:
    """The rate of `solver.type` at a fractional epoch."""
    if solver.type == "multistep":
        return multistep_rate(epoch, base_lr, decay_epochs(solver), solver.lr_warmup_step)
    return learning_rate(epoch, base_lr, solver.epochs, solver.lr_warmup_step)


def build_optimizer(model: nn.Module, solver: SolverConfig) -> torch.optim.Optimizer:
    """The optimiser of `solver.optim` over `parameter_groups`. SGD has momentum; Adam and SGD decay weights by L2.

    Fused: one pass over the memory instead of ten, and one operation on a GPU.
    """
    groups = parameter_groups(model, solver)
    if solver.optim == "sgd":
        return torch.optim.SGD(groups, momentum=solver.momentum, fused=True)
    kind = torch.optim.AdamW if solver.optim == "adamw" else torch.optim.Adam
    return kind(groups, betas=solver.betas, eps=EPSILON, fused=True)


def parameter_groups(model: nn.Module, solver: SolverConfig) -> list[dict[str, Any]]:
    """Groups `clip` (CLIP's towers, logit scale) at lr * clip_ratio and `head` (the rest) at lr.

    The tower's convolutions over time (`control_point`, of `network.tm: tokent1d`) and adapters, which begin as the
    head does, learn with the head. With `solver.layer_decay` below 1 the visual tower has a group for each depth,
    `clip.0` or `head.0` for its stem and so on, whose rate is lower by that factor for each block that follows.

    Frozen parameters and empty groups are left out. Each group holds `params`, `name`, `lr`, `weight_decay` and
    `base_lr`, the peak from which a schedule computes `lr`.
    """
    peaks = {"clip": solver.lr * solver.clip_ratio, "head": solver.lr}
    depth, blocks = _depths(model) if solver.layer_decay < 1 else ({}, 0)
    groups: dict[str, dict[str, Any]] = {}
    for kind, peak in peaks.items():
        for level in (*range(blocks + 2), None) if depth else (None,):
            rate = peak * (1.0 if level is None else solver.layer_decay ** (blocks + 1 - level))
            name = kind if level is None else f"{kind}.{level}"
            groups[name] = {"params": [], "name": name, "lr": rate, "weight_decay": solver.weight_decay}
            groups[name]["base_lr"] = rate
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            is_clip = name.startswith(CLIP_PARAMETERS) and "control_point" not in name and ".lora_" not in name
            kind = "clip" if is_clip else "head"
            groups[f"{kind}.{depth[name]}" if name in depth else kind]["params"].append(parameter)
    return [group for group in groups.values() if group["params"]]


def _depths(model: nn.Module) -> tuple[dict[str, int], int]:
    found, blocks = depths(model.get_submodule("visual"))
    return {f"visual.{name}": level for name, level in found.items()}, blocks
