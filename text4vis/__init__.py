"""Text4Vis: video recognition with CLIP, whose frozen text embeddings of the class names are the classifier.

The rooms are imported when they are first used: `text4vis.data.build_loader`, `text4vis.config.load_config`, ...
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import lazy_loader

if TYPE_CHECKING:
    from text4vis.serving.predictor import Predictor
    from text4vis.serving.search import SearchIndex

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submodules=[
        "classifier",
        "cluster",
        "common",
        "config",
        "data",
        "doctor",
        "evaluation",
        "model",
        "report",
        "saved",
        "serving",
        "training",
    ],
)


def load(export_dir: str | Path, device: str | None = None) -> Predictor:
    """Opens an export, a run or a checkpoint for prediction.

    device: such as "cuda:0"; the default is a GPU where there is one. Raises text4vis.config.ConfigError or
    text4vis.saved.CheckpointError.
    """
    from text4vis.serving.predictor import Predictor

    return Predictor.load(export_dir, device)


def open_index(folder: str | Path, model: str | Path | None = None, device: str | None = None) -> SearchIndex:
    """Opens an index of tools/search.py to find moments of videos.

    model: the export or run that it was made with; by default where that lay then. device: as of `load`. Raises
    text4vis.serving.SearchError.
    """
    from text4vis.serving.search import SearchIndex

    return SearchIndex.open(folder, model, device)
