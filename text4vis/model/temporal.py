"""Temporal modelling (`network.tm`, `network.joint_st`) and dropout inside CLIP's visual tower.

    adapt(tower with its weights) ──> tsm         channels of patches move to the next and the previous frame
                                  ├─> tokenshift  channels of the class token move
                                  ├─> tokent1d    a convolution over time on the class token, initialised as tokenshift
                                  ├─> joint_st    one sequence with the tokens of all frames
                                  └─> drop_out, emb_dropout

A tower takes N = B*T frames, video by video. Parameter names are those of the Text4Vis release, so
that its files load. B videos, T frames, L tokens (the class token first), P patches, W tower width.
"""

from __future__ import annotations

from typing import Any

import torch
from open_clip.modified_resnet import ModifiedResNet
from open_clip.transformer import ResidualAttentionBlock, Transformer, VisionTransformer
from torch import Tensor, nn
from torchvision.ops import StochasticDepth

from text4vis.config.schema import ConfigError, NetworkConfig

TSM_SHARE = 8  # one channel in 8 moves forward in time, and one backward
TOKEN_SHARE = 4
DEEP_STAGE = 23  # ResNets whose third stage has at least this many blocks are shifted in every other block


def adapt(visual: Any, network: NetworkConfig, num_segments: int) -> nn.Module:
    """Adds what `network` asks for to the tower; its modules and pre-trained weights are kept.

    Raises ConfigError that names a key which this kind of tower does not support.
    """
    asked = [key for key in ("tm", "joint_st", "drop_out", "emb_dropout") if getattr(network, key)]
    if not asked:
        return visual
    if isinstance(visual, ModifiedResNet) and asked == ["tm"] and network.tm == "tsm":
        _shift_resnet(visual, num_segments)
        return visual
    if not _is_plain(visual):
        value = getattr(network, asked[0])
        instead = "only network.tm: tsm" if isinstance(visual, ModifiedResNet) else "none of these options"
        raise ConfigError(
            f"network.{asked[0]}: {value!r} needs one of CLIP's own vision transformers; {network.arch} has {instead}"
        )
    if network.emb_dropout:
        visual.patch_dropout = nn.Sequential(visual.patch_dropout, nn.Dropout(network.emb_dropout))
    _adapt_blocks(visual.transformer.resblocks, network, num_segments)
    return JointTower(visual, num_segments) if network.joint_st else visual


def _is_plain(visual: Any) -> bool:
    """Whether this is a vision transformer like OpenAI's: standard blocks, pooled at the class token."""
    return (
        isinstance(visual, VisionTransformer)
        and visual.attn_pool is None
        and visual.pool_type == "tok"
        and all(type(block) is ResidualAttentionBlock for block in visual.transformer.resblocks)
    )


def _shift_resnet(visual: ModifiedResNet, num_segments: int) -> None:
    step = 2 if len(visual.layer3) >= DEEP_STAGE else 1
    for stage in (visual.layer1, visual.layer2, visual.layer3, visual.layer4):
        for block in stage[::step]:
            block.conv1 = ShiftedImages(block.conv1, num_segments)


def _adapt_blocks(blocks: Any, network: NetworkConfig, num_segments: int) -> None:
    drop_rates = torch.linspace(0, network.drop_out, len(blocks)).tolist()
    for index, (block, drop_rate) in enumerate(zip(blocks, drop_rates, strict=True)):
        control_point: nn.Module = nn.Identity()
        if network.tm == "tokenshift":
            control_point = TokenShift(num_segments)
        elif network.tm == "tokent1d":
            control_point = TokenConv(block.attn.embed_dim, num_segments)
        adapted: nn.Module = Block(block, control_point, drop_rate)
        blocks[index] = ShiftedPatches(adapted, num_segments) if network.tm == "tsm" else adapted


def shift_channels(x_NxC: Tensor, num_segments: int, share: int) -> Tensor:
    """Moves channels (the last axis) between the frames of a video; shape (B*T, …, C) in and out.

    channels   0 … C/share          take the next frame's value      (0 in the last frame)
               C/share … 2*C/share  take the previous frame's value  (0 in the first frame)
               the rest             stay
    """
    x_BTxC = x_NxC.unflatten(0, (-1, num_segments))
    fold = x_NxC.shape[-1] // share
    shifted = torch.zeros_like(x_BTxC)
    shifted[:, :-1, ..., :fold] = x_BTxC[:, 1:, ..., :fold]
    shifted[:, 1:, ..., fold : 2 * fold] = x_BTxC[:, :-1, ..., fold : 2 * fold]
    shifted[..., 2 * fold :] = x_BTxC[..., 2 * fold :]
    return shifted.flatten(0, 1)


class ShiftedImages(nn.Module):
    """`tsm` in a ResNet: shifts the input (N, C, H, W) of a block's first convolution, but not of its shortcut."""

    def __init__(self, net: nn.Module, num_segments: int) -> None:
        super().__init__()
        self.net, self.num_segments = net, num_segments

    def forward(self, x_NCHW: Tensor) -> Tensor:
        """Shifts (N, C, H, W), N = B * T frames, and applies the wrapped layer."""
        return self.net(shift_channels(x_NCHW.movedim(1, -1), self.num_segments, TSM_SHARE).movedim(-1, 1))


class ShiftedPatches(nn.Module):
    """`tsm` in a vision transformer: shifts a block's whole input, shortcut included, except for the class token."""

    def __init__(self, net: nn.Module, num_segments: int) -> None:
        super().__init__()
        self.net, self.num_segments = net, num_segments

    def forward(self, x_NLW: Tensor, *_: None, **__: None) -> Tensor:
        """Shifts (N, L, W), N = B * T frames of L tokens, and applies the wrapped layer."""
        patches_NPW = shift_channels(x_NLW[:, 1:], self.num_segments, TSM_SHARE)
        return self.net(torch.cat([x_NLW[:, :1], patches_NPW], dim=1))


class TokenShift(nn.Module):
    """`tokenshift`: channels of the class token move between frames; patches stay. It has no parameters."""

    def __init__(self, num_segments: int) -> None:
        super().__init__()
        self.num_segments = num_segments

    def forward(self, x_NLW: Tensor) -> Tensor:
        """(N, L, W) -> (N, L, W), N = B * T frames of L tokens."""
        return torch.cat([shift_channels(x_NLW[:, :1], self.num_segments, TOKEN_SHARE), x_NLW[:, 1:]], dim=1)


class TokenConv(nn.Module):
    """`tokent1d`: a depthwise convolution over 3 frames of the class token, initialised as TokenShift."""

    def __init__(self, width: int, num_segments: int) -> None:
        super().__init__()
        self.num_segments = num_segments
        self.conv = nn.Conv1d(width, width, kernel_size=3, padding=1, groups=width, bias=False)
        fold = width // TOKEN_SHARE
        with torch.no_grad():
            self.conv.weight.zero_()
            self.conv.weight[:fold, 0, 2] = 1.0
            self.conv.weight[fold : 2 * fold, 0, 0] = 1.0
            self.conv.weight[2 * fold :, 0, 1] = 1.0

    def forward(self, x_NLW: Tensor) -> Tensor:
        """(N, L, W) -> (N, L, W), N = B * T frames of L tokens."""
        class_BTW = x_NLW[:, 0].unflatten(0, (-1, self.num_segments))
        class_N1W = self.conv(class_BTW.transpose(1, 2)).transpose(1, 2).flatten(0, 1).unsqueeze(1)
        return torch.cat([class_N1W, x_NLW[:, 1:]], dim=1)


class Block(nn.Module):
    """open_clip's residual block, from its own modules, with two additions of the release.

    `control_point` maps the tokens before each of the two branches. `drop_rate` is the probability that a
    branch is dropped for a frame, and the dropout of the attention weights. The release drops whole token positions of
    a batch instead, because it mistakes the first axis for the batch.
    """

    ln_1: nn.Module
    attn: nn.MultiheadAttention
    ls_1: nn.Module
    ln_2: nn.Module
    mlp: nn.Module
    ls_2: nn.Module

    def __init__(self, block: ResidualAttentionBlock, control_point: nn.Module, drop_rate: float) -> None:
        super().__init__()
        for name, module in block.named_children():
            self.add_module(name, module)
        self.control_point = control_point
        self.drop_path = StochasticDepth(drop_rate, mode="row")
        self.attn.dropout = drop_rate

    def forward(self, x_NLW: Tensor, *_: None, **__: None) -> Tensor:
        """(N, L, W) -> (N, L, W)."""
        x_NLW = self.control_point(x_NLW)
        normed = self.ln_1(x_NLW)
        x_NLW = x_NLW + self.drop_path(self.ls_1(self.attn(normed, normed, normed, need_weights=False)[0]))
        x_NLW = self.control_point(x_NLW)
        return x_NLW + self.drop_path(self.ls_2(self.mlp(self.ln_2(x_NLW))))


class JointTower(nn.Module):
    """`joint_st`: attends over the patches of all frames and one class token in one sequence; gives (B, D).

    `time_embedding` (T, W) is learned, initialised from a normal with standard deviation W^-0.5, and added to every
    patch of its frame.
    """

    conv1: nn.Module
    class_embedding: nn.Parameter
    positional_embedding: nn.Parameter
    patch_dropout: nn.Module
    ln_pre: nn.Module
    transformer: Transformer
    ln_post: nn.Module
    proj: nn.Parameter

    def __init__(self, visual: VisionTransformer, num_segments: int) -> None:
        super().__init__()
        for name, module in visual.named_children():
            self.add_module(name, module)
        for name, parameter in visual.named_parameters(recurse=False):
            self.register_parameter(name, parameter)
        width = visual.class_embedding.shape[0]
        self.time_embedding = nn.Parameter(width**-0.5 * torch.randn(num_segments, width))

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Turns activation checkpointing on or off, as in open_clip's towers."""
        self.transformer.grad_checkpointing = enable

    def forward(self, pixels_NCHW: Tensor) -> Tensor:
        """(N, 3, H, W), N = B * T frames, -> (B, D)."""
        patches_NPW = self.conv1(pixels_NCHW).flatten(2).transpose(1, 2) + self.positional_embedding[1:]
        patches_BTPW = patches_NPW.unflatten(0, (-1, len(self.time_embedding))) + self.time_embedding[:, None]
        class_W = self.class_embedding + self.positional_embedding[0]
        tokens_BLW = torch.cat([class_W.expand(patches_BTPW.shape[0], 1, -1), patches_BTPW.flatten(1, 2)], dim=1)
        tokens_BLW = self.transformer(self.ln_pre(self.patch_dropout(tokens_BLW)))
        return self.ln_post(tokens_BLW[:, 0]) @ self.proj
