"""Two evaluation reports side by side, and many as mean and deviation. Plain Python on what `evaluate.py` writes.

Shares are in per cent; a difference is B - A.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from text4vis.config import ConfigError

Report = Mapping[str, Any]

# What must be equal for two figures to measure the same thing. The rest of the card may be what is compared.
PROTOCOL = (
    "data_fingerprint", "videos", "classes_fingerprint", "classes", "classifier", "template",
    "views.clips", "views.crops", "views.sampling", "views.fusion",
)  # fmt: skip
FIGURES = ("top1", "top5", "mean_class_accuracy", "map")
SPLIT_FIGURES = ("top1_mean", "top5_mean")
# Neither settings nor figures of one line.
CONTENT = ("date", "model", "step", "top1_correct", "top5_correct", "chance", "per_class", "confusion", "predictions")


@dataclass(frozen=True)
class Significance:
    """Videos that only A or only B recognises, and McNemar's exact two-sided p that chance alone divides them so."""

    only_a: int
    only_b: int
    p: float


@dataclass(frozen=True)
class Setting:
    """A key of the protocol cards that differs; None where a report does not have it."""

    key: str
    a: Any
    b: Any


@dataclass(frozen=True)
class Figure:
    """A figure that both reports have."""

    name: str
    a: float
    b: float
    difference: float


@dataclass(frozen=True)
class ClassFigure(Figure):
    """The share of a class that is right. videos: of the class in report A."""

    videos: int


@dataclass(frozen=True)
class Comparison:
    """What two reports, A and B, have to say about each other.

    protocol: settings that differ so that the figures do not measure the same thing. settings: the others that differ.
    classes: those that both have, the largest gain first. intervals: (low, high) of the top-1 of A and of B, 95 %
    (Wilson). significance: of the difference in top-1; None unless both list their predictions for the same videos.
    """

    figures: list[Figure]
    protocol: list[Setting]
    settings: list[Setting]
    classes: list[ClassFigure]
    intervals: tuple[tuple[float, float], tuple[float, float]]
    significance: Significance | None

    @property
    def is_comparable(self) -> bool:
        return not self.protocol


def read_report(path: Path) -> dict[str, Any]:
    """Raises ConfigError for a file that is no report of an evaluation."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path}: not a readable report ({error})") from None
    if not isinstance(content, dict) or not {"videos", "top1", "top1_correct", "per_class"} <= content.keys():
        raise ConfigError(f"{path}: not a report of an evaluation; text4vis/evaluate.py --report writes one")
    return content


def compare(a: Report, b: Report) -> Comparison:
    card_a, card_b = _card(a), _card(b)
    settings = [Setting(key, card_a.get(key), card_b.get(key)) for key in dict.fromkeys([*card_a, *card_b])]
    differing = [setting for setting in settings if setting.a != setting.b]
    of_b = _figures(b)
    return Comparison(
        figures=[Figure(name, x, of_b[name], of_b[name] - x) for name, x in _figures(a).items() if name in of_b],
        protocol=[setting for setting in differing if setting.key in PROTOCOL],
        settings=[setting for setting in differing if setting.key not in PROTOCOL],
        classes=_classes(a, b),
        intervals=(wilson_interval(a["top1_correct"], a["videos"]), wilson_interval(b["top1_correct"], b["videos"])),
        significance=_significance(a, b),
    )


def summarise(reports: Sequence[Report]) -> dict[str, tuple[float, float]]:
    """(mean, standard deviation of the population) of each figure that all reports have, over the reports."""
    each = [_figures(report) for report in reports]
    columns = {name: [figures[name] for figures in each] for name in each[0] if all(name in one for one in each)}
    return {name: (float(np.mean(column)), float(np.std(column))) for name, column in columns.items()}


def wilson_interval(correct: int, videos: int) -> tuple[float, float]:
    """Wilson's 95 % interval of a share, per cent."""
    z = 1.959964
    centre = correct + z * z / 2
    half = z * math.sqrt(correct * (videos - correct) / videos + z * z / 4)
    return 100 * (centre - half) / (videos + z * z), 100 * (centre + half) / (videos + z * z)


def mcnemar(only_a: int, only_b: int) -> float:
    """Exact two-sided p of McNemar's test: a fair coin divides only_a + only_b videos at least this unevenly."""
    trials, fewer = only_a + only_b, min(only_a, only_b)
    ways, total = 1, 1
    for k in range(fewer):
        ways = ways * (trials - k) // (k + 1)
        total += ways
    return min(1.0, 2 * total / 2**trials)


def _figures(report: Report) -> dict[str, float]:
    """Every figure of a report by a name that says its protocol."""
    figures = {name: report.get(name) for name in FIGURES}
    for row in report.get("by_views", []):
        figures[f"top1, {row['clips']} x {row['crops']} views"] = row["top1"]
    for key in ("half_classes", "class_splits"):
        if over := report.get(key):
            names = "" if key == "half_classes" else f" ({', '.join(split['name'] for split in over['splits'])})"
            figures |= {f"{name}, {key}{names}": over[name] for name in SPLIT_FIGURES}
    return {name: value for name, value in figures.items() if value is not None}


def _card(report: Report) -> dict[str, Any]:
    """The settings of a report, sections flattened to dotted keys."""
    skipped = {*CONTENT, *FIGURES, "by_views", "half_classes", "class_splits"}
    card: dict[str, Any] = {}
    for key, value in report.items():
        if isinstance(value, Mapping) and key not in skipped:
            card |= {f"{key}.{inner}": inner_value for inner, inner_value in value.items()}
        elif key not in skipped:
            card[key] = value
    return card


def _classes(a: Report, b: Report) -> list[ClassFigure]:
    of_b = {row["class"]: row for row in b["per_class"]}
    changes = []
    for row in a["per_class"]:
        other = of_b.get(row["class"], {"videos": 0})
        if row["videos"] and other["videos"]:
            x, y = (100 * one["correct"] / one["videos"] for one in (row, other))
            changes.append(ClassFigure(row["class"], x, y, y - x, row["videos"]))
    return sorted(changes, key=lambda change: -change.difference)


def _significance(a: Report, b: Report) -> Significance | None:
    ours, theirs = a.get("predictions"), b.get("predictions")
    same_videos = a.get("data_fingerprint") == b.get("data_fingerprint")
    if not (ours and theirs and same_videos and ours["labels"] == theirs["labels"]):
        return None
    pairs = zip(ours["labels"], ours["predicted"], theirs["predicted"], strict=True)
    outcomes = [(label == x, label == y) for label, x, y in pairs]
    only_a, only_b = outcomes.count((True, False)), outcomes.count((False, True))
    return Significance(only_a, only_b, mcnemar(only_a, only_b))
