"""CLIP's two towers from open_clip: builds what a `Source` describes, loads weights, encodes text.

    a name + tag ──> open_clip.create_model (downloads once) ──┐
    anything else ──> build the source's config, load weights ─┴──> resize to image_size ──> Towers

C texts (class names), L tokens, D embedding width, P positions, W tower width.
"""

from __future__ import annotations

import copy
import importlib.util
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import open_clip
import torch
from open_clip.convert import convert_state_dict
from open_clip.model import CLIP, CLIPTextCfg, CLIPVisionCfg, CustomTextCLIP, convert_to_custom_text_state_dict
from torch import Tensor, nn

from text4vis.config.schema import ConfigError, NetworkConfig
from text4vis.model.preprocessing import network_of
from text4vis.model.sources import RESNET_STRIDE, Source, find_source
from text4vis.model.strangers import check_encoder_config, name_within
from text4vis.model.tensors import State, load_strictly
from text4vis.model.tokenizing import ENCODER, INSTALL, Tokenizer, beside


class TextTower:
    """A text encoder, frozen and on the CPU in fp32 unless its `module` is registered with a model that trains it.

    It is not an nn.Module, so a model that holds it neither moves, trains nor saves it.
    """

    def __init__(self, clip: Any, tokenizer: Tokenizer) -> None:
        self._clip: Any = clip.float().eval().requires_grad_(False)
        # open_clip's own forward wants both towers. Calls, not methods, are what an engine's hooks see.
        self._clip.forward = self._clip.encode_text
        self.tokenizer = tokenizer

    @property
    def module(self) -> nn.Module:
        """The encoder itself: tokens (C, L) int64 -> embeddings (C, D), not normalised."""
        return self._clip

    def tokenize(self, texts: Sequence[str]) -> Tensor:
        """Tokens (C, L) int64. Raises ValueError naming the text that is longer than the context of L tokens."""
        return self.tokenizer(texts)

    def save_files(self, folder: Path) -> dict[str, Any]:
        """Writes what else than weights the tower needs. Returns the text_cfg that finds it beside itself, without a
        hub. Raises ConfigError, OSError."""
        config = self.tokenizer.save(folder)
        if config.get("hf_model_name"):
            self._clip.text.config.save_pretrained(folder / ENCODER)
            config["hf_model_name"] = ENCODER
        return config

    def encode(self, texts: Sequence[str], batch_size: int = 256) -> Tensor:
        """Embeddings (C, D) float32 on the CPU, not normalised, without gradient. Raises ValueError as `tokenize`."""
        return self.encode_tokens(self.tokenize(texts), batch_size=batch_size)

    def encode_tokens(self, tokens_CL: Tensor, batch_size: int = 256, *, device: torch.device | None = None) -> Tensor:
        """Embeddings (C, D) float32 on the CPU, not normalised, without gradient, of tokens (C, L).

        device: where to compute, without TF32; the tower is moved there and back. Default: where it is.
        """
        home, precision = next(self._clip.parameters()).device, torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision("highest")
        if device not in {None, home}:
            self._clip.to(device)
        try:
            return self._encode_tokens(tokens_CL.to(device or home), batch_size)
        finally:
            torch.set_float32_matmul_precision(precision)
            if device not in {None, home}:
                self._clip.to(home)

    def _encode_tokens(self, tokens_CL: Tensor, batch_size: int) -> Tensor:
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


def build_towers(network: NetworkConfig, image_size: int | None = None) -> Towers:
    """Towers in fp32 on the CPU, at `image_size` pixels (None: the architecture's own).

    With `network.init` false weights are random (torch's global generator) and nothing is downloaded or read, except
    a file in OpenAI's layout for its shapes. Raises ConfigError, naming the key.
    """
    source = find_source(network)
    network = network_of(network, source)
    assert network.mean and network.std
    config = _with_activation(source, network)
    clip = _download(*source.download) if source.download else _instantiate(config, network.arch, source.folder)
    if source.weights is not None:
        state = _in_layout_of(clip, source.weights.state)
        load_strictly(clip, state, f"network.pretrained: weights of {network.arch}")
    if image_size is not None and image_size != _image_size(config):
        clip, config = _resize(clip, config, image_size, source.folder)
    visual, logit_scale = clip.visual, clip.logit_scale.item()
    # What is left is the text tower. SigLIP's logit bias moves all classes alike: softmax and ranking ignore it.
    del clip.visual, clip.logit_scale
    clip.logit_bias = None
    return Towers(
        visual=visual,
        text=TextTower(clip, Tokenizer(config["text_cfg"], source.folder, network.arch)),
        logit_scale=logit_scale,
        config=config,
        mean=network.mean,
        std=network.std,
    )


def _with_activation(source: Source, network: NetworkConfig) -> dict[str, Any]:
    """The source's config with the activation of `network`; unchanged where it has that one already."""
    quick_gelu = network.activation == "quick_gelu"
    if quick_gelu == bool(source.config.get("quick_gelu")):
        return source.config
    if source.download:
        raise ConfigError(
            f"network.activation: {network.activation}, but the weights {source.what} were trained with the other; "
            "delete the key"
        )
    return source.config | {"quick_gelu": quick_gelu}


def _download(name: str, tag: str) -> Any:
    try:
        return open_clip.create_model(name, pretrained=tag)
    except ImportError as error:
        raise _missing(name, error) from None
    except (RuntimeError, OSError) as error:
        reason = " ".join(str(error).split())
        raise ConfigError(
            f"network.pretrained: weights {tag!r} of {name} could not be fetched ({reason}); fetch them elsewhere and "
            "set network.pretrained: /path/to/file"
        ) from None


def _instantiate(model_config: Mapping[str, Any], arch: str, folder: Path | None) -> Any:
    """Random weights, fp32, CPU. folder: where files lie that the config names."""
    config: dict[str, Any] = copy.deepcopy(dict(model_config))
    if "multimodal_cfg" in config:
        raise ConfigError(f"network.arch: {arch}: captioning models are not supported; use a CLIP model")
    encoder = config["text_cfg"].get("hf_model_name")
    custom_text = config.pop("custom_text", False) or encoder
    if encoder:
        encoder = name_within(encoder, folder, f"network.arch: {arch}: text_cfg.hf_model_name")
        place = str(beside(folder, encoder) or encoder)
        config["text_cfg"] |= {"hf_model_name": place, "hf_model_pretrained": False}
        _check_encoder(place, arch, encoder)
    if config["vision_cfg"].get("timm_model_name"):
        config["vision_cfg"]["timm_model_pretrained"] = False
    try:
        clip = (CustomTextCLIP if custom_text else CLIP)(**config)
    except (TypeError, ValueError, AssertionError, ArithmeticError, LookupError, AttributeError) as error:
        reason = " ".join(str(error).split())[:300]
        raise ConfigError(f"network.arch: {arch}: open_clip cannot build this model ({reason})") from None
    except (ImportError, OSError, RuntimeError) as error:
        if encoder:
            raise _missing(arch, error, encoder) from None
        raise ConfigError(f"network.arch: {arch}: {' '.join(str(error).split())}") from None
    if config["vision_cfg"].get("timm_model_name"):  # timm builds at its own size, whatever the config says
        clip.visual.set_input_size(_image_size(config))
    return clip


def _check_encoder(place: str, arch: str, encoder: str) -> None:
    """Looks at the configuration of a Hugging Face text encoder before it is built. Raises ConfigError."""
    try:
        from transformers import AutoConfig

        known = AutoConfig.from_pretrained(place, trust_remote_code=False)
    except Exception as error:  # the library raises any kind for a file that is damaged, and for no network
        raise _missing(arch, error, encoder) from None
    check_encoder_config(known, f"network.arch: {arch}: {encoder}/config.json")


def _missing(arch: str, error: Exception, encoder: str = "") -> ConfigError:
    """The error for a Hugging Face text encoder that cannot be built."""
    if importlib.util.find_spec("transformers") is None:
        return ConfigError(f"network.arch: {arch}: its text tower needs the package transformers: {INSTALL}")
    reason = " ".join(str(error).split())[:300]
    return ConfigError(
        f"network.arch: {arch}: the configuration of its text tower {encoder} cannot be read ({reason}); put it at "
        f"{encoder}/config.json in the folder of network.arch: local-dir:FOLDER"
    )


def _image_size(config: Mapping[str, Any]) -> int:
    size = config["vision_cfg"].get("image_size", CLIPVisionCfg.image_size)
    return size if isinstance(size, int) else size[0]


def _resize(clip: Any, config: dict[str, Any], image_size: int, folder: Path | None) -> tuple[Any, dict[str, Any]]:
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
    resized = _instantiate(config, "the resized model", folder)
    resized.load_state_dict(state)
    return resized, config


def resize_positions(table_PW: Tensor, grid: int) -> Tensor:
    """A table of 1 + G*G positions, class token first, to 1 + grid*grid: bicubic with antialias, as open_clip does."""
    old = round((table_PW.shape[0] - 1) ** 0.5)
    image_1Wgg = table_PW[1:].T.reshape(1, -1, old, old)
    image_1Wgg = nn.functional.interpolate(image_1Wgg, (grid, grid), mode="bicubic", antialias=True)
    return torch.cat([table_PW[:1], image_1Wgg.flatten(2)[0].T])


def _in_layout_of(clip: nn.Module, state: State) -> State:
    """The tensors as open_clip's own `load_checkpoint` brings them to a model."""
    state = convert_state_dict(clip, state)
    if "positional_embedding" in state and not hasattr(clip, "positional_embedding"):
        state = convert_to_custom_text_state_dict(state)
    expected = clip.state_dict()
    if "logit_bias" in expected and "logit_bias" not in state:
        state = state | {"logit_bias": torch.zeros_like(expected["logit_bias"])}
    position_ids = "text.transformer.embeddings.position_ids"  # a constant that older transformers saved
    return {name: tensor for name, tensor in state.items() if name in expected or name != position_ids}
