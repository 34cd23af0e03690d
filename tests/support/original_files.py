"""Checkpoints as the original project's two trainers write them."""

import torch
from tiny import CONFIG, random_clip

from text4vis.model.video_clip import build_model

T = 4
NAMES = ["archery", "surfing", "playing the flute"]


def trained(network):
    """A model whose visual tower and logit scale have left their pre-trained values."""
    torch.manual_seed(1)
    model = build_model(network, T)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.01 * torch.randn_like(parameter))
    return model.eval()


def original_state(model) -> dict[str, torch.Tensor]:
    """As the original saves it: a logit scale without dimensions."""
    return {**model.state_dict(), "logit_scale": model.logit_scale.detach()[0]}


def save_train(path, model, prefix=""):
    state = {prefix + name: tensor for name, tensor in original_state(model).items()}
    torch.save(
        {"epoch": 29, "model_state_dict": state, "optimizer_state_dict": {"state": {}, "param_groups": []}}, path
    )


def save_train_nce(path, model, prefix="", seed=7):
    """All of CLIP, with a text tower that was trained too, and the head by itself."""
    clip = {n: t for n, t in random_clip(CONFIG, seed).state_dict().items() if not n.startswith("visual.")}
    state = original_state(model)
    clip |= {name: tensor for name, tensor in state.items() if not name.startswith("fusion_model.")}
    head = {n.removeprefix("fusion_model."): t for n, t in state.items() if n.startswith("fusion_model.")}
    content = {"model_state_dict": clip, "fusion_model_state_dict": head}
    torch.save({"epoch": 0} | {k: {prefix + n: t for n, t in v.items()} for k, v in content.items()}, path)
