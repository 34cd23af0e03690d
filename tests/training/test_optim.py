"""The schedule against its closed form, and who is in which parameter group."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny import tiny_network

from text4vis.config.loading import config_from_dict
from text4vis.config.schema import ConfigError, SolverConfig, decay_epochs
from text4vis.model.adapters import add_adapters
from text4vis.model.video_clip import build_model
from text4vis.training.optim import build_optimizer, learning_rate, multistep_rate, parameter_groups, scheduled_rate

EPOCHS = st.integers(1, 100)
LR = 5e-5


@given(st.floats(0, 1), EPOCHS, st.integers(0, 20))
def test_schedule_is_linear_then_half_a_cosine(part, epochs, warmup):
    epoch = part * epochs
    rate = learning_rate(epoch, LR, epochs, warmup)
    if epoch < warmup:
        assert rate == pytest.approx(LR * epoch / warmup)
    elif epoch < epochs:
        angle = math.pi * (epoch - warmup) / (epochs - warmup)
        assert rate == pytest.approx(LR * math.cos(angle / 2) ** 2, abs=1e-18)
    assert 0 <= rate <= LR


def test_schedule_at_the_released_recipe():
    rates = [learning_rate(epoch, LR, 30, 5) for epoch in (0, 2.5, 5, 17.5, 30, 31)]
    assert rates == pytest.approx([0, LR / 2, LR, LR / 2, 0, 0], abs=1e-12)


@given(st.floats(0, 29.999))
def test_schedule_is_continuous(epoch):
    step = 1e-6
    assert abs(learning_rate(epoch + step, LR, 30, 5) - learning_rate(epoch, LR, 30, 5)) < LR * step


def groups_of(tmp_path, network=(), **solver):
    model = build_model(tiny_network(tmp_path, **dict(network)), 4)
    return model, {group["name"]: group for group in parameter_groups(model, SolverConfig(**solver))}


def names(model, group) -> set[str]:
    members = {id(parameter) for parameter in group["params"]}
    return {name for name, parameter in model.named_parameters() if id(parameter) in members}


@pytest.mark.parametrize("header", ["Transf", "LSTM"])  # an LSTM's parameters have `visual` in their names
def test_every_trainable_parameter_is_in_one_group(tmp_path, header):
    model, groups = groups_of(tmp_path, {"sim_header": header}, lr=1e-3, clip_ratio=0.1, weight_decay=0.3)
    clip, head = names(model, groups["clip"]), names(model, groups["head"])
    assert clip | head == {name for name, _ in model.named_parameters()} and not clip & head
    assert "logit_scale" in clip and "visual.proj" in clip
    assert head and all(name.startswith("fusion_model.") for name in head)
    assert [(g["lr"], g["base_lr"], g["weight_decay"]) for g in (groups["clip"], groups["head"])] == [
        (pytest.approx(1e-4), pytest.approx(1e-4), 0.3),
        (1e-3, 1e-3, 0.3),
    ]
    torch.optim.AdamW(groups.values())


def test_frozen_parameters_and_empty_groups_are_left_out(tmp_path):
    model, groups = groups_of(tmp_path, {"fix_video": True})
    assert names(model, groups["clip"]) == {"logit_scale"}
    assert set(groups_of(tmp_path, {"sim_header": "None"})[1]) == {"clip"}


def test_classes_that_train_are_in_the_right_group(tmp_path):
    model, groups = groups_of(tmp_path, {"fix_text": False})
    assert {"text_tower.token_embedding.weight", "text_tower.text_projection"} <= names(model, groups["clip"])
    model = build_model(tiny_network(tmp_path), 4)
    model.set_classifier(torch.ones(3, 64), ["a", "b", "c"])
    by_name = {group["name"]: group for group in parameter_groups(model, SolverConfig())}
    assert "classifier" in names(model, by_name["head"])


def test_multistep_falls_to_a_tenth_at_each_milestone():
    rates = [multistep_rate(epoch, LR, (10, 20), 5) for epoch in (0, 2.5, 5, 9.99, 10, 19.99, 20, 29)]
    assert rates == pytest.approx([0, LR / 2, LR, LR, LR / 10, LR / 10, LR / 100, LR / 100], abs=1e-18)


@pytest.mark.parametrize(("step", "milestones"), [([10, 20], (10, 20)), (10, (10, 20)), (20, (20,))])
def test_decay_steps_are_epochs_or_their_period(step, milestones):
    config = config_from_dict({"solver": {"type": "multistep", "lr_decay_step": step}}, "test")
    assert decay_epochs(config.solver) == milestones
    for epoch in (3, 10, 25):
        assert scheduled_rate(epoch, LR, config.solver) == multistep_rate(epoch, LR, milestones, 5)
    assert scheduled_rate(10, LR, SolverConfig()) == learning_rate(10, LR, 30, 5)


@pytest.mark.parametrize("step", [[], [20, 10], [5, 10], [10, 10], 30])
def test_decay_steps_that_cannot_be_are_refused(step):
    with pytest.raises(ConfigError, match=r"solver\.lr_decay_step"):
        config_from_dict({"solver": {"type": "multistep", "lr_decay_step": step}}, "test")


def test_each_optimiser_takes_the_step_of_its_own(tmp_path):
    """First steps: AdamW and Adam go one rate against the gradient's sign, SGD goes along the gradient."""
    settings = {"lr": 1e-3, "clip_ratio": 1.0, "weight_decay": 0.0, "momentum": 0.5}
    for optim in ("adamw", "adam", "sgd"):
        model = build_model(tiny_network(tmp_path), 4)
        before = model.logit_scale.item()
        optimizer = build_optimizer(model, SolverConfig(optim=optim, **settings))
        for _ in range(2):
            model.logit_scale.grad = torch.tensor([0.25])
            optimizer.step()
        moved = 1e-3 * (0.25 + 0.25 * 1.5) if optim == "sgd" else 2e-3
        assert before - model.logit_scale.item() == pytest.approx(moved, rel=1e-3)
        decayed = build_optimizer(model, SolverConfig(optim=optim, **settings | {"weight_decay": 0.1}))
        assert {group["weight_decay"] for group in decayed.param_groups} == {0.1}


def test_layer_decay_lowers_the_rate_by_the_depth_of_the_tower(tmp_path):
    model, groups = groups_of(tmp_path, lr=1e-3, clip_ratio=0.1, layer_decay=0.5)
    assert {name: group["lr"] for name, group in groups.items()} == pytest.approx({
        "clip.0": 1.25e-5, "clip.1": 2.5e-5, "clip.2": 5e-5, "clip.3": 1e-4, "clip": 1e-4, "head": 1e-3,
    })  # fmt: skip
    assert all(group["base_lr"] == group["lr"] for group in groups.values())
    assert "visual.conv1.weight" in names(model, groups["clip.0"])
    assert all(name.startswith("visual.transformer.resblocks.1.") for name in names(model, groups["clip.2"]))
    assert names(model, groups["clip.3"]) == {"visual.ln_post.weight", "visual.ln_post.bias", "visual.proj"}
    assert names(model, groups["clip"]) == {"logit_scale"}
    assert set().union(*(names(model, group) for group in groups.values())) == {
        name for name, _ in model.named_parameters()
    }


def test_adapters_learn_with_the_head(tmp_path):
    network = tiny_network(tmp_path, adapter="lora", fix_text=False)
    model = build_model(network, 4)
    add_adapters(model, network)
    for decay, rate in ((1.0, 1e-3), (0.5, 2.5e-4)):
        solver = SolverConfig(lr=1e-3, clip_ratio=0.1, layer_decay=decay)
        groups = {group["name"]: group for group in parameter_groups(model, solver)}
        assert names(model, groups["clip"]) == {"logit_scale"}
        place = groups["head" if decay == 1 else "head.1"]
        assert place["lr"] == pytest.approx(rate)
        assert "visual.transformer.resblocks.0.attn.packed_qkv.lora_A.default.weight" in names(model, place)
        assert any(name.startswith("text_tower.") for name in names(model, groups["head"]))


@pytest.mark.parametrize(("settings", "message"), [
    ({"network": {"adapter": "lora", "fix_video": True}}, r"network\.adapter: lora has no tower .* network\.fix_video"),
    ({"network": {"adapter": "lora", "freeze_blocks": 1}}, r"network\.freeze_blocks: an adapter freezes"),
    ({"network": {"adapter": "lora", "init": False}}, r"network\.adapter: lora adapts trained weights, but"),
    ({"network": {"adapter_rank": 8}}, r"network\.adapter_rank: is of network\.adapter: lora, which is not set"),
    ({"network": {"freeze_blocks": 2, "fix_video": True}}, r"network\.freeze_blocks: 2 blocks are frozen already"),
    ({"network": {"fix_video": True}, "solver": {"layer_decay": 0.8}}, r"solver\.layer_decay: has no blocks"),
    ({"solver": {"layer_decay": 0}}, r"solver\.layer_decay"),
    ({"solver": {"ema": 1}}, r"solver\.ema"),
    ({"network": {"adapter": "dora"}}, r"network\.adapter"),
])  # fmt: skip
def test_what_cannot_train_is_refused(settings, message):
    with pytest.raises(ConfigError, match=message):
        config_from_dict(settings, "test")
