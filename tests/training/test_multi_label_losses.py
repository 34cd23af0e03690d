"""Losses of many labels a video against their formulas by hand, and the bias that they begin with."""

import math

import numpy as np
import pytest
import torch
from tiny import random_frames, tiny_network

from text4vis.classifier.embeddings import training_classes
from text4vis.config.loading import config_from_dict
from text4vis.config.schema import Config, ConfigError, DataConfig, SolverConfig
from text4vis.data.datasets import multi_hot
from text4vis.data.mixing import draw_mix
from text4vis.model.video_clip import build_model
from text4vis.training.losses import Objective, asymmetric_loss, binary_cross_entropy, mixed_targets

NAMES = ["running", "the high jump", "diving", "juggling"]
TARGETS = torch.tensor([[1, 0, 1, 0], [0, 0, 0, 0], [0, 1, 1, 1]], dtype=torch.bool)


def logits(scale=4.0):
    return scale * torch.randn(3, 4, generator=torch.Generator().manual_seed(0))


def by_hand(logits_BC, targets_BC, gammas, margin):
    """Equations 2 to 7 of the paper, in float64."""
    total = 0.0
    for z, y in zip(logits_BC.double().flatten().tolist(), targets_BC.double().flatten().tolist(), strict=True):
        p = 1 / (1 + math.exp(-z))
        shifted = max(p - margin, 0)
        total -= y * (1 - p) ** gammas[0] * math.log(p)
        total -= (1 - y) * shifted ** gammas[1] * math.log(1 - shifted)
    return total / len(logits_BC)


@pytest.mark.parametrize("gammas", [(0.0, 4.0), (1.0, 4.0), (0.5, 0.5), (0.0, 0.0)])
@pytest.mark.parametrize("margin", [0.0, 0.05])
@pytest.mark.parametrize("soft", [False, True])
def test_asymmetric_loss_is_its_formula(gammas, margin, soft):
    targets = TARGETS.float() * 0.7 if soft else TARGETS.float()
    found = asymmetric_loss(logits(), targets, gammas, margin).item()
    assert found == pytest.approx(by_hand(logits(), targets, gammas, margin), rel=1e-5)


def test_without_focus_and_margin_it_is_binary_cross_entropy():
    found = asymmetric_loss(logits(), TARGETS.float(), (0, 0), 0)
    assert found.item() == pytest.approx(binary_cross_entropy(logits(), TARGETS.float()).item(), rel=1e-5)
    assert found.item() == pytest.approx(by_hand(logits(), TARGETS.float(), (0, 0), 0), rel=1e-5)


@pytest.mark.parametrize("gammas", [(0.0, 4.0), (0.5, 0.5)])
@pytest.mark.parametrize("margin", [0.0, 0.05])
def test_no_logit_is_too_large(gammas, margin):
    extreme = torch.tensor([[300.0, -300.0, 300.0, -300.0]], requires_grad=True)
    loss = asymmetric_loss(extreme, torch.tensor([[1.0, 0.0, 0.0, 1.0]]), gammas, margin)
    (gradient,) = torch.autograd.grad(loss, extreme)
    assert torch.isfinite(loss) and torch.isfinite(gradient).all()


def test_labels_become_targets_of_the_classes_in_use():
    assert multi_hot(torch.tensor([2, 0]), 4).tolist() == [[0, 0, 1, 0], [1, 0, 0, 0]]
    assert multi_hot(TARGETS, 4) is not None and torch.equal(multi_hot(TARGETS, 4), TARGETS)
    assert multi_hot(TARGETS, 6)[:, 4:].any().item() is False and multi_hot(TARGETS[:, :3], 2).shape == (3, 2)


def test_mixed_videos_have_the_labels_of_both_in_their_shares():
    mix = draw_mix(SolverConfig(mixup=1.0), 0, 0, [3, 4, 5], 32)
    found = mixed_targets(TARGETS.float(), mix)
    for row, (partner, share) in enumerate(zip(mix.partners, mix.shares, strict=True)):
        assert found[row].tolist() == pytest.approx((share * TARGETS[row] + (1 - share) * TARGETS[partner]).tolist())


def model_and_objective(folder, solver, **options):
    torch.manual_seed(0)
    config = Config(
        network=tiny_network(folder), solver=SolverConfig(**solver), data=DataConfig(num_segments=2, input_size=32)
    )
    model = build_model(config.network, 2)
    classes = training_classes(config, model, NAMES)
    return model, classes, Objective(config, classes, 3, **options)


@pytest.mark.parametrize("loss_type", ["BCE", "ASL"])
def test_the_first_batch_sets_the_bias_and_every_class_begins_as_likely_as_it_is(tmp_path, loss_type):
    model, classes, objective = model_and_objective(tmp_path, {"loss_type": loss_type}, share=0.1)
    frames = random_frames(3, 2)
    first = objective(model, frames, TARGETS, [0, 1, 2], 0)
    mean = float(model(frames, classes).detach().mean() + objective.bias)
    assert mean == pytest.approx(math.log(0.1 / 0.9), abs=1e-4)
    bias = objective.bias
    objective(model, random_frames(3, 2, seed=1), TARGETS, [0, 1, 2], 3)
    assert objective.bias == bias
    again = model_and_objective(tmp_path, {"loss_type": loss_type}, bias=bias)[2]
    assert again(model, frames, TARGETS, [0, 1, 2], 0).item() == first.item()
    first.backward()
    assert all(torch.isfinite(parameter.grad).all() for parameter in model.parameters() if parameter.grad is not None)


def test_an_infinite_first_logit_leaves_the_bias_open(tmp_path):
    model, _, objective = model_and_objective(tmp_path, {"loss_type": "BCE"})
    objective(lambda *_: torch.full((3, 4), np.nan), random_frames(3, 2), TARGETS, [0, 1, 2], 0)
    assert objective.bias is None
    objective(model, random_frames(3, 2), TARGETS, [0, 1, 2], 0)
    assert objective.bias is not None


def test_single_labels_train_with_them_too(tmp_path):
    model, _, objective = model_and_objective(tmp_path, {"loss_type": "BCE"}, bias=-2.0)
    labels = torch.tensor([2, 0, 3])
    found = objective(model, random_frames(3, 2), labels, [0, 1, 2], 0)
    assert found.item() == objective(model, random_frames(3, 2), multi_hot(labels, 4), [0, 1, 2], 0).item()


@pytest.mark.parametrize("solver", [{"mixup": 1.0}, {"cutmix": 1.0}])
def test_mixing_changes_frames_and_targets(tmp_path, solver):
    model, _, objective = model_and_objective(tmp_path, {"loss_type": "BCE", **solver}, bias=-2.0)
    plain = model_and_objective(tmp_path, {"loss_type": "BCE"}, bias=-2.0)[2]
    mixed, unmixed = (one(model, random_frames(3, 2), TARGETS, [0, 1, 2], 0) for one in (objective, plain))
    assert torch.isfinite(mixed) and mixed.item() != unmixed.item()


@pytest.mark.parametrize(
    ("solver", "words"),
    [
        ({"loss_type": "BCE", "smoothing": 0.1}, "smoothing: needs solver.loss_type CE; BCE decides on each class"),
        ({"loss_type": "NCE", "mixup": 0.1}, "mixup: needs solver.loss_type CE or BCE or ASL; NCE has soft targets"),
        ({"loss_type": "BCE", "asl_margin": 0.1}, "asl_margin: is of solver.loss_type ASL"),
        ({"asl_gammas": [1, 2]}, "asl_gammas: is of solver.loss_type ASL"),
    ],
)
def test_keys_that_contradict_the_loss_are_refused(solver, words):
    with pytest.raises(ConfigError) as caught:
        config_from_dict({"solver": solver}, "test")
    assert words in str(caught.value)
