"""Runs and exports keep what they need: they open from any folder, without the files that their recipe named."""

import json
import shutil
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import yaml
from launch import ROOT, program, run
from project import EVALUATE, TRAIN
from safetensors.torch import load_file, save_file
from tiny import random_frames, tiny_network, write_clip

import text4vis
from text4vis.classifier.embeddings import save_classifier
from text4vis.config.loading import load_config
from text4vis.config.schema import Config, DataConfig
from text4vis.model.video_clip import build_model
from text4vis.saved.checkpoint import CheckpointError, State
from text4vis.saved.inputs import RunInputs, digests
from text4vis.saved.runs import check_same_run

NAMES = ["walking", "running", "jumping"]
CLASSIFIERS = (pytest.param("text", marks=pytest.mark.long), "file")
FRAMES = np.random.default_rng(0).integers(0, 256, (9, 40, 48, 3), np.uint8)


def rows(count):
    """Class embeddings (count, 64)."""
    return random_frames(1, 1, 32).float().reshape(-1, 64)[:count]


def write_recipe(folder, project, classifier):
    """A recipe with all that it needs beside it, but for the shards."""
    write_clip(folder / "models")
    (folder / "names.csv").write_text("id,name\n" + "".join(f"{n},{name}\n" for n, name in enumerate(NAMES)))
    save_classifier(folder / "rows.safetensors", rows(3), NAMES, {})
    recipe = yaml.safe_load(project.config.read_text())
    recipe["data"]["label_list"] = "names.csv"
    recipe["network"] = {"arch": "models/tiny.json", "classifier": classifier, "classifier_file": "rows.safetensors"}
    recipe["solver"]["epochs"] = 1
    recipe["engine"]["precision"] = "fp32"
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    return folder / "recipe.yaml"


@pytest.fixture(scope="module", params=CLASSIFIERS)
def moved(request, project, tmp_path_factory):
    """(folder that everything was moved to, what was predicted before): the recipe's folder is gone."""
    before, after = (tmp_path_factory.mktemp(name) for name in ("before", "after"))
    recipe = write_recipe(before / "recipes", project, request.param)
    run(TRAIN, "--config", recipe, "--output", before / "run")
    assert program("tools/export.py", before / "run", "--output", before / "export").returncode == 0
    expected = text4vis.load(before / "run", "cpu").predict(FRAMES).top
    shutil.copytree(recipe.parent, after / "elsewhere")
    for name in ("run", "export"):
        shutil.move(before / name, after / "moved" / name)
    shutil.rmtree(before)
    return after, expected


def elsewhere(folder, script, *words):
    """The output of a program that is started in a folder, and must succeed."""
    code, said = attempt(folder, script, *words)
    assert code == 0, said
    return said


def attempt(folder, script, *words):
    """(exit code, output) of a program that is started in a folder."""
    command = [sys.executable, ROOT / script, *words]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=300, check=False)
    return done.returncode, done.stdout + done.stderr


@pytest.mark.slow
def test_they_predict(moved, monkeypatch):
    folder, expected = moved
    monkeypatch.chdir(folder / "moved")
    for name in ("run", "run/checkpoints/best", "export"):
        recogniser = text4vis.load(name, "cpu")
        found = recogniser.predict(FRAMES).top
        assert [(name, pytest.approx(share, abs=1e-5)) for name, share in expected] == found
        assert recogniser.class_names == NAMES


@pytest.mark.slow
def test_they_are_exported(moved):
    folder, _ = moved
    elsewhere(folder, "tools/export.py", "moved/run", "--output", "again")
    for file in ("model", "text", "classes"):
        first, again = (load_file(folder / name / f"{file}.safetensors") for name in ("moved/export", "again"))
        assert first.keys() == again.keys() and all(first[name].equal(again[name]) for name in first)


@pytest.mark.slow
@pytest.mark.parametrize("model", ["run", "export"])
def test_they_are_evaluated_with_the_run_s_configuration(moved, model):
    folder, _ = moved
    said = elsewhere(
        folder, EVALUATE, "--config", "moved/run/config.yaml", "--model", f"moved/{model}", "--report", "r"
    )
    assert "was trained with other settings" not in said
    found, before = (json.loads((folder / name).read_text()) for name in ("r", "moved/run/report.json"))
    for key in ("top1", "videos", "classes_fingerprint", "class_embeddings", "weights", "data_fingerprint"):
        assert found[key] == before[key], key


@pytest.mark.slow
def test_the_run_goes_on_with_the_same_recipe_in_another_folder(moved):
    folder, _ = moved
    said = elsewhere(folder, TRAIN, "--config", "elsewhere/recipe.yaml", "--output", "moved/run")
    assert "steps of this run are done" in said
    (folder / "elsewhere" / "names.csv").write_text("id,name\n0,walking\n1,running\n2,sitting\n")
    code, said = attempt(folder, TRAIN, "--config", "elsewhere/recipe.yaml", "--output", "moved/run")
    assert code == 1 and "the configuration differs (data.label_list: " in said


def test_a_run_is_the_same_wherever_its_files_lie_and_another_when_they_change(tmp_path):
    def configured(folder):
        (tmp_path / folder).mkdir()
        for name in ("names.csv", "rows.npy"):
            (tmp_path / folder / name).write_text(name)
        for name in ("start", "clip"):
            (tmp_path / folder / name).mkdir()
        (tmp_path / folder / "r.yaml").write_text(
            "pretrain: start\ndata: {label_list: names.csv}\n"
            "network: {arch: 'local-dir:clip', classifier_file: rows.npy, pretrained: gone.pt}\n"
        )
        return load_config(tmp_path / folder / "r.yaml")

    before, now = configured("a"), configured("b")
    found = State(0, 0, 8, "data", before.to_dict(), [], inputs=digests(before))
    assert found.inputs.keys() == {"pretrain", "data.label_list", "network.arch", "network.classifier_file"}
    with pytest.raises(CheckpointError, match=r"differs \(network\.pretrained: '.*a/gone\.pt' -> '.*b/gone\.pt'\)"):
        check_same_run(found, now, "data", [], digests(now), tmp_path)
    now = replace(now, network=replace(now.network, pretrained=before.network.pretrained))
    check_same_run(found, now, "data", [], digests(now), tmp_path)
    (tmp_path / "a" / "names.csv").write_text("other")
    with pytest.raises(CheckpointError, match=r"data\.label_list: '.*a/names\.csv' holds something else"):
        check_same_run(found, before, "data", [], digests(before), tmp_path)


def test_a_run_of_version_0_1_is_compared_by_the_paths_from_the_working_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    found = State(0, 0, 8, "data", Config(data=DataConfig(label_list="names.csv")).to_dict(), [])
    check_same_run(found, Config(data=DataConfig(label_list=f"{tmp_path}/names.csv")), "data", [], {}, tmp_path)
    with pytest.raises(CheckpointError, match=r"data\.label_list"):
        check_same_run(found, Config(data=DataConfig(label_list="/x/names.csv")), "data", [], {}, tmp_path)


def test_what_trains_is_not_kept_and_an_older_copy_goes(tmp_path):
    network = tiny_network(tmp_path / "clip")
    model = build_model(network, 4)
    RunInputs.keep(tmp_path, model, Config(), rows(3))
    files = {path.name for path in (tmp_path / "inputs").iterdir()}
    assert files == {"clip.json", "bpe.txt.gz", "text.safetensors", "classes.safetensors"}
    RunInputs.keep(tmp_path, build_model(replace(network, fix_text=False), 4), Config(), None)
    assert {path.name for path in (tmp_path / "inputs").iterdir()} == {"clip.json", "bpe.txt.gz"}


def test_a_damaged_copy_is_named(tmp_path):
    from text4vis.config.schema import ConfigError

    network = tiny_network(tmp_path / "clip")
    RunInputs.keep(tmp_path, build_model(network, 4), Config(), rows(3))
    inputs = RunInputs.find(tmp_path)
    with pytest.raises(ConfigError, match=r"inputs/classes\.safetensors: does not match the 2 class names"):
        inputs.classes(["a", "b"])
    save_file({}, tmp_path / "inputs" / "text.safetensors")
    model = build_model(inputs.network(network), 4)
    with pytest.raises(ConfigError, match=r"inputs/text\.safetensors does not fit the model; missing"):
        inputs.load_text(model)
