"""Runs with adapters, layer decay, frozen blocks and an average: killed, resumed, opened, exported without peft."""

import json
import re
import sys

import pytest
import torch
from kill_many import kill_and_go_on
from launch import finish, program, run, start
from project import EVALUATE, TRAIN, ledger, losses, weights
from safetensors.torch import load_file
from tiny import random_frames

from text4vis.config.loading import load_config
from text4vis.model.video_clip import build_model
from text4vis.saved.opening import load_pretrained, open_saved

pytestmark = pytest.mark.slow

LORA = (
    "network.adapter=lora", "network.adapter_rank=4", "network.adapter_alpha=8", "solver.ema=0.6",
    "solver.layer_decay=0.7", "engine.precision=fp32", "solver.epochs=2",
)  # fmt: skip
FROZEN = ("network.freeze_blocks=1", "solver.ema=0.6", "engine.precision=bf16", "solver.epochs=2")
TEXT = (*LORA, "network.fix_text=false", "solver.loss_type=NCE")
# Long: every stage with each kind of tuning.
RESUMED = [
    (2, LORA),
    *(pytest.param(stage, LORA, marks=pytest.mark.long) for stage in (0, 1, 3)),
    *(pytest.param(stage, FROZEN, marks=pytest.mark.long) for stage in (0, 1, 2, 3)),
    *(pytest.param(stage, TEXT, marks=pytest.mark.long) for stage in (0, 3)),
]


@pytest.fixture(scope="module")
def trained(project, tmp_path_factory):
    """A run with adapters and an average, on two ranks at ZeRO-2."""
    output = tmp_path_factory.mktemp("tuned") / "run"
    base = output.parent
    results = project.train_with(output, f"--ledger {base}/book", "engine.zero_stage=2", "logging.save_steps=2", *LORA)
    assert [code for code, _ in results] == [0, 0], results
    return output, base / "book", results[0][1]


@pytest.mark.parametrize(("stage", "settings"), RESUMED)
def test_a_killed_run_goes_on_as_if_nothing_had_happened(project, trained, tmp_path, stage, settings):
    whole, book, _ = trained
    settings = (f"engine.zero_stage={stage}", "logging.save_steps=2", *settings)
    if (stage, settings[2:]) != (2, LORA):
        whole, book = tmp_path / "whole", tmp_path / "book-whole"
        results = project.train_with(whole, f"--ledger {book}", *settings)
        assert [code for code, _ in results] == [0, 0], results
    killed = tmp_path / "killed"
    assert kill_and_go_on(project, killed, tmp_path / "book", settings, ranks=2, kills=1, seed=stage) == 1
    assert losses(killed) == losses(whole) and ledger(tmp_path / "book") == ledger(book)
    last = sorted(whole.glob("checkpoints/step-*"))[-1].name
    for name in (f"{last}/model", f"{last}/ema", f"{last}/exp_avg", "best/model"):
        ours, expected = (load_file(output / "checkpoints" / f"{name}.safetensors") for output in (killed, whole))
        assert ours.keys() == expected.keys() and all(ours[key].equal(expected[key]) for key in expected), name


def test_the_adapters_train_and_clips_own_weights_stay(project, trained):
    output, _, log = trained
    clip, state = load_file(project.base / "clip" / "tiny.safetensors"), weights(output)
    for name, value in state.items():
        plain = name.replace(".base_layer.", ".").replace(".packed_qkv.weight", ".in_proj_weight")
        if plain.startswith("visual.") and plain in clip:
            assert value.equal(clip[plain]), name
    assert all(value.any() for name, value in state.items() if ".lora_B." in name)
    average = load_file(sorted(output.glob("checkpoints/step-*"))[-1] / "ema.safetensors")
    assert {name for name in state if ".lora_" in name} < average.keys()
    share = re.search(r"trainable parameters\s*\|\s*([\d,]+) of ([\d,]+)", log)
    total = sum(value.numel() for value in state.values())
    assert [int(number.replace(",", "")) for number in share.groups()] == [
        sum(value.numel() for value in average.values()), total,
    ]  # fmt: skip
    assert "GB by formula" in log
    rates = json.loads((output / "metrics.jsonl").read_text().splitlines()[3])
    assert rates["lr_head.2"] == pytest.approx(0.7 * rates["lr_head"]) and rates["lr_clip"] > 0


def test_what_opens_a_run_needs_no_peft_and_gets_the_average_that_was_evaluated(
    project, trained, tmp_path, monkeypatch
):
    """Evaluation and export of the merged weights give the figures that the adapted model had in training."""
    output, _, _ = trained
    report, export = tmp_path / "report.json", tmp_path / "export"
    last = sorted(output.glob("checkpoints/step-*"))[-1]
    settings = [f"--set={setting}" for setting in LORA]
    run(EVALUATE, "--config", project.config, *settings, "--model", last, "--report", report)
    before, after = json.loads((output / "report.json").read_text()), json.loads(report.read_text())
    assert after["top1_correct"] == before["top1_correct"] and after["weights"] == before["weights"]
    ended = program("tools/export.py", last, "--output", export)
    assert ended.returncode == 0, ended.stderr
    monkeypatch.setitem(sys.modules, "peft", None)
    opened = {path: open_saved(path).trained() for path in (last, export)}
    frames, classes_CD = random_frames(3, 4), opened[last].class_embeddings_CD
    logits = [trained.model.eval()(frames, classes_CD) for trained in opened.values()]
    torch.testing.assert_close(*logits, rtol=0, atol=1e-5)
    assert json.loads((export / "export.json").read_text())["card"]["evaluation"]["of these weights"] is True
    state = load_file(export / "model.safetensors")
    assert not any("lora" in name or "base_layer" in name for name in state)
    raw, average = load_file(last / "model.safetensors"), load_file(last / "ema.safetensors")
    stem = "visual.transformer.resblocks.1.attn."
    low_A, low_B = (average[f"{stem}packed_qkv.lora_{part}.default.weight"] for part in "AB")
    expected = raw[f"{stem}packed_qkv.base_layer.weight"] + 8 / 4 * low_B @ low_A
    torch.testing.assert_close(state[f"{stem}in_proj_weight"], expected, atol=1e-6, rtol=1e-6)
    assert not torch.allclose(low_B, raw[f"{stem}packed_qkv.lora_B.default.weight"], atol=1e-5)


def test_a_run_goes_on_with_its_own_adapter_alone(project, trained):
    output, _, _ = trained
    for setting, key in (
        ("network.adapter_rank=8", "network.adapter_rank: 4 -> 8"), ("solver.ema=0.5", "solver.ema: 0.6 -> 0.5"),
    ):  # fmt: skip
        code, text = finish(start(TRAIN, *project.arguments(output, *LORA, setting)))[0]
        assert code == 1 and key in text.splitlines()[-1]


def test_a_model_starts_from_the_weights_that_adapters_gave(project, trained):
    output, _, _ = trained
    parts = open_saved(output).parts()
    config = load_config(project.config)
    model = build_model(config.network, config.data.num_segments, image_size=config.data.input_size)
    load_pretrained(model, output)
    assert all(model.state_dict()[name].equal(value) for name, value in parts.video.items())


@pytest.mark.long
def test_one_command_measures_mixtures_and_another_exports_one(project, trained, tmp_path):
    output, _, _ = trained
    report, picture, export = tmp_path / "curve.json", tmp_path / "curve.png", tmp_path / "mixed"
    others = ("--other", project.config, "--set", "data.test_clips=2", "--set", "engine.precision=fp32")
    ended = program(
        "tools/interpolate.py", output, *others, "--alphas", "1,0,0.5", "--report", report, "--picture", picture
    )
    assert ended.returncode == 0, ended.stderr
    own, other = json.loads(report.read_text())["sets"]
    assert [row["alpha"] for row in own["rows"]] == [row["alpha"] for row in other["rows"]] == [0, 0.5, 1]
    best = json.loads((output / "checkpoints" / "best" / "state.json").read_text())["figures"]
    assert own["rows"][2]["top1"] == pytest.approx(best["top1"]) and own["rows"][0]["videos"] == best["videos"]
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert program("tools/export.py", output, "--output", export, "--interpolate", "0.5").returncode == 0
    again = tmp_path / "again.json"
    run(EVALUATE, "--config", project.config, "--set=engine.precision=fp32", "--model", export, "--report", again)
    assert json.loads(again.read_text())["top1"] == pytest.approx(own["rows"][1]["top1"])
    card = json.loads((export / "export.json").read_text())["card"]
    assert card["interpolation"] == 0.5 and card["evaluation"] is None
