"""The learning-rate schedule and the optimiser's parameter groups. Imports config only."""

from __future__ import annotations

import math
from typing import Any

from torch import nn

from text4vis.config import SolverConfig


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


def parameter_groups(model: nn.Module, solver: SolverConfig) -> list[dict[str, Any]]:
    """AdamW's groups: `clip` (visual tower, logit scale) at lr * clip_ratio, `head` (the rest) at lr.

    Frozen parameters and empty groups are left out. Each group holds `params`, `name`, `lr`, `weight_decay` and
    `base_lr`, the peak from which a schedule computes `lr`.
    """
    parameters: dict[str, list[nn.Parameter]] = {"clip": [], "head": []}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            is_clip = name.startswith("visual.") or name == "logit_scale"
            parameters["clip" if is_clip else "head"].append(parameter)
    base_lrs = {"clip": solver.lr * solver.clip_ratio, "head": solver.lr}
    return [
        {"params": params, "name": name, "lr": base_lrs[name], "weight_decay": solver.weight_decay}
        | {"base_lr": base_lrs[name]}
        for name, params in parameters.items()
        if params
    ]
