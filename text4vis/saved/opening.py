"""One way to open what holds a trained model: a run, a checkpoint, an export, or a .pt file of the original project.

    open_saved(path) ──> SavedModel ──> .config, .class_names, .card      read from JSON when they are asked for
                                    ├─> .parts()                          named tensors
                                    ├─> .load(config)                     a VideoClip
                                    └─> .trained()                        all of it together, for prediction and export

Only this module decides which of the four a path is. C classes, D embedding width.
"""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from torch import Tensor

from text4vis.classifier.embeddings import build_classifier
from text4vis.config.keys import keys_of
from text4vis.config.loading import config_from_dict
from text4vis.config.roles import Role
from text4vis.config.schema import Config, ConfigError, NetworkConfig
from text4vis.model.preprocessing import KEYS, settle
from text4vis.model.video_clip import VideoClip, build_model
from text4vis.saved import checkpoint
from text4vis.saved.checkpoint import CheckpointError, State
from text4vis.saved.inputs import SETTLED, RunInputs
from text4vis.saved.runs import check_same_classes, check_same_tokenizer
from text4vis.saved.weights import (
    EXPORT_FILE,
    Export,
    Parts,
    load_export,
    load_text4vis,
    read_classes,
    read_export,
    read_index,
    read_text4vis,
    start_from,
)

logger = logging.getLogger("text4vis")

ORIGINAL_SUFFIXES = (".pt", ".pth")


@dataclass(frozen=True)
class TrainedModel:
    """A model in fp32 with what was recorded of it.

    config: of its training. class_names: C. class_embeddings_CD: float32. card: where it comes from, in JSON values.
    """

    model: VideoClip
    config: Config
    class_names: list[str]
    class_embeddings_CD: Tensor
    card: dict[str, Any]


class SavedModel(ABC):
    """A trained model on disk. Properties and methods raise CheckpointError or ConfigError where files are damaged.

    kind: "run", "checkpoint", "export" or "original". path: as it was given.
    """

    def __init__(self, path: Path, kind: str) -> None:
        self.path, self.kind = path, kind

    @property
    @abstractmethod
    def config(self) -> Config | None:
        """The configuration of the training; None where none is recorded."""

    @property
    @abstractmethod
    def class_names(self) -> list[str] | None:
        """The classes of the training, C names; None where none are recorded."""

    @property
    @abstractmethod
    def card(self) -> dict[str, Any]:
        """Where the model comes from, in JSON values."""

    @property
    def settled(self) -> frozenset[str]:
        """The dotted names of the keys that `load` takes from the model itself, whatever configuration it is given."""
        return frozenset()

    def settle(self, config: Config, say: Callable[[str], None] = logger.debug) -> Config:
        """`config` with the model's pixels and activation where it gives none: those of the training, or where an
        earlier version did not record them, those that its files tell.

        say: is told what was settled and from where. Raises ConfigError that names the keys to give.
        """
        keys = [key for key in KEYS if key not in self.settled]
        return settle(config, self.config, keys=keys, network=self._own_network(config.network), say=say)

    def _own_network(self, network: NetworkConfig) -> NetworkConfig:
        """`network` with the files that the model is built from."""
        return network

    @property
    def class_embeddings_CD(self) -> Tensor | None:
        """The recorded embeddings of `class_names`, float32; None where they are built, as `config` says."""
        return None

    @abstractmethod
    def parts(self, key: str = "model") -> Parts:
        """The model's tensors on the CPU. key: named in errors."""

    @abstractmethod
    def load(self, config: Config | None = None) -> VideoClip:
        """The model in fp32 on the CPU, for the network and the frames of `config`, by default the recorded one.

        `settled` names keys that do not count. Raises ConfigError also where the weights do not fit the network.
        """

    @abstractmethod
    def trained(self) -> TrainedModel:
        """The model with everything that is recorded of it. Raises CheckpointError where that is not enough."""


class SavedRun(SavedModel):
    """A run, of which the best checkpoint is opened, or else the last; or one of its checkpoints.

    folder: of the checkpoint. run: of the run that the checkpoint belongs to.
    """

    def __init__(self, path: Path) -> None:
        self.folder = checkpoint.find(path)
        self.run = self.folder.parent.parent
        super().__init__(path, "checkpoint" if self.folder == path else "run")

    @cached_property
    def state(self) -> State:
        """The checkpoint's state, read once."""
        return checkpoint.read_state(self.folder)

    @cached_property
    def config(self) -> Config:
        """The recorded configuration."""
        return config_from_dict(self.state.config, str(self.path))

    @property
    def class_names(self) -> list[str]:
        """The recorded classes, C names."""
        return self.state.class_names

    @cached_property
    def _inputs(self) -> RunInputs | None:
        return RunInputs.find(self.run)

    @property
    def settled(self) -> frozenset[str]:
        """See `SavedModel.settled`."""
        return frozenset(SETTLED if self._inputs else ())

    def _own_network(self, network: NetworkConfig) -> NetworkConfig:
        return self._inputs.network(network) if self._inputs else network

    @property
    def class_embeddings_CD(self) -> Tensor | None:
        """The recorded embeddings (C, D), float32, or None."""
        return None if self._inputs is None else self._inputs.classes(self.class_names)

    @property
    def card(self) -> dict[str, Any]:
        """What is recorded of the training, in JSON values."""
        state = self.state
        return {
            "step": state.step,
            "videos seen": state.consumed,
            "global_batch": state.global_batch,
            "data_fingerprint": state.data_fingerprint,
            "figures": state.figures,
        }

    def parts(self, key: str = "model") -> Parts:
        """The model's tensors on the CPU."""
        checkpoint.verify(self.folder, only=[checkpoint.WEIGHTS, checkpoint.AVERAGE])
        return checkpoint.read_parts(self.folder)

    def load(self, config: Config | None = None) -> VideoClip:
        """The model in fp32 on the CPU; see `SavedModel.load`."""
        config = config or self.settle(self.config)
        network = replace(self._own_network(config.network), fix_text=True)  # type: ignore[type-var]
        model = build_model(network, config.data.num_segments, image_size=config.data.input_size)
        if self._inputs:
            self._inputs.load_text(model)
        checkpoint.verify(self.folder, only=[checkpoint.WEIGHTS, checkpoint.AVERAGE])
        checkpoint.load_checkpoint(model, self.folder)
        return model

    def trained(self) -> TrainedModel:
        """The model with its recipe, classes and class embeddings."""
        config, classes_CD = self.settle(self.config), self.class_embeddings_CD
        model = self.load(config)
        if config.network.classifier == "text":
            check_same_tokenizer(self.state, model, self.path)
        if classes_CD is None:
            if model.classifier is None:
                check_same_classes(self.state, config, self.path)
            classes_CD = build_classifier(config, model, self.class_names)
        return TrainedModel(model, config, self.class_names, classes_CD, self.card)


class SavedExport(SavedModel):
    """A folder that tools/export.py wrote. It holds its own network and class embeddings."""

    def __init__(self, path: Path) -> None:
        super().__init__(path, "export")

    @cached_property
    def _index(self) -> dict[str, Any]:
        return read_index(self.path)

    @cached_property
    def config(self) -> Config:
        """The recorded configuration."""
        return config_from_dict(self._index["config"], str(self.path / EXPORT_FILE))

    @property
    def class_names(self) -> list[str]:
        """The recorded classes, C names."""
        return self._index["class_names"]

    @property
    def card(self) -> dict[str, Any]:
        """The content of export.json that describes the model, in JSON values."""
        return self._index["card"]

    @property
    def settled(self) -> frozenset[str]:
        """See `SavedModel.settled`."""
        return frozenset(keys_of(Role.MODEL))

    @property
    def class_embeddings_CD(self) -> Tensor | None:
        """The recorded embeddings (C, D), float32, or None."""
        return read_classes(self.path, self.class_names)

    def parts(self, key: str = "model") -> Parts:
        """The model's tensors on the CPU."""
        return read_export(self.path, key)

    def load(self, config: Config | None = None) -> VideoClip:
        """The model in fp32 on the CPU; see `SavedModel.load`."""
        return self._load().model

    def trained(self) -> TrainedModel:
        """The model with its recipe, classes and class embeddings."""
        export = self._load()
        return TrainedModel(export.model, self.config, export.class_names, export.class_embeddings, export.card)

    def _load(self) -> Export:
        return load_export(self.path)


class OriginalFile(SavedModel):
    """A .pt file of the original project: weights alone, so the caller gives the configuration."""

    def __init__(self, path: Path) -> None:
        super().__init__(path, "original")

    @property
    def config(self) -> None:
        """None: such a file records no configuration."""
        return None

    @property
    def class_names(self) -> None:
        """None: such a file records no classes."""
        return None

    @property
    def card(self) -> dict[str, Any]:
        """Where the model comes from, in JSON values."""
        return {"source": self.path.name}

    def parts(self, key: str = "model") -> Parts:
        """The model's tensors on the CPU."""
        return read_text4vis(self.path, key)

    def load(self, config: Config | None = None) -> VideoClip:
        """The model in fp32 on the CPU; see `SavedModel.load`."""
        if config is None:
            raise self._records_nothing()
        data = config.data
        return load_text4vis(self.path, config.network, data.num_segments, image_size=data.input_size)

    def trained(self) -> TrainedModel:
        """Raises CheckpointError: such a file records neither recipe nor classes."""
        raise self._records_nothing()

    def _records_nothing(self) -> CheckpointError:
        return CheckpointError(
            f"{self.path}: a .pt file does not hold its recipe and classes; export it first: tools/export.py "
            f"{self.path} --config RECIPE --labels CSV --output FOLDER"
        )


def open_saved(path: str | Path) -> SavedModel:
    """What lies at `path`: a run's folder (its best checkpoint, or else its last), a checkpoint, an export, or a .pt
    file of the original project.

    Raises CheckpointError where there is none of these.
    """
    path = Path(path)
    if path.suffix in ORIGINAL_SUFFIXES and path.is_file():
        return OriginalFile(path)
    if (path / EXPORT_FILE).is_file():
        return SavedExport(path)
    return SavedRun(path)


def load_pretrained(model: VideoClip, path: Path) -> None:
    """Starts the model from the weights of any saved model, whatever its classes. Raises ConfigError."""
    try:
        parts = open_saved(path).parts("pretrain")
    except CheckpointError as error:
        raise ConfigError(f"pretrain: {error}") from None
    start_from(model, parts, f"pretrain: {path}")
