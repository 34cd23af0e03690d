"""Adapters train on every kind of tower, change nothing before, and merge into the plain model; depth and freezing."""

import sys
from dataclasses import replace

import pytest
import torch
from published import KINDS, publish
from tiny import OPENAI_RESNET, openai_state, random_clip, random_frames, tiny_network

from text4vis.config.schema import ConfigError, NetworkConfig
from text4vis.model.adapters import add_adapters, merged
from text4vis.model.blocks import depths
from text4vis.model.video_clip import VideoClip, build_model

SMALL = {"convnext", "xlm-roberta"}  # the others take long; tests of the tiny CLIP stand for the first two
EACH_KIND = [pytest.param(kind, marks=[] if kind in SMALL else [pytest.mark.long]) for kind in KINDS]
LORA = {"adapter": "lora", "adapter_rank": 3, "adapter_alpha": 5}
PIXELS = {"mean": (0.5, 0.5, 0.5), "std": (0.25, 0.25, 0.25)}


def move(model: torch.nn.Module) -> None:
    """Moves what trains off its first values, as training does."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.05 * torch.randn_like(parameter))


def assert_merges(model: VideoClip, network: NetworkConfig, frames: torch.Tensor) -> None:
    """The adapted model equals a plain one with the merged weights, which needs no peft."""
    plain = build_model(replace(network, adapter=None), model.num_segments)
    values = {"adapter_alpha": network.adapter_alpha, "adapter_rank": network.adapter_rank}
    state = merged(model.state_dict(), {"network": values})
    plain.load_state_dict(state)
    with torch.no_grad():
        expected, found = (each.eval().encode_video(frames) for each in (model, plain))
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
        if model.text_tower is not None:
            texts = ["surfing", "running"]
            torch.testing.assert_close(plain.encode_text(texts), model.encode_text(texts), atol=1e-5, rtol=1e-5)


def check_adapters(network: NetworkConfig, frames: torch.Tensor) -> set[str]:
    """Adds, trains and merges adapters; returns the names of the layers that have one."""
    num_frames = frames.shape[1]
    model = build_model(network, num_frames)
    with torch.no_grad():
        before = model.eval().encode_video(frames)
        add_adapters(model, network)
        torch.testing.assert_close(model.encode_video(frames), before, atol=1e-5, rtol=1e-5)
    clip = {name: value for name, value in model.named_parameters() if not name.startswith("fusion_model.")}
    trains = {name for name, value in clip.items() if value.requires_grad}
    assert trains == {name for name in clip if ".lora_" in name} | {"logit_scale"}
    move(model)
    model.train()
    loss = model.encode_video(frames).square().sum()
    if model.text_tower is not None:
        loss = loss + model.text_tower(model.text.tokenize(["surfing"])).square().sum()
    loss.backward()
    for name in trains - {"logit_scale"}:
        assert clip[name].grad is not None and clip[name].grad.any(), f"{name} is not trained"
    assert_merges(model, network, frames)
    return {name.partition(".lora_")[0] for name in trains if ".lora_" in name}


@pytest.mark.parametrize("kind", EACH_KIND)
def test_every_kind_of_model_is_adapted_trained_and_merged(tmp_path, kind):
    size = KINDS[kind][0]["vision_cfg"]["image_size"]
    folder = publish(tmp_path, kind)
    network = NetworkConfig(arch=f"local-dir:{folder}", sim_header="None", fix_text=False, **LORA)
    layers = check_adapters(network, random_frames(1, 2, size))
    towers = {name.split(".")[0] for name in layers}
    assert towers == {"visual", "text_tower"}


def test_the_targets_are_the_layers_of_attention_or_the_others(tmp_path):
    found = {}
    for target in ("attention", "mlp", "all"):
        network = tiny_network(tmp_path, **LORA, sim_header="None", adapter_targets=target)
        found[target] = check_adapters(network, random_frames(1, 2))
    assert {name.rpartition(".")[2] for name in found["attention"]} == {"packed_qkv", "out_proj"}
    assert {name.rpartition(".")[2] for name in found["mlp"]} == {"c_fc", "c_proj"}
    assert found["all"] == found["attention"] | found["mlp"]


@pytest.mark.parametrize("options", [
    {"tm": "tsm"}, {"tm": "tokent1d", "drop_out": 0.1}, {"joint_st": True, "sim_header": "None", "emb_dropout": 0.1},
])  # fmt: skip
def test_temporal_towers_are_adapted_too(tmp_path, options):
    network = tiny_network(tmp_path, **LORA, **options)
    assert len(check_adapters(network, random_frames(2, 4))) == 8


@pytest.mark.parametrize("tm", [None, "tsm"])
def test_a_resnet_gets_adapters_on_the_convolutions_of_single_pixels_and_keeps_its_statistics(tmp_path, tm):
    torch.save(openai_state(random_clip(OPENAI_RESNET)), tmp_path / "resnet.pt")
    network = NetworkConfig(arch=str(tmp_path / "resnet.pt"), tm=tm, sim_header="None", **LORA, **PIXELS)
    model = build_model(network, 3)
    add_adapters(model, network)
    before = {name: value.clone() for name, value in model.named_buffers()}
    model.train()(random_frames(1, 3, 64), torch.ones(1, 64)).sum().backward()
    assert all(value.equal(before[name]) for name, value in model.named_buffers()), "batch statistics moved"
    layers = check_adapters(network, random_frames(1, 3, 64))
    assert "visual.layer1.0.conv3" in layers and not any("attnpool" in name for name in layers)


def test_a_tower_without_such_layers_is_refused(tmp_path):
    torch.save(openai_state(random_clip(OPENAI_RESNET)), tmp_path / "resnet.pt")
    network = NetworkConfig(
        arch=str(tmp_path / "resnet.pt"), sim_header="None", **LORA, **PIXELS, adapter_targets="attention"
    )
    model = build_model(network, 3)
    with pytest.raises(ConfigError, match=r"network\.adapter_targets: the visual tower of .* 'attention'.*use all"):
        add_adapters(model, network)


def test_the_error_names_the_extra_that_brings_peft(tmp_path, monkeypatch):
    network = tiny_network(tmp_path, **LORA)
    model = build_model(network, 2)
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(ConfigError, match=r"network\.adapter: .*pip install 'text4vis\[lora\]'"):
        add_adapters(model, network)


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "blocks"), [("openai", 2), ("siglip", 6), ("convnext", 9), ("resnet", 4)])
def test_the_first_blocks_freeze_with_the_stem(tmp_path, kind, blocks):
    if kind == "resnet":
        torch.save(openai_state(random_clip(OPENAI_RESNET)), tmp_path / "resnet.pt")
        network = NetworkConfig(arch=str(tmp_path / "resnet.pt"), sim_header="None", **PIXELS)
    else:
        network = NetworkConfig(arch=f"local-dir:{publish(tmp_path, kind)}", sim_header="None")
    depth, found = depths(build_model(network, 2).visual)
    assert found == blocks and {0, *range(1, blocks + 1)} <= set(depth.values()) <= {*range(blocks + 2)}
    model = build_model(replace(network, freeze_blocks=2), 2)
    size = model.image_size
    before = {name: value.clone() for name, value in model.visual.named_buffers()}
    model.train()(random_frames(2, 2, size), torch.ones(1, model.embed_dim)).sum().backward()
    for name, parameter in model.visual.named_parameters():
        assert parameter.requires_grad == (depth[name] > 2) and (parameter.grad is None) == (depth[name] <= 2), name
    moved = {name for name, value in model.visual.named_buffers() if not value.equal(before[name])}
    assert not any(name.startswith(("bn", "layer1", "layer2")) for name in moved)
    assert kind != "resnet" or any(name.startswith("layer3") for name in moved)
    with pytest.raises(ConfigError, match=rf"freeze_blocks: {blocks + 1}, but .* {blocks} blocks; network.fix_video"):
        build_model(replace(network, freeze_blocks=blocks + 1), 2)
