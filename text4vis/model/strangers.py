"""What a stranger's model folder may hold: numbers within limits, names that stay in it, and no more than memory takes.

`model.sources` reads such folders, `model.towers` and `model.tokenizing` build from them. Nothing is built, fetched or
allotted before the checks here have passed.
"""

from __future__ import annotations

import gzip
import json
import math
import os
import re
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import Any

from open_clip.model import CLIPTextCfg, CLIPVisionCfg

from text4vis.config.schema import ConfigError

MOST_JSON_BYTES, MOST_VOCABULARY_BYTES = 4 << 20, 64 << 20
# The largest that are published are a small part of each.
_RANGES: dict[str, dict[str, tuple[float, float]]] = {
    "": {"embed_dim": (1, 65_536)},
    "vision_cfg": {
        "layers": (1, 512), "width": (1, 32_768), "head_width": (1, 4096), "mlp_ratio": (0.001, 64),
        "patch_size": (1, 4096), "image_size": (1, 4096), "attn_pooler_queries": (1, 65_536),
        "attn_pooler_heads": (1, 1024), "patch_dropout": (0, 0.999),
    },
    "text_cfg": {
        "context_length": (1, 65_536), "vocab_size": (1, 4 << 20), "width": (1, 32_768), "heads": (1, 1024),
        "layers": (0, 512), "mlp_ratio": (0.001, 64),
    },
}  # fmt: skip
_FRACTIONS = frozenset(("mlp_ratio", "patch_dropout"))
_LISTS = frozenset(("layers", "patch_size", "image_size"))  # of vision_cfg: for each stage, or height and width
_TIMM_NAME = re.compile(r"[A-Za-z0-9_.]+")
_RESIZE = ("shortest", "longest", "squash")
_INTERPOLATION = ("bicubic", "bilinear", "random")
_NUMBER_BYTES = 4  # of a parameter


def read_json(path: Path, key: str) -> Any:
    """A small JSON file; key: named in errors. Raises ConfigError."""
    try:
        if not path.is_file():
            raise ConfigError(f"{key}: {'no such file' if not path.exists() else 'not a regular file'}: {path}")
        with path.open("rb") as file:
            data = file.read(MOST_JSON_BYTES + 1)
        if len(data) > MOST_JSON_BYTES:
            raise ConfigError(
                f"{key}: {path} has more than {MOST_JSON_BYTES} bytes, which no configuration of a model has"
            )
        return json.loads(data.decode("utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(f"{key}: {path} is not a JSON file ({error})") from None


def check_vocabulary(path: Path, where: str) -> None:
    """Raises ConfigError for a packed vocabulary that is no file, or grows beyond any when it is unpacked, OSError."""
    if not path.is_file():
        raise ConfigError(f"{where}: {'no such file' if not path.exists() else 'not a regular file'}: {path}")
    with gzip.open(path) as file:
        size = 0
        while block := file.read(1 << 20):
            size += len(block)
            if size > MOST_VOCABULARY_BYTES:
                raise ConfigError(f"{where}: {path} has more than {MOST_VOCABULARY_BYTES} bytes when it is unpacked")


def check_model_config(config: Mapping[str, Any], where: str) -> None:
    """Raises ConfigError for a number out of range, a name that would be fetched, and a model larger than memory.

    config: open_clip's model config. where: names its file.
    """
    for section, ranges in _RANGES.items():
        values = config.get(section, {}) if section else config
        for name, (low, high) in ranges.items():
            value = values.get(name)
            if value is not None:
                _check_number(f"{where}: {section}{'.' if section else ''}{name}", name, value, low, high)
    timm_name = config["vision_cfg"].get("timm_model_name")
    if timm_name is not None and not (isinstance(timm_name, str) and _TIMM_NAME.fullmatch(timm_name)):
        raise ConfigError(f"{where}: vision_cfg.timm_model_name: {timm_name!r:.80} is no name of timm's own models")
    _refuse_larger_than_memory(_parameters(config), where)


def _check_number(where: str, name: str, value: Any, low: float, high: float) -> None:
    is_list = isinstance(value, list) and name in _LISTS and "vision_cfg" in where and 2 <= len(value) <= 4
    kinds = (int, float) if name in _FRACTIONS else (int,)
    for one in value if is_list else [value]:
        if isinstance(one, bool) or not isinstance(one, kinds) or not low <= one <= high:
            what = "a number" if name in _FRACTIONS else "a whole number"
            raise ConfigError(f"{where}: {value!r:.80}; expected {what} from {low:g} to {high:g}")


def _parameters(config: Mapping[str, Any]) -> int:
    """About as many as the towers have; those of timm's and Hugging Face's own towers are not counted."""
    total = 0
    vision, text = (
        {name: value for name, value in config[section].items() if value is not None}
        for section in ("vision_cfg", "text_cfg")
    )
    if not vision.get("timm_model_name"):
        width = vision.get("width", CLIPVisionCfg.width)
        layers, ratio = vision.get("layers", CLIPVisionCfg.layers), vision.get("mlp_ratio", CLIPVisionCfg.mlp_ratio)
        if isinstance(layers, list):
            total += sum(count * 13 * (width * 2**stage) ** 2 for stage, count in enumerate(layers))
        else:
            total += int(layers * (4 + 2 * ratio) * width**2)
            sides = [_sides(vision, name) for name in ("image_size", "patch_size")]
            total += width * math.prod(-(-image // patch) for image, patch in zip(*sides, strict=True))
            total += 3 * width * math.prod(sides[1])
        total += width * config["embed_dim"]
    if not text.get("hf_model_name"):
        width, length = text.get("width", CLIPTextCfg.width), text.get("context_length", CLIPTextCfg.context_length)
        total += int(text.get("layers", CLIPTextCfg.layers) * (4 + 2 * text.get("mlp_ratio", 4.0)) * width**2)
        total += width * (text.get("vocab_size", CLIPTextCfg.vocab_size) + length + config["embed_dim"]) + length**2
    return total


def _sides(vision: Mapping[str, Any], name: str) -> tuple[int, int]:
    value = vision.get(name, getattr(CLIPVisionCfg, name))
    return (value, value) if isinstance(value, int) else (value[0], value[1])


def check_encoder_config(config: Any, where: str) -> None:
    """The same for the configuration of a Hugging Face text encoder, an object of transformers."""
    hidden, layers = getattr(config, "hidden_size", 0), getattr(config, "num_hidden_layers", 0)
    inner, words = getattr(config, "intermediate_size", None) or 0, getattr(config, "vocab_size", 0)
    values = {"hidden_size": hidden, "num_hidden_layers": layers, "intermediate_size": inner, "vocab_size": words}
    for name, value in values.items():
        if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value <= 4 << 20:
            raise ConfigError(f"{where}: {name}: {value!r:.80}; expected a whole number from 0 to {4 << 20}")
    _refuse_larger_than_memory(words * hidden + layers * hidden * (4 * hidden + 2 * inner), where)


def _refuse_larger_than_memory(parameters: int, where: str) -> None:
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    needed = parameters * _NUMBER_BYTES
    if needed > memory:
        raise ConfigError(
            f"{where}: its layers and widths make {parameters:.3g} parameters, {needed / 1e9:.0f} GB, and this machine "
            f"has {memory / 1e9:.0f} GB of memory; is the file damaged?"
        )


def check_preprocess(preprocess: Any, where: str) -> None:
    """Raises ConfigError unless open_clip's preprocess_cfg is a table of usual values."""
    if not isinstance(preprocess, dict):
        raise ConfigError(f"{where}: preprocess_cfg is {preprocess!r:.80}, not a table of settings")
    if preprocess.get("fill_color"):
        raise ConfigError(f"{where}: preprocess_cfg.fill_color is not black (0), which is not supported")
    for name in ("mean", "std"):
        value = preprocess.get(name)
        numbers = value if isinstance(value, list) else [value] * 3
        sound = [
            isinstance(number, int | float) and not isinstance(number, bool) and 0 <= number <= 255
            for number in numbers
        ]
        if value is not None and (len(sound) != 3 or not all(sound) or (name == "std" and 0 in numbers)):
            raise ConfigError(f"{where}: preprocess_cfg.{name}: {value!r:.80}; expected three numbers, 0 to 1")
    for name, known in (("interpolation", _INTERPOLATION), ("resize_mode", _RESIZE)):
        value = preprocess.get(name)
        if value is not None and value not in known:
            raise ConfigError(f"{where}: preprocess_cfg.{name}: {value!r:.80}; expected {', '.join(known)}")


def name_within(value: Any, folder: Path | None, where: str) -> str:
    """The value, a name of a file or folder beside a configuration or of a repository; where: its key in errors.

    folder: of the configuration. Raises ConfigError for what is no text or leads out of the folder, which links in it
    may do: the hub's cache consists of them.
    """
    if not isinstance(value, str) or not value or not value.isprintable():
        raise ConfigError(f"{where}: {value!r:.80} is no name of a file")
    path = PurePosixPath(value.replace("\\", "/"))
    is_inside = not path.is_absolute() or (folder is not None and path.is_relative_to(folder.absolute()))
    if not is_inside or value.startswith("~") or ".." in path.parts:
        raise ConfigError(f"{where}: {value!r:.80} leads out of the model's folder; put the file into it")
    return value
