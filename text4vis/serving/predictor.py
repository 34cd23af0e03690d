"""Recognises actions in videos with a trained model. Trains nothing and needs no launcher.

    import text4vis
    recogniser = text4vis.load("exported")                          # or a run: text4vis.load("runs/own")
    recogniser.predict("clip.mp4").top                              # the model's own classes
    recogniser.predict("clip.mp4", labels=["surfing", "skiing"])    # any others
    recogniser.scan("match.mp4", window_seconds=4).scores_WC        # a long video, window by window

B videos of a batch, T frames, S side of the model's input, C classes, D embedding width, W windows.
"""

from __future__ import annotations

import contextlib
import itertools
import re
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import torch

from shards.address import scheme_of
from shards.format import ShardError
from shards.images import read_image
from shards.text import redact, redact_text
from shards.video import FrameReader, VideoError, VideoInfo, probe_video
from shards.walk import is_hidden
from text4vis.classifier.embeddings import text_classifier
from text4vis.config.schema import Config, ConfigError
from text4vis.data.augmentation import eval_geometry, frame_rule
from text4vis.data.finishing import place
from text4vis.data.sampling import test_indices
from text4vis.evaluation.calibration import Calibration, at_temperature
from text4vis.evaluation.multi_label import MIDDLE, Decision
from text4vis.evaluation.protocols import class_logits, class_scores
from text4vis.model.video_clip import VideoClip
from text4vis.saved.opening import open_saved
from text4vis.serving.fitted import fitted_of

FRAME_SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".bmp"}


class PredictionError(Exception):
    """Input that cannot be recognised. The message names it and the fix."""


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
        return _top(self.class_names, self.scores_WC[window], count)


def takes_labels(config: Config) -> bool:
    """Whether a model of this configuration can be asked for classes that it was not trained on."""
    return config.network.classifier == "text" and not config.network.classifier_trainable


class Predictor:
    """A model with its classes and its way of sampling frames."""

    def __init__(
        self,
        model: VideoClip,
        config: Config,
        class_names: Sequence[str],
        class_embeddings_CD: torch.Tensor,
        fitted: Calibration | Decision | None = None,
    ) -> None:
        self.model, self.config = model.eval(), config
        self.calibration = fitted if isinstance(fitted, Calibration) else None
        self.decision = fitted if isinstance(fitted, Decision) else None
        self.class_names = list(class_names)
        self.class_embeddings_CD = class_embeddings_CD
        self.device = next(model.parameters()).device
        self._embedded: tuple[list[str], torch.Tensor] | None = None  # the last labels that were asked for

    @classmethod
    def load(cls, folder: str | Path, device: str | torch.device | None = None) -> Predictor:
        """Opens an export, a run (its best weights) or a checkpoint. device: by default the GPU if there is one.

        Raises text4vis.config.ConfigError or text4vis.saved.CheckpointError.
        """
        trained = open_saved(folder).trained()
        device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        model, config, names = trained.model.to(device), trained.config, trained.class_names
        return cls(model, config, names, trained.class_embeddings_CD, fitted_of(trained.card, config, folder))

    def predict(
        self,
        video: str | Path | np.ndarray,
        labels: Sequence[str] | None = None,
        top: int = 5,
        *,
        accuracy: float | None = None,
        coverage: float | None = None,
    ) -> Prediction:
        """Recognises one video: a file or its address, a folder of frames, or an array (N, H, W, 3) uint8 RGB.

        labels: class names to choose from instead of the model's own. accuracy, coverage: per cent, for `sure` and
        `candidates` of the prediction; they need an export with a calibration and the model's own classes. Raises
        PredictionError.
        """
        (prediction,) = self.predict_many([video], labels, top, accuracy=accuracy, coverage=coverage)
        if isinstance(prediction, PredictionError):
            raise prediction
        return prediction

    def predict_many(
        self,
        videos: Iterable[str | Path | np.ndarray],
        labels: Sequence[str] | None = None,
        top: int = 5,
        batch_size: int = 8,
        *,
        accuracy: float | None = None,
        coverage: float | None = None,
    ) -> Iterator[Prediction | PredictionError]:
        """`predict` of each video in order, `batch_size` at a time. Instead of the prediction of a video that cannot be
        read comes its PredictionError: it is yielded, not raised.

        Raises PredictionError at once for labels that the model cannot take.
        """
        if isinstance(videos, str | Path | bytes):
            raise PredictionError(f"videos: {videos!r} is one video; give a list of them, or use predict")
        if batch_size < 1 or top < 1:
            raise PredictionError(f"batch_size {batch_size}, top {top}: expected at least 1")
        labels = None if labels is None else _names(labels)  # an iterator is read once
        answer = self._answering(labels, top, accuracy, coverage)
        return self._predict_batches(iter(videos), self._classes(labels)[1], answer, batch_size)

    def _answering(
        self, labels: Sequence[str] | None, top: int, accuracy: float | None, coverage: float | None
    ) -> Callable[..., Prediction]:
        """Returns a function from a video's probabilities (C,), frame numbers and frames to its prediction.

        Raises PredictionError.
        """
        names, fitted = self._classes(labels)[0], self.calibration is not None or self.decision is not None
        calibrated = fitted and labels is None
        sure_from = self._threshold("accuracy", accuracy, labels)
        candidate_from = self._threshold("coverage", coverage, labels)
        present_from_C = self._present_from(labels)

        def answer(scores_C: np.ndarray, indices: np.ndarray, frames: np.ndarray) -> Prediction:
            likeliest = _top(names, scores_C, len(names) if candidate_from is not None else top)
            return Prediction(
                likeliest[:top],
                indices,
                frames,
                calibrated,
                None if sure_from is None else likeliest[0][1] >= sure_from,
                None if candidate_from is None else [name for name, share in likeliest if share >= candidate_from],
                None if present_from_C is None else _reaching(names, scores_C, present_from_C),
            )

        return answer

    def _present_from(self, labels: Sequence[str] | None) -> np.ndarray | None:
        """The probability (C,) from which each class counts as shown, for models of several labels a video."""
        if self.decision is None:
            return None
        return np.array(self.decision.thresholds) if labels is None else np.full(len(labels), MIDDLE)

    def _threshold(self, kind: str, asked: float | None, labels: Sequence[str] | None) -> float | None:
        """The probability that reaches the given accuracy or coverage; None if none was given."""
        if asked is None:
            return None
        if self.decision is not None:
            raise PredictionError(
                f"{kind}: is of models of one label a video; this one decides on each class by itself: leave it out"
            )
        if labels is not None:
            raise PredictionError(f"{kind}: it was measured with the model's own classes; leave the labels out")
        if self.calibration is None:
            raise PredictionError(
                f"{kind}: the model has no calibration; evaluate it (text4vis/evaluate.py --report FILE) and export it "
                "with that report (tools/export.py --report FILE)"
            )
        table = self.calibration.answers if kind == "accuracy" else self.calibration.sets
        if asked not in table:
            raise PredictionError(
                f"{kind}: {asked:g} was not measured; choose {', '.join(f'{key:g}' for key in table)}"
            )
        found = table[asked]
        if found is None:
            raise PredictionError(f"{kind}: the model does not reach {asked:g} % at any confidence; ask for less")
        return found

    def _predict_batches(
        self, videos: Iterator[Any], classes_CD: torch.Tensor, answer: Callable[..., Prediction], batch_size: int
    ) -> Iterator[Prediction | PredictionError]:
        while batch := list(itertools.islice(videos, batch_size)):
            sampled = [self._sampled(video) for video in batch]
            good = [one for one in sampled if not isinstance(one, PredictionError)]
            scores = iter(self._scores(np.stack([frames for _, frames in good]), classes_CD) if good else ())
            for one in sampled:
                if isinstance(one, PredictionError):
                    yield one
                else:
                    yield answer(next(scores), *one)

    def scan(
        self,
        video: str | Path,
        labels: Sequence[str] | None = None,
        *,
        window_seconds: float = 4.0,
        step_seconds: float | None = None,
        batch_size: int = 8,
    ) -> Timeline:
        """Recognises a long video, a file or its address, window by window.

        A new window begins every `step_seconds` (default: half a window). The last one ends with the video; a video
        shorter than a window is one window. Raises PredictionError.
        """
        step = window_seconds / 2 if step_seconds is None else step_seconds
        if not step > 0 or not window_seconds > 0:
            raise PredictionError(f"windows of {window_seconds} s every {step} s: expected lengths above 0")
        if batch_size < 1:
            raise PredictionError(f"batch_size {batch_size}: expected at least 1")
        if scheme_of(str(video)) is not None:
            with _fetched(str(video)) as copy:
                return self.scan(copy, labels, window_seconds=window_seconds, step_seconds=step, batch_size=batch_size)
        names, classes_CD = self._classes(labels)
        info = _probe(video)
        last = max(0.0, info.duration - window_seconds)
        starts = np.append(np.arange(0.0, last, step), last)
        seconds_W2 = np.stack([starts, np.minimum(starts + window_seconds, info.duration)], axis=1)
        frames = FrameReader(video, num_frames=info.num_frames)
        scores, thumbnails = [], []
        for begin in range(0, len(starts), batch_size):
            shown = [info.shown(start, stop) for start, stop in seconds_W2[begin : begin + batch_size].tolist()]
            windows = [frames_n[self._indices(len(frames_n))] for frames_n in shown]
            indices = np.concatenate(windows)
            frames_NSS3 = np.stack(self._decode(video, frames, indices))
            frames_BTSS3 = frames_NSS3.reshape(len(windows), -1, *frames_NSS3.shape[1:])
            scores.append(self._scores(frames_BTSS3, classes_CD))
            thumbnails += [frames_TSS3[len(frames_TSS3) // 2].copy() for frames_TSS3 in frames_BTSS3]
        return Timeline(names, seconds_W2, np.concatenate(scores), thumbnails)

    @torch.no_grad()
    def _scores(self, frames_BTSS3: np.ndarray, classes_CD: torch.Tensor) -> np.ndarray:
        """Probabilities (B, C), calibrated where the classes are the model's own and a calibration is known.

        Of each class by itself for models of several labels a video, else they add up to 1.
        """
        frames_BTCHW = torch.from_numpy(frames_BTSS3).permute(0, 1, 4, 2, 3).to(self.device)
        embeddings_BVD = self.model.encode_video(frames_BTCHW)[:, None].float().cpu().numpy()
        if self.decision is not None:
            return self.decision.probabilities(class_logits(embeddings_BVD, classes_CD.float().cpu().numpy()))
        scores_BC = class_scores(embeddings_BVD, classes_CD.float().cpu().numpy())
        if self.calibration is None or classes_CD is not self.class_embeddings_CD:
            return scores_BC
        return at_temperature(scores_BC, self.calibration.temperature)

    def _classes(self, labels: Sequence[str] | None) -> tuple[list[str], torch.Tensor]:
        if labels is None:
            return self.class_names, self.class_embeddings_CD
        names = _names(labels)
        return names, self.embed(names)

    def embed(self, labels: Sequence[str]) -> torch.Tensor:
        """Embeddings (C, D) of class names, with which `predict` compares a video. Those of the last names are kept.

        Raises PredictionError for names that are none, and for a model that knows its own classes only.
        """
        names = _names(labels)
        if not takes_labels(self.config):
            kind = self.config.network.classifier
            raise PredictionError(
                f"labels: this model was trained with {'a trainable' if kind == 'text' else 'the'} classifier {kind}, "
                f"so it knows its own classes only ({', '.join(self.class_names[:3])} ...); leave the labels out, or "
                "train with the frozen text classifier"
            )
        if self._embedded is None or self._embedded[0] != names:
            try:
                self._embedded = names, text_classifier(self.model, names, self.config.network.template)
            except ConfigError as error:
                raise PredictionError(f"labels: {error}") from None
        return self._embedded[1]

    def _sampled(self, video: str | Path | np.ndarray) -> tuple[np.ndarray, np.ndarray] | PredictionError:
        try:
            indices, frames = self._sample(video)
        except PredictionError as error:
            return error
        except ShardError as error:  # an address that is refused
            return PredictionError(str(error))
        return indices, np.stack(frames)

    def _sample(self, video: str | Path | np.ndarray) -> tuple[np.ndarray, list[np.ndarray]]:
        """Numbers of the sampled frames, and these (S, S, 3) uint8."""
        if isinstance(video, np.ndarray):
            if video.ndim != 4 or video.shape[3] != 3 or video.dtype != np.uint8 or not video.size:
                raise PredictionError(f"expected frames (N, H, W, 3) uint8, got {video.shape} {video.dtype}")
            indices = self._indices(len(video))
            return indices, [self._prepare(video[i]) for i in indices]
        if not isinstance(video, str | Path):
            raise PredictionError(f"expected a path, an address or an array of frames, got {type(video).__name__}")
        if scheme_of(str(video)) is not None:
            with _fetched(str(video)) as copy:
                return self._sample(copy)
        path = Path(video)
        if path.is_dir():
            files = [p for p in path.iterdir() if p.suffix.lower() in FRAME_SUFFIXES and not is_hidden(p.name)]
            files.sort(key=_natural)
            if not files:
                raise PredictionError(f"{path}: holds no frames ({', '.join(sorted(FRAME_SUFFIXES))})")
            indices = self._indices(len(files))
            return indices, [self._prepare(_read_image(files[i])) for i in indices]
        num_frames = _probe(path).num_frames
        indices = self._indices(num_frames)
        return indices, self._decode(path, FrameReader(path, num_frames=num_frames), indices)

    def _decode(self, path: str | Path, frames: FrameReader, indices: np.ndarray) -> list[np.ndarray]:
        """Prepared frames of the file at `path`."""
        try:
            return frames.read(indices, use=self._prepare)
        except (VideoError, IndexError) as error:
            raise PredictionError(f"{path}: {error}; is it damaged?") from error

    def _indices(self, num_frames: int) -> np.ndarray:
        """The frames that an evaluation of one clip takes, (T,)."""
        return test_indices(num_frames, self.config.data.num_segments, dense=self.config.data.dense)

    def _prepare(self, image: np.ndarray) -> np.ndarray:
        """A frame (H, W, 3) as (S, S, 3) uint8: scaled and centre-cropped as in evaluation."""
        side = self.config.data.input_size
        out_VTSS3 = np.empty((1, 1, side, side, 3), np.uint8)
        (height, width), scale_size = image.shape[:2], self.config.scale_size
        resize, interpolation = frame_rule(self.config.data)
        geometry = eval_geometry(height, width, scale_size, side, 1, resize=resize, interpolation=interpolation)
        place(image, geometry, [(0, 0, 0)], out_VTSS3)
        return out_VTSS3[0, 0]


def _reaching(names: Sequence[str], scores_C: np.ndarray, from_C: np.ndarray) -> list[tuple[str, float]]:
    reached = int((scores_C >= from_C).sum())
    chosen_C = np.where(scores_C >= from_C, scores_C, -1.0)
    return _top(names, chosen_C, reached)


def _names(labels: Iterable[str]) -> list[str]:
    names = list(labels)
    wrong = labels if isinstance(labels, str) else next((name for name in names if not isinstance(name, str)), None)
    if wrong is not None:
        raise PredictionError(f"labels: {wrong!r}; give a list of class names")
    return names


def _top(names: Sequence[str], scores_C: np.ndarray, count: int) -> list[tuple[str, float]]:
    return [(names[c], float(scores_C[c])) for c in np.argsort(-scores_C, kind="stable")[:count]]


@contextlib.contextmanager
def _fetched(address: str) -> Iterator[Path]:
    """A local copy of a remote file, for a while."""
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "video"
        try:
            fsspec.filesystem(scheme_of(address)).get_file(address, str(copy))
        except Exception as error:  # every kind of file system has its own
            reason = redact_text(str(error))
            if reason in ("", redact(address)):  # a server's 404 is no more than the address
                reason = "not found" if isinstance(error, FileNotFoundError) else type(error).__name__
            raise PredictionError(f"{redact(address)}: cannot be fetched ({reason})") from None
        try:
            yield copy
        except PredictionError as error:
            raise PredictionError(str(error).replace(str(copy), redact(address))) from error


def _probe(path: str | Path) -> VideoInfo:
    if not Path(path).is_file():
        raise PredictionError(f"{path}: no such video file or folder of frames")
    try:
        return probe_video(path)
    except VideoError as error:
        raise PredictionError(f"{path}: {error}; is it a video file?") from error


def _read_image(path: Path) -> np.ndarray:
    try:
        return np.asarray(read_image(path.read_bytes()))
    except (OSError, ValueError) as error:
        raise PredictionError(f"{path}: not a readable image ({error})") from error


def _natural(path: Path) -> list[Any]:
    """Sorts img_2 before img_10."""
    return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", path.name)]
