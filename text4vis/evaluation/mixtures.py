"""The accuracies of a model on the line between its first weights and its trained ones, on one data set or two.

Each batch is decoded once and embedded with the weights at every alpha. A alphas, N videos, V views, C classes, D
embedding width.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from matplotlib.figure import Figure
from torch import Tensor, nn

from text4vis.classifier.embeddings import build_classifier
from text4vis.cluster import distributed
from text4vis.config.schema import Config
from text4vis.data.datasets import class_names
from text4vis.data.loader import build_loader
from text4vis.evaluation.embedding import Embeddings, embed_videos, measured
from text4vis.evaluation.protocols import deciding_figure, is_multi_label, main_figures
from text4vis.model.video_clip import WEIGHTS_DTYPE, VideoClip
from text4vis.saved.interpolation import Interpolation


class _AtEveryAlpha(nn.Module):
    """Stands for a video model whose embeddings are those at every alpha side by side, (B, A * D)."""

    def __init__(self, line: Interpolation, alphas: Sequence[float]) -> None:
        super().__init__()
        self.model, self.line, self.alphas = line.model, line, alphas

    def encode_video(self, frames_BTCHW: Tensor) -> Tensor:
        """Videos (B, A * D) float32."""
        embeddings = []
        for alpha in self.alphas:
            self.line.move(alpha)
            embeddings.append(self.model.encode_video(frames_BTCHW))
        return torch.cat(embeddings, dim=1)


def accuracies(line: Interpolation, alphas: Sequence[float], config: Config) -> dict[str, Any]:
    """The figures at each alpha on `data.val` of a configuration, in one pass over its videos; JSON values.

    Its classes are those of the training where the names are the same, else what `network.classifier` makes of their
    names. Raises ConfigError, ShardError.
    """
    trained = line.trained
    line.model.check_frames(config.data)
    distributed.use_cores(config.engine.num_threads)
    distributed.use_tf32(config.engine.tf32)
    with build_loader(config, "val") as loader:
        names = class_names(config, loader.dataset)
        line.to(torch.device("cpu"), torch.float32)
        classes = []
        for alpha in alphas:
            own_CD = line.at(alpha).class_embeddings_CD
            classes.append(own_CD if names == trained.class_names else build_classifier(config, line.model, names))
        line.to(distributed.device(), WEIGHTS_DTYPE[config.engine.precision])
        line.model.autocast = config.engine.precision == "amp"
        embedded = embed_videos(cast(VideoClip, _AtEveryAlpha(line, alphas)), loader)
        assert embedded is not None, "one rank"
        parts = torch.from_numpy(embedded.embeddings_NVD).chunk(len(alphas), dim=-1)
        rows = []
        for alpha, part, classes_CD in zip(alphas, parts, classes, strict=True):
            one = Embeddings(part.numpy(), embedded.labels_N, embedded.ids_N)
            rows.append({"alpha": alpha, **_row(measured(one, classes_CD, names, loader))})
        return {"data": config.data.dataset, "classes": len(names), "rows": rows}


def _row(report: Mapping[str, Any]) -> dict[str, Any]:
    halves = report.get("half_classes")
    figure = {"figure": deciding_figure(report), "is": "mAP" if is_multi_label(report) else "top-1"}
    return {**figure, **main_figures(report)} | ({"half_classes_top1": halves["top1_mean"]} if halves else {})


def draw(sets: Sequence[Mapping[str, Any]], path: Path) -> None:
    """The curves as a picture: each data set's figure over alpha, in per cent."""
    figure = Figure(figsize=(6, 4), dpi=120, layout="constrained")
    axes = figure.subplots()
    for number, each in enumerate(sets, start=1):
        rows = each["rows"]
        name = f"{each['data'] or f'data set {number}'}, {rows[0]['is']}"
        axes.plot([row["alpha"] for row in rows], [row["figure"] for row in rows], marker="o", label=name)
        if len(sets) == 1 and "half_classes_top1" in rows[0]:
            halves = [row["half_classes_top1"] for row in rows]
            axes.plot([row["alpha"] for row in rows], halves, marker="o", label="top-1 among halves of the classes")
    axes.set_xlabel("share of the trained weights (0: pre-trained, 1: trained)")
    axes.set_ylabel("%")
    axes.legend()
    figure.savefig(path)
