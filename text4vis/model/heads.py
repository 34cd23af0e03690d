"""Temporal heads: fuse the embeddings of a video's frames into one.

B videos, T frames, D embedding width. Every head maps frames (B, T, D), in the visual tower's dtype, to videos (B, D)
in float32, not normalised. Parameter names and initialisation are those of the Text4Vis and ActionCLIP releases.
"""

from __future__ import annotations

from collections import OrderedDict

import torch
from torch import Tensor, nn

NUM_POSITIONS = 77  # the releases give the frame position table the text tower's context length
NUM_LAYERS = 6
HEAD_WIDTH = 64
INIT_STD = 0.02


def build_head(sim_header: str, *, embed_dim: int, text_width: int, num_segments: int) -> nn.Module:
    """The head named by `network.sim_header`. Raises ValueError if it cannot take `num_segments` frames."""
    if sim_header == "None":
        return MeanHead()
    if sim_header == "Transf":
        if num_segments > NUM_POSITIONS:
            raise ValueError(f"data.num_segments: {num_segments} frames, but the head has {NUM_POSITIONS} positions")
        num_heads = max(1, text_width // HEAD_WIDTH)
        if embed_dim % num_heads:
            raise ValueError(f"network.sim_header: width {embed_dim} cannot be split into {num_heads} heads")
        return TransformerHead(embed_dim, num_heads)
    if sim_header == "Transf_cls":
        return ClassTokenHead(embed_dim, num_segments)
    return {"LSTM": LSTMHead, "Conv_1D": ConvHead}[sim_header](embed_dim)


class MeanHead(nn.Module):
    """`None`: the mean over frames; their order has no effect."""

    def forward(self, frames_BTD: Tensor) -> Tensor:
        """(B, T, D) -> (B, D) float32: the mean over the frames."""
        return frames_BTD.float().mean(dim=1)


class QuickGELU(nn.Module):
    """The approximation of GELU that OpenAI's CLIP uses."""

    def forward(self, x: Tensor) -> Tensor:
        """x * sigmoid(1.702 * x), of any shape."""
        return x * torch.sigmoid(1.702 * x)


class LayerNorm(nn.LayerNorm):
    """Layer norm that always computes in float32, because its epsilon of 1e-12 needs that precision."""

    def __init__(self, width: int) -> None:
        super().__init__(width, eps=1e-12)

    def forward(self, x: Tensor) -> Tensor:
        """Normalises the last axis in float32; the result has the input's dtype."""
        normed = nn.functional.layer_norm(
            x.float(), self.normalized_shape, self.weight.float(), self.bias.float(), self.eps
        )
        return normed.to(x.dtype)


class ResidualAttentionBlock(nn.Module):
    """Pre-norm self-attention and MLP over time, each with a residual."""

    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        self.attn = nn.MultiheadAttention(width, num_heads, batch_first=True)
        self.ln_1 = LayerNorm(width)
        self.mlp = nn.Sequential(
            OrderedDict(
                c_fc=nn.Linear(width, 4 * width),
                gelu=QuickGELU(),
                c_proj=nn.Linear(4 * width, width),
            )
        )
        self.ln_2 = LayerNorm(width)

    def forward(self, x_BTD: Tensor) -> Tensor:
        """(B, T, D) -> (B, T, D)."""
        normed = self.ln_1(x_BTD)
        x_BTD = x_BTD + self.attn(normed, normed, normed, need_weights=False)[0]
        return x_BTD + self.mlp(self.ln_2(x_BTD))


class TemporalTransformer(nn.Module):
    """Pre-norm blocks of attention over the frames of a video."""

    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        self.resblocks = nn.Sequential(*[ResidualAttentionBlock(width, num_heads) for _ in range(NUM_LAYERS)])

    def forward(self, x_BTD: Tensor) -> Tensor:
        """(B, T, D) -> (B, T, D)."""
        return self.resblocks(x_BTD)


class TransformerHead(nn.Module):
    """`Transf`: learned frame positions, six blocks, a residual around all of it, then the mean over frames.

    Linear layers (including the attention's output projection) and positions are initialised from a normal with
    standard deviation 0.02, biases with zero; the attention's input projection keeps torch's default.
    """

    def __init__(self, embed_dim: int, num_heads: int) -> None:
        super().__init__()
        self.frame_position_embeddings = nn.Embedding(NUM_POSITIONS, embed_dim)
        self.transformer = TemporalTransformer(embed_dim, num_heads)
        self.apply(_normal_init)

    def forward(self, frames_BTD: Tensor) -> Tensor:
        """(B, T, D) -> (B, D) float32."""
        # Call the module instead of slicing its weight: ZeRO-3 gathers the table when the module is called.
        positions_TD = self.frame_position_embeddings(torch.arange(frames_BTD.shape[1], device=frames_BTD.device))
        fused_BTD = self.transformer(frames_BTD + positions_TD)
        return (fused_BTD.float() + frames_BTD.float()).mean(dim=1)


def _normal_init(module: nn.Module) -> None:
    if isinstance(module, (nn.Linear, nn.Embedding)):
        nn.init.normal_(module.weight, std=INIT_STD)
    if isinstance(module, nn.Linear) and module.bias is not None:
        nn.init.zeros_(module.bias)


class ClassTokenHead(nn.Module):
    """`Transf_cls` (ActionCLIP): a class token reads the frames through six post-norm encoder layers; no residual."""

    def __init__(self, embed_dim: int, num_segments: int) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(embed_dim, nhead=8, batch_first=True)
        self.transformer_enc = nn.TransformerEncoder(
            layer, NUM_LAYERS, norm=nn.LayerNorm(embed_dim), enable_nested_tensor=False
        )
        self.cls_token = nn.Parameter(torch.empty(1, 1, embed_dim))
        self.pos_embed = nn.Parameter(torch.empty(1, num_segments + 1, embed_dim))
        weights = [module.weight for module in self.modules() if isinstance(module, nn.Linear)]
        for tensor in (self.cls_token, self.pos_embed, *weights):
            nn.init.trunc_normal_(tensor, std=INIT_STD, a=-2 * INIT_STD, b=2 * INIT_STD)
        for name, parameter in self.named_parameters():
            if name.endswith("bias"):
                nn.init.zeros_(parameter)

    def forward(self, frames_BTD: Tensor) -> Tensor:
        """(B, T, D) -> (B, D) float32."""
        cls_B1D = self.cls_token.expand(frames_BTD.shape[0], -1, -1)
        tokens = torch.cat([cls_B1D, frames_BTD], dim=1) + self.pos_embed
        return self.transformer_enc(tokens)[:, 0].float()


class LSTMHead(nn.Module):
    """`LSTM` (ActionCLIP): one layer as wide as the embedding, a residual from the frames, then their mean."""

    def __init__(self, embed_dim: int) -> None:
        super().__init__()
        self.lstm_visual = nn.LSTM(embed_dim, embed_dim, batch_first=True)

    def forward(self, frames_BTD: Tensor) -> Tensor:
        """(B, T, D) -> (B, D) float32."""
        fused_BTD, _ = self.lstm_visual(frames_BTD)
        return (fused_BTD.float() + frames_BTD.float()).mean(dim=1)


class ConvHead(nn.Module):
    """`Conv_1D` (ActionCLIP): a depthwise convolution over time, initialised as a shift, a residual, then the mean.

    At initialisation the first quarter of the channels reads the previous frame and the last quarter the next one.
    ActionCLIP reshapes (T, D) to (D, T) without transposing, which mixes channels with time; this head transposes.
    """

    def __init__(self, embed_dim: int) -> None:
        super().__init__()
        self.shift = nn.Conv1d(embed_dim, embed_dim, kernel_size=3, padding=1, groups=embed_dim, bias=False)
        quarter = embed_dim // 4
        with torch.no_grad():
            self.shift.weight.zero_()
            self.shift.weight[:quarter, 0, 0] = 1.0
            self.shift.weight[quarter : embed_dim - quarter, 0, 1] = 1.0
            self.shift.weight[embed_dim - quarter :, 0, 2] = 1.0

    def forward(self, frames_BTD: Tensor) -> Tensor:
        """(B, T, D) -> (B, D) float32."""
        fused_BTD = self.shift(frames_BTD.transpose(1, 2)).transpose(1, 2)
        return (fused_BTD.float() + frames_BTD.float()).mean(dim=1)
