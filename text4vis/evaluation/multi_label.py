"""Figures of videos that have several labels, or none: mAP, thresholds and F1 of each class.

A class is decided on by itself: probability = sigmoid(slope * logit + intercept), the logit being 100 times the cosine,
and a video is said to show the classes whose probability reaches their threshold. Slope, intercept and thresholds are
fitted on the evaluated videos, so the bias of a training loss plays no part here. F1 is measured on videos that they
were not fitted on: the videos are dealt into two halves, and each is measured with what was fitted on the other.

Videos without labels are left out of mAP and top-k. Charades' script gives them the score -inf, so they rank behind all
others in every class, where they change no precision: the mAP is the same. Thresholds and F1 count them: whatever is
said of them is wrong.

N videos, V views, C classes, D embedding width. Shares are in per cent.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from scipy.optimize import minimize
from scipy.special import expit, log_expit

from text4vis.evaluation import metrics
from text4vis.evaluation.protocols import Views, class_logits, rounded

MIN_VIDEOS = 40  # with fewer, halves say nothing
MIDDLE = 0.5  # the threshold of a class that no video shows
_LEAST_SLOPE = 1e-3  # a larger cosine never means a smaller probability
_SEED = 0


@dataclass(frozen=True)
class Decision:
    """From logits to the classes that a video shows; thresholds: C probabilities."""

    slope: float
    intercept: float
    thresholds: tuple[float, ...]

    @classmethod
    def fit(cls, logits_NC: np.ndarray, targets_NC: np.ndarray) -> Decision:
        """Fits it to videos whose labels are known, targets_NC bool: the scale first, then each class's threshold."""
        slope, intercept = fit_scale(logits_NC, targets_NC)
        thresholds_C = best_thresholds(expit(slope * logits_NC + intercept), targets_NC)
        return cls(slope, intercept, tuple(thresholds_C.tolist()))

    @classmethod
    def of(cls, figures: Mapping[str, Any]) -> Decision:
        """From the `decision` of a report. Raises ValueError for what is none."""
        try:
            decision = cls(
                float(figures["slope"]), float(figures["intercept"]), tuple(map(float, figures["thresholds"]))
            )
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"no decision on classes ({type(error).__name__}: {error})") from None
        if not np.isfinite([decision.slope, decision.intercept, *decision.thresholds]).all() or decision.slope <= 0:
            raise ValueError("a decision on classes takes finite numbers and a slope above 0")
        return decision

    def probabilities(self, logits_NC: np.ndarray) -> np.ndarray:
        """(N, C) float64, from 0 to 1."""
        return expit(self.slope * logits_NC + self.intercept)

    def shown(self, probabilities_NC: np.ndarray) -> np.ndarray:
        """Which classes the videos are said to show, (N, C) bool."""
        return probabilities_NC >= np.array(self.thresholds)


def fit_scale(logits_NC: np.ndarray, targets_NC: np.ndarray) -> tuple[float, float]:
    """(slope, intercept) at which sigmoid(slope * logit + intercept) makes the labels likeliest.

    Platt scaling of all (video, class) pairs, with Platt's targets, which stay finite where the pairs can be told apart
    without an error (Platt, "Probabilistic Outputs for Support Vector Machines", 1999). The slope is above 0.
    """
    positives = int(targets_NC.sum())
    high, low = (positives + 1) / (positives + 2), 1 / (targets_NC.size - positives + 2)
    wanted_M = np.where(targets_NC, high, low).ravel()
    centre, spread = float(logits_NC.mean()), max(float(logits_NC.std()), np.finfo(np.float64).eps)
    scaled_M = ((logits_NC - centre) / spread).ravel()

    def loss(parameters: np.ndarray) -> tuple[float, np.ndarray]:
        z_M = parameters[0] * scaled_M + parameters[1]
        value = -np.mean(wanted_M * log_expit(z_M) + (1 - wanted_M) * log_expit(-z_M))
        error_M = expit(z_M) - wanted_M
        return float(value), np.array([np.mean(error_M * scaled_M), np.mean(error_M)])

    mean = float(wanted_M.mean())
    start = np.array([1.0, np.log(mean / (1 - mean))])
    found = minimize(loss, start, jac=True, method="L-BFGS-B", bounds=[(_LEAST_SLOPE, None), (None, None)])
    slope = float(found.x[0]) / spread
    return slope, float(found.x[1]) - slope * centre


def best_thresholds(scores_NC: np.ndarray, targets_NC: np.ndarray) -> np.ndarray:
    """For each class the score from which on its F1 is best, (C,) float64; MIDDLE for a class that no video shows.

    A threshold lies half-way between the lowest score that is taken and the highest one that is not.
    """
    return np.array([_best_threshold(*column) for column in zip(scores_NC.T, targets_NC.T, strict=True)])


def _best_threshold(scores_N: np.ndarray, targets_N: np.ndarray) -> float:
    positives = int(targets_N.sum())
    if not positives:
        return MIDDLE
    order_N = np.argsort(-scores_N, kind="stable")
    ordered_N = scores_N[order_N]
    taken_N = np.arange(1, len(ordered_N) + 1)
    f1_N = 2 * np.cumsum(targets_N[order_N]) / (taken_N + positives)
    f1_N[:-1][ordered_N[1:] == ordered_N[:-1]] = 0  # equal scores are taken all or none
    last = int(f1_N.argmax())
    below = ordered_N[last + 1] if last + 1 < len(ordered_N) else 0.0
    return float((ordered_N[last] + below) / 2)


def multi_label_figures(
    embeddings_NVD: np.ndarray,
    targets_NC: np.ndarray,
    class_embeddings_CD: np.ndarray,
    class_names: Sequence[str],
    *,
    views: Views | None = None,
) -> dict[str, Any]:
    """The figures of a report, as JSON values, for the same keys as `protocols.figures` where they make sense.

    targets_NC: bool. `videos` are those with labels, `unlabelled` the others. `top1`, `top5`: videos that have one of
    their labels among the first 1 or 5 classes. `map`: see `metrics.average_precisions`; None if a score is not finite.
    `f1`: mean over the classes that videos have, `f1_micro`: of all pairs; None for fewer than MIN_VIDEOS videos, with
    the unlabelled ones.
    `decision`: of one view, as prediction uses it; None where no labelled video has finite scores. `chance`: what
    guessing would reach, in top-1 and on average in mAP. Rows of `per_class`: `said` counts the videos that `decision`
    says show the class, `correct` those of them that do.
    """
    views = views or Views()
    labelled_N = targets_NC.any(axis=1)
    logits_NC = class_logits(embeddings_NVD, class_embeddings_CD)
    _, _, one_view, _ = next(views.subsets())
    single_NC = class_logits(embeddings_NVD[:, one_view], class_embeddings_CD)
    finite_N = np.isfinite(single_NC).all(axis=1)
    decision = Decision.fit(single_NC[finite_N], targets_NC[finite_N]) if targets_NC[finite_N].any() else None
    known_nC, known_targets_nC = logits_NC[labelled_N], targets_NC[labelled_N]
    precisions_C = _average_precisions(known_nC, known_targets_nC)
    return {
        "videos": int(labelled_N.sum()),
        "unlabelled": int((~labelled_N).sum()),
        "classes": len(class_names),
        **_ranking(known_nC, known_targets_nC, precisions_C),
        "mean_class_accuracy": None,
        **_f1(single_NC[finite_N], targets_NC[finite_N]),
        "not_finite": int((~np.isfinite(logits_NC).all(axis=1)).sum()),
        "chance": float(100 * known_targets_nC.mean()) if len(known_nC) else 0.0,
        "by_views": [
            {
                "clips": clips,
                "crops": crops,
                **_ranking(class_logits(embeddings_NVD[:, chosen], class_embeddings_CD)[labelled_N], known_targets_nC),
                "note": note,
            }
            for clips, crops, chosen, note in views.subsets()
        ],
        "calibration": None,
        "half_classes": None,
        "class_splits": None,
        "decision": None if decision is None else asdict(decision),
        "per_class": _per_class(class_names, single_NC, targets_NC, decision, precisions_C),
        "confusion": [],
        "predictions": _predictions(single_NC, targets_NC, decision),
    }


def _average_precisions(logits_NC: np.ndarray, targets_NC: np.ndarray) -> np.ndarray | None:
    """(C,) per cent, NaN for classes without videos; None if a score is not finite."""
    return metrics.average_precisions(logits_NC, targets_NC) if np.isfinite(logits_NC).all() else None


def _ranking(logits_NC: np.ndarray, targets_NC: np.ndarray, precisions_C: np.ndarray | None = None) -> dict[str, Any]:
    if precisions_C is None:
        precisions_C = _average_precisions(logits_NC, targets_NC)
    counts = metrics.any_topk_correct(logits_NC, targets_NC)
    return {
        **{f"top{k}": 100 * count / max(1, len(logits_NC)) for k, count in counts.items()},
        **{f"top{k}_correct": count for k, count in counts.items()},
        "map": None if precisions_C is None or np.isnan(precisions_C).all() else float(np.nanmean(precisions_C)),
    }


def _f1(logits_NC: np.ndarray, targets_NC: np.ndarray) -> dict[str, float | None]:
    """`f1` and `f1_micro`, each half of the videos measured with what is fitted on the other."""
    if len(logits_NC) < MIN_VIDEOS or not targets_NC.any():
        return {"f1": None, "f1_micro": None}
    said_NC = np.empty_like(targets_NC)
    halves = np.array_split(np.random.default_rng(_SEED).permutation(len(logits_NC)), 2)
    for fitted, measured in (halves, halves[::-1]):
        decision = Decision.fit(logits_NC[fitted], targets_NC[fitted])
        said_NC[measured] = decision.shown(decision.probabilities(logits_NC[measured]))
    right_C, total_C = (said_NC & targets_NC).sum(axis=0), said_NC.sum(axis=0) + targets_NC.sum(axis=0)
    present_C = targets_NC.any(axis=0)
    return {
        "f1": float(100 * np.mean(2 * right_C[present_C] / total_C[present_C])),
        "f1_micro": float(100 * 2 * right_C.sum() / total_C.sum()),
    }


def _per_class(
    class_names: Sequence[str],
    logits_NC: np.ndarray,
    targets_NC: np.ndarray,
    decision: Decision | None,
    precisions_C: np.ndarray | None,
) -> list[dict[str, Any]]:
    """A row for each class. Videos whose scores are not finite are said to show nothing."""
    num_classes = len(class_names)
    finite_N = np.isfinite(logits_NC).all(axis=1)
    said_NC = np.zeros_like(targets_NC)
    thresholds: Sequence[float | None] = [None] * num_classes
    if decision is not None:
        said_NC[finite_N] = decision.shown(decision.probabilities(logits_NC[finite_N]))
        thresholds = rounded(np.array(decision.thresholds))
    precisions = rounded(np.full(num_classes, np.nan) if precisions_C is None else precisions_C)
    right_C = (said_NC & targets_NC).sum(axis=0)
    columns = (class_names, targets_NC.sum(axis=0).tolist(), right_C.tolist(), said_NC.sum(axis=0).tolist())
    keys = ("class", "videos", "correct", "said", "average_precision", "threshold")
    return [dict(zip(keys, row, strict=True)) for row in zip(*columns, precisions, thresholds, strict=True)]


def _predictions(logits_NC: np.ndarray, targets_NC: np.ndarray, decision: Decision | None) -> dict[str, Any]:
    """Columns over all videos, unlabelled ones too.

    labels, said: lists of classes. predicted, probability: the likeliest class. label_probability: of the likeliest of
    its labels. Probabilities that are unknown are None.
    """
    probabilities_NC = np.full(logits_NC.shape, np.nan) if decision is None else decision.probabilities(logits_NC)
    said_NC = np.zeros_like(targets_NC) if decision is None else decision.shown(probabilities_NC)
    own_NC = np.where(targets_NC, probabilities_NC, -1.0).max(axis=1)
    return {
        "labels": [np.flatnonzero(row_C).tolist() for row_C in targets_NC],
        "said": [np.flatnonzero(row_C).tolist() for row_C in said_NC],
        "predicted": logits_NC.argmax(axis=1).tolist(),
        "probability": rounded(probabilities_NC.max(axis=1)),
        "label_probability": rounded(np.where(own_NC < 0, np.nan, own_NC)),
    }
