"""Compares two reports of `evaluate.py`, and gives the mean and deviation of many.

Shares are in per cent; a difference is B - A.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, NonNegativeInt, PositiveInt, ValidationError

from text4vis.config.schema import ConfigError

Report = Mapping[str, Any]

# Keys of the protocol card that must be equal for two figures to be comparable. The others may be what is compared.
PROTOCOL = (
    "data_fingerprint", "videos", "skipped", "classes_fingerprint", "classes", "classifier", "template",
    "views.clips", "views.crops", "views.sampling", "views.fusion",
)  # fmt: skip
FIGURES = ("top1", "top5", "mean_class_accuracy", "map", "f1", "f1_micro")
SPLIT_FIGURES = ("top1_mean", "top5_mean")
# Keys of a report that are neither settings nor single figures.
CONTENT = (
    "date", "model", "step", "top1_correct", "top5_correct", "chance", "not_finite", "calibration", "decision",
    "per_class", "confusion", "predictions",
)  # fmt: skip
# Classifiers whose class embeddings do not depend on the template.
WORDLESS = ("random", "orthogonal", "lda", "file", "trained")


class _Checked(BaseModel):
    model_config = ConfigDict(strict=True)


class _ClassRow(_Checked):
    name: str = Field(alias="class")
    videos: NonNegativeInt
    correct: NonNegativeInt
    average_precision: float | None = None


class _ViewsRow(_Checked):
    clips: int
    crops: int
    top1: float


class _Split(_Checked):
    name: str


class _Splits(_Checked):
    top1_mean: float
    top5_mean: float
    splits: list[_Split]


class _Predictions(_Checked):
    labels: list[NonNegativeInt] | list[list[NonNegativeInt]]
    said: list[list[NonNegativeInt]] = []
    predicted: list[NonNegativeInt]
    probability: list[float | None]
    label_probability: list[float | None]


class _Skipped(_Checked):
    id: NonNegativeInt


Percent = Annotated[float, Field(ge=0, le=100)]


class _Bin(_Checked):
    videos: PositiveInt
    confidence: Percent
    accuracy: Percent


class _Calibration(_Checked):
    temperature: Annotated[float, Field(gt=0, allow_inf_nan=False)]
    ece: Percent
    ece_calibrated: Percent
    ece_of_chance: Percent | None = None  # older reports have none
    reliability: Annotated[list[_Bin], Field(min_length=1)]
    reliability_calibrated: Annotated[list[_Bin], Field(min_length=1)]


class _Decision(_Checked):
    slope: Annotated[float, Field(gt=0, allow_inf_nan=False)]
    intercept: Annotated[float, Field(allow_inf_nan=False)]
    thresholds: list[Annotated[float, Field(ge=0, le=1)]]


class _Report(_Checked):
    """The parts of a report that this package calculates with."""

    videos: Annotated[PositiveInt, Field(le=2**53)]  # beyond, floats skip integers
    top1: float
    top1_correct: NonNegativeInt
    top5: float | None = None
    f1: float | None = None
    f1_micro: float | None = None
    mean_class_accuracy: float | None = None
    map: float | None = None
    skipped: list[_Skipped] = []
    views: dict[str, Any] = {}
    pixels: dict[str, Any] = {}
    by_views: list[_ViewsRow] = []
    half_classes: _Splits | None = None
    class_splits: _Splits | None = None
    calibration: _Calibration | None = None
    decision: _Decision | None = None
    per_class: list[_ClassRow]
    confusion: list[list[NonNegativeInt]] = []
    predictions: _Predictions | None = None


@dataclass(frozen=True)
class Significance:
    """Videos that only A or only B recognises, and the two-sided p of McNemar's exact test."""

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
    """A figure that both reports hold."""

    name: str
    a: float
    b: float
    difference: float


@dataclass(frozen=True)
class ClassFigure(Figure):
    """The `class_share` of a class. videos: of the class in report A."""

    videos: int


@dataclass(frozen=True)
class Confusion:
    """How many videos of a class each report takes for another class. videos: of the class in report A."""

    name: str
    taken_for: str
    a: int
    b: int
    videos: int


@dataclass(frozen=True)
class Comparison:
    """The differences between two reports, A and B.

    protocol: differing settings that make the figures incomparable. settings: the other settings that differ.
    classes: the classes of both reports, the largest gain first; for the same videos, classes with different wording
    count as one. confused: pairs of classes, the most often confused first. intervals: (low, high) of the top-1 of A
    and of B, 95 % (Wilson).
    significance: of the difference in top-1; None unless both list their predictions for the same videos.
    """

    figures: list[Figure]
    protocol: list[Setting]
    settings: list[Setting]
    classes: list[ClassFigure]
    confused: list[Confusion]
    intervals: tuple[tuple[float, float], tuple[float, float]]
    significance: Significance | None

    @property
    def is_comparable(self) -> bool:
        """Whether both reports were made by one protocol."""
        return not self.protocol


def read_report(path: Path) -> dict[str, Any]:
    """Reads a report file, or the report.json of a run's folder. Raises ConfigError if it is missing, no report, or
    damaged."""
    path = path / "report.json" if path.is_dir() else path
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        reason = (isinstance(error, OSError) and error.strerror) or error
        raise ConfigError(f"{path}: not a readable report ({reason})") from None
    if not isinstance(content, dict) or not {"videos", "top1", "top1_correct", "per_class"} <= content.keys():
        raise ConfigError(f"{path}: not a report of an evaluation; text4vis/evaluate.py --report writes one")
    try:
        report = _Report.model_validate(content)
        too_many = [report.top1_correct > report.videos, *(row.correct > row.videos for row in report.per_class)]
        if any(too_many):
            raise ValueError("more videos are right than there are")
        sides = {len(report.confusion), *map(len, report.confusion)}
        if report.confusion and sides != {len(report.per_class)}:
            raise ValueError("confusion: not a row and a column for each class")
        if one := report.predictions:
            columns = [
                one.labels,
                one.predicted,
                one.probability,
                one.label_probability,
                *([one.said] if one.said else []),
            ]
            if len(set(map(len, columns))) > 1:
                raise ValueError("predictions: columns of unequal length")
            named = [label for entry in [*one.labels, *one.said] for label in labels_in(entry)]
            if max([*named, *one.predicted], default=0) >= len(report.per_class):
                raise ValueError("predictions: a class that is not in per_class")
        if report.decision and len(report.decision.thresholds) != len(report.per_class):
            raise ValueError("decision: not a threshold for each class")
    except ValidationError as error:
        first = error.errors()[0]
        raise _damaged(path, f"{'.'.join(map(str, first['loc']))}: {first['msg']}") from None
    except ValueError as error:
        raise _damaged(path, str(error)) from None
    return content


def labels_in(entry: int | list[int]) -> list[int]:
    """The labels of a video in a report's predictions: one, or a list of several or none."""
    return entry if isinstance(entry, list) else [entry]


def class_share(row: Mapping[str, Any]) -> float:
    """What tells in per cent how well a class is recognised, from its row of `per_class`: the share of its videos that
    are right, or its average precision where videos have several labels. The class has videos."""
    known = row.get("average_precision")
    return 100 * row["correct"] / row["videos"] if known is None else known


def _damaged(path: Path, reason: str) -> ConfigError:
    return ConfigError(f"{path}: not a sound report ({reason}); text4vis/evaluate.py --report writes it again")


def compare(a: Report, b: Report) -> Comparison:
    """Compares two reports: protocols, settings, figures, classes, confused pairs, McNemar's test."""
    a, b = _with_common_names(a, b)
    card_a, card_b = card_of(a), card_of(b)
    settings = [Setting(key, card_a.get(key), card_b.get(key)) for key in dict.fromkeys([*card_a, *card_b])]
    differing = [setting for setting in settings if setting.a != setting.b]
    wordless = card_a.get("classifier") in WORDLESS and card_b.get("classifier") in WORDLESS
    decisive = [key for key in PROTOCOL if not (key == "template" and wordless)]
    of_b = figures_of(b)
    return Comparison(
        figures=[Figure(name, x, of_b[name], of_b[name] - x) for name, x in figures_of(a).items() if name in of_b],
        protocol=[setting for setting in differing if setting.key in decisive],
        settings=[setting for setting in differing if setting.key not in decisive],
        classes=_classes(a, b),
        confused=_confused(a, b),
        intervals=(wilson_interval(a["top1_correct"], a["videos"]), wilson_interval(b["top1_correct"], b["videos"])),
        significance=_significance(a, b),
    )


def summarise(reports: Sequence[Report]) -> dict[str, tuple[float, float]]:
    """{figure: (mean, population standard deviation)} over the reports, for the figures that all of them hold."""
    each = [figures_of(report) for report in reports]
    columns = {name: [figures[name] for figures in each] for name in each[0] if all(name in one for one in each)}
    return {name: (float(np.mean(column)), float(np.std(column))) for name, column in columns.items()}


def wilson_interval(correct: int, videos: int) -> tuple[float, float]:
    """(low, high) in per cent: Wilson's 95 % interval of `correct / videos`. videos: at least 1."""
    from scipy.stats import binomtest  # imported here: it takes most of a second

    interval = binomtest(correct, videos).proportion_ci(0.95, method="wilson")
    return 100 * float(interval.low), 100 * float(interval.high)


def mcnemar(only_a: int, only_b: int) -> float:
    """Exact two-sided p of McNemar's test: the probability that a fair coin splits the videos at least this unevenly.

    It is 1 if there are none.
    """
    from scipy.stats import binomtest

    trials = only_a + only_b
    return float(binomtest(only_a, trials).pvalue) if trials else 1.0


def figures_of(report: Report) -> dict[str, float]:
    """{name: value} of all figures of a report; the name includes the protocol."""
    figures = {name: report.get(name) for name in FIGURES}
    for row in report.get("by_views", []):
        figures[f"top1, {row['clips']} x {row['crops']} views"] = row["top1"]
    for key in ("half_classes", "class_splits"):
        if over := report.get(key):
            names = "" if key == "half_classes" else f" ({', '.join(split['name'] for split in over['splits'])})"
            figures |= {f"{name}, {key}{names}": over[name] for name in SPLIT_FIGURES}
    return {name: value for name, value in figures.items() if value is not None}


def card_of(report: Report) -> dict[str, Any]:
    """The settings of a report with dotted keys for sections; `skipped` lists the ids of the videos left out."""
    skipped = {*CONTENT, *FIGURES, "by_views", "half_classes", "class_splits"}
    card: dict[str, Any] = {}
    for key, value in report.items():
        if isinstance(value, Mapping) and key not in skipped:
            card |= {f"{key}.{inner}": inner_value for inner, inner_value in value.items()}
        elif key == "skipped":
            card |= {key: [entry["id"] for entry in value]} if value else {}
        elif key not in skipped:
            card[key] = value
    return card


def _with_common_names(a: Report, b: Report) -> tuple[Report, Report]:
    """If both reports are of the same videos, renames differently worded classes to "wording of A -> wording of B"."""
    rows = a["per_class"], b["per_class"]
    videos = a.get("data_fingerprint"), b.get("data_fingerprint")
    if None in videos or videos[0] != videos[1] or len(rows[0]) != len(rows[1]):
        return a, b
    known = [{row["class"] for row in of_one} for of_one in rows]
    names = [(x["class"], y["class"]) for x, y in zip(*rows, strict=True)]
    joined = [f"{x} -> {y}" if x not in known[1] and y not in known[0] else None for x, y in names]
    renamed = [
        [{**row, "class": new or row["class"]} for row, new in zip(of_one, joined, strict=True)] for of_one in rows
    ]
    return {**a, "per_class": renamed[0]}, {**b, "per_class": renamed[1]}


def _classes(a: Report, b: Report) -> list[ClassFigure]:
    of_b = {row["class"]: row for row in b["per_class"]}
    changes = []
    for row in a["per_class"]:
        other = of_b.get(row["class"], {"videos": 0})
        if row["videos"] and other["videos"]:
            x, y = class_share(row), class_share(other)
            changes.append(ClassFigure(row["class"], x, y, y - x, row["videos"]))
    return sorted(changes, key=lambda change: -change.difference)


def confusions(report: Report) -> list[tuple[str, str, int, int]]:
    """[(class, predicted class, how often, videos of the class)], the most frequent confusion first."""
    rows = report["per_class"]
    pairs = [
        (rows[true]["class"], rows[predicted]["class"], times, rows[true]["videos"])
        for true, counts in enumerate(report.get("confusion", []))
        for predicted, times in enumerate(counts)
        if times and true != predicted
    ]
    return sorted(pairs, key=lambda pair: -pair[2])


def _confused(a: Report, b: Report) -> list[Confusion]:
    videos = {one.name: one.videos for one in _classes(a, b)}
    of_a, of_b = Counter[tuple[str, str]](), Counter[tuple[str, str]]()
    for counts, report in ((of_a, a), (of_b, b)):
        for name, other, times, _ in confusions(report):
            counts[name, other] += times
    pairs = [
        Confusion(name, other, of_a[name, other], of_b[name, other], videos[name])
        for name, other in dict.fromkeys([*of_a, *of_b])
        if name in videos
    ]
    return sorted(pairs, key=lambda pair: -max(pair.a, pair.b))


def _significance(a: Report, b: Report) -> Significance | None:
    ours, theirs = a.get("predictions"), b.get("predictions")
    same_videos = all(card_of(a).get(key) == card_of(b).get(key) for key in ("data_fingerprint", "skipped"))
    if not (ours and theirs and same_videos and ours["labels"] == theirs["labels"]):
        return None
    outcomes = list(zip(_right(ours), _right(theirs), strict=True))
    only_a, only_b = outcomes.count((True, False)), outcomes.count((False, True))
    return Significance(only_a, only_b, mcnemar(only_a, only_b))


def _right(predictions: Mapping[str, Any]) -> list[bool]:
    """Whether each video is right; one without a probability had no finite scores and is wrong."""
    columns = zip(predictions["labels"], predictions["predicted"], predictions["probability"], strict=True)
    return [predicted in labels_in(entry) and probability is not None for entry, predicted, probability in columns]
