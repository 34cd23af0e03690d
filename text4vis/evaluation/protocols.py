"""From embeddings of videos to every figure that an evaluation reports. Pure numpy; imports metrics only.

The field's protocols are all here, because each costs next to nothing once the views are embedded: one view and
several, all classes, the zero-shot halves of the classes, given splits of the classes (Kinetics-600's three), mean
average precision (ActivityNet), and the table, the confusion matrix and the predictions behind them.

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

LOGIT_SCALE = 100.0  # CLIP's largest; the original evaluates with it whatever was learned
FUSION = "mean of the views' unnormalised embeddings, normalised, times 100 against the classes, softmax"
CENTRE_CROP = {1: 0, 3: 2, 5: 4, 10: 8}  # its place among the crops of `augmentation.eval_geometry`
MIN_HALVED_CLASSES = 4  # halves of one class have nothing to tell apart


@dataclass(frozen=True)
class Views:
    """How many views a video was given: `clips` in time, `crops` of each (1, 3, 5 or 10); view k * crops + c."""

    clips: int = 1
    crops: int = 1
    dense: bool = False

    def subsets(self) -> Iterator[tuple[int, int, list[int], str]]:
        """(clips, crops, their views, what differs from an evaluation with just these) of the protocols in this one.

        The single clip is the first one: it has the frames that an evaluation of one clip takes. With dense sampling it
        is the middle one of the windows. The single crop is the centre one; 5 crops are the unflipped ones of 10.
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
                    notes.append(f"window {self.clips // 2} of {self.clips} stands for the centre window")
                if crops == 1 < self.crops:
                    notes.append(f"the centre one of {self.crops} crops lies up to 2 pixels off the only crop of one")
                views = [clip * self.crops + crop for clip in clip_set for crop in crop_set]
                yield clips, crops, views, "; ".join(notes)


def class_scores(embeddings_NVD: np.ndarray, class_embeddings_CD: np.ndarray) -> np.ndarray:
    """Probabilities (N, C) float64: views averaged, normalised, times 100 against the normalised classes, softmax."""
    video_ND = embeddings_NVD.mean(axis=1, dtype=np.float64)
    video_ND /= np.linalg.norm(video_ND, axis=1, keepdims=True)
    classes_CD = class_embeddings_CD.astype(np.float64)
    classes_CD = classes_CD / np.linalg.norm(classes_CD, axis=1, keepdims=True)
    logits_NC = LOGIT_SCALE * video_ND @ classes_CD.T
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
    """The figures of every protocol that applies, ready for JSON: shares in per cent, counts of videos beside them.

    embeddings_NVD: unnormalised, with V = clips * crops of `views` (default: one). class_splits: class ids by name of
    split. `half_classes` is None below four classes or where a half has no videos, `map` where a score is not a number.
    A video without numbers for scores is never right: `not_finite` counts such videos, their probabilities are None.
    """
    views = views or Views()
    scores_NC = class_scores(embeddings_NVD, class_embeddings_CD)
    num_classes = len(class_names)
    finite_N = np.isfinite(scores_NC).all(axis=1)
    predicted_N = scores_NC.argmax(axis=1)
    answers_N = np.where(finite_N, predicted_N, num_classes)  # one more column: no class at all
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
            "probability": _rounded(scores_NC.max(axis=1)),
            "label_probability": _rounded(own_N),
        },
    }


def within(scores_NC: np.ndarray, labels_N: np.ndarray, classes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Scores (n, c) and labels (n,) of the videos of some classes, among these alone. classes: ascending ids."""
    chosen_N = np.isin(labels_N, classes)
    return scores_NC[chosen_N][:, classes], np.searchsorted(classes, labels_N[chosen_N])


def _over_splits(scores_NC: np.ndarray, labels_N: np.ndarray, splits: Mapping[str, np.ndarray]) -> dict | None:
    """Each split by itself, mean and standard deviation (of the population, as numpy's) over them."""
    parts = {name: within(scores_NC, labels_N, classes) for name, classes in splits.items()}
    if not parts or not all(len(labels) for _, labels in parts.values()):
        return None
    each = [
        {"name": name, "classes": scores.shape[1], "videos": len(labels), **_accuracy(scores, labels)}
        for name, (scores, labels) in parts.items()
    ]
    return {**spread(each, ("top1", "top5")), "splits": each}


def spread(rows: Sequence[Mapping[str, Any]], keys: Sequence[str]) -> dict[str, float]:
    """Mean and standard deviation (of the population) of each key over the rows: `top1_mean`, `top1_std` ..."""
    result: dict[str, float] = {}
    for key in keys:
        column = [row[key] for row in rows]
        result |= {f"{key}_mean": float(np.mean(column)), f"{key}_std": float(np.std(column))}
    return result


def _accuracy(scores_NC: np.ndarray, labels_N: np.ndarray) -> dict[str, Any]:
    counts = metrics.topk_correct(scores_NC, labels_N, ks=(1, 5))
    shares = {f"top{k}": 100 * count / len(labels_N) for k, count in counts.items()}
    return shares | {f"top{k}_correct": count for k, count in counts.items()}


def _rounded(values_N: np.ndarray) -> list[float | None]:
    return [None if np.isnan(value) else round(float(value), 4) for value in values_N]


def write_report(path: Path, report: Mapping[str, Any]) -> None:
    """JSON that a person can read too: a line for each key and for each row of a table."""
    lines = []
    for key, value in report.items():
        text = json.dumps(value, ensure_ascii=False)
        if isinstance(value, list) and value and isinstance(value[0], (dict, list)):
            text = "[\n  " + ",\n  ".join(json.dumps(row, ensure_ascii=False) for row in value) + "\n ]"
        lines.append(f" {json.dumps(key)}: {text}")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")
