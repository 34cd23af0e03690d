"""Recognises actions in videos with a trained model. Trains nothing and needs no launcher.

    import text4vis
    recogniser = text4vis.load("exported")                          # or a run: text4vis.load("runs/own")
    recogniser.predict("clip.mp4").top                              # the model's own classes
    recogniser.predict("clip.mp4", labels=["surfing", "skiing"])    # any others
    recogniser.scan("match.mp4", window_seconds=4).scores_WC        # a long video, window by window

B videos of a batch, T frames, S side of the model's input, C classes, D embedding width, W windows.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch

from shards.frames import LongVideo, PacketsError
from text4vis.classifier.embeddings import text_classifier
from text4vis.cluster.distributed import cores_per_rank
from text4vis.config.schema import Config, ConfigError
from text4vis.data.augmentation import frame_rule
from text4vis.evaluation.calibration import Calibration, at_temperature
from text4vis.evaluation.multi_label import MIDDLE, Decision
from text4vis.evaluation.protocols import class_logits, class_scores
from text4vis.model.video_clip import VideoClip
from text4vis.saved.opening import open_saved
from text4vis.saved.weights import weights_fingerprint
from text4vis.serving.answers import Prediction, Timeline, likeliest_of, reaching
from text4vis.serving.fitted import fitted_of
from text4vis.serving.footage import (
    PredictionError,
    Sampled,
    Sampler,
    Video,
    local_copy,
    open_long,
)
from text4vis.serving.index_store import LEAST_SECONDS

# Starts and ends (W, 2) in seconds of windows, a row for each, and their pictures (S, S, 3).
Windows: TypeAlias = tuple[np.ndarray, np.ndarray, list[np.ndarray]]


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
        video: Video,
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
        videos: Iterable[Video],
        labels: Sequence[str] | None = None,
        top: int = 5,
        batch_size: int = 8,
        *,
        accuracy: float | None = None,
        coverage: float | None = None,
        threads: int = 0,
    ) -> Iterator[Prediction | PredictionError]:
        """`predict` of each video in order, `batch_size` at a time. Instead of the prediction of a video that cannot be
        read comes its PredictionError: it is yielded, not raised.

        Videos are taken from `videos` and decoded ahead of the model, in `threads` threads (0: the cores of this rank);
        see text4vis.serving.footage.FRAMES_IN_FLIGHT. Raises PredictionError at once for labels that the model cannot
        take.
        """
        if isinstance(videos, str | Path | bytes):
            raise PredictionError(f"videos: {videos!r} is one video; give a list of them, or use predict")
        if batch_size < 1 or top < 1 or threads < 0:
            raise PredictionError(
                f"batch_size {batch_size}, top {top}: expected at least 1; threads {threads}: 0 or more"
            )
        labels = None if labels is None else _names(labels)  # an iterator is read once
        answer = self._answering(labels, top, accuracy, coverage)
        sampler = Sampler(self.config)
        sampled = sampler.sample_many(videos, threads=threads or cores_per_rank(), at_least=batch_size)
        return self._predict_batches(sampled, self._classes(labels)[1], answer, batch_size)

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
            likeliest = likeliest_of(names, scores_C, len(names) if candidate_from is not None else top)
            return Prediction(
                likeliest[:top],
                indices,
                frames,
                calibrated,
                None if sure_from is None else likeliest[0][1] >= sure_from,
                None if candidate_from is None else [name for name, share in likeliest if share >= candidate_from],
                None if present_from_C is None else reaching(names, scores_C, present_from_C),
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
        self,
        sampled: Iterable[Sampled | PredictionError],
        classes_CD: torch.Tensor,
        answer: Callable[..., Prediction],
        batch_size: int,
    ) -> Iterator[Prediction | PredictionError]:
        """In order, in batches of `batch_size` videos that could be read."""
        waiting: list[Sampled | PredictionError] = []

        def answered() -> Iterator[Prediction | PredictionError]:
            good = [one for one in waiting if not isinstance(one, PredictionError)]
            frames = np.stack([frames for _, frames in good]) if good else None
            scores = iter(() if frames is None else self._scores(self._embed(self._frames(frames)), classes_CD))
            for one in waiting:
                yield one if isinstance(one, PredictionError) else answer(next(scores), *one)
            waiting.clear()

        num_good = 0
        for one in sampled:
            waiting.append(one)
            num_good += not isinstance(one, PredictionError)
            if num_good in (0, batch_size):
                yield from answered()
                num_good = 0
        yield from answered()

    def scan(
        self,
        video: str | Path,
        labels: Sequence[str] | None = None,
        *,
        window_seconds: float = 4.0,
        step_seconds: float | None = None,
        batch_size: int = 8,
        threads: int = 0,
    ) -> Timeline:
        """Recognises a long video, a file or its address, window by window.

        A new window begins every `step_seconds` (default: half a window). The last one ends with the video; a video
        shorter than a window is one window. Each frame is decoded once, and windows of the same frames are recognised
        once. threads: that decode (0: the cores of this rank). Raises PredictionError.
        """
        step = window_seconds / 2 if step_seconds is None else step_seconds
        if not step >= LEAST_SECONDS or not window_seconds >= LEAST_SECONDS:
            raise PredictionError(
                f"windows of {window_seconds} s every {step} s: expected at least {LEAST_SECONDS:g} s"
            )
        if batch_size < 1 or threads < 0:
            raise PredictionError(f"batch_size {batch_size}: expected at least 1; threads {threads}: 0 or more")
        names, classes_CD = self._classes(labels)
        seconds_W2, scores_WC, thumbnails = self._scan(
            video,
            lambda embeddings_BD: self._scores(embeddings_BD, classes_CD),
            window_seconds=window_seconds,
            step_seconds=step,
            batch_size=batch_size,
            threads=threads or cores_per_rank(),
        )
        return Timeline(names, seconds_W2, scores_WC, thumbnails)

    def embed_windows(
        self,
        video: str | Path,
        *,
        window_seconds: float = 4.0,
        step_seconds: float = 2.0,
        batch_size: int = 8,
        threads: int = 1,
    ) -> tuple[float, np.ndarray]:
        """Length of a video in seconds, and the embeddings (W, D) float32 of the windows that `scan` would take, as
        unit vectors. Raises PredictionError.
        """
        seconds_W2, embeddings_WD, _ = self._scan(
            video,
            lambda embeddings_BD: embeddings_BD,
            window_seconds=window_seconds,
            step_seconds=step_seconds,
            batch_size=batch_size,
            threads=threads,
            pictures=False,
        )
        return float(seconds_W2[-1, 1]), _unit(embeddings_WD, video)

    def embed_moment(self, video: str | Path, start: float = 0.0, end: float | None = None) -> np.ndarray:
        """The embedding (D,) float32, a unit vector, of a part of a video file, in seconds. Raises PredictionError."""
        frames_TSS3 = Sampler(self.config).sample_part(video, start, end)
        return _unit(self._embed(self._frames(frames_TSS3[None])), video)[0]

    def _scan(self, video: str | Path, use: Callable[[np.ndarray], np.ndarray], **options: Any) -> Windows:
        """See `_scan_opened`. A file whose packets do not tell its times is read anew."""
        with local_copy(video) as path:
            try:
                return self._scan_opened(path, open_long(path), use, **options)
            except PacketsError:
                return self._scan_opened(path, open_long(path, by_packets=False), use, **options)

    def _scan_opened(
        self,
        path: Path,
        video: LongVideo,
        use: Callable[[np.ndarray], np.ndarray],
        *,
        window_seconds: float,
        step_seconds: float,
        batch_size: int,
        threads: int,
        pictures: bool = True,
    ) -> Windows:
        """The windows of an opened file, what `use` makes of their embeddings (B, D), and their pictures.

        Where the model sees each frame by itself, a frame of several windows is encoded once. U distinct windows.
        """
        sampler, duration = Sampler(self.config), video.timing.duration
        last = max(0.0, duration - window_seconds)
        starts = np.append(np.arange(0.0, last, step_seconds), last)
        seconds_W2 = np.stack([starts, np.minimum(starts + window_seconds, duration)], axis=1)
        windows_UT, which_W = np.unique(sampler.windows(video.timing, seconds_W2), axis=0, return_inverse=True)
        frames = sampler.in_order(path, video, np.unique(windows_UT).tolist(), threads)
        order_U = np.argsort(windows_UT.max(axis=1), kind="stable")
        middles_U = windows_UT[:, windows_UT.shape[1] // 2].tolist()
        results: dict[int, np.ndarray] = {}
        thumbnails: dict[int, np.ndarray] = {}  # by the number of the frame
        held: dict[int, torch.Tensor] = {}  # frames, or their embeddings, that these or later windows need
        uses = Counter(windows_UT.ravel().tolist())
        for begin in range(0, len(order_U), batch_size):
            batch = order_U[begin : begin + batch_size]
            needed = windows_UT[batch].ravel().tolist()
            new: dict[int, np.ndarray] = {}
            while not held.keys() | new.keys() >= set(needed):
                new |= [next(frames)]
            held |= zip(new, self._seen([*new.values()]), strict=True)
            if pictures:
                thumbnails |= {number: new[number].copy() for number in new.keys() & set(middles_U)}
            windows = torch.stack([held[number] for number in needed]).unflatten(0, (len(batch), -1))
            results |= zip(batch.tolist(), use(self._embed(windows)), strict=True)
            for number, count in Counter(needed).items():
                uses[number] -= count
                if not uses[number]:
                    del held[number]
        which = which_W.ravel().tolist()
        shown = [thumbnails[middles_U[u]] for u in which if pictures]
        return seconds_W2, np.stack([results[u] for u in which]), shown

    @torch.no_grad()
    def _seen(self, frames: Sequence[np.ndarray]) -> Sequence[torch.Tensor]:
        """Of each frame (S, S, 3) what `_embed` takes: its embedding (D,), or where the model looks at the frames of a
        window together, the frame (3, S, S) itself."""
        if not frames:
            return []
        frames_NCHW = self._frames(np.stack(frames))
        alone = not self.model.takes_fixed_frames
        return (self.model.encode_frames(frames_NCHW[:, None])[:, 0] if alone else frames_NCHW).unbind()

    @torch.no_grad()
    def _embed(self, windows: torch.Tensor) -> np.ndarray:
        """Embeddings (B, D) float32, not normalised, of frames (B, T, 3, S, S) uint8 or their embeddings (B, T, D)."""
        embed = self.model.encode_video if windows.dtype == torch.uint8 else self.model.fusion_model
        return embed(windows).float().cpu().numpy()

    def _frames(self, frames: np.ndarray) -> torch.Tensor:
        """Frames (..., S, S, 3) as (..., 3, S, S) on the device."""
        return torch.from_numpy(frames).movedim(-1, -3).to(self.device)

    def _scores(self, embeddings_BD: np.ndarray, classes_CD: torch.Tensor) -> np.ndarray:
        """Probabilities (B, C), calibrated where the classes are the model's own and a calibration is known.

        Of each class by itself for models of several labels a video, else they add up to 1.
        """
        embeddings_BVD, known_CD = embeddings_BD[:, None], classes_CD.float().cpu().numpy()
        if self.decision is not None:
            return self.decision.probabilities(class_logits(embeddings_BVD, known_CD))
        scores_BC = class_scores(embeddings_BVD, known_CD)
        if self.calibration is None or classes_CD is not self.class_embeddings_CD:
            return scores_BC
        return at_temperature(scores_BC, self.calibration.temperature)

    def settings(self, labels: Sequence[str] | None = None) -> dict[str, Any]:
        """What decides its answers, in JSON values: equal for a run, its checkpoint and its export."""
        data, network = self.config.data, self.config.network
        resize, interpolation = frame_rule(data)
        return {
            "weights": weights_fingerprint(self.model.state_dict()),
            "classifier": network.classifier,
            "template": network.template,
            "fitted": repr(self.calibration or self.decision),
            "classes": self.class_names if labels is None else list(labels),
            "frames": data.num_segments,
            "dense": data.dense,
            "pixels": [self.config.scale_size, data.input_size, resize, interpolation],
        }

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


def _unit(embeddings_WD: np.ndarray, video: str | Path) -> np.ndarray:
    """The same as unit vectors. Raises PredictionError where a model gives no numbers."""
    lengths_W1 = np.linalg.norm(embeddings_WD, axis=1, keepdims=True)
    if not (np.isfinite(lengths_W1) & (lengths_W1 > 0)).all():
        raise PredictionError(f"{video}: the model gives no finite embedding of it; are its weights damaged?")
    return embeddings_WD / lengths_W1


def _names(labels: Iterable[str]) -> list[str]:
    names = list(labels)
    wrong = labels if isinstance(labels, str) else next((name for name in names if not isinstance(name, str)), None)
    if wrong is not None:
        raise PredictionError(f"labels: {wrong!r}; give a list of class names")
    return names
