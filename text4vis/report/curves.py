"""The records of training runs as charts: which metric, where its lines and ticks lie, in the units of a picture.

Pure: what draws them is the template of `report.py`. Imports nothing of text4vis.

N points of a curve.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.ticker import MaxNLocator
from matplotlib.transforms import nonsingular

# Title, unit and factor of the metrics that are drawn, in order; others follow under their own names.
CURVES = {
    "loss": ("training loss", "", 1.0),
    "top1": ("top-1", "%", 1.0),
    "top5": ("top-5", "%", 1.0),
    "mean_class_accuracy": ("mean class accuracy", "%", 1.0),
    "lr_head": ("learning rate, head", "", 1.0),
    "lr_clip": ("learning rate, CLIP", "", 1.0),
    "videos_per_second": ("speed", "videos/s", 1.0),
    "data_wait_share": ("waiting for data", "% of the time", 100.0),
    "step_seconds": ("time of a step", "s", 1.0),
    "memory_bytes": ("peak memory, all ranks", "GB", 1e-9),
    "gpu_utilisation": ("GPU utilisation", "%", 100.0),
    "grad_norm": ("gradient norm", "", 1.0),
    "logit_scale": ("logit scale", "", 1.0),
    "skipped_steps": ("skipped steps", "", 1.0),
    "bad_videos": ("videos that could not be used", "", 1.0),
    "missing": ("videos left out of the evaluation", "", 1.0),
}
COUNTERS = {"skipped_steps", "bad_videos", "missing"}  # of what goes wrong: not drawn where nothing did
NOT_DRAWN = {"kind", "time", "step", "epoch", "videos", "best_top1"}
TOO_LARGE = 1e100  # to be drawn
MOST_DOTS = 60  # evaluations of a run that get a dot each
MOST_POINTS = 400  # of a curve; of more, the extremes of each stretch are kept
WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 360, 214, 54, 10, 8, 36  # of a chart and its margins, in its own units


@dataclass(frozen=True)
class Curve:
    """One run in a chart: polylines and dots (x, y, what they stand for) in the chart's units; last: its last value."""

    run: int
    lines: list[str]
    dots: list[tuple[float, float, str]]
    last: float | None


@dataclass(frozen=True)
class Chart:
    """A metric over the epochs. Ticks: (place in the chart's units, label)."""

    title: str
    unit: str
    x_label: str
    x_ticks: list[tuple[float, str]]
    y_ticks: list[tuple[float, str]]
    curves: list[Curve]


def charts(runs: Sequence[Sequence[Mapping[str, Any]]]) -> list[Chart]:
    """One chart for each metric that a run has numbers of. runs: the records of each one's metrics.jsonl."""
    keys = dict.fromkeys(key for run in runs for record in run for key in record if key not in NOT_DRAWN)
    ordered = [key for key in CURVES if key in keys] + [key for key in keys if key not in CURVES]
    x_key = "epoch" if all(record.get("epoch") is not None for run in runs for record in run) else "step"
    evaluated = {key for run in runs for record in run if record["kind"] == "val" for key in record}
    drawn = []
    for key in ordered:
        points = [_points(run, x_key, key) for run in runs]
        values = np.concatenate([points_N2[:, 1] for points_N2 in points])
        if not np.isnan(values).all() and not (key in COUNTERS and np.nansum(values) == 0):
            title, unit, factor = CURVES.get(key, (key, "", 1.0))
            scaled = [points_N2 * (1.0, factor) for points_N2 in points]
            drawn.append(_chart(title, unit, x_key, scaled, dots=key in evaluated))
    return drawn


def _points(records: Sequence[Mapping[str, Any]], x_key: str, key: str) -> np.ndarray:
    """(N, 2) float64 of the records that have this metric; what cannot be drawn is NaN."""
    pairs = [(record[x_key], math.nan if record[key] is None else record[key]) for record in records if key in record]
    points_N2 = np.array(pairs, float).reshape(-1, 2)
    points_N2[~(np.abs(points_N2) < TOO_LARGE).all(axis=1), 1] = math.nan
    return points_N2


def _chart(title: str, unit: str, x_label: str, points: Sequence[np.ndarray], *, dots: bool) -> Chart:
    finite_N2 = np.concatenate([points_N2[~np.isnan(points_N2[:, 1])] for points_N2 in points])
    x_ticks = _ticks(0, finite_N2[:, 0].max())
    y_ticks = _ticks(finite_N2[:, 1].min(), finite_N2[:, 1].max())
    (x_low, x_high), (y_low, y_high) = x_ticks[[0, -1]], y_ticks[[0, -1]]

    def place(points_N2: np.ndarray) -> np.ndarray:
        shares_N2 = (points_N2 - (x_low, y_low)) / (x_high - x_low, y_high - y_low)
        return (LEFT, HEIGHT - BOTTOM) + shares_N2 * (WIDTH - LEFT - RIGHT, TOP + BOTTOM - HEIGHT)

    curves = []
    for number, points_N2 in enumerate(points):
        if len(points_N2):
            stretches = np.ma.clump_unmasked(np.ma.masked_invalid(points_N2[:, 1]))
            lines = [" ".join(f"{x:.1f},{y:.1f}" for x, y in place(_thinned(points_N2[part]))) for part in stretches]
            known = points_N2[~np.isnan(points_N2[:, 1])]
            dotted = known if len(known) == 1 or (dots and len(known) <= MOST_DOTS) else known[:0]
            spots = [
                (*spot, f"{x_label} {x:g}: {y:.6g}")
                for spot, (x, y) in zip(place(dotted).round(1).tolist(), dotted.tolist(), strict=True)
            ]
            curves.append(Curve(number, lines, spots, float(known[-1, 1]) if len(known) else None))
    return Chart(
        title,
        unit,
        x_label,
        [(float(place(np.array([[x, y_low]]))[0, 0]), f"{x:.6g}") for x in x_ticks],
        [(float(place(np.array([[x_low, y]]))[0, 1]), f"{y:.6g}") for y in y_ticks],
        curves,
    )


def _ticks(low: float, high: float) -> np.ndarray:
    """Round numbers from at most `low` to at least `high`, two or more."""
    low, high = (0.0, 1.0) if low == high == 0 else nonsingular(low, high, expander=0.1, tiny=1e-5)
    return np.asarray(MaxNLocator(nbins=5, min_n_ticks=2).tick_values(low, high))


def _thinned(points_N2: np.ndarray) -> np.ndarray:
    """At most about MOST_POINTS of the points: of each stretch the first, the last, the lowest and the highest."""
    if len(points_N2) <= MOST_POINTS:
        return points_N2
    kept: set[int] = set()
    for part in np.array_split(np.arange(len(points_N2)), MOST_POINTS // 4):
        values = points_N2[part, 1]
        kept |= {int(part[0]), int(part[-1]), int(part[values.argmin()]), int(part[values.argmax()])}
    return points_N2[sorted(kept)]
