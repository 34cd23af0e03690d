"""Computes every figure of an evaluation report from the videos' embeddings. Pure numpy.

Once the views are embedded each protocol costs next to nothing, so all are computed: one view and several, all classes,
the zero-shot halves of the classes, given splits of the classes (Kinetics-600's three), mean average precision
(ActivityNet), and the table, confusion matrix and predictions behind them.

N videos, V views, C classes, D embedding width. Shares are in per cent.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from text4vis.evaluation import metrics
from text4vis.evaluation.calibration import calibration_figures

LOGIT_SCALE = 100.0  # CLIP's upper bound; the original evaluates with it, not with the learned scale
FUSION = "mean of the views' unnormalised embeddings, normalised, times 100 against the classes, softmax"
CENTRE_CROP = {1: 0, 3: 2, 5: 4, 10: 8}  # number of crops -> index of the centre one in `augmentation.eval_geometry`
MIN_HALVED_CLASSES = 4  # a half with one class is always right


@dataclass(frozen=True)
class Views:
    """A video's views: `clips` in time, each in 1, 3, 5 or 10 `crops`. View k * crops + c is crop c of clip k."""

    clips: int = 1
    crops: int = 1
    dense: bool = False

    def subsets(self) -> Iterator[tuple[int, int, list[int], str]]:
        """Yields (clips, crops, indices of their views, note) for each smaller protocol that these views contain.

        The single clip is the first one, which has the frames of a one-clip evaluation; with dense sampling it is the
        middle window. The single crop is the centre one; 5 crops are the unflipped ones of 10. The note says how the
        result differs from an evaluation with only these views.
        """
        clip_sets = {1: [self.clips // 2 if self.dense else 0], self.clips: list(range(self.clips))}
        crop_sets = {1: [CENTRE_CROP[self.crops]]}
        if self.crops == 10:
            crop_sets[5] = list(range(0, 10, 2))
        crop_sets[self.crops] = list(range(self.crops))
        for clips, clip_set in clip_sets.items():
            for crops, crop_set in crop_sets.items():
                notes = []
                if clips < self.clips and self.dense:
                    notes.append(f"window {self.clips // 2} of {self.clips} is used as the centre window")
                if crops == 1 < self.crops:
                    notes.append(
                        f"the centre one of {self.crops} crops may lie up to 2 pixels off that of a one-crop evaluation"
                    )
                views = [clip * self.crops + crop for clip in clip_set for crop in crop_set]
                yield clips, crops, views, "; ".join(notes)


def class_logits(embeddings_NVD: np.ndarray, class_embeddings_CD: np.ndarray) -> np.ndarray:
    """Logits (N, C) float64: 100 times the cosine between the mean view and each class."""
    video_ND = embeddings_NVD.mean(axis=1, dtype=np.float64)
    video_ND /= np.linalg.norm(video_ND, axis=1, keepdims=True)
    classes_CD = class_embeddings_CD.astype(np.float64)
    classes_CD = classes_CD / np.linalg.norm(classes_CD, axis=1, keepdims=True)
    return LOGIT_SCALE * video_ND @ classes_CD.T


def class_scores(embeddings_NVD: np.ndarray, class_embeddings_CD: np.ndarray) -> np.ndarray:
    """Probabilities (N, C) float64: the softmax of `class_logits`."""
    logits_NC = class_logits(embeddings_NVD, class_embeddings_CD)
    logits_NC -= logits_NC.max(axis=1, keepdims=True)
    scores_NC = np.exp(logits_NC)
    return scores_NC / scores_NC.sum(axis=1, keepdims=True)


def figures(
    embeddings_NVD: np.ndarray,
    labels_N: np.ndarray,
    class_embeddings_CD: np.ndarray,
    class_names: Sequence[str],
    *,
    views: Views | None = None,
    class_splits: Mapping[str, np.ndarray] | None = None,
) -> dict[str, Any]:
    """The figures of every protocol that applies, as JSON values: shares in per cent and counts of videos.

    embeddings_NVD: unnormalised, with V = clips * crops of `views` (default: one). class_splits: {name of the split:
    class ids}. `calibration` is None for fewer than calibration.MIN_VIDEOS videos, `half_classes` for fewer than four
    classes or if a half has no videos, `map` if a score is not finite. A video whose scores are not finite counts as
    wrong: `not_finite` is the number of such videos, and their probabilities are None.
    """
    views = views or Views()
    scores_NC = class_scores(embeddings_NVD, class_embeddings_CD)
    num_classes = len(class_names)
    finite_N = np.isfinite(scores_NC).all(axis=1)
    predicted_N = scores_NC.argmax(axis=1)
    answers_N = np.where(finite_N, predicted_N, num_classes)  # the extra column stands for no class
    answers_CX = metrics.confusion_matrix(answers_N, labels_N, num_classes + 1)[:num_classes]
    halves = metrics.half_class_splits(num_classes) if num_classes >= MIN_HALVED_CLASSES else []
    own_N = np.take_along_axis(scores_NC, labels_N[:, None], axis=1)[:, 0]
    return {
        "videos": len(labels_N),
        "classes": num_classes,
        **_accuracy(scores_NC, labels_N),
        "mean_class_accuracy": metrics.mean_class_accuracy(answers_CX),
        "map": metrics.mean_average_precision(scores_NC, labels_N) if finite_N.all() else None,
        "not_finite": int((~finite_N).sum()),
        "chance": 100 / num_classes,
        "by_views": [
            {
                "clips": clips,
                "crops": crops,
                **_accuracy(class_scores(embeddings_NVD[:, chosen], class_embeddings_CD), labels_N),
                "note": note,
            }
            for clips, crops, chosen, note in views.subsets()
        ],
        "calibration": _calibration(embeddings_NVD, labels_N, class_embeddings_CD, views),
        "half_classes": _over_splits(scores_NC, labels_N, {f"seed {seed}": half for seed, half in enumerate(halves)}),
        "class_splits": _over_splits(scores_NC, labels_N, class_splits or {}),
        "per_class": [
            {"class": name, "videos": int(row.sum()), "correct": int(row[c])}
            for c, (name, row) in enumerate(zip(class_names, answers_CX, strict=True))
        ],
        "confusion": answers_CX[:, :num_classes].tolist(),
        "predictions": {
            "labels": labels_N.tolist(),
            "predicted": predicted_N.tolist(),
            "probability": rounded(scores_NC.max(axis=1)),
            "label_probability": rounded(own_N),
        },
    }


def _calibration(
    embeddings_NVD: np.ndarray, labels_N: np.ndarray, class_embeddings_CD: np.ndarray, views: Views
) -> dict[str, Any] | None:
    """The calibration of one view, as prediction uses it; videos without finite scores are left out."""
    _, _, one_view, _ = next(views.subsets())
    scores_NC = class_scores(embeddings_NVD[:, one_view], class_embeddings_CD)
    finite_N = np.isfinite(scores_NC).all(axis=1)
    return calibration_figures(scores_NC[finite_N], labels_N[finite_N])


def within(scores_NC: np.ndarray, labels_N: np.ndarray, class_ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Restricts videos and scores to some classes: scores (n, c), labels (n,). class_ids: (c,), ascending."""
    chosen_N = np.isin(labels_N, class_ids)
    return scores_NC[chosen_N][:, class_ids], np.searchsorted(class_ids, labels_N[chosen_N])


def _over_splits(scores_NC: np.ndarray, labels_N: np.ndarray, splits: Mapping[str, np.ndarray]) -> dict | None:
    """The accuracy of each split, and their mean and population standard deviation."""
    parts = {name: within(scores_NC, labels_N, class_ids) for name, class_ids in splits.items()}
    if not parts or not all(len(labels) for _, labels in parts.values()):
        return None
    each = [
        {"name": name, "classes": scores.shape[1], "videos": len(labels), **_accuracy(scores, labels)}
        for name, (scores, labels) in parts.items()
    ]
    return {**spread(each, ("top1", "top5")), "splits": each}


def spread(rows: Sequence[Mapping[str, Any]], keys: Sequence[str]) -> dict[str, float]:
    """Mean and population standard deviation of each key over the rows: `top1_mean`, `top1_std` ..."""
    result: dict[str, float] = {}
    for key in keys:
        column = [row[key] for row in rows]
        result |= {f"{key}_mean": float(np.mean(column)), f"{key}_std": float(np.std(column))}
    return result


def _accuracy(scores_NC: np.ndarray, labels_N: np.ndarray) -> dict[str, Any]:
    counts = metrics.topk_correct(scores_NC, labels_N, ks=(1, 5))
    shares = {f"top{k}": 100 * count / len(labels_N) for k, count in counts.items()}
    return shares | {f"top{k}_correct": count for k, count in counts.items()}


def rounded(values_N: np.ndarray) -> list[float | None]:
    """Four decimals, None for NaN."""
    return [None if np.isnan(value) else round(float(value), 4) for value in values_N]


def is_multi_label(report: Mapping[str, Any]) -> bool:
    """Whether a report is of videos that may have several labels, or none."""
    return "decision" in report


def main_figures(report: Mapping[str, Any]) -> dict[str, Any]:
    """What logs, curves and checkpoints keep of a report."""
    shares = ("map", "f1", "top1", "top5") if is_multi_label(report) else ("top1", "top5", "mean_class_accuracy")
    return {key: report[key] for key in (*shares, "videos", "missing") if report.get(key) is not None}


def in_words(figures: Mapping[str, Any]) -> str:
    """The main shares among figures on one line."""
    names = {"map": "mAP", "f1": "F1", "top1": "top-1", "top5": "top-5"}
    return "  ".join(f"{name} {figures[key]:.2f} %" for key, name in names.items() if key in figures)


def decision_of(report: Mapping[str, Any]) -> dict[str, Any]:
    """{"decision": what turns logits into classes} where videos have several labels, else empty."""
    return {"decision": report["decision"]} if report.get("decision") else {}


def deciding_figure(report: Mapping[str, Any]) -> float:
    """What makes weights the best: the top-1, or the mAP where videos have several labels; per cent."""
    return (report["map"] or 0.0) if is_multi_label(report) else report["top1"]


def write_report(path: Path, report: Mapping[str, Any]) -> None:
    """Writes the report as JSON with one line for each key and for each row of a table."""
    lines = []
    for key, value in report.items():
        text = json.dumps(value, ensure_ascii=False)
        if isinstance(value, list) and value and isinstance(value[0], (dict, list)):
            text = "[\n  " + ",\n  ".join(json.dumps(row, ensure_ascii=False) for row in value) + "\n ]"
        lines.append(f" {json.dumps(key)}: {text}")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")
