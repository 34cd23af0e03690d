"""Evaluation in one pass: every video is embedded once, everything reported follows from the embeddings.

Ranks take unequal shares of the videos and send their embeddings to rank 0, which counts. Nothing is padded, repeated
or averaged over ranks, so the figures do not depend on the number of ranks.

B videos of a batch, N of the data set, V views, T frames, C classes, D embedding width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from text4vis import distributed, metrics
from text4vis.model import VideoClip
from text4vis.pipeline import Loader

LOGIT_SCALE = 100.0  # CLIP's largest; the original evaluates with it whatever was learned


@dataclass(frozen=True)
class Embeddings:
    """embeddings_NVD float32 unnormalised, labels_N and ids_N int64, in the order of the data set."""

    embeddings_NVD: np.ndarray
    labels_N: np.ndarray
    ids_N: np.ndarray


@torch.no_grad()
def embed_videos(model: VideoClip, loader: Loader, *, progress: bool = False) -> Embeddings | None:
    """Embeds the loader's share on every rank and joins the shares on rank 0; None on the others.

    All ranks run the same number of forward passes, since parameters may be sharded over ranks (ZeRO-3): a rank that
    has run out of videos embeds a blank one and throws the result away. Raises RuntimeError when a video is missing or
    counted twice.
    """
    was_training = model.training
    model.eval()
    device = next(model.parameters()).device
    share = -(-len(loader.dataset) // loader.world_size)
    num_batches = -(-share // loader.batch_size)
    size = loader.config.data.input_size
    blank_BTCHW = torch.zeros(1, loader.config.data.num_segments, 3, size, size, dtype=torch.uint8, device=device)
    parts: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []
    batches = iter(loader)
    for _ in tqdm(range(num_batches), "evaluating", unit="batch", disable=not progress, leave=False):
        batch = next(batches, None)
        if batch is None:
            model.encode_video(blank_BTCHW)
            continue
        frames_BVTCHW = batch.frames.to(device, non_blocking=True)
        views_BVD = model.encode_video(frames_BVTCHW.flatten(0, 1)).unflatten(0, frames_BVTCHW.shape[:2])
        parts.append((views_BVD.float().cpu().numpy(), batch.labels.numpy(), batch.ids.numpy()))
    loader.close()
    model.train(was_training)
    gathered = distributed.gather_to_main(parts)
    if gathered is None:
        return None
    joined = [np.concatenate(column) for column in zip(*(part for rank in gathered for part in rank), strict=True)]
    order = np.argsort(joined[2], kind="stable")
    if not np.array_equal(joined[2][order], np.arange(len(loader.dataset))):
        raise RuntimeError(f"evaluation saw {len(joined[2])} videos, the data set has {len(loader.dataset)}")
    return Embeddings(*(column[order] for column in joined))


def class_scores(embeddings_NVD: np.ndarray, class_embeddings_CD: np.ndarray) -> np.ndarray:
    """Probabilities (N, C): views averaged, normalised, times 100 against the normalised classes, softmax."""
    video_ND = embeddings_NVD.mean(axis=1, dtype=np.float64)
    video_ND /= np.linalg.norm(video_ND, axis=1, keepdims=True)
    classes_CD = class_embeddings_CD.astype(np.float64)
    classes_CD = classes_CD / np.linalg.norm(classes_CD, axis=1, keepdims=True)
    logits_NC = LOGIT_SCALE * video_ND @ classes_CD.T
    logits_NC -= logits_NC.max(axis=1, keepdims=True)
    scores_NC = np.exp(logits_NC)
    return scores_NC / scores_NC.sum(axis=1, keepdims=True)


def report(scores_NC: np.ndarray, labels_N: np.ndarray, class_names: Sequence[str]) -> dict[str, Any]:
    """The figures of an evaluation, ready for JSON: shares in per cent, counts of videos beside them."""
    counts = metrics.topk_correct(scores_NC, labels_N, ks=(1, 5))
    confusion_CC = metrics.confusion_matrix(scores_NC.argmax(axis=1), labels_N, len(class_names))
    videos = len(labels_N)
    return {
        "videos": videos,
        "classes": len(class_names),
        "top1": 100 * counts[1] / videos,
        "top5": 100 * counts[5] / videos,
        "top1_correct": counts[1],
        "top5_correct": counts[5],
        "mean_class_accuracy": metrics.mean_class_accuracy(confusion_CC),
        "chance": 100 / len(class_names),
        "per_class": [
            {"class": name, "videos": int(row.sum()), "correct": int(row[c])}
            for c, (name, row) in enumerate(zip(class_names, confusion_CC, strict=True))
        ],
        "confusion": confusion_CC.tolist(),
    }


def evaluate(
    model: VideoClip,
    class_embeddings_CD: torch.Tensor,
    class_names: Sequence[str],
    loader: Loader,
    *,
    progress: bool = False,
) -> dict[str, Any] | None:
    """Embeds every video of the loader's data set and reports on rank 0; None on the other ranks. Collective."""
    embedded = embed_videos(model, loader, progress=progress)
    if embedded is None:
        return None
    data = loader.config.data
    scores_NC = class_scores(embedded.embeddings_NVD, class_embeddings_CD.float().cpu().numpy())
    return {
        "data": data.dataset,
        "data_fingerprint": loader.dataset.fingerprint,
        "views": {"clips": data.test_clips, "crops": data.test_crops, "frames": data.num_segments},
        "template": loader.config.network.template,
        **report(scores_NC, embedded.labels_N, class_names),
    }
