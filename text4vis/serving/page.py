"""The page to try a model on, as HTML: a form, and the answer to what was asked with it.

It knows nothing of the server (`page_server`). All names on it are untrusted: the template escapes every text, and
`printable` shows control characters as escapes first. Pictures are part of the page, so nothing is kept for it.

T frames, S their side in pixels.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import BinaryIO

import numpy as np
from markupsafe import Markup
from PIL import Image

from shards.text import printable
from text4vis.common.templates import html_templates
from text4vis.serving.answers import Prediction
from text4vis.serving.footage import PredictionError
from text4vis.serving.pictures import clock, save_moments, save_timeline
from text4vis.serving.predictor import Predictor, takes_labels
from text4vis.serving.search import Moment, SearchIndex

UPLOAD_BYTES = 2**30  # the default limit
_BLANK = {"ask": "", "labels": "", "accuracy": "", "window": "4", "text": "", "count": "10"}  # the form's fields
_WINDOWS = (1.0, 3600.0)  # seconds; of shorter ones a long film has too many
_MOMENTS = (1.0, 40.0)  # on a contact sheet
_LONGEST_NAME = 120  # characters of a file's name that are shown


@dataclass(frozen=True)
class Upload:
    """A video that was sent: the file to read, and the name that it has where it came from."""

    path: Path
    name: str


@dataclass(frozen=True)
class _Recognised:
    """title: the video's name. bars: (class, per cent, whether it is the answer). frames: (number, picture)."""

    title: str
    headline: str
    bars: list[tuple[str, float, bool]]
    frames: list[tuple[int, Markup]]
    calibrated: bool


@dataclass(frozen=True)
class _Scanned:
    """rows: (start, end, likeliest class, per cent) of each window, in seconds."""

    title: str
    picture: Markup
    rows: list[tuple[float, float, str, float]]


@dataclass(frozen=True)
class _Found:
    title: str
    picture: Markup
    moments: list[Moment]


class Page:
    """Answers questions about videos with a model. It answers one at a time: the model keeps what it embedded last.

    title: what the page calls the model. index: an index of the same model, to be searched by sentences; None: the page
    has no search. upload_bytes: the largest video that may be sent.
    """

    def __init__(
        self,
        recogniser: Predictor,
        title: str,
        *,
        index: SearchIndex | None = None,
        upload_bytes: int = UPLOAD_BYTES,
    ) -> None:
        self.upload_bytes = upload_bytes
        self._recogniser, self._index = recogniser, index
        environment = html_templates("text4vis.serving", printable)
        table = recogniser.calibration.answers if recogniser.calibration else {}
        self._template = environment.get_template("page.html.j2")
        self._facts = {
            "model": title,
            "class_names": recogniser.class_names,
            "num_frames": recogniser.config.data.num_segments,
            "takes_labels": takes_labels(recogniser.config),
            "accuracies": sorted(accuracy for accuracy, threshold in table.items() if threshold is not None),
            "upload_bytes": upload_bytes,
            "limit": size_in_words(upload_bytes),
            "windows": _WINDOWS,
            "moments": _MOMENTS,
            "num_indexed": None if index is None else len(index.videos),
            "clock": clock,
        }

    def show(self, fields: Mapping[str, str] | None = None, *, answer: object = None, error: str = "") -> str:
        """The page. fields: what the form holds; error: a sentence to show instead of an answer."""
        kind = type(answer).__name__.strip("_").lower()
        fields = _BLANK | dict(fields or {})
        return self._template.render(self._facts, fields=fields, answer=answer, kind=kind, error=error)

    def answer(self, fields: Mapping[str, str], upload: Upload | None) -> str:
        """The page with the answer to a form. Raises PredictionError and SearchError, which name the fix.

        fields: `ask` is "recognise", "timeline" or "search"; the others are as they were typed.
        """
        fields = _BLANK | dict(fields)
        if fields["ask"] == "search" and self._index is not None:
            return self.show(fields, answer=self._find(self._index, fields))
        if fields["ask"] not in ("recognise", "timeline"):
            raise PredictionError(f"ask: {fields['ask']!r} is no question of this page; use its buttons")
        if upload is None:
            raise PredictionError("No video was chosen; choose a file first.")
        ask = self._recognise if fields["ask"] == "recognise" else self._scan
        try:
            return self.show(fields, answer=ask(fields, upload))
        except PredictionError as error:
            raise PredictionError(str(error).replace(str(upload.path), _short(upload.name))) from error

    def _recognise(self, fields: Mapping[str, str], upload: Upload) -> _Recognised:
        accuracy = _number("accuracy", fields["accuracy"], 0, 100) if fields["accuracy"] else None
        prediction = self._recogniser.predict(upload.path, self._labels(fields), accuracy=accuracy)
        answers = prediction.top[:1] if prediction.present is None else prediction.present
        shown = dict.fromkeys([*answers, *prediction.top])
        return _Recognised(
            _short(upload.name),
            _headline(prediction, accuracy),
            [(name, 100 * share, (name, share) in answers) for name, share in shown],
            list(zip(prediction.indices.tolist(), map(_jpeg, prediction.frames), strict=True)),
            prediction.calibrated,
        )

    def _scan(self, fields: Mapping[str, str], upload: Upload) -> _Scanned:
        seconds = _number("window", fields["window"], *_WINDOWS)
        timeline = self._recogniser.scan(upload.path, self._labels(fields), window_seconds=seconds)
        best = [timeline.top(window, 1)[0] for window in range(len(timeline.seconds_W2))]
        rows = [
            (start, end, name, 100 * share)
            for (start, end), (name, share) in zip(timeline.seconds_W2.tolist(), best, strict=True)
        ]
        return _Scanned(_short(upload.name), _png(partial(save_timeline, timeline, upload.name)), rows)

    def _find(self, index: SearchIndex, fields: Mapping[str, str]) -> _Found:
        moments = index.find(fields["text"], int(_number("count", fields["count"], *_MOMENTS)))
        picture = _png(partial(save_moments, moments, index.frames(moments), fields["text"]))
        return _Found(_short(fields["text"]), picture, moments)

    def _labels(self, fields: Mapping[str, str]) -> list[str] | None:
        labels = typed_labels(fields["labels"])
        if labels is not None and len(labels) == 1 and self._recogniser.decision is None:
            raise PredictionError(f"labels: of one label alone, {labels[0]!r}, every video is 100 %; give two or more")
        return labels


def typed_labels(text: str) -> list[str] | None:
    """Class names, one a line, or on a single line separated by commas; each once. None where none was typed."""
    lines = text.strip().splitlines()
    parts = lines[0].split(",") if len(lines) == 1 else lines
    return list(dict.fromkeys(part.strip() for part in parts if part.strip())) or None


def size_in_words(count: int) -> str:
    """A number of bytes for people, in units of 1024: `1 GiB`, `1.5 MiB`, `512 bytes`."""
    for power, unit in ((3, "GiB"), (2, "MiB"), (1, "KiB")):
        if count >= 1024**power:
            return f"{count / 1024**power:.4g} {unit}"
    return f"{count} bytes"


def _headline(prediction: Prediction, accuracy: float | None) -> str:
    if prediction.present is not None:
        names = ", ".join(name for name, _ in prediction.present)
        return names or "None of the classes. The likeliest are:"
    name = prediction.top[0][0]
    if prediction.sure is None:
        return name
    if prediction.sure:
        return f"{name} (answers as sure as this are right {accuracy:g} % of the time)"
    return f"Unsure: answers like this are right less than {accuracy:g} % of the time"


def _number(key: str, text: str, least: float, most: float) -> float:
    try:
        value = float(text)
    except ValueError:
        value = np.nan
    if not least <= value <= most:
        raise PredictionError(f"{key}: {text!r}; give a number from {least:g} to {most:g}")
    return value


def _short(name: str) -> str:
    return name if len(name) <= _LONGEST_NAME else f"{name[: _LONGEST_NAME - 1]}\u2026"


def _jpeg(frame_SS3: np.ndarray) -> Markup:
    stream = io.BytesIO()
    Image.fromarray(frame_SS3).save(stream, "JPEG", quality=90)
    return _data_address("image/jpeg", stream.getvalue())


def _png(save: Callable[[BinaryIO], None]) -> Markup:
    stream = io.BytesIO()
    save(stream)
    return _data_address("image/png", stream.getvalue())


def _data_address(kind: str, content: bytes) -> Markup:
    return Markup(f"data:{kind};base64,{base64.b64encode(content).decode()}")  # noqa: S704
