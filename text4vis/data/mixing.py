"""Mixup and cutmix: videos of a micro batch are blended in pairs, and so are their labels.

The draws of a video are keyed by (seed, position of the step in the training stream, video): its share and its box do
not depend on rank, world size or restarts. Its partner is drawn from the same numbers among the other videos of the
rank's micro batch. All frames of a video are mixed alike. Imports config and augmentation.

B videos, T frames, S side of a frame in pixels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from text4vis.config.schema import SolverConfig
from text4vis.data.augmentation import generator

STREAM = 1  # of the counter-based generator; augmentation draws from stream 0


@dataclass(frozen=True)
class Mix:
    """For each of B videos: its partner's row, its own share of the label, and what becomes of its pixels.

    boxes: (top, bottom, left, right) in pixels, outside of which a video keeps its pixels; inside, its own weigh
    `weights` and its partner's the rest.
    """

    partners: list[int]
    shares: list[float]
    boxes: list[tuple[int, int, int, int]]
    weights: list[float]


def draw_mix(solver: SolverConfig, seed: int, position: int, ids: Sequence[int], side: int) -> Mix | None:
    """The mix of a micro batch of two or more videos `ids`, for frames of `side` pixels; None when both are off.

    Mixup (Zhang et al., ICLR 2018) takes its share from Beta(solver.mixup, solver.mixup). Cutmix (Yun et al., ICCV
    2019) takes it from Beta(solver.cutmix, solver.cutmix) and a box of that area around a uniform centre; where the
    frame's edge cuts the box, the share follows. With both on, each video gets one of them by a fair coin.
    position: samples that the job had consumed before the step.
    """
    if not solver.mixup and not solver.cutmix:
        return None
    mix = Mix([], [], [], [])
    for row, sample in enumerate(ids):
        rng = generator(seed, position, sample, STREAM)
        coin, partner, y, x = rng.random(4)
        cut = solver.cutmix > 0 and (not solver.mixup or coin < 0.5)
        alpha = solver.cutmix if cut else solver.mixup
        share = weight = float(rng.beta(alpha, alpha))
        box = (0, side, 0, side)
        if cut:
            half = side * np.sqrt(1 - share) / 2
            top, bottom, left, right = np.clip(
                np.rint([y * side - half, y * side + half, x * side - half, x * side + half]), 0, side
            ).astype(int)
            box = (int(top), int(bottom), int(left), int(right))
            share, weight = 1 - float((bottom - top) * (right - left)) / side**2, 0.0
        mix.partners.append((row + 1 + int(partner * (len(ids) - 1))) % len(ids))
        mix.shares.append(share)
        mix.boxes.append(box)
        mix.weights.append(weight)
    return mix


def mix_frames(frames_BTCHW: Tensor, mix: Mix) -> Tensor:
    """The mixed frames, uint8 again: blended pixels are rounded to the nearest. The input is left as it is."""
    mixed_BTCHW = frames_BTCHW.clone()
    for row, partner in enumerate(mix.partners):
        top, bottom, left, right = mix.boxes[row]
        box = (..., slice(top, bottom), slice(left, right))
        own, other = frames_BTCHW[row][box].float(), frames_BTCHW[partner][box].float()
        mixed_BTCHW[row][box] = torch.lerp(other, own, mix.weights[row]).round().to(torch.uint8)
    return mixed_BTCHW
