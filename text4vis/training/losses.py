"""From a micro batch to its loss: mixing, cross entropy, losses of many labels, contrastive losses over all ranks.

B videos of a rank's micro batch, T frames, N videos of all ranks together, C classes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from text4vis.cluster import distributed
from text4vis.config.schema import Config, ConfigError
from text4vis.data.datasets import multi_hot
from text4vis.data.mixing import Mix, draw_mix, mix_frames
from text4vis.model.video_clip import Classes

TARGET_SHARPNESS = 10.0
PRIOR_TEMPERATURE = 1000.0
LEAST_SHARE = 1e-4  # of positives that the first bias stands for
LEAST_PROBABILITY = 1e-8


class Objective:
    """The loss of `solver.loss_type`. classes: all of the run's, C of them, on the device of the frames.

    micro_batch: videos of a micro batch. Raises ConfigError where videos are to be mixed and it holds only one.

    With the losses of many labels the logits are exp(logit_scale) * cos + `bias`. All cosines of CLIP's video and text
    embeddings are positive and near each other, so without a bias every class begins as certain, and the first epochs
    would go into pushing all of them away. The bias is chosen once, from the run's first micro batches, such that the
    mean logit is that of `share`, the part of the (video, class) pairs that belong together: the rule of focal
    loss (Lin et al., ICCV 2017, section 4.1). It stays as it is, for a single number that AdamW moves by less than the
    learning rate a step would not go far; SigLIP (Zhai et al., ICCV 2023) trains one and begins with -10 for the same
    reason. The state of the run keeps it.
    """

    def __init__(
        self,
        config: Config,
        classes: Classes,
        micro_batch: int,
        *,
        share: float = 0.5,
        bias: float | None = None,
    ) -> None:
        self.config, self.classes = config, classes
        self.share, self.bias = share, bias
        for key in ("mixup", "cutmix"):
            if getattr(config.solver, key) and micro_batch == 1:
                raise ConfigError(
                    f"solver.{key}: mixes videos of a micro batch, but one holds a single video; raise "
                    "data.batch_size or solver.global_batch, or start fewer ranks"
                )

    def __call__(
        self,
        forward: Callable[[Tensor, Classes], Tensor],
        frames_BTCHW: Tensor,
        labels_B: Tensor,
        ids: Sequence[int],
        position: int,
    ) -> Tensor:
        """The loss of the micro batch of videos `ids`, with `forward` for VideoClip's. Collective.

        labels_B: of the batch, on the CPU, (B, C) bool where videos have several. position: samples that the job had
        consumed before the step. Only a run's first loss of many labels waits for the device.

        The contrastive losses take the texts of the batch's own videos, on all ranks. Each rank compares its videos
        with every class that any rank has, and the logits are gathered: the same numbers as from gathered embeddings,
        and a class that comes twice is embedded once.
        """
        solver = self.config.solver
        if solver.loss_type == "CE" or solver.multi_label:
            mix = draw_mix(solver, self.config.seed, position, ids, frames_BTCHW.shape[-1])
            if mix is not None:
                frames_BTCHW = mix_frames(frames_BTCHW, mix)
            logits_BC = forward(frames_BTCHW, self.classes)
            labels_B = labels_B.to(logits_BC.device, non_blocking=True)
            if solver.multi_label:
                return self._multi_label_loss(logits_BC, labels_B, mix)
            return cross_entropy(logits_BC, labels_B, solver.smoothing, mix)
        labels_N = distributed.rows_of_all(labels_B)
        found = labels_N.unique(return_inverse=True)  # on the CPU: their number decides shapes
        present_C, columns_N, labels_N = (
            each.to(frames_BTCHW.device, non_blocking=True) for each in (*found, labels_N)
        )
        logits_NC = gather_rows(forward(frames_BTCHW, self.classes[present_C]))
        return contrastive(logits_NC[:, columns_N], labels_N, dual=solver.loss_type == "DS")

    def _multi_label_loss(self, logits_BC: Tensor, labels: Tensor, mix: Mix | None) -> Tensor:
        if self.bias is None:
            total, ranks = distributed.sum_over_ranks([float(logits_BC.detach().mean()), 1.0])
            share = min(max(self.share, LEAST_SHARE), 1 - LEAST_SHARE)
            if math.isfinite(total):  # else the step is skipped or ends the run, as the loss is not finite either
                self.bias = math.log(share / (1 - share)) - total / ranks
        targets_BC = mixed_targets(multi_hot(labels, logits_BC.shape[1]).to(logits_BC.dtype), mix)
        logits_BC = logits_BC + (self.bias or 0.0)
        if self.config.solver.loss_type == "BCE":
            return binary_cross_entropy(logits_BC, targets_BC)
        return asymmetric_loss(logits_BC, targets_BC, self.config.solver.asl_gammas, self.config.solver.asl_margin)


def mixed_targets(targets_BC: Tensor, mix: Mix | None) -> Tensor:
    """Targets (B, C) of mixed videos: each video's own and its partner's, in their shares."""
    if mix is None:
        return targets_BC
    partners_B, shares_B = _on_device(mix, targets_BC)
    return torch.lerp(targets_BC[partners_B], targets_BC, shares_B[:, None])


def _on_device(mix: Mix, like: Tensor) -> tuple[Tensor, Tensor]:
    """Partners (B,) int64 and shares (B,) on the device and, these, of the type of a tensor. Waits for no queue."""
    partners_B, shares_B = torch.tensor(mix.partners), torch.tensor(mix.shares, dtype=like.dtype)
    return partners_B.to(like.device, non_blocking=True), shares_B.to(like.device, non_blocking=True)


def binary_cross_entropy(logits_BC: Tensor, targets_BC: Tensor) -> Tensor:
    """Binary cross entropy, summed over the classes as cross entropy is, and averaged over the videos.

    targets_BC: from 0 to 1.
    """
    return F.binary_cross_entropy_with_logits(logits_BC, targets_BC, reduction="none").sum(dim=1).mean()


def asymmetric_loss(
    logits_BC: Tensor, targets_BC: Tensor, gammas: tuple[float, float] = (0.0, 4.0), margin: float = 0.05
) -> Tensor:
    """Asymmetric loss (Ridnik et al., ICCV 2021, arXiv:2009.14119, equations 2 to 7), summed and averaged as above.

    With p = sigmoid(logit), p_m = max(p - margin, 0) and gammas (g+, g-) a class costs
    -y (1 - p)^g+ log(p) - (1 - y) p_m^g- log(1 - p_m). Gammas (0, 0) and margin 0 are binary cross entropy.
    targets_BC: y, from 0 to 1.
    """
    positive_gamma, negative_gamma = gammas
    p_BC = torch.sigmoid(logits_BC)
    shifted_BC = (p_BC - margin).clamp(min=LEAST_PROBABILITY)  # a power below 1 has no gradient at 0
    log_not_BC = torch.log1p(-shifted_BC) if margin else F.logsigmoid(-logits_BC)
    missed_BC = torch.sigmoid(-logits_BC).clamp(min=LEAST_PROBABILITY)
    positive_BC = targets_BC * missed_BC**positive_gamma * F.logsigmoid(logits_BC)
    negative_BC = (1 - targets_BC) * shifted_BC**negative_gamma * log_not_BC
    return -(positive_BC + negative_BC).sum(dim=1).mean()


def cross_entropy(logits_BC: Tensor, labels_B: Tensor, smoothing: float = 0.0, mix: Mix | None = None) -> Tensor:
    """Mean cross entropy. With a mix, each video's is that of its own label and its partner's, in their shares.

    smoothing: the part of the target that is spread evenly over all classes.
    """

    def losses_B(labels_B: Tensor) -> Tensor:
        return F.cross_entropy(logits_BC, labels_B, reduction="none", label_smoothing=smoothing)

    if mix is None:
        return losses_B(labels_B).mean()
    partners_B, shares_B = _on_device(mix, logits_BC)
    return torch.lerp(losses_B(labels_B[partners_B]), losses_B(labels_B), shares_B).mean()


def contrastive(logits_NN: Tensor, labels_N: Tensor, *, dual: bool) -> Tensor:
    """Contrastive loss of N videos (rows) and the N texts of their classes (columns); logits carry the logit scale.

    The mean of two directions, rows against columns and columns against rows. Each is the Kullback-Leibler divergence
    of softmax(logits) from soft targets, summed over a row and averaged over rows. A row's targets are the softmax of
    10 where the labels are equal and 0 elsewhere, so all texts that read the same share the row, and the others keep
    exp(-10) of a share each.

    dual: logits are first multiplied by N * softmax(logits / 1000) over the other axis (dual softmax, CAMoE,
    arXiv:2109.04290). Source: `NCELoss` (dual false) and `DualLoss` (dual true) of the Text4Vis release, used by its
    `train_nce.py` for `solver.loss_type` NCE and DS; the divergence and targets are ActionCLIP's `KLLoss`.
    """
    same_NN = (labels_N[:, None] == labels_N).to(logits_NN.dtype)
    targets_NN = torch.softmax(TARGET_SHARPNESS * same_NN, dim=1)

    def divergence(logits_NN: Tensor) -> Tensor:
        if dual:
            logits_NN = logits_NN * torch.softmax(logits_NN / PRIOR_TEMPERATURE, dim=0) * len(logits_NN)
        return F.kl_div(torch.log_softmax(logits_NN, dim=1), targets_NN, reduction="batchmean")

    return (divergence(logits_NN) + divergence(logits_NN.T)) / 2


def gather_rows(rows_BX: Tensor) -> Tensor:
    """The rows (N, X) of all ranks, in rank order and with gradient. Every rank calls it, with as many rows.

    The gradient is right for parameters' gradients that are averaged over ranks, as the engine does, when every rank
    computes the same loss from the gathered rows: the average is then the gradient of that one loss. The original
    keeps the gradient of the local rows only, which leaves 1/world size of it.
    """
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return rows_BX
    return _GatherRows.apply(rows_BX)


class _GatherRows(torch.autograd.Function):
    """Backward, each rank's loss holds the rank's rows with the same gradient: their sum is world size times one."""

    @staticmethod
    def forward(context: Any, rows_BX: Tensor) -> Tensor:
        gathered = [torch.empty_like(rows_BX) for _ in range(dist.get_world_size())]
        dist.all_gather(gathered, rows_BX.contiguous())
        return torch.cat(gathered)

    @staticmethod
    def backward(context: Any, gradient_NX: Tensor) -> Tensor:
        return gradient_NX.chunk(dist.get_world_size())[dist.get_rank()] * dist.get_world_size()
