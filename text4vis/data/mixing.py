"""Mixup and cutmix: blends the videos of a micro batch, and their labels, in pairs.

The draws of a video are keyed by (seed, position of the step in the training stream, video), so its share and its box
do not depend on rank, world size or restarts. Its partner is one of the other videos of the rank's micro batch. All
frames of a video are mixed alike.

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
    """How each of B videos is mixed; lists of B entries.

    partners: the row of the other video. shares: the video's own share of the label, 0 to 1. boxes: (top, bottom, left,
    right) in pixels. Outside its box a video keeps its pixels; inside, `weights` is the weight of its own pixels, and
    the rest that of its partner's.
    """

    partners: list[int]
    shares: list[float]
    boxes: list[tuple[int, int, int, int]]
    weights: list[float]


def draw_mix(solver: SolverConfig, seed: int, position: int, ids: Sequence[int], side: int) -> Mix | None:
    """Draws the mix of a micro batch of two or more videos; None if neither mixup nor cutmix is on.

    Mixup (Zhang et al., ICLR 2018) takes its share from Beta(solver.mixup, solver.mixup). Cutmix (Yun et al., ICCV
    2019) takes it from Beta(solver.cutmix, solver.cutmix) and a box of that area around a uniform centre; where the
    frame's edge cuts the box, the share follows. With both on, a fair coin chooses one for each video.
    position: samples that the job had consumed before the step. ids: the videos' positions in the data set. side: of a
    frame, pixels.
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
    """The mixed frames, (B, T, 3, S, S) uint8 like the input, which is not changed. Blended values are rounded."""
    mixed_BTCHW = frames_BTCHW.clone()
    for row, partner in enumerate(mix.partners):
        top, bottom, left, right = mix.boxes[row]
        box = (..., slice(top, bottom), slice(left, right))
        own, other = frames_BTCHW[row][box].float(), frames_BTCHW[partner][box].float()
        mixed_BTCHW[row][box] = torch.lerp(other, own, mix.weights[row]).round().to(torch.uint8)
    return mixed_BTCHW
