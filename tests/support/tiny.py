"""Tiny CLIPs of random weights, written where a test wants them: a model JSON with its vocabulary and weights."""

import copy
import gzip
import json
from collections.abc import Sequence
from pathlib import Path

import torch
from open_clip.model import CLIP
from safetensors.torch import save_file

from text4vis.classifier.embeddings import build_classifier
from text4vis.config.schema import Config, DataConfig, NetworkConfig
from text4vis.model.preprocessing import settle
from text4vis.model.video_clip import build_model
from text4vis.saved.weights import export_model

# As OpenAI's CLIPs see pixels.
PIXELS = {
    "mean": [0.48145466, 0.4578275, 0.40821073],
    "std": [0.26862954, 0.26130258, 0.27577711],
    "interpolation": "bicubic",
    "resize_mode": "shortest",
}
MERGES = ("t h", "th e</w>", "i n", "in g</w>")
CONFIG = {
    "embed_dim": 64,
    "quick_gelu": True,
    "vision_cfg": {"image_size": 32, "layers": 2, "width": 64, "head_width": 32, "patch_size": 8},
    "text_cfg": {
        "context_length": 32,
        "vocab_size": 512 + len(MERGES) + 2,
        "width": 128,
        "heads": 2,
        "layers": 2,
        "tokenizer_kwargs": {"bpe_path": "tiny-bpe.txt.gz"},
    },
}
# What OpenAI's layout implies: heads of 64, quick GELU, and CLIP's own vocabulary.
OPENAI_VIT = {
    "embed_dim": 64,
    "quick_gelu": True,
    "vision_cfg": {"image_size": 32, "layers": 2, "width": 128, "patch_size": 16},
    "text_cfg": {"context_length": 20, "vocab_size": 49408, "width": 64, "heads": 1, "layers": 2},
}
OPENAI_RESNET = OPENAI_VIT | {"vision_cfg": {"image_size": 64, "layers": [1, 1, 1, 1], "width": 8, "head_width": 64}}


def random_clip(config: dict, seed: int = 0) -> CLIP:
    """open_clip's model with every parameter moved off its initial value, in evaluation mode."""
    torch.manual_seed(seed)
    clip = CLIP(**copy.deepcopy(config)).eval()
    with torch.no_grad():
        for parameter in clip.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    return clip


def openai_state(clip: CLIP) -> dict[str, torch.Tensor]:
    """The tensors of a CLIP as OpenAI's archives hold them: with three numbers that nobody else saves."""
    extras = {"input_resolution": torch.tensor(0), "context_length": torch.tensor(20), "vocab_size": torch.tensor(1)}
    return clip.state_dict() | extras


def write_clip(folder: Path, seed: int = 0) -> Path:
    """Writes tiny.json, its vocabulary and tiny.safetensors; returns the JSON's path."""
    folder.mkdir(parents=True, exist_ok=True)
    with gzip.open(folder / "tiny-bpe.txt.gz", "wt", encoding="utf-8") as file:
        file.write("\n".join(["#version: tiny", *MERGES]))
    path = folder / "tiny.json"
    path.write_text(json.dumps({"model_cfg": CONFIG, "preprocess_cfg": PIXELS}))
    save_file(random_clip(CONFIG, seed).state_dict(), path.with_suffix(".safetensors"))
    return path


def tiny_network(folder: Path, **changes: object) -> NetworkConfig:
    """A network section that names a tiny CLIP written to `folder`."""
    return NetworkConfig(**{"arch": str(write_clip(folder)), **changes})


def random_frames(videos: int, frames: int, size: int = 32, seed: int = 0) -> torch.Tensor:
    """Frames (B, T, 3, H, W) uint8."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (videos, frames, 3, size, size), dtype=torch.uint8, generator=generator)


def write_export(folder: Path, class_names: Sequence[str], frames: int = 4, seed: int = 0, **network: object) -> Path:
    """Writes an export of a tiny model of random weights to `folder`/export; returns that."""
    settings = tiny_network(folder / "clip", **network)
    config = settle(Config(network=settings, data=DataConfig(num_segments=frames, input_size=32, dataset="tiny")))
    torch.manual_seed(seed)
    model = build_model(settings, frames).eval()
    classes_CD = build_classifier(config, model, class_names)
    export_model(folder / "export", model, settings, config.to_dict(), list(class_names), classes_CD, {})
    return folder / "export"
