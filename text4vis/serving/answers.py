"""What a model answers about a video. T frames, S side of the model's input, C classes, W windows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np


@dataclass(frozen=True)
class Prediction:
    """top: (class name, probability), the likeliest first. indices: (T,) frame numbers; frames: (T, S, S, 3) uint8.

    calibrated: whether the probabilities use a temperature that an evaluation fitted. sure: whether the answer is
    confident enough for the `accuracy` that was given. candidates: class names, likeliest first, one of which is right
    as often as the `coverage` that was given. Both are None if nothing was given. present: for a model of several
    labels a video, (class name, probability) of all classes whose probability reaches their threshold, likeliest first;
    else None.
    """

    top: list[tuple[str, float]]
    indices: np.ndarray
    frames: np.ndarray = field(repr=False)
    calibrated: bool = False
    sure: bool | None = None
    candidates: list[str] | None = None
    present: list[tuple[str, float]] | None = None


@dataclass(frozen=True)
class Timeline:
    """A long video, window by window: seconds_W2 (start, end), scores_WC probabilities, thumbnails (S, S, 3)."""

    class_names: list[str]
    seconds_W2: np.ndarray
    scores_WC: np.ndarray
    thumbnails: list[np.ndarray]

    def top(self, window: int, count: int = 5) -> list[tuple[str, float]]:
        """The likeliest classes of one window."""
        return likeliest_of(self.class_names, self.scores_WC[window], count)


def likeliest_of(names: Sequence[str], scores_C: np.ndarray, count: int) -> list[tuple[str, float]]:
    """(class name, probability) of the `count` likeliest of the classes' probabilities (C,), the likeliest first."""
    return [(names[c], float(scores_C[c])) for c in np.argsort(-scores_C, kind="stable")[:count]]


def reaching(names: Sequence[str], scores_C: np.ndarray, from_C: np.ndarray) -> list[tuple[str, float]]:
    """The same of all classes whose probability reaches their own threshold in `from_C`."""
    reached = int((scores_C >= from_C).sum())
    chosen_C = np.where(scores_C >= from_C, scores_C, -1.0)
    return likeliest_of(names, chosen_C, reached)
