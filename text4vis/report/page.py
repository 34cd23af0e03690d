"""Training runs compared on one page of HTML that stands alone: no script, no network, no other file.

    a run's config.yaml, metrics.jsonl, report.json ...  ->  Run  ->  curves, tables, example frames  ->  report.html.j2

The files are untrusted. The template escapes every text, `redact_text` removes control characters and credentials from
it first, and `read_runs` checks every number that is calculated with.

Differences are taken against the first run that has a report, the reference. S is the side of a frame in pixels.
"""

from __future__ import annotations

import base64
import io
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from operator import attrgetter
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from markupsafe import Markup
from PIL import Image

from shards.format import ShardError
from shards.text import redact_text
from text4vis.common.templates import html_templates
from text4vis.config.keys import schema
from text4vis.config.loading import config_from_dict, load_config
from text4vis.config.retired import EARLIER
from text4vis.config.schema import Config, ConfigError
from text4vis.evaluation.comparison import (
    Comparison,
    card_of,
    class_share,
    compare,
    confusions,
    figures_of,
    labels_in,
    read_report,
    wilson_interval,
)
from text4vis.evaluation.protocols import is_multi_label
from text4vis.report.curves import COLOURS, charts, reliability_chart

REPORT, METRICS, CONFIG = "report.json", "metrics.jsonl", "config.yaml"
FRAME_SIDE = 112  # pixels of a frame on the page, at most
FINGERPRINTS = ("fingerprint", "weights", "class_embeddings")  # ends of keys whose values are long hashes


@dataclass(frozen=True)
class Run:
    """The contents of a run's files.

    config: config.yaml. train, val: the records of metrics.jsonl. report: report.json, None if nothing was evaluated.
    others: further reports in the folder, by file name. notes: remarks for the reader about missing or damaged files.
    For a single report without a run, only `report` is set.
    """

    name: str
    path: Path
    config: Config | None = None
    train: list[dict[str, Any]] = field(default_factory=list)
    val: list[dict[str, Any]] = field(default_factory=list)
    report: dict[str, Any] | None = None
    others: dict[str, dict[str, Any]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class PredictionRow:
    """A run's prediction for a video, probabilities in per cent or None. right: it is the true class, or one of them.

    said: the classes above their thresholds, where videos may have several; None where they have one.
    """

    run: int
    class_name: str
    probability: float | None
    label_probability: float | None
    right: bool
    said: str | None = None


@dataclass(frozen=True)
class Example:
    """A video with its frames as `data:` addresses and the predictions of the runs that were evaluated on it."""

    video: str
    label: str
    frames: list[Markup]
    predictions: list[PredictionRow]


@dataclass(frozen=True)
class Examples:
    """One run's right and wrong predictions with the highest probability, or in `missing` why they cannot be shown."""

    right: list[Example] = field(default_factory=list)
    wrong: list[Example] = field(default_factory=list)
    missing: str = ""


def read_runs(paths: Sequence[Path]) -> list[Run]:
    """Reads run folders, or single report files of evaluate.py, in the given order; each gets a name of its own.

    Raises ConfigError for a file that is missing or damaged.
    """
    tails = [path.resolve().parts[1:] for path in paths]
    depth = next(
        (n for n in range(1, max(map(len, tails), default=1)) if len({tail[-n:] for tail in tails}) == len(tails)), 1
    )
    return [_read_run(path, "/".join(tail[-depth:])) for path, tail in zip(paths, tails, strict=True)]


def _read_run(path: Path, name: str) -> Run:
    if path.is_file():
        return Run(name, path, report=read_report(path), notes=["a single report: no curves, settings or frames"])
    if not path.is_dir():
        raise ConfigError(f"{path}: no such folder; name the --output folder of a training run")
    config = load_config(path / CONFIG)
    train, val, notes = _read_metrics(path / METRICS)
    report = read_report(path / REPORT) if (path / REPORT).exists() else None
    if report is None:
        notes.append(f"not evaluated yet: there is no {REPORT}")
    others = {}
    for file in sorted(path.glob("*.json")):
        if file.name != REPORT:
            try:
                others[file.name] = read_report(file)
            except ConfigError as error:
                notes.append(f"left out: {error}")
    return Run(name, path, config, train, val, report, others, notes)


def _read_metrics(path: Path) -> tuple[list[dict[str, Any]], list[dict[str, Any]], list[str]]:
    """(training records, evaluation records, notes). A killed job may leave half a line at the end."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"{path}: not readable ({error}); text4vis/train.py writes it into the folder of its run: copy it from "
            "there, or leave this run out"
        ) from None
    *lines, rest = text.split("\n")
    records = [_record(line, f"{path}:{number}") for number, line in enumerate(lines, start=1)]
    train, val = ([record for record in records if record["kind"] == kind] for kind in ("train", "val"))
    return train, val, [f"{METRICS} ends in the middle of a line; that line is left out"] if rest else []


def _record(line: str, where: str) -> dict[str, Any]:
    """A line of metrics.jsonl with its numbers as floats; None stays None. Raises ConfigError."""
    try:
        record = json.loads(line)
        numbers = {key: None if value is None else float(value) for key, value in record.items() if key != "kind"}
        return {**numbers, "kind": str(record["kind"]), "step": int(record["step"])}
    except (AttributeError, KeyError, OverflowError, RecursionError, TypeError, ValueError):
        raise ConfigError(
            f"{where}: damaged: expected a JSON object with a kind, a step and numbers, got {line[:80]!r}; "
            "remove the line, or copy the file from the run again"
        ) from None


def read_examples(runs: Sequence[Run], count: int) -> Iterator[Examples]:
    """Yields for each run the `count` right and `count` wrong predictions with the highest probability, with frames.

    The frames are read from the shards that config.yaml names. If they cannot be read, `missing` says why.
    """
    for run in runs:
        try:
            yield _examples(runs, run, count)
        except (ConfigError, ShardError, OSError) as error:
            yield Examples(missing=str(error))


def _examples(runs: Sequence[Run], run: Run, count: int) -> Examples:
    from text4vis.data.loader import build_loader
    from text4vis.report.tensorboard import extremes, read_clips

    if run.report is None:
        raise ConfigError("it was not evaluated")
    if not run.report.get("predictions"):
        raise ConfigError("no predictions are listed in its report; evaluate it again with text4vis/evaluate.py")
    if run.config is None:
        raise ConfigError("a report does not say where the videos are; name the folder of the run instead")
    chosen = extremes(run.report["predictions"], count)
    with build_loader(config_from_dict(_evaluated(run), str(run.path / CONFIG)), "val") as loader:
        fingerprint, skipped = _videos_of(run.report)
        kept = np.setdiff1d(np.arange(len(loader.dataset)), skipped)
        if loader.dataset.fingerprint != fingerprint or len(kept) != len(run.report["predictions"]["labels"]):
            raise ConfigError(f"{', '.join(loader.config.data.val)}: not the videos that were evaluated")
        ids = {row: int(kept[row]) for rows in chosen.values() for row in rows}
        frames = read_clips(loader, sorted(set(ids.values())))
        found = {
            kind: [
                Example(
                    loader.dataset.name(ids[row]),
                    _class_names(run, run.report["predictions"]["labels"][row]),
                    [_data_address(frame) for frame in frames[ids[row]]],
                    _predictions(runs, run, row),
                )
                for row in rows
            ]
            for kind, rows in chosen.items()
        }
    return Examples(found["right"], found["wrong"])


def _evaluated(run: Run) -> dict[str, Any]:
    """The run's configuration with the views that its report was measured with."""
    assert run.report is not None and run.config is not None
    values = run.config.to_dict()
    views = run.report.get("views", {})
    same = {"test_clips": "clips", "test_crops": "crops", "num_segments": "frames", "scale_size": "scale_size",
            "input_size": "input_size"}  # fmt: skip
    values["data"] |= {key: views[name] for key, name in same.items() if name in views}
    pixels = run.report.get("pixels", {})
    values["data"] |= {key: pixels.get(key, before) for key, before in EARLIER["data"].items()}
    if values["data"]["resize"] != "shortest":
        values["data"]["scale_size"] = None  # the card names one though nothing is cropped
    values["data"] |= {
        "dense": views.get("sampling") == "dense",
        "on_error": "fail",
        "decode": "auto",
        "cache_dir": None,
        "cache_bytes": 0,
    }
    return values


def _class_names(run: Run, entry: int | list[int]) -> str:
    """The classes of an entry of the report's predictions."""
    assert run.report is not None
    return ", ".join(run.report["per_class"][label]["class"] for label in labels_in(entry)) or "none of the classes"


def _predictions(runs: Sequence[Run], about: Run, row: int) -> list[PredictionRow]:
    """The predictions of the runs evaluated on the same videos for one of them, by its row in the reports."""
    assert about.report is not None
    rows = []
    for number, run in enumerate(runs):
        report = run.report
        if not report or not report.get("predictions"):
            continue
        if _videos_of(report) != _videos_of(about.report):
            continue
        label, predicted, *shares = (
            report["predictions"][key][row] for key in ("labels", "predicted", "probability", "label_probability")
        )
        probability, of_label = (None if share is None else 100 * share for share in shares)
        right = probability is not None and predicted in labels_in(label)
        said = report["predictions"].get("said")
        names = _class_names(run, said[row]) if said else None
        rows.append(PredictionRow(number, _class_names(run, predicted), probability, of_label, right, names))
    return rows


def _videos_of(report: Mapping[str, Any]) -> tuple[Any, list[int]]:
    """What identifies the videos of a report: the data's fingerprint and the ids that were left out."""
    return report.get("data_fingerprint"), [entry["id"] for entry in report.get("skipped", [])]


def _data_address(frame_SS3: np.ndarray) -> Markup:
    image = Image.fromarray(frame_SS3)
    image.thumbnail((FRAME_SIDE, FRAME_SIDE))
    stream = io.BytesIO()
    image.save(stream, "JPEG", quality=85)
    return Markup("data:image/jpeg;base64," + base64.b64encode(stream.getvalue()).decode())  # noqa: S704


def render(runs: Sequence[Run], examples: Sequence[Examples] = ()) -> str:
    """Returns the page as HTML. examples: of `read_examples`; without them the page has no such section."""
    environment = html_templates("text4vis.report", redact_text)
    environment.filters |= {"number": _number, "soft": _soft}
    environment.globals |= {"COLOURS": COLOURS, "FRAME_SIDE": FRAME_SIDE}
    reports = {number: run.report for number, run in enumerate(runs) if run.report is not None}
    reference, *others = list(reports) or [-1]
    comparisons = {number: compare(reports[reference], reports[number]) for number in others}
    configured = {number: _shown(_settings(run.config)) for number, run in enumerate(runs) if run.config}
    return environment.get_template("report.html.j2").render(
        runs=runs,
        reports=reports,
        reference=reference,
        comparisons=comparisons,
        headlines=[_headline(run) for run in runs],
        several={n: is_multi_label(report) for n, report in reports.items()},
        intervals={n: wilson_interval(report["top1_correct"], report["videos"]) for n, report in reports.items()},
        figures=_rows({number: figures_of(report) for number, report in reports.items()}),
        charts=charts({run.name: [*run.train, *run.val] for run in runs}),
        reliability=[
            reliability_chart(runs[number].name, number, report["calibration"])
            for number, report in reports.items()
            if report.get("calibration")
        ],
        classes=_class_rows(reports),
        confusions={number: confusions(report)[:10] for number, report in reports.items()},
        changes={number: _changes(found) for number, found in comparisons.items()},
        examples=examples,
        cards=_differing({number: _shown(card_of(report)) for number, report in reports.items()}),
        configured=list(configured),
        settings=_differing(configured),
    )


def _number(value: float | None, spec: str = ".2f") -> Markup:
    """An HTML `data` element: the rounded number as its text, the exact one as its value."""
    if value is None:
        return Markup("&ndash;")
    return Markup('<data value="{}">{}</data>').format(repr(value), format(value, spec))


def _soft(key: str) -> Markup:
    """A key that the browser may break across lines after a dot or underscore."""
    return Markup("<wbr>").join(re.split(r"(?<=[._])", redact_text(key)))


def _headline(run: Run) -> dict[str, tuple[float, str, str]]:
    """{name: (value, format, unit)}: the summary of a run's metrics.jsonl."""
    found: dict[str, tuple[float, str, str]] = {}
    key, name = ("map", "mAP") if any("map" in record for record in run.val) else ("top1", "top-1")
    if evaluated := [record for record in run.val if record.get(key) is not None]:
        best = max(evaluated, key=lambda record: record[key])
        found[f"best {name} while training"] = (best[key], ".2f", f"% at step {best['step']}")
    if run.train:
        last = run.train[-1]
        found["steps"] = (last["step"], "d", "")
        columns = {key: _column(run.train, key) for key in ("epoch", "loss", "videos_per_second", "data_wait_share")}
        if columns["epoch"]:
            found["epochs"] = (columns["epoch"][-1], ".2f", "")
        if columns["loss"]:
            found["last training loss"] = (columns["loss"][-1], ".4g", "")
        if columns["videos_per_second"]:
            found["speed, median"] = (median(columns["videos_per_second"]), ".4g", "videos/s")
        if columns["data_wait_share"]:
            found["waiting for data, median"] = (100 * median(columns["data_wait_share"]), ".2g", "%")
    return found


def _column(records: Iterable[Mapping[str, Any]], key: str) -> list[float]:
    return [record[key] for record in records if record.get(key) is not None]


def _rows(columns: Mapping[int, Mapping[str, Any]]) -> dict[str, dict[int, Any]]:
    """Turns {column: {key: value}} into {key: {column: value}}; columns may lack keys."""
    keys = dict.fromkeys(key for column in columns.values() for key in column)
    return {key: {number: column[key] for number, column in columns.items() if key in column} for key in keys}


def _shown(values: Mapping[str, Any]) -> dict[str, str]:
    """Values as text; long hashes are cut to 12 characters."""
    return {
        key: str(value)[: 12 if key.endswith(FINGERPRINTS) else None] if isinstance(value, str) else json.dumps(value)
        for key, value in values.items()
    }


def _settings(config: Config) -> dict[str, Any]:
    return {key.name: attrgetter(key.name)(config) for key in schema()}


def _differing(columns: Mapping[int, Mapping[str, str]]) -> list[tuple[str, bool, dict[int, str]]]:
    """[(key, whether the columns differ in it, {column: value})], the keys that differ first."""
    rows = _rows(columns)
    marked = [(key, len(row) < len(columns) or len(set(row.values())) > 1, row) for key, row in rows.items()]
    return sorted(marked, key=lambda row: not row[1])


def _class_rows(reports: Mapping[int, Mapping[str, Any]]) -> list[tuple[str, int, dict[int, float]]]:
    """[(class, its videos in the first report that has it, {run: class_share})], the reference's worst class first."""
    rows: dict[str, tuple[str, int, dict[int, float]]] = {}
    for number, report in reports.items():
        for row in report["per_class"]:
            if row["videos"]:
                entry = rows.setdefault(row["class"], (row["class"], row["videos"], {}))
                entry[2][number] = class_share(row)
    return sorted(rows.values(), key=lambda row: next(iter(row[2].values())))


def _changes(found: Comparison, count: int = 10) -> dict[str, list[Any]]:
    """The `count` classes that gained most and those that lost most."""
    gained = [one for one in found.classes if one.difference > 0]
    lost = [one for one in reversed(found.classes) if one.difference < 0]
    return {"gained": gained[:count], "lost": lost[:count]}
