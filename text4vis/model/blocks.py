"""The depth of a visual tower's parameters: stem, blocks, and what follows them. Freezing and rate decay go by it."""

from __future__ import annotations

import re
from collections.abc import Iterator

from open_clip.timm_model import TimmModel
from timm.models import group_parameters
from torch import nn

from text4vis.config.schema import ConfigError

# The blocks of open_clip's own towers, and what stands behind the last one. All else is the stem.
_BLOCK = re.compile(r"transformer\.resblocks\.\d+\.|layer\d\.\d+\.")
_END = ("ln_post.", "proj", "attnpool.", "attn_pool")
_TIMM_BLOCK = re.compile(r"(blocks|layers|stages)\.\d+\.")


def depths(visual: nn.Module) -> tuple[dict[str, int], int]:
    """Depth of each parameter of a visual tower, by name: 0 for the stem, 1 to L for its L blocks, L + 1 behind them;
    and L.

    timm's towers say themselves what their blocks are; a tower of stages counts the blocks of all stages.
    """
    names = [name for name, _ in visual.named_parameters()]
    if isinstance(visual, TimmModel):
        levels = group_parameters(visual.trunk, visual.trunk.group_matcher(coarse=False), reverse=True)
        deepest = max(levels.values())
        ends_in_block = any(_TIMM_BLOCK.match(name) for name, level in levels.items() if level == deepest)
        blocks = deepest if ends_in_block else deepest - 1
        return {name: levels.get(name.removeprefix("trunk."), blocks + 1) for name in names}, blocks
    matches = {name: _BLOCK.match(name) for name in names}
    order = {key: index for index, key in enumerate(dict.fromkeys(m[0] for m in matches.values() if m), start=1)}
    end = len(order) + 1
    return {name: order[m[0]] if m else end * name.startswith(_END) for name, m in matches.items()}, len(order)


def freeze_blocks(visual: nn.Module, count: int) -> None:
    """Freezes the stem and the first `count` blocks of a visual tower. Raises ConfigError if it has fewer."""
    depth, blocks = depths(visual)
    if count > blocks:
        raise ConfigError(
            f"network.freeze_blocks: {count}, but the visual tower has {blocks} blocks; network.fix_video freezes all"
        )
    for name, parameter in visual.named_parameters():
        if depth[name] <= count:
            parameter.requires_grad_(False)


def frozen_norms(module: nn.Module) -> Iterator[nn.Module]:
    """Batch normalisations whose own parameters are frozen: their statistics must stay too."""
    for part in module.modules():
        own = list(part.parameters(recurse=False))
        if isinstance(part, nn.modules.batchnorm._BatchNorm) and own and not any(each.requires_grad for each in own):
            yield part
