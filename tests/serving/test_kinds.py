"""Models of every kind through export, ONNX and prediction, and through a run that goes on: without their folder."""

import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from launch import run
from project import EVALUATE, TRAIN, Project, losses, weights
from published import KINDS, jpeg, publish
from videos import write_video

import text4vis
from text4vis.classifier.embeddings import build_classifier
from text4vis.config.schema import Config, DataConfig, NetworkConfig
from text4vis.model.preprocessing import settle
from text4vis.model.video_clip import build_model
from text4vis.saved.inputs import RunInputs, tokenizer_digest
from text4vis.saved.opening import TrainedModel, open_saved
from text4vis.serving.exporting import export

NAMES = ["Archery", "surfing; skiing!", "ein Mensch läuft"]
OTHERS = ["a dog", "cats jumping"]
T = 2
QUICK_GRAPHS = {"openai", "siglip2"}


def each_kind(*quick: str) -> list:
    """Every kind; those that are not quick are marked long."""
    return [pytest.param(kind, marks=[] if kind in quick else [pytest.mark.long]) for kind in KINDS]


def trained_model(folder: Path, kind: str) -> TrainedModel:
    data = DataConfig(num_segments=T, input_size=KINDS[kind][0]["vision_cfg"]["image_size"])
    config = settle(Config(data=data, network=NetworkConfig(arch=f"local-dir:{folder}", sim_header="None")))
    model = build_model(config.network, T, image_size=data.input_size).eval()
    return TrainedModel(model, config, NAMES, build_classifier(config, model, NAMES), {})


def frames() -> np.ndarray:
    """A video (N, H, W, 3) uint8 whose frames differ."""
    import io

    from PIL import Image

    return np.stack([np.asarray(Image.open(io.BytesIO(jpeg(150, 100)))) // k for k in (1, 2, 3)])


def shares(prediction) -> dict[str, float]:
    return dict(prediction.top)


@pytest.mark.slow
@pytest.mark.parametrize("kind", each_kind("openai", "siglip2", "siglip", "xlm-roberta"))
def test_an_export_opens_without_the_folder_it_came_from(tmp_path, kind, monkeypatch):
    folder = publish(tmp_path / "published", kind)
    trained = trained_model(folder, kind)
    before = text4vis.serving.Predictor(trained.model, trained.config, NAMES, trained.class_embeddings_CD)
    expected = [before.predict(frames()), before.predict(frames(), OTHERS)]
    export(tmp_path / "export", trained)
    shutil.rmtree(folder)
    shutil.move(tmp_path / "export", tmp_path / "moved")
    after = text4vis.load(tmp_path / "moved", device="cpu")
    found = [after.predict(frames()), after.predict(frames(), OTHERS)]
    for one, other in zip(found, expected, strict=True):
        assert shares(one) == pytest.approx(shares(other), abs=1e-6)
        np.testing.assert_array_equal(one.frames, other.frames)
    assert max(shares(expected[0]).values()) - min(shares(expected[0]).values()) > 1e-4, "a constant would agree too"
    assert after.model.text.tokenizer.facts() == trained.model.text.tokenizer.facts()
    card = (tmp_path / "moved" / "README.md").read_text()
    for fact in (after.config.data.resize, after.config.network.activation.replace("_", r"\_")):
        assert fact in card
    # an export of an export is the same again
    export(tmp_path / "again", open_saved(tmp_path / "moved").trained())
    again = text4vis.load(tmp_path / "again", device="cpu").predict(frames())
    assert shares(again) == pytest.approx(shares(expected[0]), abs=1e-6)


@pytest.mark.parametrize("kind", each_kind("openai", "siglip2", "xlm-roberta"))
def test_the_inputs_of_a_run_build_its_model_without_the_folder_it_came_from(tmp_path, kind):
    folder = publish(tmp_path / "published", kind)
    trained = trained_model(folder, kind)
    config, side = trained.config, trained.config.data.input_size
    (tmp_path / "run").mkdir()
    RunInputs.keep(tmp_path / "run", trained.model, config, trained.class_embeddings_CD)
    shutil.rmtree(folder)
    shutil.move(tmp_path / "run", tmp_path / "moved")
    inputs = RunInputs.find(tmp_path / "moved")
    network = inputs.network(NetworkConfig(arch=f"local-dir:{folder}", sim_header="None"))
    asked = Config(data=DataConfig(num_segments=T, input_size=side), network=network)
    assert settle(asked) == replace(config, network=replace(config.network, arch=network.arch, init=False))
    model = build_model(network, T, image_size=side)
    inputs.load_text(model)
    assert torch.equal(model.encode_text(OTHERS), trained.model.encode_text(OTHERS))
    assert torch.equal(inputs.classes(NAMES), trained.class_embeddings_CD)
    assert tokenizer_digest(model) == tokenizer_digest(trained.model)
    assert (model.mean, model.std, model.clip_config["vision_cfg"]) == (
        trained.model.mean, trained.model.std, trained.model.clip_config["vision_cfg"],
    )  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize(
    "kind", [pytest.param(kind, marks=[pytest.mark.long] * (kind not in QUICK_GRAPHS)) for kind in KINDS]
)
def test_the_graph_and_its_program_see_what_the_model_sees(tmp_path, kind):
    trained = trained_model(publish(tmp_path / "published", kind), kind)
    written = export(tmp_path / "export", trained, onnx=True)
    assert written is not None and written.difference < 1e-3
    write_video(tmp_path / "clip.mp4", 90, 11)
    command = [sys.executable, "predict_onnx.py", "model.onnx", tmp_path / "clip.mp4"]
    said = subprocess.run(command, cwd=tmp_path / "export", capture_output=True, text=True, check=True).stdout
    found = {line.split("\t")[1]: float(line.split("\t")[2]) for line in said.splitlines()}
    top = text4vis.load(tmp_path / "export", device="cpu").predict(tmp_path / "clip.mp4").top
    assert found == pytest.approx(dict(top), abs=1e-3)


@pytest.fixture(scope="module")
def project(tmp_path_factory) -> Project:
    return Project(tmp_path_factory.mktemp("kinds"))


@pytest.mark.slow
@pytest.mark.parametrize(
    "kind", [kind if kind == "siglip2" else pytest.param(kind, marks=pytest.mark.long) for kind in KINDS]
)
def test_a_run_goes_on_and_is_evaluated_as_it_was_trained(project, tmp_path, kind):
    folder = publish(tmp_path / "published", kind)
    settings = {
        "network.arch": f"local-dir:{folder}", "network.sim_header": "None", "data.scale_size": "null",
        "data.input_size": KINDS[kind][0]["vision_cfg"]["image_size"], "data.num_segments": T, "solver.epochs": 2,
        "engine.precision": "fp32",
    }  # fmt: skip
    given = [f"--set={key}={value}" for key, value in settings.items()]
    whole = tmp_path / "whole"
    said = run(TRAIN, "--config", project.config, "--output", whole, *given)
    resize = KINDS[kind][1].get("resize_mode", "shortest")
    assert f"data.resize {resize}" in said
    assert open_saved(whole).config.data.resize == resize
    shutil.rmtree(folder)  # the run has kept what it needs
    half = tmp_path / "half"
    shutil.copytree(whole, half)
    shutil.rmtree(sorted((half / "checkpoints").glob("step-*"))[-1])
    assert "resumed from" in run(TRAIN, "--config", project.config, "--output", half, *given)
    assert losses(half) == losses(whole)
    assert all(torch.equal(tensor, weights(whole)[name]) for name, tensor in weights(half).items())
    export(tmp_path / "export", open_saved(whole).trained())
    reports = []
    for model in (whole, tmp_path / "export"):
        reports.append(tmp_path / f"{model.name}.json")
        run(EVALUATE, "--config", project.config, "--model", model, "--report", reports[-1], *given)
    of_run, of_export = (json.loads(path.read_text()) for path in reports)
    same = ("pixels", "activation", "tokenizer", "top1_correct", "views", "weights", "class_embeddings")
    assert {key: of_run[key] for key in same} == {key: of_export[key] for key in same}
    assert of_run["pixels"]["resize"] == resize
