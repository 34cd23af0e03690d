"""Model files: the original project's checkpoints, and exports. Imports config, model and tensors.

An export is one folder from which a recogniser is built again without network access or the original weights:

    export.json          config, class names, card; written last: without it the folder is no export
    clip.json            open_clip's model config, with the normalisation of pixels
    model.safetensors    visual tower, temporal head, logit scale
    text.safetensors     text tower
    classes.safetensors  `class_embeddings` (C, D) float32
    a vocabulary         where the tokenizer is not CLIP's own

Only tensors and JSON are read; nothing in a file is executed. C classes, D embedding width.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError
from safetensors.torch import save_file
from torch import Tensor

from text4vis.config import ConfigError, NetworkConfig
from text4vis.model import VideoClip, build_model
from text4vis.tensors import State, load_strictly, read_torch_file, read_weights

EXPORT_FORMAT = "text4vis-export-1"
EXPORT_FILE = "export.json"
CLIP_FILE = "clip.json"


def load_text4vis(
    path: str | Path, network: NetworkConfig, num_segments: int, *, image_size: int | None = None
) -> VideoClip:
    """A `.pt` file of the original project in a model of `network`, in fp32 on the CPU.

    Reads what its `train.py` saves (`model_state_dict` with `visual.*`, `fusion_model.*`, `logit_scale`) and what its
    `train_nce.py` saves (`model_state_dict` of all of CLIP, text tower included, and `fusion_model_state_dict`), with
    or without `module.` before the names. The first has no text tower: it comes from `network.arch`'s own weights.
    `image_size` as in `build_model`. Raises ConfigError listing every key that does not fit.
    """
    video, text = _split(_read_checkpoint(Path(path)))
    # Weights that the file replaces need not be fetched first.
    network = replace(network, init=network.init and not text)  # type: ignore[type-var]
    model = build_model(network, num_segments, image_size=image_size)
    has_head = any(name.startswith("fusion_model.") for name in video)
    hint = ""
    if has_head != any(name.startswith("fusion_model.") for name in model.state_dict()):
        hint = f"; the file has {'a' if has_head else 'no'} temporal head: check network.sim_header"
    load_strictly(model, video, str(path), hint)
    if text:
        model.text.load_strictly(text, f"{path}: text tower")
    return model


def _read_checkpoint(path: Path) -> dict[str, Any]:
    checkpoint = read_torch_file(path, "checkpoint")
    if not isinstance(checkpoint, dict) or not isinstance(checkpoint.get("model_state_dict"), dict):
        raise ConfigError(f"checkpoint: {path} is not one of Text4Vis's: it has no `model_state_dict`")
    return checkpoint


def _split(checkpoint: Mapping[str, Any]) -> tuple[State, State]:
    """Tensors of the video part, named as in VideoClip, and those of the text tower, named as in open_clip's CLIP."""

    def without_prefix(state: Mapping[str, Tensor]) -> State:
        return {name.removeprefix("module."): tensor for name, tensor in state.items()}

    state = without_prefix(checkpoint["model_state_dict"])
    head = without_prefix(checkpoint.get("fusion_model_state_dict") or {})
    state |= {f"fusion_model.{name}": tensor for name, tensor in head.items()}
    text_names = {name for name in state if name in TEXT_TENSORS or name.startswith("transformer.")}
    video = {name: tensor for name, tensor in state.items() if name not in text_names}
    return video, {name: state[name] for name in text_names}


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

    Raises ConfigError for a text tower whose tokenizer is not CLIP's kind, or names and embeddings that disagree.
    """
    if class_embeddings.shape != (len(class_names), model.embed_dim):
        found = tuple(class_embeddings.shape)
        raise ConfigError(f"{folder}: {len(class_names)} class names, but class embeddings of shape {found}")
    if not model.text.has_simple_tokenizer:
        raise ConfigError(f"network.arch: the tokenizer of {network.arch} is not CLIP's; it cannot be exported yet")
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / EXPORT_FILE).unlink(missing_ok=True)
    clip_config = copy.deepcopy(model.clip_config)
    if model.text.bpe_path is not None:
        copied = folder / "bpe.txt.gz"
        copied.write_bytes(model.text.bpe_path.read_bytes())
        clip_config["text_cfg"]["tokenizer_kwargs"]["bpe_path"] = copied.name
    pixels = {"mean": list(model.mean), "std": list(model.std)}
    _write_json(folder / CLIP_FILE, {"model_cfg": clip_config, "preprocess_cfg": pixels})
    _write_tensors(folder / "model.safetensors", model.state_dict())
    _write_tensors(folder / "text.safetensors", model.text.state_dict())
    _write_tensors(folder / "classes.safetensors", {"class_embeddings": class_embeddings.float()})
    content = {
        "format": EXPORT_FORMAT,
        "network": TypeAdapter(NetworkConfig).dump_python(network, mode="json"),
        "num_segments": model.num_segments,
        "class_names": list(class_names),
        "card": dict(card),
        "config": dict(config_dict),
    }
    _write_json(folder / EXPORT_FILE, content)


def load_export(folder: str | Path) -> Export:
    """What `export_model` wrote, in fp32 on the CPU. Raises ConfigError naming the file that does not fit."""
    folder = Path(folder)
    content = _read_index(folder)
    own = {"arch": str(folder / CLIP_FILE), "pretrained": None, "init": False}
    try:
        network = TypeAdapter(NetworkConfig).validate_python(content["network"] | own)
    except ValidationError as error:
        raise ConfigError(f"{folder}/{EXPORT_FILE}: network: {error.errors()[0]['msg']}") from None
    model = build_model(network, content["num_segments"])
    where = f"{folder}/model.safetensors"
    load_strictly(model, read_weights(Path(where), "export"), where)
    where = f"{folder}/text.safetensors"
    model.text.load_strictly(read_weights(Path(where), "export"), where)
    class_names = content["class_names"]
    class_embeddings = read_weights(folder / "classes.safetensors", "export").get("class_embeddings")
    if class_embeddings is None or class_embeddings.shape != (len(class_names), model.embed_dim):
        raise ConfigError(f"{folder}/classes.safetensors: does not match the {len(class_names)} names in {EXPORT_FILE}")
    return Export(model, network, content["config"], class_names, class_embeddings, content["card"])


def _read_index(folder: Path) -> dict[str, Any]:
    path = folder / EXPORT_FILE
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        raise ConfigError(f"{folder}: not an export (no {EXPORT_FILE}); make one with tools/export.py") from None
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path}: not readable ({error})") from None
    if not isinstance(content, dict) or content.get("format") != EXPORT_FORMAT:
        raise ConfigError(f"{path}: not of format {EXPORT_FORMAT}; export the model again")
    absent = {"network", "num_segments", "class_names", "card", "config"} - content.keys()
    if absent:
        raise ConfigError(f"{path}: lacks {', '.join(sorted(absent))}; export the model again")
    return content


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _write_tensors(path: Path, state: Mapping[str, Tensor]) -> None:
    partial = path.with_suffix(".partial")  # tensors read from an export are views of its files
    save_file({name: tensor.detach().cpu().contiguous() for name, tensor in state.items()}, partial)
    partial.replace(path)
