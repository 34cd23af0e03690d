"""Losses, sources of class embeddings, optimisers and frozen parts in real runs, which train, resume and export."""

import json
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from launch import run
from project import EVALUATE, NUM_VIDEOS, losses, weights
from safetensors.torch import load_file

from text4vis.classifier.embeddings import build_classifier
from text4vis.config.loading import config_from_dict, load_config
from text4vis.config.schema import ConfigError
from text4vis.model.video_clip import build_model
from text4vis.saved.weights import load_export

pytestmark = pytest.mark.slow

TEXT = ("network.fix_text=false", "solver.clip_ratio=1")
TRAINABLE = ("network.classifier_trainable=true",)
CASES = {
    "text tower, NCE": (*TEXT, "solver.loss_type=NCE", "engine.zero_stage=0", "engine.precision=fp32"),
    "text tower, ZeRO-3": (*TEXT, "engine.zero_stage=3", "network.template=['a video of {}.', '{}']"),
    "trainable, mixed, SGD": (
        *TRAINABLE, "solver.mixup=0.4", "solver.cutmix=1", "solver.smoothing=0.1", "engine.zero_stage=0",
        "solver.optim=sgd", "solver.lr=0.1",
    ),
    "trainable, DS, frozen video, Adam, ZeRO-3": (
        *TRAINABLE, "solver.loss_type=DS", "network.fix_video=true", "engine.zero_stage=3", "engine.precision=fp32",
        "solver.optim=adam", "solver.weight_decay=0.01", "solver.type=multistep", "solver.lr_decay_step=1",
    ),
}  # fmt: skip
LONG = ("text tower, ZeRO-3", "trainable, mixed, SGD")
PARAMETERS = [pytest.param(case, marks=pytest.mark.long) if case in LONG else case for case in CASES]
IN_FP32 = [case for case, settings in CASES.items() if "engine.precision=fp32" in settings]


@pytest.fixture(scope="module")
def trained(project, tmp_path_factory):
    """Runs of two epochs at two ranks, one for each case, when first asked for."""
    base = tmp_path_factory.mktemp("options")
    done: dict[str, Path] = {}

    def train(case: str) -> Path:
        if case not in done:
            done[case] = base / str(len(done))
            project.train(done[case], "solver.epochs=2", *CASES[case])
        return done[case]

    return train


def start_weights(project, settings) -> dict[str, torch.Tensor]:
    """The weights that a run starts from."""
    config = load_config(project.config, settings)
    torch.manual_seed(config.seed)
    model = build_model(config.network, config.data.num_segments, image_size=config.data.input_size)
    return model.state_dict()


@pytest.mark.parametrize("case", PARAMETERS)
def test_a_run_resumes_exactly(project, trained, tmp_path, case):
    """From its checkpoint after the first epoch it goes on to the weights of the run that never stopped."""
    whole, again = trained(case), tmp_path / "again"
    shutil.copytree(whole, again)
    first, last = sorted((again / "checkpoints").glob("step-*"))
    shutil.rmtree(last)
    assert f"{first.name}" in project.train(again, "solver.epochs=2", *CASES[case])
    assert losses(again) == losses(whole)
    ours, expected = weights(again), weights(whole)
    assert ours.keys() == expected.keys() and all(ours[name].equal(expected[name]) for name in expected)


@pytest.mark.parametrize("case", PARAMETERS)
def test_what_trains_moves_and_what_is_frozen_stays(project, trained, case):
    before, after = start_weights(project, CASES[case]), weights(trained(case))
    moved = {name.split(".")[0] for name in before if not torch.allclose(before[name], after[name], atol=1e-6)}
    trains = {"text_tower": "text tower" in case, "visual": "frozen video" not in case}
    assert moved == {"fusion_model", "logit_scale"} | {part for part, does in trains.items() if does}
    assert ("classifier" in after) == ("trainable" in case)
    assert all(value == value for value in losses(trained(case)).values())


@pytest.mark.parametrize("case", IN_FP32)
def test_evaluation_and_export_use_the_classes_that_were_trained(project, trained, tmp_path, case):
    output = trained(case)
    report, export = tmp_path / "report.json", tmp_path / "export"
    last = sorted((output / "checkpoints").glob("step-*"))[-1]
    settings = [f"--set={setting}" for setting in CASES[case]]
    run(EVALUATE, "--config", project.config, *settings, "--model", last, "--report", report)
    before, after = json.loads((output / "report.json").read_text()), json.loads(report.read_text())
    assert after["videos"] == before["videos"] == NUM_VIDEOS
    assert after["top1_correct"] == before["top1_correct"]
    run("tools/export.py", last, "--output", export)
    exported = load_export(export)
    config = config_from_dict(exported.config, "test")
    state = load_file(last / "model.safetensors")
    if "text" in case:
        assert exported.model.text_tower is None
        for name, tensor in load_file(export / "text.safetensors").items():
            assert tensor.equal(state[f"text_tower.{name}"])
    else:
        expected = torch.nn.functional.normalize(state["classifier"], dim=-1)
        torch.testing.assert_close(exported.class_embeddings, expected)
        with pytest.raises(ConfigError, match="has no class 'sailing'"):
            build_classifier(config, exported.model, ["sailing"])
    names = exported.class_names[::-1]
    torch.testing.assert_close(build_classifier(config, exported.model, names), exported.class_embeddings.flip(0))
    frozen = build_classifier(config, build_model(config.network, 4, image_size=32), exported.class_names)
    assert not torch.allclose(exported.class_embeddings, frozen, atol=1e-4)


@pytest.mark.parametrize("case", IN_FP32)
def test_one_rank_with_twice_the_batch_trains_alike(project, trained, tmp_path, case):
    """The contrastive losses see the same batch, and the gradients that the engine averages are right."""
    project.train(tmp_path / "one", "solver.epochs=2", *CASES[case], "data.batch_size=4", ranks=1)
    assert losses(tmp_path / "one") == pytest.approx(losses(trained(case)), rel=1e-3)


def test_pretrain_starts_a_run_and_is_not_read_again(project, trained, tmp_path):
    source, output = tmp_path / "source", tmp_path / "run"
    shutil.copytree(trained("text tower, NCE"), source)
    settings = (f"pretrain={source}", "network.fix_video=true", "network.sim_header=None", "solver.epochs=2")
    log = project.train(output, *settings)
    assert "took visual tower, logit scale" in log and "text tower is another" in log
    best = load_file(source / "checkpoints" / "best" / "model.safetensors")
    tower = {name: tensor.bfloat16().float() for name, tensor in best.items() if name.startswith("visual.")}
    assert all(weights(output)[name].equal(tensor) for name, tensor in tower.items())
    shutil.rmtree(source)
    whole = weights(output)
    shutil.rmtree(sorted((output / "checkpoints").glob("step-*"))[-1])
    assert "took visual tower" not in project.train(output, *settings)
    assert all(weights(output)[name].equal(tensor) for name, tensor in whole.items())
    assert yaml.safe_load((output / "config.yaml").read_text())["pretrain"] == str(source)
