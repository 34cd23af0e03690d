"""Finds moments of indexed videos by a sentence or by an example video.

    index = text4vis.open_index("index")
    for moment in index.find("a dog catching a frisbee", top=5):
        print(moment.video, moment.start, moment.end, moment.score)

The answers are exact: every window is compared with the question. N rows of vectors, D embedding width, W windows.
"""

from __future__ import annotations

import math
import os
from collections import defaultdict
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn.functional import normalize

from text4vis.model.tensors import fingerprint
from text4vis.saved.inputs import tokenizer_digest
from text4vis.saved.weights import weights_fingerprint
from text4vis.serving.footage import PredictionError, Sampler
from text4vis.serving.index_store import (
    Catalogue,
    IndexedVideo,
    SearchError,
    check_settings,
    read_catalogue,
    remembered_model,
)
from text4vis.serving.predictor import Predictor, takes_labels

# A float16 product of unit vectors differs from the exact one by at most 2**-11 for the question's rounding, 2**-12 for
# the result's, and little for the sum in float32; twice that, for two products are compared.
MARGIN = 2e-3
_PIECE = 65536  # rows that a thread takes at a time
_LONGEST = 1.01  # of vectors that are unit vectors but for their rounding


@dataclass(frozen=True)
class Moment:
    """A part of a video that fits a question. start, end: seconds. score: the cosine with the question, -1 to 1."""

    video: str
    start: float
    end: float
    score: float


class SearchIndex:
    """An index that is opened for questions. `text4vis.open_index` opens one.

    model: where the model lies that the index was made with; None: where it lay then. It is loaded for the first
    question. device: as of `text4vis.load`.
    """

    def __init__(self, catalogue: Catalogue, model: str | Path | None = None, device: str | None = None) -> None:
        self.catalogue, self._model, self._device = catalogue, model, device
        self._names = list(catalogue.parts)
        self._parts = [torch.from_numpy(part_ND) for part_ND in catalogue.parts.values()]
        self.videos: list[IndexedVideo] = list(catalogue.videos.values())
        begins = np.cumsum([0, *map(len, self._parts)])
        first = dict(zip(self._names, begins.tolist(), strict=False))
        self._begins, self._num_rows = begins, int(begins[-1])
        self._first_row = np.array([first[video.part] + video.row for video in self.videos], np.int64)
        self._video_N = np.full(self._num_rows, -1, np.int32)
        for number, (row, video) in enumerate(zip(self._first_row.tolist(), self.videos, strict=True)):
            rows = self._video_N[row : row + video.windows]
            if rows.max() >= 0:
                other = self.videos[int(rows.max())].path
                raise SearchError(
                    f"{catalogue.folder}: two videos have the same vectors, {other!r} and {video.path!r}; the index is "
                    "damaged, build it anew"
                )
            rows[:] = number
        self._dead_N = self._video_N < 0

    @classmethod
    def open(cls, folder: str | Path, model: str | Path | None = None, device: str | None = None) -> SearchIndex:
        """Reads an index; its vectors are mapped, and read by the first question. Raises SearchError."""
        return cls(read_catalogue(Path(folder)), model, device)

    @property
    def num_windows(self) -> int:
        """Windows that can be found."""
        return self.catalogue.num_windows

    @cached_property
    def predictor(self) -> Predictor:
        """The index's model. Raises SearchError where it is another one than that of the index."""
        path = self._model or remembered_model(self.catalogue.folder)
        if path is None:
            raise SearchError(f"{self.catalogue.folder}: does not tell where its model lies; name it with --model")
        if not Path(path).exists():
            raise SearchError(f"{path}: the index's model is not there any more; name its place with --model")
        predictor = Predictor.load(path, self._device)
        settings = self.catalogue.settings
        check_settings(self.catalogue, replace(settings, model=model_facts(predictor), dims=predictor.model.embed_dim))
        return predictor

    def find(self, text: str, top: int = 20, *, prompt: str = "{}") -> list[Moment]:
        """The moments that fit a sentence best, the best first: at most `top`, none of which overlap.

        prompt: the sentence takes the place of its `{}`. Raises SearchError for a text that the model cannot take.
        """
        return self.nearest(self.embed(text, prompt), top)

    def embed(self, text: str, prompt: str = "{}") -> np.ndarray:
        """The sentence as a unit vector (D,) float32. Raises SearchError."""
        if not text.strip():
            raise SearchError("the question is empty; write what the video shows")
        if "{}" not in prompt:
            raise SearchError(f"prompt {prompt!r}: has no {{}} for the text to take the place of")
        if not takes_labels(self.predictor.config):
            raise SearchError(
                "this model was not trained with the frozen text classifier, so sentences mean nothing to it; search "
                "by an example (--like), or build an index with another model"
            )
        try:
            embedding_D = self.predictor.model.encode_text([prompt.replace("{}", text)])[0]
        except ValueError as error:
            raise SearchError(f"question: {error}") from None
        return normalize(embedding_D, dim=0).numpy()

    def like(self, video: str | Path, at: float | None = None, top: int = 20) -> list[Moment]:
        """The moments that look most like an example, which is left out itself.

        at: seconds; the example is a window of the index's length that begins there. Without it, it is the whole video.
        Raises SearchError.
        """
        start, end = (0.0, None) if at is None else (at, at + self.catalogue.settings.window)
        try:
            example_D = self.predictor.embed_moment(video, start, end)
        except PredictionError as error:
            raise SearchError(str(error)) from None
        own = os.path.abspath(video)  # noqa: PTH100
        return self.nearest(example_D, top, leave_out=(own, start, end or math.inf))

    def frames(self, moments: Sequence[Moment]) -> list[np.ndarray | None]:
        """The frames (T, S, S, 3) uint8 of each moment as the model sees them; None where its file cannot be read."""
        sampler = Sampler(self.predictor.config)
        found: list[np.ndarray | None] = []
        for moment in moments:
            try:
                found.append(sampler.sample_part(moment.video, moment.start, moment.end))
            except PredictionError:
                found.append(None)
        return found

    def nearest(
        self, question_D: np.ndarray, top: int = 20, *, leave_out: tuple[str, float, float] | None = None
    ) -> list[Moment]:
        """The moments nearest to a unit vector (D,) float32, the best first.

        Of windows of a video that overlap, the best one answers. leave_out: a video and seconds of it from where to
        where no answer is wanted.
        """
        if top < 1:
            raise SearchError(f"top {top}: expected at least 1")
        scores_N = self._scores(question_D)
        taken: dict[str, list[tuple[float, float]]] = defaultdict(list)
        if leave_out is not None:
            taken[leave_out[0]].append(leave_out[1:])
        wanted, count = top, min(8 * top, self.num_windows)
        while True:
            found = self._moments(self._best(scores_N, question_D, count), wanted, taken)
            if len(found) >= wanted or count >= self.num_windows:
                return found
            count = min(8 * count, self.num_windows)

    def best_scores(self, questions_QD: np.ndarray, videos: Sequence[int]) -> np.ndarray:
        """The cosine (Q, V) float32 of each question, unit vectors (Q, D), with the best window of each video.

        videos: positions in `videos`.
        """
        best_QV = np.empty((len(questions_QD), len(videos)), np.float32)
        for number, position in enumerate(videos):
            vectors_WD = self.catalogue.vectors(self.videos[position]).astype(np.float32)
            best_QV[:, number] = (questions_QD @ vectors_WD.T).max(axis=1)
        return best_QV

    def _scores(self, question_D: np.ndarray) -> np.ndarray:
        """The question's cosines (N,) float32 with all rows, to half of MARGIN; -inf for dead rows."""
        scores_N = torch.empty(self._num_rows, dtype=torch.float16)
        question = torch.from_numpy(question_D).half()

        def multiply(piece: tuple[torch.Tensor, int, int]) -> None:
            part, begin, row = piece
            rows = part[row : row + _PIECE]
            torch.mv(rows, question, out=scores_N[begin + row : begin + row + len(rows)])

        pieces = [
            (part, begin, row)
            for part, begin in zip(self._parts, self._begins.tolist(), strict=False)
            for row in range(0, len(part), _PIECE)
        ]
        with ThreadPoolExecutor(torch.get_num_threads()) as threads:
            list(threads.map(multiply, pieces))
        scores = scores_N.float().numpy()
        if not (np.abs(scores) <= _LONGEST).all():
            raise SearchError(f"{self.catalogue.folder}: holds vectors that are no unit vectors; build it anew")
        scores[self._dead_N] = -np.inf
        return scores

    def _best(self, scores_N: np.ndarray, question_D: np.ndarray, count: int) -> list[tuple[float, int]]:
        """Exact cosines and rows of the `count` nearest windows, the nearest first."""
        if count == 0:
            return []
        least = np.partition(scores_N, len(scores_N) - count)[len(scores_N) - count]
        rows = np.flatnonzero(scores_N >= max(least - MARGIN, -2.0))
        exact = np.empty(len(rows), np.float32)
        part_of = np.searchsorted(self._begins, rows, side="right") - 1
        for begin in range(0, len(rows), _PIECE):
            some = slice(begin, begin + _PIECE)
            for part in np.unique(part_of[some]):
                inside = begin + np.flatnonzero(part_of[some] == part)
                vectors = self.catalogue.parts[self._names[part]][rows[inside] - self._begins[part]]
                exact[inside] = vectors.astype(np.float32) @ question_D
        order = np.argsort(-exact, kind="stable")[:count]
        return list(zip(exact[order].tolist(), rows[order].tolist(), strict=True))

    def _moments(
        self, best: Sequence[tuple[float, int]], top: int, taken: dict[str, list[tuple[float, float]]]
    ) -> list[Moment]:
        """The first windows that overlap neither a better one nor what is taken."""
        spans = {video: list(given) for video, given in taken.items()}
        found: list[Moment] = []
        for score, row in best:
            number = int(self._video_N[row])
            video = self.videos[number]
            start, end = self.catalogue.settings.span(video.seconds, row - int(self._first_row[number]))
            others = spans.setdefault(video.path, [])
            if all(end <= begun or ended <= start for begun, ended in others):
                others.append((start, end))
                found.append(Moment(video.path, start, end, score))
                if len(found) == top:
                    break
        return found


def model_facts(predictor: Predictor) -> dict[str, Any]:
    """What decides the vectors of an index, in JSON values: the same for a run, its best checkpoint and its export."""
    model, data = predictor.model, predictor.config.data
    return {
        "weights": weights_fingerprint(model.state_dict()),
        "text": fingerprint(model.text.state_dict()),
        "tokenizer": tokenizer_digest(model),
        "pixels": {
            "resize": data.resize,
            "interpolation": data.interpolation,
            "mean": list(model.mean),
            "std": list(model.std),
            "scale_size": predictor.config.scale_size,
            "input_size": data.input_size,
        },
        "frames": {"number": data.num_segments, "dense": data.dense},
    }
