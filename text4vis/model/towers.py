"""CLIP's two towers from open_clip: resolves `network.arch` and `network.pretrained`, loads weights, encodes text.

    CLIP's or open_clip's name + tag ──> open_clip.create_model (downloads once) ──┐
    a name + weights file ──> open_clip's config of that name ──┐                  │
    a model JSON + file   ──> the JSON's config ────────────────┼─ build, load ────┼──> resize to image_size ──> Towers
    a file in OpenAI's layout ──> config from tensor shapes ────┘                  ┘

C texts (class names), L tokens, D embedding width, P positions, W tower width.
"""

from __future__ import annotations

import copy
import difflib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import open_clip
import torch
from open_clip.constants import OPENAI_DATASET_MEAN, OPENAI_DATASET_STD
from open_clip.convert import convert_state_dict
from open_clip.model import CLIP, CLIPTextCfg, CLIPVisionCfg, CustomTextCLIP, convert_to_custom_text_state_dict
from open_clip.pretrained import get_pretrained_cfg
from open_clip.tokenizer import SimpleTokenizer
from torch import Tensor, nn

from text4vis.config.schema import ConfigError, NetworkConfig
from text4vis.model.tensors import State, load_strictly, read_weights, some

Tokenizer = Callable[..., Tensor]

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
WEIGHT_SUFFIXES = (".safetensors", ".pt", ".pth", ".bin")
RESNET_STRIDE = 32


class TextTower:
    """A text encoder, frozen and on the CPU in fp32 unless its `module` is registered with a model that trains it.

    It is not an nn.Module, so a model that holds it neither moves, trains nor saves it. `bpe_path` is the vocabulary
    file of a custom tokenizer, None for CLIP's own.
    """

    def __init__(self, clip: Any, tokenizer: Tokenizer, bpe_path: Path | None) -> None:
        self._clip: Any = clip.float().eval().requires_grad_(False)
        # open_clip's own forward wants both towers. Calls, not methods, are what an engine's hooks see.
        self._clip.forward = self._clip.encode_text
        self._tokenizer = tokenizer
        self.bpe_path = bpe_path

    @property
    def module(self) -> nn.Module:
        """The encoder itself: tokens (C, L) int64 -> embeddings (C, D), not normalised."""
        return self._clip

    @property
    def has_simple_tokenizer(self) -> bool:
        """True for CLIP's byte-pair tokenizer, which needs no other files than `bpe_path`."""
        return isinstance(self._tokenizer, SimpleTokenizer)

    def tokenize(self, texts: Sequence[str]) -> Tensor:
        """Tokens (C, L) int64. Raises ValueError naming the text that is longer than the context of L tokens."""
        length = int(self._tokenizer("").shape[1])
        tokens_CL = self._tokenizer(list(texts), context_length=length)
        # A truncated row changes when there is room for one more token; a complete one only gains padding.
        longer = self._tokenizer(list(texts), context_length=length + 1)
        for text, complete in zip(texts, (longer[:, :length] == tokens_CL).all(dim=1).tolist(), strict=True):
            if not complete:
                raise ValueError(f"{text!r} is longer than the text tower's context of {length} tokens; shorten it")
        return tokens_CL

    def encode(self, texts: Sequence[str], batch_size: int = 256) -> Tensor:
        """Embeddings (C, D) float32 on the CPU, not normalised, without gradient. Raises ValueError as `tokenize`."""
        tokens_CL = self.tokenize(texts).to(next(self._clip.parameters()).device)
        was_training = self._clip.training
        self._clip.eval()
        with torch.no_grad():  # not inference_mode: the classifier built from these takes part in training
            embeddings_CD = torch.cat([self._clip(batch) for batch in tokens_CL.split(batch_size)])
        self._clip.train(was_training)
        return embeddings_CD.float().cpu()

    def state_dict(self) -> State:
        """The encoder's tensors by name."""
        return self._clip.state_dict()

    def load_strictly(self, state: Mapping[str, Tensor], where: str) -> None:
        """Loads tensors whose names and shapes must be exactly the encoder's. Raises ConfigError that names `where`."""
        load_strictly(self._clip, state, where)


@dataclass(frozen=True)
class Towers:
    """`config` is open_clip's model config of exactly these towers: with it they can be built again from nothing."""

    visual: nn.Module
    text: TextTower
    logit_scale: float
    config: dict[str, Any]
    mean: tuple[float, ...]
    std: tuple[float, ...]

    @property
    def embed_dim(self) -> int:
        """D, the width of the embeddings of both towers."""
        return self.config["embed_dim"]

    @property
    def image_size(self) -> int:
        """Side of the visual tower's input, pixels."""
        return _image_size(self.config)

    @property
    def text_width(self) -> int:
        """Width of the text transformer; D for an encoder from Hugging Face."""
        if self.config["text_cfg"].get("hf_model_name"):
            return self.embed_dim
        return self.config["text_cfg"].get("width", CLIPTextCfg.width)


@dataclass(frozen=True)
class _Source:
    """What `network.arch` names: the config, the folder that its paths are relative to, and where weights lie."""

    config: dict[str, Any]
    preprocess: Mapping[str, Any]
    weights: State | None = None
    clip: Any = None  # already built and loaded, by open_clip
    tokenizer_name: str | None = None
    folder: Path = Path()


def build_towers(network: NetworkConfig, image_size: int | None = None) -> Towers:
    """Towers in fp32 on the CPU, at `image_size` pixels (None: the architecture's own).

    With `network.init` false weights are random (torch's global generator) and nothing is downloaded or read, except
    a file in OpenAI's layout for its shapes. Raises ConfigError, naming the key.
    """
    source = _resolve(network)
    clip = source.clip or _instantiate(source.config, network.arch)
    if source.weights is not None:
        load_strictly(clip, _in_layout_of(clip, source.weights), f"network.pretrained: weights of {network.arch}")
    config = source.config
    if image_size is not None and image_size != _image_size(config):
        clip, config = _resize(clip, config, image_size)
    visual, logit_scale = clip.visual, clip.logit_scale.item()
    # What is left is the text tower. SigLIP's logit bias moves all classes alike: softmax and ranking ignore it.
    del clip.visual, clip.logit_scale
    clip.logit_bias = None
    mean, std = source.preprocess.get("mean"), source.preprocess.get("std")
    return Towers(
        visual=visual,
        text=TextTower(clip, *_tokenizer(source, network.arch)),
        logit_scale=logit_scale,
        config=config,
        mean=tuple(mean or OPENAI_DATASET_MEAN),
        std=tuple(std or OPENAI_DATASET_STD),
    )


def _resolve(network: NetworkConfig) -> _Source:
    path = Path(network.arch)
    if path.suffix == ".json":
        return _from_json(path, network)
    if path.suffix in WEIGHT_SUFFIXES:
        if network.pretrained:
            raise ConfigError(f"network.pretrained: delete it: network.arch is a weights file ({path})")
        weights = read_weights(path, "network.arch")
        return _Source(config_from_openai_weights(weights, path), {}, weights if network.init else None)
    return _from_name(network)


def _from_name(network: NetworkConfig) -> _Source:
    """CLIP's names mean OpenAI's weights and quick GELU, unless another tag was trained without it."""
    plain = CLIP_NAMES.get(network.arch)
    pretrained = network.pretrained or ("openai" if plain else None)
    name = network.arch
    if plain:
        tag = get_pretrained_cfg(plain, pretrained)
        name = plain if tag and not tag.get("quick_gelu") else f"{plain}-quickgelu"
    if name not in open_clip.list_models():
        near = difflib.get_close_matches(network.arch, [*CLIP_NAMES, *open_clip.list_models()], n=3)
        hint = f"; did you mean {' or '.join(near)}?" if near else "; open_clip.list_models() lists the names"
        raise ConfigError(f"network.arch: {network.arch!r} is no CLIP or open_clip name, model JSON or file{hint}")
    config = open_clip.get_model_config(name)
    if not network.init:
        return _Source(config, {}, tokenizer_name=name)
    if pretrained is None:
        tags = ", ".join(open_clip.list_pretrained_tags_by_model(name)) or "none known: give a weights file"
        raise ConfigError(f"network.pretrained: {name} needs a tag or a weights file; tags: {tags}")
    if Path(pretrained).suffix in WEIGHT_SUFFIXES or Path(pretrained).is_file():
        weights = read_weights(Path(pretrained), "network.pretrained")
        return _Source(config, {}, weights, tokenizer_name=name)
    clip = _download(name, pretrained, config)
    return _Source(config, clip.visual.preprocess_cfg, clip=clip, tokenizer_name=name)


def _download(name: str, tag: str, config: Mapping[str, Any]) -> Any:
    found = get_pretrained_cfg(name, tag)
    if not found:
        tags = ", ".join(open_clip.list_pretrained_tags_by_model(name)) or "none"
        raise ConfigError(f"network.pretrained: {name} has no weights {tag!r}, and no such file; its tags: {tags}")
    if bool(found.get("quick_gelu")) != bool(config.get("quick_gelu")):
        other = name.removesuffix("-quickgelu") if config.get("quick_gelu") else f"{name}-quickgelu"
        raise ConfigError(f"network.arch: weights {tag!r} were trained with the other GELU; use {other}")
    try:
        return open_clip.create_model(name, pretrained=tag)
    except (RuntimeError, OSError) as error:
        reason = " ".join(str(error).split())
        raise ConfigError(
            f"network.pretrained: weights {tag!r} of {name} could not be fetched ({reason}); fetch them elsewhere and "
            "set network.pretrained: /path/to/file"
        ) from None


def _from_json(path: Path, network: NetworkConfig) -> _Source:
    """A model JSON of open_clip's: a bare config, or one below `model_cfg` beside `preprocess_cfg`."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"network.arch: no such file: {path}") from None
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(f"network.arch: {path} is not a JSON file ({error})") from None
    config = content.get("model_cfg", content) if isinstance(content, dict) else {}
    absent = [key for key in ("embed_dim", "vision_cfg", "text_cfg") if key not in config]
    if absent:
        raise ConfigError(f"network.arch: {path} is not an open_clip model config: it lacks {', '.join(absent)}")
    source = _Source(config, content.get("preprocess_cfg", {}), folder=path.parent)
    if not network.init:
        return source
    if network.pretrained:
        weights_path = Path(network.pretrained)
    else:
        beside = [path.with_suffix(suffix) for suffix in WEIGHT_SUFFIXES]
        weights_path = next((candidate for candidate in beside if candidate.exists()), beside[0])
    return _Source(config, source.preprocess, read_weights(weights_path, "network.pretrained"), folder=path.parent)


def _instantiate(model_config: Mapping[str, Any], arch: str) -> Any:
    """Random weights, fp32, CPU."""
    config: dict[str, Any] = copy.deepcopy(dict(model_config))
    if "multimodal_cfg" in config:
        raise ConfigError(f"network.arch: {arch}: captioning models are not supported; use a CLIP model")
    custom_text = config.pop("custom_text", False) or config["text_cfg"].get("hf_model_name")
    if config["vision_cfg"].get("timm_model_name"):
        config["vision_cfg"]["timm_model_pretrained"] = False
    try:
        clip = (CustomTextCLIP if custom_text else CLIP)(**config)
    except (TypeError, ValueError, AssertionError, ZeroDivisionError) as error:
        raise ConfigError(f"network.arch: {arch}: open_clip cannot build this model ({error})") from None
    except (ImportError, OSError, RuntimeError) as error:
        raise ConfigError(f"network.arch: {arch}: {' '.join(str(error).split())}") from None
    if config["vision_cfg"].get("timm_model_name"):  # timm builds at its own size, whatever the config says
        clip.visual.set_input_size(_image_size(config))
    return clip


def _tokenizer(source: _Source, arch: str) -> tuple[Tokenizer, Path | None]:
    text_cfg = source.config["text_cfg"]
    kwargs = dict(text_cfg.get("tokenizer_kwargs") or {})
    bpe_path = source.folder / kwargs.pop("bpe_path") if "bpe_path" in kwargs else None
    try:
        if bpe_path is None and source.tokenizer_name:
            tokenizer = open_clip.get_tokenizer(source.tokenizer_name)
        else:
            context_length = text_cfg.get("context_length", CLIPTextCfg.context_length)
            files = {"bpe_path": str(bpe_path)} if bpe_path else {}
            tokenizer = SimpleTokenizer(context_length=context_length, **files, **kwargs)
    except (OSError, ImportError, RuntimeError, TypeError, ValueError, AssertionError) as error:
        raise ConfigError(f"network.arch: the tokenizer of {arch} cannot be loaded ({error})") from None
    vocabulary = text_cfg.get("vocab_size", CLIPTextCfg.vocab_size)
    if isinstance(tokenizer, SimpleTokenizer) and tokenizer.vocab_size > vocabulary:
        raise ConfigError(
            f"network.arch: {arch}: text_cfg.vocab_size is {vocabulary}, but its tokenizer has {tokenizer.vocab_size} "
            "tokens; name the right vocabulary in text_cfg.tokenizer_kwargs.bpe_path"
        )
    return tokenizer, bpe_path


def _image_size(config: Mapping[str, Any]) -> int:
    size = config["vision_cfg"].get("image_size", CLIPVisionCfg.image_size)
    return size if isinstance(size, int) else size[0]


def _resize(clip: Any, config: dict[str, Any], image_size: int) -> tuple[Any, dict[str, Any]]:
    """The same weights for another input size: the grid of position embeddings is interpolated."""
    config = copy.deepcopy(config)
    config["vision_cfg"]["image_size"] = image_size
    vision = config["vision_cfg"]
    is_resnet = not isinstance(vision.get("layers", CLIPVisionCfg.layers), int)
    stride = RESNET_STRIDE if is_resnet else vision.get("patch_size", CLIPVisionCfg.patch_size)
    if vision.get("timm_model_name"):
        patches = getattr(clip.visual.trunk, "patch_embed", None)
        stride = getattr(patches, "patch_size", (1,))[0]
    if image_size % stride:
        raise ConfigError(
            f"data.input_size: {image_size} is not a multiple of the visual tower's patch, {stride} pixels"
        )
    if vision.get("timm_model_name"):
        clip.visual.set_input_size(image_size)
        return clip, config
    state = clip.state_dict()
    key = "visual.attnpool.positional_embedding" if is_resnet else "visual.positional_embedding"
    state[key] = resize_positions(state[key], image_size // stride)
    resized = _instantiate(config, "the resized model")
    resized.load_state_dict(state)
    return resized, config


def resize_positions(table_PW: Tensor, grid: int) -> Tensor:
    """A table of 1 + G*G positions, class token first, to 1 + grid*grid: bicubic with antialias, as open_clip does."""
    old = round((table_PW.shape[0] - 1) ** 0.5)
    image_1Wgg = table_PW[1:].T.reshape(1, -1, old, old)
    image_1Wgg = nn.functional.interpolate(image_1Wgg, (grid, grid), mode="bicubic", antialias=True)
    return torch.cat([table_PW[:1], image_1Wgg.flatten(2)[0].T])


def config_from_openai_weights(state: Mapping[str, Tensor], path: Path) -> dict[str, Any]:
    """open_clip's config of a CLIP in OpenAI's layout, read off its tensors' shapes. Raises ConfigError.

    Heads are 64 wide in both towers and the activation is quick GELU, as in all of OpenAI's models.
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


def _in_layout_of(clip: nn.Module, state: State) -> State:
    state = convert_state_dict(clip, state)
    if "positional_embedding" in state and not hasattr(clip, "positional_embedding"):
        state = convert_to_custom_text_state_dict(state)
    return state
