"""Model files: the parts of a saved model, the original project's checkpoints, exports.

An export is one folder from which a recogniser is built again without network access or the original weights:

    export.json          config, class names, card; written last: without it the folder is no export
    clip.json            open_clip's model config, with the normalisation of pixels
    model.safetensors    visual tower, temporal head, logit scale
    text.safetensors     text tower
    classes.safetensors  `class_embeddings` (C, D) float32
    bpe.txt.gz, tokenizer/, encoder/   what the text tower needs besides, where it is not CLIP's own

Only tensors and JSON are read; nothing in a file is executed. C classes, D embedding width.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from pydantic import TypeAdapter, ValidationError
from torch import Tensor

from shards.files import replacing_path, write_atomically
from text4vis.classifier.embeddings import TENSOR
from text4vis.config.schema import ConfigError, NetworkConfig
from text4vis.model.layouts import State, without_wrappers
from text4vis.model.tensors import fingerprint, is_state, load_strictly, read_torch_file, read_weights, write_tensors
from text4vis.model.video_clip import VideoClip, build_model

logger = logging.getLogger("text4vis")

EXPORT_FORMAT = "text4vis-export-1"
EXPORT_FILE = "export.json"
MAX_SEGMENTS = 10_000  # no model sees so many frames at once
CLIP_FILE, TEXT_FILE, CLASSES_FILE = "clip.json", "text.safetensors", "classes.safetensors"


@dataclass(frozen=True)
class Parts:
    """The tensors of a saved model, however its file names them.

    video: visual tower, temporal head and logit scale, named as in VideoClip. text: the text tower, named as in its
    `module`; empty if the file has none. classifier: class embeddings (C, D) that were trained, if any were.
    """

    video: State
    text: State
    classifier: Tensor | None = None

    @classmethod
    def of(cls, state: Mapping[str, Tensor]) -> Parts:
        """The parts of a VideoClip's state dict."""
        return cls(
            video={name: tensor for name, tensor in state.items() if not _is_class_part(name)},
            text=_below("text_tower.", state),
            classifier=state.get("classifier"),
        )


def _is_class_part(name: str) -> bool:
    return name == "classifier" or name.startswith("text_tower.")


def _below(prefix: str, state: Mapping[str, Tensor]) -> State:
    return {name.removeprefix(prefix): tensor for name, tensor in state.items() if name.startswith(prefix)}


def load_parts(model: VideoClip, parts: Parts, where: str, hint: str = "") -> None:
    """Loads the video part, and the text tower where there is one. Raises ConfigError listing what does not fit."""
    others = {name: tensor for name, tensor in model.state_dict().items() if _is_class_part(name)}
    load_strictly(model, others | parts.video, where, hint)
    if parts.text:
        model.text.load_strictly(parts.text, f"{where}: text tower")


def start_from(model: VideoClip, parts: Parts, where: str) -> None:
    """Starts a model from another one's weights, whatever that one's classes; logs what was taken.

    The visual tower and the logit scale must fit. A temporal head of another kind or shape is left as it is, and so
    are convolutions over time that the other tower lacks. The text tower is taken where it trains. Raises ConfigError.
    """
    visual = _below("visual.", parts.video)
    own = model.visual.state_dict()
    added = {name: own[name] for name in own if "control_point" in name and name not in visual}
    hint = "; network.arch, network.tm and data.input_size must be those that it was trained with"
    load_strictly(model.visual, added | visual, f"{where}: visual tower", hint)
    if "logit_scale" not in parts.video:
        raise ConfigError(f"{where}: has no logit_scale; give a model of Text4Vis")
    with torch.no_grad():
        model.logit_scale.copy_(parts.video["logit_scale"].reshape(1))
    taken, fresh = ["visual tower", "logit scale"], ["convolutions over time"] if added else []
    head, own_head = _below("fusion_model.", parts.video), model.fusion_model.state_dict()
    if {name: tensor.shape for name, tensor in head.items()} == {name: own_head[name].shape for name in own_head}:
        model.fusion_model.load_state_dict(head)
        taken += ["temporal head"] if head else []
    elif own_head:
        fresh.append(f"temporal head ({'another kind or shape' if head else 'none'} in the file)")
    if parts.text and model.text_tower is not None:
        model.text.load_strictly(parts.text, f"{where}: text tower")
        taken.append("text tower")
    elif parts.text and not _same(parts.text, model.text.state_dict()):
        logger.warning("%s: its text tower is another than network.arch's, which stays (network.fix_text)", where)
    logger.info("%s: took %s%s", where, ", ".join(taken), f"; starts fresh: {', '.join(fresh)}" if fresh else "")


def _same(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(
        one[name].shape == other[name].shape and torch.allclose(one[name].float(), other[name].float()) for name in one
    )


def load_text4vis(
    path: str | Path, network: NetworkConfig, num_segments: int, *, image_size: int | None = None
) -> VideoClip:
    """A `.pt` file of the original project in a model of `network`, in fp32 on the CPU.

    Reads what its `train.py` saves (`model_state_dict` with `visual.*`, `fusion_model.*`, `logit_scale`) and what its
    `train_nce.py` saves (`model_state_dict` of all of CLIP, text tower included, and `fusion_model_state_dict`), with
    or without wrappers' prefixes (`model.layouts`), or the first's state dict alone. The first has no text tower: it
    comes from `network.arch`'s own weights. `image_size` as in `build_model`. Raises ConfigError listing every key that
    does not fit.
    """
    parts = read_text4vis(Path(path))
    # Weights that the file replaces need not be fetched first.
    network = replace(network, init=network.init and not parts.text, fix_text=True)  # type: ignore[type-var]
    model = build_model(network, num_segments, image_size=image_size)
    load_parts(model, parts, str(path), _hints(parts.video, model.state_dict()))
    return model


# What the names of tensors show, and the key that decides it.
OPTIONAL_PARTS = {
    "fusion_model.": ("temporal head", "network.sim_header"),
    "visual.time_embedding": ("time embedding", "network.joint_st"),
    ".control_point.conv.": ("convolution over time", "network.tm: tokent1d"),
    ".net.": ("shift of patches", "network.tm: tsm"),
}


def _hints(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> str:
    """The keys to check where a file has an optional part and the network does not, or the other way round."""
    hints = []
    for mark, (part, key) in OPTIONAL_PARTS.items():
        has = any(mark in name for name in found)
        if has != any(mark in name for name in expected):
            hints.append(f"; the file has {'a' if has else 'no'} {part}: check {key}")
    return "".join(hints)


def read_text4vis(path: Path, key: str = "checkpoint") -> Parts:
    """The parts of a `.pt` file of the original project. `key` is named in errors. Raises ConfigError."""
    checkpoint = read_torch_file(path, key)
    if is_state(checkpoint) and checkpoint:
        checkpoint = {"model_state_dict": checkpoint}
    if not isinstance(checkpoint, dict) or not is_state(checkpoint.get("model_state_dict")):
        raise ConfigError(f"{key}: {path} is not one of Text4Vis's: it has no `model_state_dict` of named tensors")
    if not is_state(checkpoint.get("fusion_model_state_dict") or {}):
        raise ConfigError(f"{key}: {path}: its `fusion_model_state_dict` is no dictionary of named tensors")

    state = without_wrappers(checkpoint["model_state_dict"])
    head = without_wrappers(checkpoint.get("fusion_model_state_dict") or {})
    state |= {f"fusion_model.{name}": tensor for name, tensor in head.items()}
    text_names = {name for name in state if name in TEXT_TENSORS or name.startswith("transformer.")}
    video = {name: tensor for name, tensor in state.items() if name not in text_names}
    return Parts(video, {name: state[name] for name in text_names})


TEXT_TENSORS = (
    "token_embedding.weight",
    "positional_embedding",
    "ln_final.weight",
    "ln_final.bias",
    "text_projection",
)


@dataclass(frozen=True)
class Export:
    """A loaded export: `network` names the export's own files, `config` is the training run's, as plain values."""

    model: VideoClip
    network: NetworkConfig
    config: dict[str, Any]
    class_names: list[str]
    class_embeddings: Tensor
    card: dict[str, Any]


def export_model(  # noqa: PLR0917
    folder: str | Path,
    model: VideoClip,
    network: NetworkConfig,
    config_dict: Mapping[str, Any],
    class_names: Sequence[str],
    class_embeddings: Tensor,
    card: Mapping[str, Any],
) -> None:
    """Writes an export; an older one in the same folder is replaced. `card` says where it comes from, in JSON values.

    Raises ConfigError for a tokenizer that cannot be copied, and names and embeddings that disagree.
    """
    if class_embeddings.shape != (len(class_names), model.embed_dim):
        found = tuple(class_embeddings.shape)
        raise ConfigError(f"{folder}: {len(class_names)} class names, but class embeddings of shape {found}")
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / EXPORT_FILE).unlink(missing_ok=True)
    write_clip(folder, model, config_dict.get("data", {}))
    write_state(folder / "model.safetensors", Parts.of(model.state_dict()).video)
    write_state(folder / TEXT_FILE, model.text.state_dict())
    write_state(folder / CLASSES_FILE, {TENSOR: class_embeddings.float()})
    content = {
        "format": EXPORT_FORMAT,
        "network": TypeAdapter(NetworkConfig).dump_python(network, mode="json"),
        "num_segments": model.num_segments,
        "class_names": list(class_names),
        "card": dict(card),
        "config": dict(config_dict),
    }
    _write_json(folder / EXPORT_FILE, content)


def write_card(folder: Path, card: Mapping[str, Any]) -> None:
    """Gives an export another card, in one step; all else stays. Raises ConfigError, OSError."""
    _write_json(folder / EXPORT_FILE, read_index(folder) | {"card": dict(card)})


def load_export(folder: str | Path) -> Export:
    """What `export_model` wrote, in fp32 on the CPU. Raises ConfigError naming the file that does not fit."""
    folder = Path(folder)
    content = read_index(folder)
    own = {"arch": str(folder / CLIP_FILE), "pretrained": None, "init": False, "fix_text": True}
    own |= {"mean": None, "std": None, "activation": None}  # clip.json tells
    try:
        network = TypeAdapter(NetworkConfig).validate_python(content["network"] | own)
    except ValidationError as error:
        raise ConfigError(f"{folder}/{EXPORT_FILE}: network: {error.errors()[0]['msg']}") from None
    model = build_model(network, content["num_segments"])
    parts = read_export(folder)
    load_strictly(model, parts.video, f"{folder}/model.safetensors")
    model.text.load_strictly(parts.text, f"{folder}/{TEXT_FILE}")
    class_names = content["class_names"]
    class_embeddings = read_classes(folder, class_names)
    if class_embeddings.shape[1] != model.embed_dim:
        raise ConfigError(f"{folder}/{CLASSES_FILE}: is {class_embeddings.shape[1]} wide, the model {model.embed_dim}")
    if network.classifier_trainable:
        model.set_classifier(class_embeddings, class_names)
    return Export(model, network, content["config"], class_names, class_embeddings, content["card"])


def read_classes(folder: Path, class_names: Sequence[str]) -> Tensor:
    """The class embeddings (C, D) in the folder of an export or of a run's inputs. Raises ConfigError."""
    path = folder / CLASSES_FILE
    classes_CD = read_weights(path, "class embeddings").get(TENSOR)
    if classes_CD is None or classes_CD.ndim != 2 or len(classes_CD) != len(class_names):
        raise ConfigError(f"{path}: does not match the {len(class_names)} class names recorded with it")
    return classes_CD


def read_export(folder: Path, key: str = "export") -> Parts:
    """The parts of an export's model. key: named in errors. Raises ConfigError."""
    video, text = (read_weights(folder / f"{name}.safetensors", key) for name in ("model", "text"))
    return Parts(video, text)


def read_index(folder: Path) -> dict[str, Any]:
    """The checked content of export.json: network, num_segments, class_names, card, config. Raises ConfigError."""
    path = folder / EXPORT_FILE
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        raise ConfigError(f"{folder}: not an export (no {EXPORT_FILE}); make one with tools/export.py") from None
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(f"{path}: not readable ({error})") from None
    if not isinstance(content, dict) or content.get("format") != EXPORT_FORMAT:
        raise ConfigError(f"{path}: not of format {EXPORT_FORMAT}; export the model again")
    absent = {"network", "num_segments", "class_names", "card", "config"} - content.keys()
    if absent:
        raise ConfigError(f"{path}: lacks {', '.join(sorted(absent))}; export the model again")
    names, segments = content["class_names"], content["num_segments"]
    sections = all(isinstance(content[key], dict) for key in ("network", "card", "config"))
    if not (sections and isinstance(names, list) and all(isinstance(name, str) for name in names)):
        raise ConfigError(f"{path}: network, card, config or class_names are of another kind; export the model again")
    if type(segments) is not int or not 0 < segments <= MAX_SEGMENTS:
        raise ConfigError(f"{path}: num_segments is {segments!r}; export the model again")
    return content


def write_clip(folder: Path, model: VideoClip, data: Mapping[str, Any]) -> None:
    """Writes clip.json, from which the towers are built again, after the files that it names.

    data: of the configuration, in plain values. Raises ConfigError for a tokenizer that cannot be copied, OSError.
    """
    clip_config = model.clip_config | {"text_cfg": model.text.save_files(folder)}
    frames = {"interpolation": data.get("interpolation"), "resize_mode": data.get("resize")}
    pixels = {"mean": list(model.mean), "std": list(model.std), **frames}
    _write_json(folder / CLIP_FILE, {"model_cfg": clip_config, "preprocess_cfg": pixels})


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    write_atomically(path, (json.dumps(content, indent=2, ensure_ascii=False) + "\n").encode())


def write_state(path: Path, state: Mapping[str, Tensor]) -> None:
    """Writes named tensors as safetensors, complete or not at all. Raises OSError."""
    with replacing_path(path) as temporary:  # tensors read from an export may be views of this very file
        write_tensors(temporary, state)


def weights_fingerprint(state: Mapping[str, Tensor]) -> str:
    """SHA-256 of a model's weights without the text tower, in fp32: equal for a run, its checkpoint and its export."""
    video = Parts.of(state).video
    return fingerprint({name: value.float() if value.is_floating_point() else value for name, value in video.items()})
