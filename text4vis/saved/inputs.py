"""What a run takes from elsewhere: which files those were, and a copy of what it needs to be opened without them.

    OUT/inputs/   clip.json            open_clip's model config of the towers, at the run's image size
                  a vocabulary         where the tokenizer is not CLIP's own
                  text.safetensors     the text tower, unless it trains and is in the checkpoints
                  classes.safetensors  the class embeddings (C, D), unless they train or come from a tower that does

The checkpoints hold the rest, so a run opens from any folder, also when its weights, class names or embeddings are gone
from where the recipe names them.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from operator import attrgetter
from pathlib import Path

from torch import Tensor

from text4vis.classifier.embeddings import TENSOR
from text4vis.config.schema import Config, NetworkConfig, schema
from text4vis.model.tensors import read_weights
from text4vis.model.video_clip import VideoClip
from text4vis.saved.checkpoint import sha256_of
from text4vis.saved.weights import CLASSES_FILE, CLIP_FILE, TEXT_FILE, read_classes, write_clip, write_state

FOLDER = "inputs"
SETTLED = ("network.arch", "network.pretrained")  # keys whose values the copy replaces


@dataclass(frozen=True)
class RunInputs:
    """The folder OUT/inputs of a run. Its methods raise ConfigError where a file in it is missing or damaged."""

    folder: Path

    @classmethod
    def find(cls, run: Path) -> RunInputs | None:
        """Those of a run; None where it keeps none, as runs of version 0.1."""
        return cls(run / FOLDER) if (run / FOLDER / CLIP_FILE).is_file() else None

    @classmethod
    def keep(cls, run: Path, model: VideoClip, classes_CD: Tensor | None) -> None:
        """Writes the folder, in place of an older one. classes_CD: class embeddings that do not train. Raises OSError.

        A tower whose tokenizer is not CLIP's kind cannot be written: such a run needs its files where they were.
        """
        folder = run / FOLDER
        shutil.rmtree(folder, ignore_errors=True)
        if not model.text.has_simple_tokenizer:
            return
        folder.mkdir()
        if model.text_tower is None:
            write_state(folder / TEXT_FILE, model.text.state_dict())
        if classes_CD is not None:
            write_state(folder / CLASSES_FILE, {TENSOR: classes_CD.float()})
        write_clip(folder, model)  # the last: without it the folder counts as absent

    def network(self, network: NetworkConfig) -> NetworkConfig:
        """The same network, built from the kept files; `load_text` gives it its text tower's weights."""
        arch = str(self.folder / CLIP_FILE)
        return replace(network, arch=arch, pretrained=None, init=False)  # type: ignore[type-var]

    def load_text(self, model: VideoClip) -> None:
        """Gives a model of `network` the text tower that the run began with, unless the checkpoints hold it."""
        path = self.folder / TEXT_FILE
        if path.exists():
            model.text.load_strictly(read_weights(path, "inputs"), str(path))

    def classes(self, class_names: Sequence[str]) -> Tensor | None:
        """The class embeddings (C, D) of the run's classes; None where the model gives them."""
        return read_classes(self.folder, class_names) if (self.folder / CLASSES_FILE).exists() else None


def fixed_paths() -> tuple[str, ...]:
    """The dotted names of the keys that name files and may not change within a run."""
    return tuple(declared.name for declared in schema() if declared.path != "no" and not declared.role.may_change)


def digests(config: Config) -> dict[str, str]:
    """What the files that decide a run hold, by key: the SHA-256 of a file, the name of a folder.

    So a run is the same wherever its files lie. Left out: names of models, what is not there.
    """
    found = {}
    for key in fixed_paths():
        value = attrgetter(key)(config)
        if value and Path(value).is_file():
            found[key] = sha256_of(Path(value))
        elif value and Path(value).is_dir():
            found[key] = f"folder {Path(value).absolute().name}"
    return found


def same_path(key: str, before: object, now: object, known: Mapping[str, str], found: Mapping[str, str]) -> bool:
    """Whether two values of a key of `fixed_paths` stand for the same; known, found: the `digests` of both."""
    if key in known and key in found:
        return known[key] == found[key]
    if before is None or now is None:
        return before == now
    return before == now or Path(str(before)).absolute() == Path(str(now)).absolute()
