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
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import torch
from PIL import Image

from shards.address import scheme_of
from shards.format import ShardError
from shards.text import redact, redact_text
from shards.video import FrameReader, VideoError, VideoInfo, probe_video
from text4vis.classifier.embeddings import build_classifier, text_classifier
from text4vis.config.schema import Config, ConfigError, config_from_dict
from text4vis.data.augmentation import eval_geometry
from text4vis.data.loader import place
from text4vis.data.plan import Frame
from text4vis.data.sampling import test_indices
from text4vis.evaluation.protocols import class_scores
from text4vis.model.video_clip import VideoClip
from text4vis.saved import checkpoint
from text4vis.saved.runs import check_same_classes
from text4vis.saved.weights import EXPORT_FILE, load_export

FRAME_SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".bmp"}


class PredictionError(Exception):
    """Input that cannot be recognised. The message names it and the fix."""


@dataclass(frozen=True)
class Prediction:
    """top: (class name, probability), the likeliest first. indices: (T,) frame numbers; frames: (T, S, S, 3) uint8."""

    top: list[tuple[str, float]]
    indices: np.ndarray
    frames: np.ndarray = field(repr=False)


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


@dataclass(frozen=True)
class Trained:
    """A trained model with its configuration, its classes' names and embeddings (C, D), and where it comes from."""

    model: VideoClip
    config: Config
    class_names: list[str]
    class_embeddings_CD: torch.Tensor
    card: dict[str, Any]


def open_run(path: Path) -> Trained:
    """A run's best weights, or a checkpoint. Raises CheckpointError, ConfigError."""
    state = checkpoint.read_state(checkpoint.find(path))
    config = config_from_dict(state.config, str(path))
    model = checkpoint.load_model(path, config)
    if model.classifier is None:
        check_same_classes(state, config, path)
    classes_CD = build_classifier(config, model, state.class_names)
    card = {
        "step": state.step,
        "videos seen": state.consumed,
        "global_batch": state.global_batch,
        "data_fingerprint": state.data_fingerprint,
        "figures": state.figures,
    }
    return Trained(model, config, state.class_names, classes_CD, card)


def takes_labels(config: Config) -> bool:
    """Whether a model of this configuration can be asked for classes that it was not trained on."""
    return config.network.classifier == "text" and not config.network.classifier_trainable


class Predictor:
    """A model with its classes and its way of sampling frames."""

    def __init__(
        self, model: Any, config: Config, class_names: Sequence[str], class_embeddings_CD: torch.Tensor
    ) -> None:
        self.model, self.config = model.eval(), config
        self.class_names = list(class_names)
        self.class_embeddings_CD = class_embeddings_CD
        self.device = next(model.parameters()).device
        self._embedded: tuple[list[str], torch.Tensor] | None = None  # the last labels that were asked for

    @classmethod
    def load(cls, folder: str | Path, device: str | torch.device | None = None) -> Predictor:
        """Opens an export, a run (its best weights) or a checkpoint. device: by default the GPU if there is one.

        Raises text4vis.config.ConfigError or text4vis.saved.checkpoint.CheckpointError.
        """
        device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        if not (Path(folder) / EXPORT_FILE).is_file():
            run = open_run(Path(folder))
            return cls(run.model.to(device), run.config, run.class_names, run.class_embeddings_CD)
        export = load_export(folder)
        config = config_from_dict(export.config, f"{folder}/{EXPORT_FILE}")
        return cls(export.model.to(device), config, export.class_names, export.class_embeddings)

    def predict(self, video: str | Path | np.ndarray, labels: Sequence[str] | None = None, top: int = 5) -> Prediction:
        """Recognises one video: a file or its address, a folder of frames, or an array (N, H, W, 3) uint8 RGB.

        labels: class names to choose from instead of the model's own. Raises PredictionError.
        """
        (prediction,) = self.predict_many([video], labels, top)
        if isinstance(prediction, PredictionError):
            raise prediction
        return prediction

    def predict_many(
        self,
        videos: Iterable[str | Path | np.ndarray],
        labels: Sequence[str] | None = None,
        top: int = 5,
        batch_size: int = 8,
    ) -> Iterator[Prediction | PredictionError]:
        """`predict` of each video in order, `batch_size` at a time. Instead of the prediction of a video that cannot be
        read comes its PredictionError: it is yielded, not raised.

        Raises PredictionError at once for labels that the model cannot take.
        """
        if isinstance(videos, str | Path | bytes):
            raise PredictionError(f"videos: {videos!r} is one video; give a list of them, or use predict")
        if batch_size < 1 or top < 1:
            raise PredictionError(f"batch_size {batch_size}, top {top}: expected at least 1")
        return self._predict_batches(iter(videos), *self._classes(labels), top, batch_size)

    def _predict_batches(
        self, videos: Iterator[Any], names: list[str], classes_CD: torch.Tensor, top: int, batch_size: int
    ) -> Iterator[Prediction | PredictionError]:
        while batch := list(itertools.islice(videos, batch_size)):
            sampled = [self._sampled(video) for video in batch]
            good = [one for one in sampled if not isinstance(one, PredictionError)]
            scores = iter(self._scores(np.stack([frames for _, frames in good]), classes_CD) if good else ())
            for one in sampled:
                if isinstance(one, PredictionError):
                    yield one
                else:
                    yield Prediction(_top(names, next(scores), top), *one)

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
        first_last_W2 = np.searchsorted(info.times_N, seconds_W2)
        frames = FrameReader(video, num_frames=info.num_frames)
        scores, thumbnails = [], []
        for begin in range(0, len(starts), batch_size):
            windows = [
                first + self._indices(max(1, stop - first))
                for first, stop in first_last_W2[begin : begin + batch_size].tolist()
            ]
            indices = np.minimum(np.concatenate(windows), info.num_frames - 1)
            frames_NSS3 = np.stack(self._decode(video, frames, indices))
            frames_BTSS3 = frames_NSS3.reshape(len(windows), -1, *frames_NSS3.shape[1:])
            scores.append(self._scores(frames_BTSS3, classes_CD))
            thumbnails += [frames_TSS3[len(frames_TSS3) // 2].copy() for frames_TSS3 in frames_BTSS3]
        return Timeline(names, seconds_W2, np.concatenate(scores), thumbnails)

    @torch.no_grad()
    def _scores(self, frames_BTSS3: np.ndarray, classes_CD: torch.Tensor) -> np.ndarray:
        """Probabilities (B, C)."""
        frames_BTCHW = torch.from_numpy(frames_BTSS3).permute(0, 1, 4, 2, 3).to(self.device)
        embeddings_BVD = self.model.encode_video(frames_BTCHW)[:, None].float().cpu().numpy()
        return class_scores(embeddings_BVD, classes_CD.float().cpu().numpy())

    def _classes(self, labels: Sequence[str] | None) -> tuple[list[str], torch.Tensor]:
        if labels is None:
            return self.class_names, self.class_embeddings_CD
        names = _names(labels)
        return names, self.embed(names)

    def embed(self, labels: Sequence[str]) -> torch.Tensor:
        """Rows (C, D) of class names: what `predict` compares a video with. Those of the last labels are kept.

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
            files = sorted((p for p in path.iterdir() if p.suffix.lower() in FRAME_SUFFIXES), key=_natural)
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
        out_BVTSS3 = np.empty((1, 1, 1, side, side, 3), np.uint8)
        geometry = eval_geometry(image.shape[0], image.shape[1], self.config.scale_size, side, 1)
        place(Frame(geometry, ((0, 0, 0, 0),)), image, out_BVTSS3)
        return out_BVTSS3[0, 0, 0]


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
        with Image.open(path) as image:
            return np.asarray(image.convert("RGB"))
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise PredictionError(f"{path}: not a readable image ({error})") from error


def _natural(path: Path) -> list[Any]:
    """Sorts img_2 before img_10."""
    return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", path.name)]
