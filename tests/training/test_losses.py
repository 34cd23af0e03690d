"""The losses against plain re-derivations, and over ranks against one process."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from launch import free_port
from tiny import random_frames, tiny_network

from text4vis.classifier.embeddings import training_classes
from text4vis.config.loading import config_from_dict
from text4vis.config.schema import Config, ConfigError, DataConfig, NetworkConfig, SolverConfig
from text4vis.data.mixing import draw_mix, mix_frames
from text4vis.model.video_clip import build_model
from text4vis.training.losses import Objective, contrastive, cross_entropy

NAMES = ["running", "the high jump", "diving", "juggling"]
LABELS = torch.tensor([2, 0, 2, 3])


def softmax(row: np.ndarray) -> np.ndarray:
    exponentials = np.exp(row - row.max())
    return exponentials / exponentials.sum()


def kl_by_hand(logits: np.ndarray, labels: list[int]) -> float:
    """Mean over rows of KL(softmax of 10 for equal labels || softmax of logits)."""
    total = 0.0
    for row, label in zip(logits, labels, strict=True):
        target = softmax(np.array([10.0 if other == label else 0.0 for other in labels]))
        total += sum(t * (math.log(t) - math.log(p)) for t, p in zip(target, softmax(row), strict=True))
    return total / len(logits)


@pytest.mark.parametrize("dual", [False, True])
def test_contrastive_losses_are_those_of_the_original(dual):
    logits = 5 * torch.randn(4, 4, generator=torch.Generator().manual_seed(0))
    directions = [logits.double().numpy(), logits.double().numpy().T]
    if dual:
        directions = [
            matrix * np.stack([softmax(column / 1000) for column in matrix.T], axis=1) * 4 for matrix in directions
        ]
    expected = np.mean([kl_by_hand(matrix, LABELS.tolist()) for matrix in directions])
    assert contrastive(logits, LABELS, dual=dual).item() == pytest.approx(expected, rel=1e-5)


def test_a_contrastive_loss_is_least_where_equal_labels_share_their_row():
    same = (LABELS[:, None] == LABELS).float()
    assert contrastive(10 * same, LABELS, dual=False).item() == pytest.approx(0, abs=1e-6)
    assert contrastive(10 * torch.eye(4), LABELS, dual=False) > 0.1


def test_cross_entropy_with_smoothing_and_mixed_labels():
    logits = torch.randn(3, 5, generator=torch.Generator().manual_seed(1))
    labels = torch.tensor([4, 0, 2])
    mix = draw_mix(SolverConfig(mixup=1.0), 0, 0, [3, 4, 5], 32)
    targets = torch.full((3, 5), 0.1 / 5)
    for row, (partner, share) in enumerate(zip(mix.partners, mix.shares, strict=True)):
        targets[row, labels[row]] += 0.9 * share
        targets[row, labels[partner]] += 0.9 * (1 - share)
    expected = -(targets * logits.log_softmax(1)).sum(1).mean()
    assert cross_entropy(logits, labels, 0.1, mix).item() == pytest.approx(expected.item(), rel=1e-6)
    assert cross_entropy(logits, labels).equal(torch.nn.functional.cross_entropy(logits, labels))


def model_and_objective(folder: Path, network: dict, solver: dict):
    config = Config(
        network=tiny_network(folder, **network), solver=SolverConfig(**solver), data=DataConfig(batch_size=2)
    )
    torch.manual_seed(0)
    model = build_model(config.network, 2)
    return model, Objective(config, training_classes(config, model, NAMES), config.data.batch_size)


def gradients(model) -> dict[str, torch.Tensor]:
    return {name: p.grad for name, p in model.named_parameters() if p.requires_grad}


NETWORKS = {
    "frozen": {},
    "trainable": {"classifier_trainable": True},
    "text tower": {"fix_text": False, "template": ("a video of a person {}.", "{}")},
}


CASES = [(network, loss_type) for network in NETWORKS for loss_type in ("CE", "NCE", "DS")]


def one_rank(rank: int, port: int, folder: Path) -> None:
    """Half of the batch: saves each case's loss, and its gradients averaged over ranks as the engine averages them."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    results = {}
    for network, loss_type in CASES:
        model, objective = model_and_objective(folder / str(rank), NETWORKS[network], {"loss_type": loss_type})
        half = slice(2 * rank, 2 * rank + 2)
        loss = objective(model, random_frames(4, 2)[half], LABELS[half], [0, 1], 0)
        loss.backward()
        for gradient in gradients(model).values():
            dist.all_reduce(gradient)
            gradient.div_(2)
        results[f"{network} {loss_type}"] = (loss.detach(), gradients(model))
    torch.save(results, folder / f"{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory) -> list[dict]:
    folder = tmp_path_factory.mktemp("ranks")
    torch.multiprocessing.spawn(one_rank, (free_port(), folder), nprocs=2)
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(2)]


@pytest.mark.slow
@pytest.mark.parametrize(("network", "loss_type"), CASES)
def test_two_ranks_have_the_loss_and_gradients_of_one_process(two_ranks, tmp_path, network, loss_type):
    model, objective = model_and_objective(tmp_path, NETWORKS[network], {"loss_type": loss_type})
    loss = objective(model, random_frames(4, 2), LABELS, [0, 1, 2, 3], 0)
    loss.backward()
    found = [rank[f"{network} {loss_type}"] for rank in two_ranks]
    losses = [rank[0].item() for rank in found]
    assert np.mean(losses) == pytest.approx(loss.item(), rel=1e-5)
    if loss_type != "CE":
        assert losses[0] == losses[1]
    expected = gradients(model)
    assert found[0][1].keys() == expected.keys()
    scale = max(gradient.abs().max() for gradient in expected.values())
    assert scale > 1e-3
    for name, gradient in expected.items():
        torch.testing.assert_close(found[0][1][name], gradient, rtol=1e-4, atol=1e-5 * scale.item())


@pytest.mark.parametrize("network", NETWORKS)
def test_a_contrastive_batch_is_compared_with_its_own_texts(tmp_path, network):
    """The loss from the batch's embeddings one by one, duplicates included, as the original computes it."""
    model, objective = model_and_objective(tmp_path, NETWORKS[network], {"loss_type": "NCE"})
    frames = random_frames(4, 2)
    with torch.no_grad():
        videos = torch.nn.functional.normalize(model.encode_video(frames), dim=-1)
        texts = torch.nn.functional.normalize(model.embed_classes(objective.classes[LABELS]), dim=-1)
        expected = contrastive(model.logit_scale.exp() * videos @ texts.T, LABELS, dual=False)
    assert objective(model, frames, LABELS, [0, 1, 2, 3], 0).item() == pytest.approx(expected.item(), rel=1e-5)


def test_the_three_sources_of_classes_start_from_the_same_logits(tmp_path):
    logits, trained = [], []
    for name, network in NETWORKS.items():
        model, objective = model_and_objective(tmp_path / name, {"template": "{}."} | network, {})
        model.eval()
        logits.append(model(random_frames(2, 2), objective.classes))
        trained.append({part for part in ("classifier", "text_tower") if any(part in n for n in gradients(model))})
    # the last has other prompts: it is compared with frozen embeddings of the same
    model, objective = model_and_objective(tmp_path / "again", {"template": NETWORKS["text tower"]["template"]}, {})
    torch.testing.assert_close(logits[0], logits[1])
    torch.testing.assert_close(model.eval()(random_frames(2, 2), objective.classes), logits[2], rtol=1e-4, atol=1e-4)
    assert trained == [set(), {"classifier"}, {"text_tower"}]


def test_the_objective_mixes_what_the_model_sees(tmp_path):
    model, objective = model_and_objective(tmp_path, {}, {"mixup": 1.0, "smoothing": 0.1})
    frames, labels = random_frames(2, 2), torch.tensor([1, 3])
    mix = draw_mix(objective.config.solver, objective.config.seed, 4, [8, 9], 32)
    logits = model(mix_frames(frames, mix), objective.classes)
    assert objective(model, frames, labels, [8, 9], 4).item() == cross_entropy(logits, labels, 0.1, mix).item()


def test_a_frozen_visual_tower_costs_no_gradient(tmp_path):
    model, objective = model_and_objective(tmp_path, {"fix_video": True}, {})
    seen = []
    model.visual.register_forward_hook(lambda _, __, output: seen.append(output.requires_grad))
    objective(model, random_frames(2, 2), torch.tensor([0, 1]), [0, 1], 0).backward()
    assert seen == [False]
    assert all(parameter.grad is None for parameter in model.visual.parameters())
    assert all(parameter.grad is not None for parameter in model.fusion_model.transformer.parameters())


@pytest.mark.parametrize(
    ("network", "solver", "message"),
    [
        ({}, {"loss_type": "NCE", "mixup": 0.2}, "solver.mixup: needs solver.loss_type CE"),
        ({}, {"loss_type": "DS", "cutmix": 1}, "solver.cutmix: needs solver.loss_type CE"),
        ({}, {"loss_type": "NCE", "smoothing": 0.1}, "solver.smoothing: needs solver.loss_type CE"),
        ({"fix_text": False, "classifier": "random"}, {}, "network.fix_text"),
        ({"fix_text": False, "classifier_trainable": True}, {}, "network.classifier_trainable"),
    ],
)
def test_contradictions_are_refused(network, solver, message):
    with pytest.raises(ConfigError, match=message):
        config_from_dict({"network": network, "solver": solver}, "test")


def test_mixing_needs_two_videos():
    config = Config(solver=SolverConfig(cutmix=1.0), data=DataConfig(batch_size=1))
    with pytest.raises(ConfigError, match=r"solver\.cutmix.*single video"):
        Objective(config, torch.eye(3), config.data.batch_size)


def test_frozen_text_is_the_default():
    assert NetworkConfig().fix_text and not NetworkConfig().classifier_trainable
