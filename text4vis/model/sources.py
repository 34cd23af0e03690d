"""What `network.arch` and `network.pretrained` name: a CLIP's configuration, its weights, and what is known of them.

    CLIP's or open_clip's name + tag        open_clip's configuration of that name; the tag tells pixels and activation
    a name + weights file                   the same configuration; its tags tell the pixels if they all agree
    hf-hub:ORG/NAME, local-dir:FOLDER       open_clip_config.json, weights and tokenizer in open_clip's layout
    a model JSON + weights file             such a configuration, or a bare one, with the weights beside it
    a weights file in OpenAI's layout       the configuration is read off the tensors' shapes

Nothing is built here, and files of weights are read when they are asked for.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import open_clip
from open_clip.pretrained import download_pretrained_from_hf, get_pretrained_cfg
from open_clip.transform import PreprocessCfg, merge_preprocess_dict

from text4vis.config.paths import LOCAL_MODEL
from text4vis.config.schema import ConfigError, NetworkConfig
from text4vis.model.layouts import State
from text4vis.model.strangers import check_model_config, check_preprocess, read_json
from text4vis.model.tensors import read_clip_weights, some

# CLIP's names for OpenAI's models, and open_clip's names for the same architectures with ordinary GELU.
CLIP_NAMES = {
    "ViT-B/32": "ViT-B-32",
    "ViT-B/16": "ViT-B-16",
    "ViT-L/14": "ViT-L-14",
    "ViT-L/14-336px": "ViT-L-14-336",
    "ViT-L/14@336px": "ViT-L-14-336",
    "RN50": "RN50",
    "RN101": "RN101",
    "RN50x4": "RN50x4",
    "RN50x16": "RN50x16",
    "RN50x64": "RN50x64",
}
QUICK_GELU = "-quickgelu"  # ends open_clip's names of architectures with quick GELU
WEIGHT_SUFFIXES = (".safetensors", ".pt", ".pth", ".bin")
RESNET_STRIDE = 32
HUB = "hf-hub:"
CONFIG_FILE = "open_clip_config.json"
# The weights of a folder, in the order in which open_clip looks for them.
WEIGHT_FILES = (
    "open_clip_model.safetensors",
    "open_clip_pytorch_model.safetensors",
    "open_clip_pytorch_model.bin",
    "open_clip_pytorch_model.pth",
    "model.safetensors",
    "pytorch_model.bin",
    "pytorch_model.pth",
    "model.pth",
)


@dataclass(frozen=True)
class Weights:
    """A file of weights, read once when it is asked for. key: the config key named in errors."""

    path: Path
    key: str

    @cached_property
    def _content(self) -> tuple[State, bool]:
        return read_clip_weights(self.path, self.key)

    @property
    def state(self) -> State:
        """The named tensors. Raises ConfigError."""
        return self._content[0]

    @property
    def are_openais(self) -> bool:
        """Whether the file shows that OpenAI trained them. Raises ConfigError."""
        return self._content[1]


@dataclass(frozen=True)
class Source:
    """A CLIP on its way.

    what: in words, for logs and errors. config: open_clip's model config; its `quick_gelu` counts only if `says_gelu`.
    preprocess: open_clip's preprocess_cfg, complete; None if nothing tells it. tags: what open_clip knows of published
    weights of this architecture, by tag. folder: where files lie that the config names. weights, or (name, tag) to
    download, are both None for random weights.
    """

    what: str
    config: dict[str, Any]
    preprocess: Mapping[str, Any] | None = None
    says_gelu: bool = True
    tags: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    folder: Path | None = None
    weights: Weights | None = None
    download: tuple[str, str] | None = None

    @property
    def quick_gelu(self) -> bool | None:
        """Whether the weights were trained with quick GELU; None if nothing tells. Raises ConfigError."""
        if self.says_gelu:
            return bool(self.config.get("quick_gelu"))
        if self.weights is not None and self.weights.are_openais:
            return True
        known = {bool(tag.get("quick_gelu")) for tag in self.tags.values()}
        return known.pop() if len(known) == 1 else None


def find_source(network: NetworkConfig) -> Source:
    """Where the CLIP of `network` comes from. Raises ConfigError, naming the key."""
    path = Path(network.arch)
    if network.arch.startswith(HUB):
        return _from_hub(network)
    if network.arch.startswith(LOCAL_MODEL):
        return _from_folder(network)
    if path.suffix == ".json":
        return _from_json(path, network)
    if path.suffix in WEIGHT_SUFFIXES:
        return _from_openai_layout(path, network)
    return _from_name(network)


def _from_name(network: NetworkConfig) -> Source:
    """CLIP's names mean OpenAI's weights and quick GELU, unless another tag was trained without it."""
    plain = CLIP_NAMES.get(network.arch)
    pretrained = network.pretrained or ("openai" if plain else None)
    name, weights = network.arch, None
    is_file = pretrained is not None and (Path(pretrained).suffix in WEIGHT_SUFFIXES or Path(pretrained).is_file())
    if plain:
        tag = {} if is_file else get_pretrained_cfg(plain, pretrained)
        name = plain if tag and not tag.get("quick_gelu") else f"{plain}{QUICK_GELU}"
    if name not in open_clip.list_models():
        near = difflib.get_close_matches(network.arch, [*CLIP_NAMES, *open_clip.list_models()], n=3)
        hint = f"; did you mean {' or '.join(near)}?" if near else "; open_clip.list_models() lists the names"
        raise ConfigError(f"network.arch: {network.arch!r} is no CLIP or open_clip name, model JSON or file{hint}")
    config, tags = open_clip.get_model_config(name), _tags(plain or name)
    if is_file:
        assert pretrained is not None
        says_gelu = network.arch.endswith(QUICK_GELU) or f"{plain or name}{QUICK_GELU}" not in open_clip.list_models()
        weights = Weights(Path(pretrained), "network.pretrained") if network.init else None
        what = f"{network.arch} with {pretrained}"
        return Source(what, config, says_gelu=says_gelu, tags=tags, weights=weights)
    if pretrained is None and network.init:
        known = ", ".join(tags) or "none known: give a weights file"
        raise ConfigError(f"network.pretrained: {name} needs a tag or a weights file; tags: {known}")
    if pretrained is None:
        return Source(name, config, tags=tags)
    return _from_tag(name, pretrained, config, network)


def _from_tag(name: str, tag: str, config: dict[str, Any], network: NetworkConfig) -> Source:
    found = get_pretrained_cfg(name, tag)
    if not found and network.init:
        known = ", ".join(_tags(name)) or "none"
        raise ConfigError(f"network.pretrained: {name} has no weights {tag!r}, and no such file; its tags: {known}")
    if found and bool(found.get("quick_gelu")) != bool(config.get("quick_gelu")):
        other = name.removesuffix(QUICK_GELU) if config.get("quick_gelu") else f"{name}{QUICK_GELU}"
        raise ConfigError(f"network.arch: weights {tag!r} were trained with the other GELU; use {other}")
    preprocess = _complete(found) if found else None
    download = (name, tag) if network.init else None
    return Source(f"{name} with {tag!r}", config, preprocess, tags=_tags(name), download=download)


def _tags(name: str) -> dict[str, Mapping[str, Any]]:
    return {tag: get_pretrained_cfg(name, tag) for tag in open_clip.list_pretrained_tags_by_model(name)}


def _tags_of(config: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    """What open_clip knows of weights of the architecture of this config, whatever its activation."""

    def shape(of: Mapping[str, Any]) -> tuple[Any, ...]:
        return of["embed_dim"], of["vision_cfg"], of["text_cfg"]

    names = [name for name in open_clip.list_models() if shape(open_clip.get_model_config(name)) == shape(config)]
    return {f"{name} {tag}": known for name in names for tag, known in _tags(name).items()}


def _complete(preprocess: Mapping[str, Any]) -> dict[str, Any]:
    """What a preprocess_cfg leaves out is open_clip's default by its format."""
    return merge_preprocess_dict(PreprocessCfg(), dict(preprocess))


def _from_hub(network: NetworkConfig) -> Source:
    """A repository of the Hugging Face hub, or its copy in the hub's cache."""
    name = network.arch.removeprefix(HUB)
    config_path = _fetched(name, CONFIG_FILE, network)
    config, preprocess = _read_config(config_path, network)
    weights = None
    if network.init:
        own = Path(network.pretrained) if network.pretrained else _fetched(name, None, network)
        weights = Weights(own, "network.pretrained")
    return Source(network.arch, config, preprocess, tags=_tags_of(config), weights=weights)


def _fetched(name: str, file: str | None, network: NetworkConfig) -> Path:
    """A file of a repository of the hub; None: its weights."""
    try:
        return Path(download_pretrained_from_hf(name, filename=file))
    except (RuntimeError, OSError, ValueError) as error:
        raise ConfigError(
            f"network.arch: {network.arch}: {file or 'its weights'} could not be fetched "
            f"({' '.join(str(error).split())}); fetch the repository elsewhere and set "
            f"network.arch: {LOCAL_MODEL}/its/folder"
        ) from None


def _from_folder(network: NetworkConfig) -> Source:
    folder = Path(network.arch.removeprefix(LOCAL_MODEL))
    config, preprocess = _read_config(folder / CONFIG_FILE, network)
    weights = Weights(_weights_in(folder, network), "network.pretrained") if network.init else None
    return Source(network.arch, config, preprocess, tags=_tags_of(config), folder=folder, weights=weights)


def _weights_in(folder: Path, network: NetworkConfig) -> Path:
    if network.pretrained:
        return Path(network.pretrained)
    found = sorted(path for path in folder.iterdir() if path.suffix in WEIGHT_SUFFIXES and path.is_file())
    usual = [folder / name for name in WEIGHT_FILES if folder / name in found]
    if not usual and len(found) != 1:
        what = ", ".join(path.name for path in found) or "no weights"
        raise ConfigError(
            f"network.arch: {folder} holds {what}; name the file in network.pretrained, or call it {WEIGHT_FILES[0]}"
        )
    return (usual or found)[0]


def _from_json(path: Path, network: NetworkConfig) -> Source:
    config, preprocess = _read_config(path, network)
    if network.pretrained:
        weights_path = Path(network.pretrained)
    else:
        beside = [path.with_suffix(suffix) for suffix in WEIGHT_SUFFIXES]
        weights_path = next((candidate for candidate in beside if candidate.exists()), beside[0])
    weights = Weights(weights_path, "network.pretrained") if network.init else None
    return Source(str(path), config, preprocess, tags=_tags_of(config), folder=path.parent, weights=weights)


def _read_config(path: Path, network: NetworkConfig) -> tuple[dict[str, Any], dict[str, Any] | None]:
    """open_clip's model config, bare or below `model_cfg`, and the `preprocess_cfg` beside it if there is one."""
    content = read_json(path, "network.arch")
    config = content.get("model_cfg", content) if isinstance(content, dict) else {}
    config = config if isinstance(config, dict) else {}
    parts = {"embed_dim": int, "vision_cfg": dict, "text_cfg": dict}
    absent = [key for key, kind in parts.items() if not isinstance(config.get(key), kind)]
    if absent:
        raise ConfigError(f"network.arch: {path} is not an open_clip model config: it lacks {', '.join(absent)}")
    preprocess = content.get("preprocess_cfg")
    config = {key: value for key, value in config.items() if key != "preprocess_cfg"}  # beside a bare config
    where = f"network.arch: {path}"
    check_model_config(config, where)
    if not preprocess:
        return config, None
    check_preprocess(preprocess, where)
    return config, _complete(preprocess)


def _from_openai_layout(path: Path, network: NetworkConfig) -> Source:
    if network.pretrained:
        raise ConfigError(f"network.pretrained: delete it: network.arch is a weights file ({path})")
    weights = Weights(path, "network.arch")
    config = config_from_openai_weights(weights.state, path)
    openais = _complete(get_pretrained_cfg("ViT-B-32", "openai"))
    return Source(
        str(path),
        config,
        openais if weights.are_openais else None,
        says_gelu=weights.are_openais,
        tags=_tags_of(config),
        weights=weights if network.init else None,
    )


def config_from_openai_weights(state: Mapping[str, Any], path: Path) -> dict[str, Any]:
    """open_clip's config of a CLIP in OpenAI's layout, read off its tensors' shapes. Raises ConfigError.

    Heads are 64 wide in both towers; quick GELU, as in all of OpenAI's models, leaves no trace in the shapes.
    """

    def blocks(prefix: str) -> int:
        return len({name.removeprefix(prefix).split(".")[0] for name in state if name.startswith(prefix)})

    try:
        if "visual.proj" in state:
            patch_size = state["visual.conv1.weight"].shape[-1]
            positions = state["visual.positional_embedding"].shape[0]
            vision: dict[str, Any] = {
                "layers": blocks("visual.transformer.resblocks."),
                "width": state["visual.conv1.weight"].shape[0],
                "patch_size": patch_size,
                "image_size": patch_size * round((positions - 1) ** 0.5),
            }
        else:
            positions = state["visual.attnpool.positional_embedding"].shape[0]
            vision = {
                "layers": [blocks(f"visual.layer{stage}.") for stage in (1, 2, 3, 4)],
                "width": state["visual.layer1.0.conv1.weight"].shape[0],
                "image_size": RESNET_STRIDE * round((positions - 1) ** 0.5),
            }
        text_width = state["ln_final.weight"].shape[0]
        text = {
            "context_length": state["positional_embedding"].shape[0],
            "vocab_size": state["token_embedding.weight"].shape[0],
            "width": text_width,
            "heads": text_width // 64,
            "layers": blocks("transformer.resblocks."),
        }
        embed_dim = state["text_projection"].shape[1]
    except KeyError as error:
        raise ConfigError(
            f"network.arch: {path} is not a CLIP in OpenAI's layout: it lacks {error}; it has {some(state)}"
        ) from None
    return {"embed_dim": embed_dim, "quick_gelu": True, "vision_cfg": vision, "text_cfg": text}
