"""How far a model's probabilities can be trusted: temperature, calibration error, when to answer "unsure".

The temperature T divides the logits (Guo et al., "On Calibration of Modern Neural Networks", ICML 2017); it changes no
answer, only how sure the answers are. What is reported of it is measured on videos that it was not fitted on: the
videos are dealt into two halves, and each is measured with what was fitted on the other.

N videos, C classes. Probabilities are from 0 to 1, shares in per cent.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

MIN_VIDEOS = 40  # with fewer, the halves are too small to measure anything
NUM_BINS = 15
ACCURACIES = (80, 85, 90, 95, 97, 98, 99)
COVERAGES = (80, 90, 95, 99)
_LOG_TEMPERATURES = (-4.0, 4.0)
_SEED = 0
_CHANCE_DRAWS = 20


def at_temperature(scores_NC: np.ndarray, temperature: float) -> np.ndarray:
    """Probabilities (N, C) float64 of softmax(logits / temperature), from those of softmax(logits)."""
    logits_NC = np.log(np.maximum(scores_NC, np.finfo(np.float64).tiny)) / temperature
    logits_NC -= logits_NC.max(axis=1, keepdims=True)
    scaled_NC = np.exp(logits_NC)
    return scaled_NC / scaled_NC.sum(axis=1, keepdims=True)


def fit_temperature(scores_NC: np.ndarray, labels_N: np.ndarray) -> float:
    """The temperature at which the labels' mean negative log likelihood is least, between e^-4 and e^4."""

    def loss(log_temperature: float) -> float:
        own_N = at_temperature(scores_NC, np.exp(log_temperature))[np.arange(len(labels_N)), labels_N]
        return float(-np.log(np.maximum(own_N, np.finfo(np.float64).tiny)).mean())

    from scipy.optimize import minimize_scalar  # imported here: it takes most of a second

    return float(np.exp(minimize_scalar(loss, bounds=_LOG_TEMPERATURES, method="bounded").x))


def expected_calibration_error(scores_NC: np.ndarray, labels_N: np.ndarray, num_bins: int = NUM_BINS) -> float:
    """Per cent: the mean over videos of |accuracy - confidence| of their bin (Naeini et al., AAAI 2015).

    Confidence is the largest probability; the bins are equally wide.
    """
    rows = reliability(scores_NC, labels_N, num_bins)
    return sum(row["videos"] * abs(row["accuracy"] - row["confidence"]) for row in rows) / len(labels_N)


def calibration_error_of_chance(scores_NC: np.ndarray) -> float:
    """Per cent: the calibration error that these probabilities show where they are exactly right.

    With few videos in a bin its accuracy strays from its confidence by chance, so no model's error falls below this
    (Broecker and Smith, "Increasing the Reliability of Reliability Diagrams", 2007). The mean over labels that are
    drawn from the probabilities.
    """
    rng = np.random.default_rng(_SEED)
    below_NC = scores_NC.cumsum(axis=1)
    draws = ((below_NC < below_NC[:, -1:] * rng.random((len(scores_NC), 1))).sum(axis=1) for _ in range(_CHANCE_DRAWS))
    return float(np.mean([expected_calibration_error(scores_NC, labels_N) for labels_N in draws]))


def reliability(scores_NC: np.ndarray, labels_N: np.ndarray, num_bins: int = NUM_BINS) -> list[dict[str, float]]:
    """A row for each bin of confidence that holds videos: `videos`, mean `confidence` and `accuracy` in per cent."""
    confidence_N, correct_N = scores_NC.max(axis=1), scores_NC.argmax(axis=1) == labels_N
    bin_N = np.minimum((confidence_N * num_bins).astype(np.int64), num_bins - 1)
    return [
        {
            "videos": int(inside_N.sum()),
            "confidence": float(100 * confidence_N[inside_N].mean()),
            "accuracy": float(100 * correct_N[inside_N].mean()),
        }
        for inside_N in (bin_N == number for number in range(num_bins))
        if inside_N.any()
    ]


def threshold_for_accuracy(scores_NC: np.ndarray, labels_N: np.ndarray, accuracy: float) -> float | None:
    """The least confidence t such that of the videos with confidence >= t at least `accuracy` per cent are right.

    None if not even the most confident ones are.
    """
    confidence_N = scores_NC.max(axis=1)
    order_N = np.argsort(-confidence_N, kind="stable")
    ordered_N, correct_N = confidence_N[order_N], (scores_NC.argmax(axis=1) == labels_N)[order_N]
    share_N = 100 * np.cumsum(correct_N) / np.arange(1, len(labels_N) + 1)
    ends_N = np.append(ordered_N[1:] < ordered_N[:-1], True)  # equal confidences are taken all or none
    good = np.flatnonzero(ends_N & (share_N >= accuracy))
    return float(ordered_N[good[-1]]) if len(good) else None


def threshold_for_coverage(scores_NC: np.ndarray, labels_N: np.ndarray, coverage: float) -> float:
    """The probability t such that, for `coverage` per cent of videos, the right class has a probability >= t.

    Split conformal prediction (Sadinle et al., JASA 2019): the ceil((N + 1) * coverage)-th largest of the labels' own
    probabilities; 0, which is all classes, where N is too small for the promise.
    """
    own_N = np.sort(scores_NC[np.arange(len(labels_N)), labels_N])[::-1]
    rank = int(np.ceil((len(own_N) + 1) * coverage / 100))
    return float(own_N[rank - 1]) if rank <= len(own_N) else 0.0


class _Halves:
    """Two halves of the videos, each measured with what is fitted on the other.

    calibrated_NC: the probabilities at the other half's temperature.
    """

    def __init__(self, scores_NC: np.ndarray, labels_N: np.ndarray) -> None:
        self.calibrated_NC = np.empty_like(scores_NC, dtype=np.float64)
        self._folds: list[
            tuple[np.ndarray, np.ndarray, np.ndarray]
        ] = []  # scores and labels to fit on, who is measured
        halves = np.array_split(np.random.default_rng(_SEED).permutation(len(labels_N)), 2)
        for fitted, measured in (halves, halves[::-1]):
            temperature = fit_temperature(scores_NC[fitted], labels_N[fitted])
            self.calibrated_NC[measured] = at_temperature(scores_NC[measured], temperature)
            self._folds.append((at_temperature(scores_NC[fitted], temperature), labels_N[fitted], measured))

    def thresholds(
        self, threshold: Callable[[np.ndarray, np.ndarray, float], float | None], share: float
    ) -> np.ndarray:
        """(N,): for each video the threshold of the other half, 2 (above every probability) where there is none."""
        threshold_N = np.empty(len(self.calibrated_NC))
        for scores, labels, measured in self._folds:
            found = threshold(scores, labels, share)
            threshold_N[measured] = 2.0 if found is None else found
        return threshold_N


def calibration_figures(scores_NC: np.ndarray, labels_N: np.ndarray) -> dict[str, Any] | None:
    """The calibration of a model's probabilities, as a report holds it, ready for JSON; None below MIN_VIDEOS videos.

    scores_NC: finite probabilities at temperature 1. `temperature` and the thresholds are fitted on all videos. `ece`,
    `ece_calibrated`, `reliability`, and the shares beside the thresholds are measured on videos that they were not
    fitted on. A threshold is None where the accuracy was not reached.
    """
    num_videos = len(labels_N)
    if num_videos < MIN_VIDEOS:
        return None
    halves = _Halves(scores_NC, labels_N)
    calibrated_NC = halves.calibrated_NC
    temperature = fit_temperature(scores_NC, labels_N)
    final_NC = at_temperature(scores_NC, temperature)
    correct_N = calibrated_NC.argmax(axis=1) == labels_N
    answers, sets = [], []
    for accuracy in ACCURACIES:
        sure_N = calibrated_NC.max(axis=1) >= halves.thresholds(threshold_for_accuracy, accuracy)
        answers.append(
            {
                "accuracy": accuracy,
                "threshold": threshold_for_accuracy(final_NC, labels_N, accuracy),
                "answered": float(100 * sure_N.mean()),
                "right_of_answered": float(100 * correct_N[sure_N].mean()) if sure_N.any() else None,
            }
        )
    for coverage in COVERAGES:
        set_NC = calibrated_NC >= halves.thresholds(threshold_for_coverage, coverage)[:, None]
        sets.append(
            {
                "coverage": coverage,
                "threshold": threshold_for_coverage(final_NC, labels_N, coverage),
                "covered": float(100 * set_NC[np.arange(num_videos), labels_N].mean()),
                "classes": float(set_NC.sum(axis=1).mean()),
            }
        )
    return {
        "videos": num_videos,
        "temperature": temperature,
        "ece": expected_calibration_error(scores_NC, labels_N),
        "ece_calibrated": expected_calibration_error(calibrated_NC, labels_N),
        "ece_of_chance": calibration_error_of_chance(calibrated_NC),
        "reliability": reliability(scores_NC, labels_N),
        "reliability_calibrated": reliability(calibrated_NC, labels_N),
        "answers": answers,
        "sets": sets,
    }


@dataclass(frozen=True)
class Calibration:
    """What an export keeps: the temperature, and thresholds by accuracy and by coverage, in per cent."""

    temperature: float
    answers: Mapping[float, float | None]
    sets: Mapping[float, float]

    @classmethod
    def of(cls, figures: Mapping[str, Any]) -> Calibration:
        """Reads the result of `calibration_figures`. Raises ValueError for other content."""
        try:
            answers = {float(row["accuracy"]): row["threshold"] for row in figures["answers"]}
            sets = {float(row["coverage"]): float(row["threshold"]) for row in figures["sets"]}
            temperature = float(figures["temperature"])
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"no figures of a calibration ({type(error).__name__}: {error})") from None
        if not (np.isfinite(temperature) and temperature > 0):
            raise ValueError(f"temperature {temperature}: expected a number above 0")
        return cls(temperature, answers, sets)
