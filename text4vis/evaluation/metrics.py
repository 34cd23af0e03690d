"""Metrics and class splits of the evaluation protocols, from scores and labels of all videos.

N videos, C classes, K values of k. Scores are larger for likelier classes. A percentage is a float from 0 to 100.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]


def half_class_splits(num_classes: int, num_splits: int = 10) -> list[NDArray[np.int64]]:
    """Class ids, sorted, of the zero-shot half-class splits: for split s, `num_classes // 2` of a permutation seeded s.

    Equals the published rule `numpy.random.seed(s); numpy.random.permutation(C)[:C // 2]` without touching the global
    generator.
    """
    if num_classes < 2:
        raise ValueError(f"half_class_splits: expected at least 2 classes, got {num_classes}")
    permutations = (np.random.RandomState(split).permutation(num_classes) for split in range(num_splits))
    return [np.sort(permutation[: num_classes // 2]).astype(np.int64) for permutation in permutations]


def topk_correct(scores_NC: Array, labels_N: Array, ks: Sequence[int] = (1, 5)) -> dict[int, int]:
    """Videos whose class is among the k best, for each k.

    Ties count against the model: the class must have fewer than k others that score as high or higher, so a constant
    score is never correct unless k >= C. A video with a NaN among its scores is never correct.
    """
    scores_NC, labels_N = _checked(scores_NC, labels_N)
    own_N1 = np.take_along_axis(scores_NC, labels_N[:, None], axis=1)
    rank_N = (scores_NC >= own_N1).sum(axis=1)  # 1 for the best class: it is as high as itself
    valid_N = ~np.isnan(scores_NC).any(axis=1)
    return {k: int((valid_N & (rank_N <= k)).sum()) for k in ks}


def mean_average_precision(scores_NC: Array, labels_N: Array) -> float:
    """Mean over the classes present of the average precision of "is of this class", per cent.

    AP = sum over thresholds of (recall - previous recall) * precision, with videos of equal score at one threshold
    (scikit-learn's `average_precision_score`). Raises ValueError without videos or with scores that are not finite.
    """
    from sklearn.metrics import average_precision_score  # late: prediction imports this module and needs no metrics

    scores_NC, labels_N = _checked(scores_NC, labels_N)
    if not len(labels_N):
        raise ValueError("mean_average_precision: no videos")
    if not np.isfinite(scores_NC).all():
        raise ValueError("mean_average_precision: scores contain NaN or infinity")
    each = [average_precision_score(labels_N == label, scores_NC[:, label]) for label in np.unique(labels_N)]
    return 100.0 * float(np.mean(each))


def average_precisions(scores_NC: Array, targets_NC: Array) -> NDArray[np.float64]:
    """Average precision of each class where videos may have several, (C,) per cent; NaN for classes without videos.

    AP = mean over the videos of the class, ranked by score among all videos, of the precision down to each of them; the
    mean over classes is Charades' mAP (`Charades_v1_classify.m`, and `map.py` of gsig/charades-algorithms). Videos of
    equal score are taken at once, where that script takes them in the order of its sort. It ranks videos without labels
    last, which changes no precision: leave them out. Raises ValueError for scores that are not finite.
    """
    from sklearn.metrics import average_precision_score

    scores_NC, targets_NC = np.asarray(scores_NC), np.asarray(targets_NC, bool)
    if scores_NC.ndim != 2 or scores_NC.shape != targets_NC.shape:
        raise ValueError(f"expected scores and targets (N, C), got {scores_NC.shape} and {targets_NC.shape}")
    if not np.isfinite(scores_NC).all():
        raise ValueError("average_precisions: scores contain NaN or infinity")
    pairs = zip(targets_NC.T, scores_NC.T, strict=True)
    return np.array([100.0 * average_precision_score(*pair) if pair[0].any() else np.nan for pair in pairs])


def any_topk_correct(scores_NC: Array, targets_NC: Array, ks: Sequence[int] = (1, 5)) -> dict[int, int]:
    """Videos of which a label is among the k best classes, for each k; ties count against the model.

    With one label a video the same as `topk_correct`. A video without labels, or with a NaN, is never correct.
    """
    scores_NC, targets_NC = np.asarray(scores_NC), np.asarray(targets_NC, bool)
    best_N1 = np.where(targets_NC, scores_NC, -np.inf).max(axis=1, keepdims=True, initial=-np.inf)
    others_N = ((scores_NC >= best_N1) & ~targets_NC).sum(axis=1)
    valid_N = ~np.isnan(scores_NC).any(axis=1) & targets_NC.any(axis=1)
    return {k: int((valid_N & (others_N < k)).sum()) for k in ks}


def confusion_matrix(pred_N: Array, labels_N: Array, num_classes: int) -> NDArray[np.int64]:
    """Counts (C, C) int64: rows are true classes, columns predicted ones.

    Raises ValueError without videos or on an id that is not in 0 ... C-1, which scikit-learn would leave out.
    """
    from sklearn.metrics import confusion_matrix as count_pairs

    pred_N, labels_N = np.asarray(pred_N, np.int64), np.asarray(labels_N, np.int64)
    if pred_N.shape != labels_N.shape or pred_N.ndim != 1:
        raise ValueError(f"confusion_matrix: expected two (N,) arrays, got {pred_N.shape} and {labels_N.shape}")
    for ids in (pred_N, labels_N):
        if len(ids) and not 0 <= ids.min() <= ids.max() < num_classes:
            raise ValueError(f"confusion_matrix: class ids {ids.min()}..{ids.max()} are not in 0..{num_classes - 1}")
    return count_pairs(labels_N, pred_N, labels=np.arange(num_classes))


def mean_class_accuracy(confusion_CC: Array) -> float:
    """Mean over the classes present of the share of their videos that is right, per cent. ValueError without videos."""
    confusion_CC = np.asarray(confusion_CC)
    videos_C = confusion_CC.sum(axis=1)
    present_C = videos_C > 0
    if not present_C.any():
        raise ValueError("mean_class_accuracy: no videos")
    return 100.0 * float(np.mean(np.diag(confusion_CC)[present_C] / videos_C[present_C]))


def _checked(scores_NC: Array, labels_N: Array) -> tuple[Array, NDArray[np.int64]]:
    scores_NC, labels_N = np.asarray(scores_NC), np.asarray(labels_N, np.int64)
    if scores_NC.ndim != 2 or labels_N.shape != scores_NC.shape[:1]:
        raise ValueError(f"expected scores (N, C) and labels (N,), got {scores_NC.shape} and {labels_N.shape}")
    if len(labels_N) and not 0 <= labels_N.min() <= labels_N.max() < scores_NC.shape[1]:
        raise ValueError(f"labels {labels_N.min()}..{labels_N.max()} are not in 0..{scores_NC.shape[1] - 1}")
    return scores_NC, labels_N
