"""Weights under other programs' names give the same model; what cannot be read is named."""

import open_clip
import pytest
import torch
from safetensors.torch import save_file
from tiny import OPENAI_VIT, random_clip

from text4vis.config.schema import ConfigError, NetworkConfig
from text4vis.model.layouts import clip_names, without_wrappers
from text4vis.model.tensors import read_weights
from text4vis.model.towers import build_towers

NAMES = ["archery", "a person surfing", "sailing"]


@pytest.fixture(scope="module")
def theirs():
    """A CLIPModel of transformers with random weights and OpenAI's kind of sizes."""
    transformers = pytest.importorskip("transformers")
    text = {"vocab_size": 49408, "hidden_size": 64, "intermediate_size": 256, "num_hidden_layers": 2,
            "num_attention_heads": 1, "max_position_embeddings": 20, "eos_token_id": 49407}  # fmt: skip
    vision = {"hidden_size": 128, "intermediate_size": 512, "num_hidden_layers": 3, "num_attention_heads": 2,
              "image_size": 32, "patch_size": 16}  # fmt: skip
    torch.manual_seed(0)
    config = transformers.CLIPConfig(text_config=text, vision_config=vision, projection_dim=48)
    model = transformers.CLIPModel(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return model


def embedded(found):
    """Embeddings of what transformers' methods return, in its older versions and its newer ones."""
    return found if isinstance(found, torch.Tensor) else found.pooler_output


@pytest.mark.parametrize("prefix", ["", "module.", "model._orig_mod."])
def test_a_clip_of_transformers_gives_the_same_embeddings(theirs, tmp_path, prefix):
    path = tmp_path / "model.safetensors"
    constants = {"text_model.embeddings.position_ids": torch.arange(20)[None]}  # older versions saved them
    save_file({f"{prefix}{name}": value for name, value in (theirs.state_dict() | constants).items()}, path)
    openai = open_clip.get_pretrained_cfg("ViT-B-32", "openai")
    given = {"mean": openai["mean"], "std": openai["std"], "activation": "quick_gelu"}  # its weights do not tell
    towers = build_towers(NetworkConfig(arch=str(path), **given))
    pixels = torch.randn(2, 3, 32, 32)
    tokens = towers.text.tokenize(NAMES)
    with torch.no_grad():
        torch.testing.assert_close(
            towers.visual(pixels), embedded(theirs.get_image_features(pixel_values=pixels)), atol=1e-5, rtol=0
        )
        torch.testing.assert_close(
            towers.text.encode(NAMES), embedded(theirs.get_text_features(input_ids=tokens)), atol=1e-5, rtol=0
        )
    assert towers.logit_scale == pytest.approx(theirs.logit_scale.item())


@pytest.fixture(scope="module")
def state():
    return random_clip(OPENAI_VIT).state_dict()


WRAPPED = {
    "DDP": lambda name: f"module.{name}",
    "torch.compile": lambda name: f"_orig_mod.{name}",
    "DDP of a compiled model": lambda name: f"module._orig_mod.{name}",
    "Lightning": lambda name: f"model.{name}",
    "a compiled tower": lambda name: name.replace("visual.", "visual._orig_mod."),
    "a wrapper's CLIP": lambda name: f"clip_model.{name}",
}


@pytest.mark.parametrize("wrap", WRAPPED.values(), ids=WRAPPED)
def test_what_is_wrapped_around_a_model_does_not_matter(state, tmp_path, wrap):
    save_file({wrap(name): tensor.contiguous() for name, tensor in state.items()}, tmp_path / "w.safetensors")
    found = read_weights(tmp_path / "w.safetensors", "network.arch")
    assert found.keys() == state.keys() and all(found[name].equal(state[name]) for name in state)


@pytest.mark.parametrize("key", ["state_dict", "model_state_dict", "model", "module"])
def test_the_state_dict_within_a_checkpoint_is_found(state, tmp_path, key):
    torch.save({"epoch": 3, "optimizer": {"lr": 0.1}, key: dict(state)}, tmp_path / "w.pt")
    assert read_weights(tmp_path / "w.pt", "network.arch").keys() == state.keys()


def test_a_prefix_that_some_names_have_stays():
    one = torch.zeros(1)
    assert without_wrappers({"model.a": one, "b": one}).keys() == {"model.a", "b"}
    assert without_wrappers({}) == {}


def test_what_is_not_read_is_named(theirs, state, tmp_path):
    one = torch.zeros(1)
    with pytest.raises(ConfigError, match=r"x: .*transformers that is no CLIPModel \(such as text_model.head.weight\)"):
        clip_names({"vision_model.head.probe": one, "text_model.head.weight": one}, "x")
    whole = theirs.state_dict()
    missing = "vision_model.encoder.layers.1.self_attn.v_proj.bias"
    with pytest.raises(ConfigError, match=f"x: lacks {missing}, but has .*q_proj"):
        clip_names({name: tensor for name, tensor in whole.items() if name != missing}, "x")
    torch.save({"weights": {"visual.proj": one}, "step": 3}, tmp_path / "w.pt")
    with pytest.raises(ConfigError, match=r"w\.pt is not a dictionary of named tensors; it holds step, weights"):
        read_weights(tmp_path / "w.pt", "network.arch")
    save_file({f"backbone.{name}": tensor.contiguous() for name, tensor in state.items()}, tmp_path / "w.safetensors")
    message = r"not a CLIP in OpenAI's layout: it lacks .*; it has backbone\.ln_final\.bias, .* and \d+ more"
    with pytest.raises(ConfigError, match=message):
        build_towers(NetworkConfig(arch=str(tmp_path / "w.safetensors")))
