"""The charts of the HTML page: metrics over the epochs and reliability diagrams, as SVG drawn by matplotlib.

The SVG is part of the page. Matplotlib draws with the colours of the light scheme; each is then replaced by the CSS
variable of that name, so that the page's colour scheme applies. Names from files stand outside the picture, or in the
tooltips, and are escaped.

N points of a curve.
"""

from __future__ import annotations

import io
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from xml.etree import ElementTree

import matplotlib as mpl
import numpy as np
from markupsafe import Markup
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from matplotlib.transforms import nonsingular

from shards.text import redact_text

# Title, unit and factor of the metrics that are drawn, in order; others follow under their own names.
CURVES = {
    "loss": ("training loss", "", 1.0),
    "map": ("mean average precision", "%", 1.0),
    "f1": ("F1, mean over classes", "%", 1.0),
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
COUNTERS = {"skipped_steps", "bad_videos", "missing"}  # not drawn while they are 0
NOT_DRAWN = {"kind", "time", "step", "epoch", "videos", "best_top1"}
TOO_LARGE = 1e100  # values from here on are not drawn
MOST_DOTS = 60  # evaluations of a run that get a dot each
WIDTH, HEIGHT = 360, 214  # of a chart, in CSS pixels
SERIES = ("#2a78d6", "#c4570f", "#0f8a63", "#c2397a", "#4a3aa7", "#9a6b00", "#d13a39", "#3b7d86")
DASHES = ("solid", (0, (3, 1.5)), (0, (1, 1)))  # in line widths
# CSS variables of the page, as they are in the light scheme.
COLOURS = {"muted": "#5b6470", "grid": "#e7eaee", **{f"s{number}": colour for number, colour in enumerate(SERIES)}}
STYLE = {
    "svg.fonttype": "none",
    "svg.hashsalt": "text4vis",
    "font.family": "DejaVu Sans",
    "font.size": 11,
    "text.color": COLOURS["muted"],
    "axes.labelcolor": COLOURS["muted"],
    "axes.edgecolor": COLOURS["muted"],
    "axes.spines.left": False,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.axisbelow": True,
    "grid.color": COLOURS["grid"],
    "xtick.color": COLOURS["muted"],
    "ytick.color": COLOURS["muted"],
    "ytick.major.size": 0,
    "path.simplify_threshold": 0.5,
    "lines.linewidth": 2,
    "lines.markersize": 6,
    "lines.markeredgewidth": 0,
}  # of matplotlib; at 72 dots per inch its points are CSS pixels


@dataclass(frozen=True)
class Curve:
    """points_N2: x and y float64; a y of NaN interrupts the line. style: number of the colour and the dashes.

    name: for the legend and the tooltips of the dots. dots: whether each point gets one.
    """

    name: str
    style: int
    points_N2: np.ndarray
    dots: bool = False

    @property
    def known_N2(self) -> np.ndarray:
        """The points that have a y."""
        return self.points_N2[~np.isnan(self.points_N2[:, 1])]

    @property
    def last(self) -> float | None:
        """The last y that is known."""
        return float(self.known_N2[-1, 1]) if len(self.known_N2) else None


@dataclass(frozen=True)
class Chart:
    """A picture with its title, its unit and the curves that its legend names."""

    title: str
    unit: str
    curves: list[Curve]
    svg: Markup


def charts(runs: Mapping[str, Sequence[Mapping[str, Any]]]) -> list[Chart]:
    """One chart for each metric that a run has numbers of. runs: the records of metrics.jsonl by the run's name."""
    records = [record for run in runs.values() for record in run]
    keys = dict.fromkeys(key for record in records for key in record if key not in NOT_DRAWN)
    ordered = [key for key in CURVES if key in keys] + [key for key in keys if key not in CURVES]
    x_key = "epoch" if all(record.get("epoch") is not None for record in records) else "step"
    evaluated = {key for record in records if record["kind"] == "val" for key in record}
    drawn = []
    for key in ordered:
        title, unit, factor = CURVES.get(key, (key, "", 1.0))
        points = {name: _points(run, x_key, key) * (1.0, factor) for name, run in runs.items()}
        values = np.concatenate([points_N2[:, 1] for points_N2 in points.values()])
        if np.isnan(values).all() or (key in COUNTERS and np.nansum(values) == 0):
            continue
        curves = [
            Curve(name, number, points_N2, dots=key in evaluated)
            for number, (name, points_N2) in enumerate(points.items())
            if len(points_N2)
        ]
        drawn.append(Chart(title, unit, curves, draw(curves, x_key, f"{title} over {x_key}")))
    return drawn


def reliability_chart(run: str, number: int, calibration: Mapping[str, Any]) -> Chart:
    """How often answers of each confidence are right, before and after the temperature; on the diagonal it is as often
    as the confidence promises.

    calibration: of a report, see `evaluation.calibration`. number: of the run, which decides the colour.
    """
    colour, dotted = number % len(SERIES), 2 * len(SERIES)
    curves = [
        Curve(name, style, np.array([[row["confidence"], row["accuracy"]] for row in calibration[key]]), dots=True)
        for name, style, key in (
            (f"before: ECE {calibration['ece']:.1f} %", colour + dotted, "reliability"),
            (
                f"at temperature {calibration['temperature']:.2f}: ECE {calibration['ece_calibrated']:.1f} %",
                colour,
                "reliability_calibrated",
            ),
        )
    ]
    svg = draw(curves, "confidence, %", f"{run}: accuracy over confidence", diagonal=True)
    return Chart(run, "accuracy, %", curves, svg)


def _points(records: Sequence[Mapping[str, Any]], x_key: str, key: str) -> np.ndarray:
    """(N, 2) float64 of the records that have this metric; y is NaN where it cannot be drawn."""
    pairs = [(record[x_key], math.nan if record[key] is None else record[key]) for record in records if key in record]
    points_N2 = np.array(pairs, float).reshape(-1, 2)
    points_N2[~(np.abs(points_N2) < TOO_LARGE).all(axis=1), 1] = math.nan
    return points_N2


def draw(curves: Sequence[Curve], x_label: str, description: str, *, diagonal: bool = False) -> Markup:
    """An `svg` element, WIDTH by HEIGHT, the same bytes each time. description: for those who do not see the picture.

    At least one point must have a y. diagonal: the line from (0, 0) to (100, 100), which then sets the limits.
    """
    known_N2 = np.concatenate(
        [np.array([[0, 0], [100, 100]]) if diagonal else np.empty((0, 2)), *(curve.known_N2 for curve in curves)]
    )
    x_ticks = _ticks(0, known_N2[:, 0].max())
    y_ticks = _ticks(known_N2[:, 1].min(), known_N2[:, 1].max())
    stream = io.BytesIO()
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(WIDTH / 72, HEIGHT / 72), dpi=72, layout="constrained")
        axes = figure.subplots()
        axes.set(xticks=x_ticks, yticks=y_ticks, xlim=x_ticks[[0, -1]], ylim=y_ticks[[0, -1]])
        if diagonal:
            axes.plot([0, 100], [0, 100], color=COLOURS["muted"], linewidth=1)
        for number, curve in enumerate(curves):
            colour, dashes = SERIES[curve.style % len(SERIES)], DASHES[curve.style // len(SERIES) % len(DASHES)]
            axes.plot(*curve.points_N2.T, color=colour, linestyle=dashes, gid=f"curve_{number}", clip_on=False)
            axes.plot(*_dots(curve).T, "o", color=colour, gid=f"dots_{number}", clip_on=False)
        axes.xaxis.set_major_formatter("{x:.6g}")
        axes.yaxis.set_major_formatter("{x:.6g}")
        axes.set_xlabel(x_label, loc="right")
        axes.patch.set_visible(False)
        figure.patch.set_visible(False)
        figure.savefig(stream, format="svg", metadata={"Date": None})
    return _inline(stream.getvalue(), curves, x_label, description)


def _ticks(low: float, high: float) -> np.ndarray:
    """Round numbers from at most `low` to at least `high`, two or more."""
    is_zero = max(abs(low), abs(high)) < 1 / TOO_LARGE  # below about 1e-287 matplotlib's ticks fall together
    low, high = (0.0, 1.0) if is_zero else nonsingular(low, high, expander=0.1, tiny=1e-5)
    return np.asarray(MaxNLocator(5, steps=[1, 2, 2.5, 5, 10], min_n_ticks=2).tick_values(low, high))


def _dots(curve: Curve) -> np.ndarray:
    """(N, 2): the points that get a dot; a single point always does, for no line shows it."""
    known_N2 = curve.known_N2
    return known_N2 if len(known_N2) == 1 or (curve.dots and len(known_N2) <= MOST_DOTS) else known_N2[:0]


def _inline(file: bytes, curves: Sequence[Curve], x_label: str, description: str) -> Markup:
    """Matplotlib's SVG file as an element of a page: classes for ids, tooltips on the dots, colours of the page."""
    text = file.decode()
    for name, colour in COLOURS.items():
        text = text.replace(colour, f"var(--{name})")
    root = ElementTree.fromstring(text)  # noqa: S314 matplotlib wrote it
    for element in root.iter():
        element.tag = element.tag.rpartition("}")[2]
        element.attrib = {
            key.rpartition("}")[2]: re.sub(r"\d+\.\d+", lambda number: f"{float(number[0]):.1f}", value)
            for key, value in element.items()
            if key not in ("clip-path", "transform")  # nothing lies outside the axes, no text is turned
        }
    for number, curve in enumerate(curves):
        dots = root.iterfind(f".//g[@id='dots_{number}']//use")
        for dot, (x, y) in zip(dots, _dots(curve), strict=True):
            ElementTree.SubElement(dot, "title").text = redact_text(f"{curve.name}, {x_label} {x:g}: {y:.6g}")
    for group in root.iter("g"):
        if "id" in group.attrib:
            group.set("class", re.sub(r"_\d+$", "", group.attrib.pop("id")))
    for child in [child for child in root if child.tag != "g"]:  # a style sheet for the whole page, among others
        root.remove(child)
    root.attrib = {"class": "plot", "viewBox": root.attrib["viewBox"], "role": "img",
                   "aria-label": redact_text(description)}  # fmt: skip
    return Markup(ElementTree.tostring(root, encoding="unicode"))  # noqa: S704 ElementTree escaped the texts
