"""Text4Vis: video recognition with CLIP, whose frozen text embeddings of the class names are the classifier."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from text4vis.serving.predictor import Predictor


def load(export_dir: str | Path, device: str | None = None) -> Predictor:
    """Opens an export (or a run, or a checkpoint) for prediction; see `predictor.Predictor`, and there
    `PredictionError`."""
    from text4vis.serving.predictor import Predictor

    return Predictor.load(export_dir, device)
