"""The video recogniser: CLIP's visual tower on every frame, a temporal head, cosine with class embeddings.

B videos, T frames, C classes, P prompts, L tokens, D embedding width; frames are (B, T, 3, H, W) uint8. Imports
config, heads, temporal and towers.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from text4vis.config.schema import ConfigError, DataConfig, NetworkConfig
from text4vis.model.blocks import freeze_blocks, frozen_norms
from text4vis.model.heads import NUM_POSITIONS, TransformerHead, build_head
from text4vis.model.temporal import adapt
from text4vis.model.towers import TextTower, Towers, build_towers


@dataclass(frozen=True)
class ClassRows:
    """Classes as rows (C,) int64 of the model's own `classifier`, where that trains."""

    rows_C: Tensor

    def __getitem__(self, chosen_C: Tensor) -> ClassRows:
        """Some of the classes, by their positions (C,) int64."""
        return ClassRows(self.rows_C[chosen_C])

    def to(self, device: torch.device) -> ClassRows:
        """The same on a device."""
        return ClassRows(self.rows_C.to(device))


@dataclass(frozen=True)
class ClassTokens:
    """Classes as tokens (C, P, L) int64 of their prompts, for the model's own `text_tower`, where that trains."""

    tokens_CPL: Tensor

    def __getitem__(self, chosen_C: Tensor) -> ClassTokens:
        """Some of the classes, by their positions (C,) int64."""
        return ClassTokens(self.tokens_CPL[chosen_C])

    def to(self, device: torch.device) -> ClassTokens:
        """The same on a device."""
        return ClassTokens(self.tokens_CPL.to(device))


# The weights' type with each `engine.precision`.
WEIGHTS_DTYPE = {"bf16": torch.bfloat16, "fp16": torch.float16, "amp": torch.float32, "fp32": torch.float32}

# What a forward pass compares videos with: class embeddings (C, D), or what trains in their place.
Classes = Tensor | ClassRows | ClassTokens


def build_model(network: NetworkConfig, num_segments: int, *, image_size: int | None = None) -> VideoClip:
    """A recogniser in fp32 on the CPU for videos of `num_segments` frames.

    `image_size` (pixels, default: the tower's own) interpolates the position embedding where it differs. The head is
    random, drawn from torch's global generator. Raises ConfigError, naming the key.
    """
    towers = build_towers(network, image_size)
    towers = replace(towers, visual=adapt(towers.visual, network, num_segments))
    try:
        head = build_head(
            network.sim_header,
            embed_dim=towers.embed_dim,
            text_width=towers.text_width,
            num_segments=num_segments,
        )
    except ValueError as error:
        raise ConfigError(str(error)) from None
    model = VideoClip(towers, head, num_segments, fix_video=network.fix_video, fix_text=network.fix_text)
    if network.freeze_blocks:
        freeze_blocks(model.visual, network.freeze_blocks)
        model.train()
    model.takes_fixed_frames = bool(network.tm or network.joint_st) or network.sim_header == "Transf_cls"
    return model


class VideoClip(nn.Module):
    """`visual`, `fusion_model` and `logit_scale` are its parameters, under the names that Text4Vis's files use.

    `logit_scale` has shape (1,): the engine cannot partition a parameter without dimensions. The frozen text tower
    (`text`) is not a submodule: it stays in fp32 on the CPU, and neither the optimiser nor a checkpoint sees it. Two
    more parts are there when they train: with `fix_text` false `text_tower`, which is the module within `text`, and
    `classifier` (C, D) for `class_names`, after `set_classifier`.

    autocast: whether towers and head compute in fp16 by torch's autocast, from weights in fp32 (`engine.precision:
    amp`).
    """

    def __init__(
        self, towers: Towers, head: nn.Module, num_segments: int, *, fix_video: bool = False, fix_text: bool = True
    ) -> None:
        super().__init__()
        self.visual = towers.visual
        self.fusion_model = head
        self.logit_scale = nn.Parameter(torch.tensor([towers.logit_scale]))
        self._has_grouped_convolutions = any(getattr(module, "groups", 1) > 1 for module in self.visual.modules())
        self.text: TextTower = towers.text
        self.text_tower = None if fix_text else towers.text.module.requires_grad_(True)
        self.classifier: nn.Parameter | None = None
        self.class_names: tuple[str, ...] = ()
        self.clip_config: dict[str, Any] = towers.config
        self.mean, self.std = towers.mean, towers.std
        self._scale_C11, self._shift_C11 = _pixel_constants(towers.mean, towers.std)
        self.autocast = False
        self.embed_dim, self.image_size, self.num_segments = towers.embed_dim, towers.image_size, num_segments
        self.takes_fixed_frames = False
        self.fix_video = fix_video
        if fix_video:
            self.visual.requires_grad_(False)
        self.train()

    def train(self, mode: bool = True) -> VideoClip:
        """What is frozen of the visual tower stays in evaluation mode, so that its batch statistics stay frozen too."""
        super().train(mode)
        for norm in frozen_norms(self.visual):
            norm.eval()
        if self.fix_video:
            self.visual.eval()
        return self

    def _apply(self, *given: Any, **options: Any) -> VideoClip:
        """What `to` and its like call. The pixels' constants follow the weights' device, but are never rounded."""
        super()._apply(*given, **options)
        device = next(self.visual.parameters()).device
        self._scale_C11, self._shift_C11 = self._scale_C11.to(device), self._shift_C11.to(device)
        return self

    def set_classifier(self, class_embeddings_CD: Tensor, class_names: Sequence[str]) -> None:
        """Makes the class embeddings of these names a parameter of the model, in float32."""
        self.classifier = nn.Parameter(class_embeddings_CD.detach().float().clone())
        self.class_names = tuple(class_names)

    def forward(self, frames_BTCHW: Tensor, classes: Classes) -> Tensor:
        """Logits (B, C) float32: exp(logit_scale) times the cosine of video and class, computed in float32.

        frames_BTCHW: uint8. classes: class embeddings (C, D) of a floating type, or where they train what
        `embed_classes` makes them from.
        """
        videos_BD = nn.functional.normalize(self.encode_video(frames_BTCHW), dim=-1)
        classes_CD = nn.functional.normalize(self.embed_classes(classes.to(videos_BD.device)), dim=-1)
        cosines_BC = videos_BD @ classes_CD.T
        return self.logit_scale.float().exp() * cosines_BC

    def embed_classes(self, classes: Classes) -> Tensor:
        """Class embeddings (C, D) float32, with gradient where they train, not normalised.

        Embeddings are returned unchanged; tokens become the mean of their prompts' unit vectors.
        """
        if isinstance(classes, ClassRows):
            assert self.classifier is not None, "the model has no classifier of its own"
            return self.classifier[classes.rows_C].float()
        if isinstance(classes, ClassTokens):
            assert self.text_tower is not None, "the text tower is frozen"
            tokens_CPL = classes.tokens_CPL
            with self._arithmetic(tokens_CPL.device):
                prompts_CPD = self.text_tower(tokens_CPL.flatten(0, 1)).float().unflatten(0, tokens_CPL.shape[:2])
            return nn.functional.normalize(prompts_CPD, dim=-1).mean(dim=1)
        return classes.float()

    def check_frames(self, data: DataConfig) -> None:
        """Raises ConfigError where the model cannot take the frames of `data`, naming the key and the value to set."""
        if self.image_size != data.input_size:
            raise ConfigError(
                f"data.input_size: {data.input_size}, but the model takes {self.image_size} pixels; "
                f"add --set data.input_size={self.image_size}"
            )
        if self.takes_fixed_frames and self.num_segments != data.num_segments:
            raise ConfigError(
                f"data.num_segments: {data.num_segments}, but the model takes {self.num_segments} frames; "
                f"add --set data.num_segments={self.num_segments}"
            )
        if isinstance(self.fusion_model, TransformerHead) and data.num_segments > NUM_POSITIONS:
            raise ConfigError(
                f"data.num_segments: {data.num_segments}, but the model's head has positions for {NUM_POSITIONS} "
                f"frames; add --set data.num_segments={self.num_segments}"
            )

    def encode_video(self, frames_BTCHW: Tensor) -> Tensor:
        """Videos (B, D) float32, not normalised."""
        embeddings_BTD = self.encode_frames(frames_BTCHW)
        with self._arithmetic(frames_BTCHW.device):
            return self.fusion_model(embeddings_BTD)

    def encode_frames(self, frames_BTCHW: Tensor) -> Tensor:
        """Frames' embeddings (B, T, D) in the visual tower's dtype, not normalised. Any memory format will do.

        With `network.joint_st` the tower joins the frames itself: (B, 1, D).
        """
        size = self.image_size
        if frames_BTCHW.dtype != torch.uint8 or tuple(frames_BTCHW.shape[2:]) != (3, size, size):
            found = f"{tuple(frames_BTCHW.shape)} {frames_BTCHW.dtype}"
            raise ValueError(f"frames: expected (B, T, 3, {size}, {size}) uint8 (data.input_size), got {found}")
        if self.takes_fixed_frames and (num_frames := frames_BTCHW.shape[1]) != self.num_segments:
            raise ValueError(f"frames: expected {self.num_segments} a video (data.num_segments), got {num_frames}")
        pixels = frames_BTCHW.flatten(0, 1).float() * self._scale_C11 + self._shift_C11
        if self._has_grouped_convolutions and not pixels.is_cuda:
            # torch 2.14's backward pass of FastViT (MobileCLIP2) in the loader's layout, channels last, writes outside
            # of its memory on CPUs: the process crashes.
            pixels = pixels.contiguous()
        with self._arithmetic(frames_BTCHW.device):
            embeddings = self.visual(pixels.to(next(self.visual.parameters()).dtype))
        return embeddings.unflatten(0, (frames_BTCHW.shape[0], -1))

    def _arithmetic(self, device: torch.device) -> AbstractContextManager[object]:
        return torch.autocast(device.type, torch.float16) if self.autocast else nullcontext()

    def encode_text(self, texts: Sequence[str]) -> Tensor:
        """Texts (C, D) float32 on the CPU, not normalised, without gradient. Raises ValueError if one is too long."""
        return self.text.encode(texts)


def _pixel_constants(mean: tuple[float, ...], std: tuple[float, ...]) -> tuple[Tensor, Tensor]:
    """Scale and shift (3, 1, 1) float32 that turn 0..255 into (x / 255 - mean) / std.

    Not buffers, because the engine would round those to bf16.
    """
    mean_C11, std_C11 = (torch.tensor(values, dtype=torch.float64).reshape(3, 1, 1) for values in (mean, std))
    return (1 / (255 * std_C11)).float(), (-mean_C11 / std_C11).float()
