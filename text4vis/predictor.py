"""Recognises actions in videos with an exported model. May import the model and the geometry; needs no engine.

    import text4vis
    recogniser = text4vis.load("exported")
    recogniser.predict("clip.mp4").top                          # the model's own classes
    recogniser.predict("clip.mp4", labels=["surfing", "skiing"])   # any others

T frames, S side of the model's input, D embedding width.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from shards.video import VideoError, decode_frames, probe_video
from text4vis.augmentation import eval_geometry
from text4vis.classifier import text_classifier
from text4vis.config import Config, config_from_dict
from text4vis.jobs import Frame
from text4vis.pipeline import place
from text4vis.protocols import class_scores
from text4vis.sampling import val_indices
from text4vis.weights import load_export

FRAME_SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".bmp"}


class PredictionError(Exception):
    """Input that cannot be recognised. The message names it and the fix."""


@dataclass(frozen=True)
class Prediction:
    """top: (class name, probability), the likeliest first. indices: (T,) frame numbers; frames: (T, S, S, 3) uint8."""

    top: list[tuple[str, float]]
    indices: np.ndarray
    frames: np.ndarray


class Predictor:
    """A model with its classes and its way of sampling frames."""

    def __init__(
        self, model: Any, config: Config, class_names: Sequence[str], class_embeddings_CD: torch.Tensor
    ) -> None:
        self.model, self.config = model.eval(), config
        self.class_names = list(class_names)
        self.class_embeddings_CD = class_embeddings_CD
        self.device = next(model.parameters()).device

    @classmethod
    def load(cls, folder: str | Path) -> Predictor:
        """Opens an export on the GPU if there is one. Raises text4vis.config.ConfigError."""
        export = load_export(folder)
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        config = config_from_dict(export.config, f"{folder}/export.json")
        return cls(export.model.to(device), config, export.class_names, export.class_embeddings)

    @torch.no_grad()
    def predict(self, video: str | Path | np.ndarray, labels: Sequence[str] | None = None, top: int = 5) -> Prediction:
        """Recognises one video: a file, a folder of frames, or an array (N, H, W, 3) uint8 RGB.

        labels: class names to choose from instead of the model's own. Raises PredictionError.
        """
        indices, images = self._sample(video)
        frames_TSS3 = self._prepare(images)
        names = self.class_names if labels is None else list(labels)
        classes_CD = self.class_embeddings_CD if labels is None else self._embed_labels(names)
        frames_BTCHW = torch.from_numpy(frames_TSS3).permute(0, 3, 1, 2)[None].to(self.device)
        embedding_BVD = self.model.encode_video(frames_BTCHW)[:, None].float().cpu().numpy()
        scores_C = class_scores(embedding_BVD, classes_CD.float().cpu().numpy())[0]
        order = np.argsort(-scores_C, kind="stable")[:top]
        return Prediction([(names[c], float(scores_C[c])) for c in order], indices, frames_TSS3)

    def _embed_labels(self, names: list[str]) -> torch.Tensor:
        kind = self.config.network.classifier
        if kind != "text" or self.config.network.classifier_trainable:
            raise PredictionError(
                f"labels: this model was trained with {'a trainable' if kind == 'text' else 'the'} classifier {kind}, "
                f"so it knows its own classes only ({', '.join(self.class_names[:3])} ...); leave the labels out, or "
                "train with the frozen text classifier"
            )
        return text_classifier(self.model, names, self.config.network.template)

    def _sample(self, video: str | Path | np.ndarray) -> tuple[np.ndarray, list[np.ndarray]]:
        """Numbers and RGB images of the sampled frames, first of each segment, as in evaluation."""
        segments = self.config.data.num_segments
        if isinstance(video, np.ndarray):
            if video.ndim != 4 or video.shape[3] != 3 or video.dtype != np.uint8 or not len(video):
                raise PredictionError(f"expected frames (N, H, W, 3) uint8, got {video.shape} {video.dtype}")
            indices = val_indices(len(video), segments)
            return indices, [video[i] for i in indices]
        path = Path(video)
        if path.is_dir():
            files = sorted((p for p in path.iterdir() if p.suffix.lower() in FRAME_SUFFIXES), key=_natural)
            if not files:
                raise PredictionError(f"{path}: holds no frames ({', '.join(sorted(FRAME_SUFFIXES))})")
            indices = val_indices(len(files), segments)
            return indices, [_read_image(files[i]) for i in indices]
        if not path.is_file():
            raise PredictionError(f"{path}: no such video file or folder of frames")
        try:
            indices = val_indices(max(1, probe_video(path).num_frames), segments)
            return indices, decode_frames(path, indices)
        except VideoError as error:
            raise PredictionError(f"{path}: {error}; is it a video file?") from error

    def _prepare(self, images: list[np.ndarray]) -> np.ndarray:
        """(T, S, S, 3) uint8: scaled and centre-cropped as in evaluation."""
        side = self.config.data.input_size
        out_BVTSS3 = np.empty((1, 1, len(images), side, side, 3), np.uint8)
        for t, image in enumerate(images):
            height, width = image.shape[:2]
            geometry = eval_geometry(height, width, self.config.scale_size, side, 1)
            place(Frame(geometry, ((0, 0, t, geometry.crops[0]),)), image, out_BVTSS3)
        return out_BVTSS3[0, 0]


def _read_image(path: Path) -> np.ndarray:
    try:
        with Image.open(path) as image:
            return np.asarray(image.convert("RGB"))
    except OSError as error:
        raise PredictionError(f"{path}: not a readable image ({error})") from error


def _natural(path: Path) -> list[Any]:
    """Sorts img_2 before img_10."""
    return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", path.name)]
