"""The names that other programs give to CLIP's tensors, brought to those of open_clip and OpenAI.

Wrappers put a prefix before every name (`module.` torch's DDP, `_orig_mod.` torch.compile, `model.` Lightning …). The
class CLIPModel of transformers has names of its own, keeps queries, keys and values apart, and stores projections
transposed.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch
from torch import Tensor

from text4vis.config.schema import ConfigError

State = dict[str, Tensor]

# Each stands before all names of a state dict, or before none.
WRAPPERS = ("module.", "model.", "base_model.", "clip.", "clip_model.", "net.")
COMPILED = "_orig_mod."  # before the names of whichever part was compiled

_TRANSFORMERS_MARK = "vision_model.pre_layrnorm.weight"  # transformers' own spelling
_OTHER_TRANSFORMERS_MARK = "vision_model."
_CONSTANT = "embeddings.position_ids"  # that older transformers saved
_TOWERS = {"vision_model.": "visual.", "text_model.": ""}
_PARTS = {
    "embeddings.class_embedding": "class_embedding",
    "embeddings.patch_embedding.weight": "conv1.weight",
    "embeddings.position_embedding.weight": "positional_embedding",
    "embeddings.token_embedding.weight": "token_embedding.weight",
    "pre_layrnorm": "ln_pre",
    "post_layernorm": "ln_post",
    "final_layer_norm": "ln_final",
}
_BLOCK_PARTS = {
    "self_attn.out_proj": "attn.out_proj",
    "layer_norm1": "ln_1",
    "layer_norm2": "ln_2",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
}
_BLOCK = re.compile(r"encoder\.layers\.(\d+)\.(.+)")
_QUERY = re.compile(r"self_attn\.q_proj\.(weight|bias)")


def without_wrappers(state: Mapping[str, Tensor]) -> State:
    """The tensors under the names that they had before something was wrapped around the model."""
    plain = {name.replace(COMPILED, ""): tensor for name, tensor in state.items()}
    while prefix := next((mark for mark in WRAPPERS if plain and all(name.startswith(mark) for name in plain)), None):
        plain = {name.removeprefix(prefix): tensor for name, tensor in plain.items()}
    return plain


def clip_names(state: Mapping[str, Tensor], where: str) -> State:
    """The tensors under open_clip's names, whatever is wrapped around them; names that are not known stay.

    where: named in errors. Raises ConfigError for another model of transformers than CLIPModel.
    """
    plain = without_wrappers(state)
    if _TRANSFORMERS_MARK in plain:
        return _from_transformers(plain, where)
    if any(name.startswith(_OTHER_TRANSFORMERS_MARK) for name in plain):
        raise ConfigError(
            f"{where}: has the names of a model of transformers that is no CLIPModel (such as {min(plain)}); give its "
            "weights in open_clip's layout"
        )
    return plain


def _from_transformers(state: State, where: str) -> State:
    found: State = {}
    for name, tensor in state.items():
        if name.endswith(_CONSTANT):
            continue
        if name in ("visual_projection.weight", "text_projection.weight"):
            found["visual.proj" if name.startswith("visual") else "text_projection"] = tensor.T.contiguous()
            continue
        tower = next((mark for mark in _TOWERS if name.startswith(mark)), None)
        if tower is None:
            found[name] = tensor
            continue
        for new, value in _of_tower(tower, name.removeprefix(tower), state, where).items():
            found[_TOWERS[tower] + new] = value
    return found


def _of_tower(tower: str, name: str, state: State, where: str) -> State:
    """What a tensor of a tower becomes: queries bring keys and values along, which alone become nothing."""
    block = _BLOCK.fullmatch(name)
    if block is None:
        return {_renamed(name, _PARTS): state[tower + name]}
    number, part = block.groups()
    if re.fullmatch(r"self_attn\.[kv]_proj\.(weight|bias)", part):
        return {}
    new = f"transformer.resblocks.{number}."
    query = _QUERY.fullmatch(part)
    if query is None:
        return {new + _renamed(part, _BLOCK_PARTS): state[tower + name]}
    three = [(tower + name).replace("q_proj", f"{letter}_proj") for letter in "qkv"]
    if missing := [other for other in three if other not in state]:
        raise ConfigError(f"{where}: lacks {missing[0]}, but has {three[0]}; save the weights again")
    return {f"{new}attn.in_proj_{query[1]}": torch.cat([state[other] for other in three])}


def _renamed(name: str, parts: Mapping[str, str]) -> str:
    if name in parts:
        return parts[name]
    part, _, kind = name.rpartition(".")
    return f"{parts.get(part, part)}.{kind}"
