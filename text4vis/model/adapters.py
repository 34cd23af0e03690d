"""Low-rank adapters (LoRA, Hu et al., 2022) on CLIP's towers, by peft, and their merging into plain weights.

    add_adapters(model, network)    W x  ->  W x + alpha / rank * B A x      A (rank, in), B (out, rank) train, W stays
    merged(state, config)           W + alpha / rank * B A, under the names of the model without adapters

The visual tower gets them, and the text tower where it trains. Only `add_adapters` needs peft: whatever opens a trained
model merges. DeepSpeed fetches a module's weights when the module is called (ZeRO-3), so a layer that is not called,
but whose weight is used by another module, cannot carry an adapter.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch
from open_clip.transformer import ResidualAttentionBlock
from torch import Tensor, nn

from text4vis.config.schema import ConfigError, NetworkConfig
from text4vis.model.layouts import State
from text4vis.model.temporal import Block

if TYPE_CHECKING:
    from text4vis.model.video_clip import VideoClip

logger = logging.getLogger("text4vis")

INSTALL = "pip install 'text4vis[lora]'"
_PACKED = "packed_qkv"  # our own name: merging gives it MultiheadAttention's back
_BY_TYPE = "text_projection"  # open_clip asks for its type, which an adapter changes
_A, _B, _BASE = ".lora_A.default.weight", ".lora_B.default.weight", ".base_layer."


def add_adapters(model: VideoClip, network: NetworkConfig) -> None:
    """Adds the adapters of `network` to a model whose weights are loaded; without `network.adapter` nothing happens.

    They change nothing as long as they are not trained: B is zero. A is drawn from torch's global generator. Raises
    ConfigError without peft, and where a tower has no layer of `network.adapter_targets`.
    """
    if network.adapter is None:
        return
    if not network.fix_video:
        num_frames = model.num_segments if model.takes_fixed_frames else 1
        frames = torch.zeros(num_frames, 3, model.image_size, model.image_size)
        _adapt(model.visual, network, frames, "visual tower")
    if model.text_tower is not None:
        _adapt(model.text_tower, network, model.text.tokenize(["a"]), "text tower")
    model.train(model.training)  # batch statistics of what is frozen now stay


def _adapt(tower: nn.Module, network: NetworkConfig, example: Tensor, what: str) -> None:
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError as error:
        raise ConfigError(f"network.adapter: {network.adapter} needs the package peft: {INSTALL} ({error})") from None
    if network.adapter_targets != "mlp":
        _unpack_attention(tower)
    chosen = [name for name in _layers(tower) if network.adapter_targets in ("all", _kind(name))]
    called = _called(tower, chosen, example)
    if not called:
        raise ConfigError(
            f"network.adapter_targets: the {what} of {network.arch} has no layer of {network.adapter_targets!r} that "
            "can carry an adapter; use all, or train the weights themselves without network.adapter"
        )
    if unused := [name for name in chosen if name not in called]:
        logger.info("network.adapter: %d layers of the %s get none, %s for one", len(unused), what, unused[0])
    config = LoraConfig(r=network.adapter_rank, lora_alpha=network.adapter_alpha, target_modules=called)
    inject_adapter_in_model(config, tower)


def _layers(tower: nn.Module) -> Iterator[str]:
    """Names of the layers that a low-rank product can stand for: linear ones, and those of each pixel by itself."""
    for name, module in tower.named_modules():
        pointwise = isinstance(module, nn.Conv2d) and module.kernel_size == (1, 1) and module.groups == 1
        if (isinstance(module, nn.Linear) or pointwise) and not name.endswith(_BY_TYPE):
            yield name


def _kind(name: str) -> str:
    return "attention" if "attn" in name or "attention" in name or "token_mixer" in name else "mlp"


@torch.no_grad()
def _called(tower: nn.Module, names: list[str], example: Tensor) -> list[str]:
    """Those of the layers that are called, in a forward pass of `example`; others would not count (see above)."""
    called: dict[str, None] = {}
    handles = [
        tower.get_submodule(name).register_forward_hook(lambda *_, name=name: called.setdefault(name)) for name in names
    ]
    was_training = tower.training
    tower.eval()
    tower(example)
    tower.train(was_training)
    for handle in handles:
        handle.remove()
    return list(called)


class Attention(nn.Module):
    """Self-attention with the weights of an nn.MultiheadAttention, whose packed projection is a layer of its own."""

    def __init__(self, packed: nn.MultiheadAttention) -> None:
        super().__init__()
        assert packed.batch_first and packed.bias_k is None and not packed.add_zero_attn, "other shapes or other keys"
        width = packed.embed_dim
        projection = nn.Linear(width, 3 * width, bias=packed.in_proj_bias is not None, device="meta")
        projection.weight, projection.bias = packed.in_proj_weight, packed.in_proj_bias
        self.add_module(_PACKED, projection)
        self.out_proj = packed.out_proj
        self.num_heads, self.dropout = packed.num_heads, packed.dropout

    def forward(
        self, query_NLW: Tensor, *others: Tensor, need_weights: bool = False, attn_mask: Tensor | None = None
    ) -> tuple[Tensor, None]:
        """(N, L, W) -> (N, L, W); keys and values, the `others`, are the query itself. attn_mask: additive."""
        assert not need_weights and all(_is_same(other, query_NLW) for other in others), "no attention to others"
        packed_NL3Hd = self.get_submodule(_PACKED)(query_NLW).unflatten(-1, (3, self.num_heads, -1))
        query_NHLd, key_NHLd, value_NHLd = packed_NL3Hd.permute(2, 0, 3, 1, 4)
        mixed_NHLd = nn.functional.scaled_dot_product_attention(
            query_NHLd, key_NHLd, value_NHLd, attn_mask, self.dropout if self.training else 0.0
        )
        return self.out_proj(mixed_NHLd.transpose(1, 2).flatten(2)), None


def _is_same(tensor: Tensor, other: Tensor) -> bool:
    """Whether two arguments of a call were one tensor: ZeRO-3's hooks give a module a view of each argument."""
    return tensor is other or (tensor.shape == other.shape and tensor.data_ptr() == other.data_ptr())


def _unpack_attention(tower: nn.Module) -> None:
    """Gives the blocks' nn.MultiheadAttention, which uses its layers' weights without calling them, a form that does
    not."""
    for block in tower.modules():
        if isinstance(block, (ResidualAttentionBlock, Block)) and isinstance(block.attn, nn.MultiheadAttention):
            block.attn = Attention(block.attn)


def merged(state: Mapping[str, Tensor], config: Mapping[str, Any]) -> State:
    """A model's tensors with its adapters merged into its weights, on the CPU; without adapters the tensors themselves.

    config: of the training, in plain values, for `adapter_alpha` and `adapter_rank`. The sum is computed in float64.
    """
    if not any(name.endswith(_A) for name in state):
        return dict(state)
    network = config["network"]
    scale = network["adapter_alpha"] / network["adapter_rank"]
    plain = {}
    for name, tensor in state.items():
        if name.endswith((_A, _B)):
            continue
        stem = name.removesuffix(f"{_BASE}weight")
        value = tensor
        if f"{stem}{_A}" in state:
            low_A, low_B = (state[f"{stem}{part}"].double().flatten(1) for part in (_A, _B))
            value = (tensor.double() + scale * (low_B @ low_A).reshape(tensor.shape)).to(tensor.dtype)
        plain[_plain_name(name)] = value
    return plain


def _plain_name(name: str) -> str:
    name = name.replace(_BASE, ".")
    return name.replace(f".{_PACKED}.weight", ".in_proj_weight").replace(f".{_PACKED}.bias", ".in_proj_bias")
