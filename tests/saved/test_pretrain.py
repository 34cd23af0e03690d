"""`pretrain:` starts a run from any saved model whatever its classes, and says what it took and what it left."""

import logging
from dataclasses import replace

import pytest
import torch
from original_files import NAMES, T, save_train, save_train_nce, trained
from tiny import tiny_network

from text4vis.classifier.embeddings import build_classifier
from text4vis.config.schema import Config, ConfigError, NetworkConfig
from text4vis.model.video_clip import build_model
from text4vis.saved.opening import load_pretrained
from text4vis.saved.weights import export_model


@pytest.fixture(scope="module")
def network(tmp_path_factory) -> NetworkConfig:
    return tiny_network(tmp_path_factory.mktemp("clip"))


@pytest.fixture
def log(caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("text4vis"), "propagate", True)
    caplog.set_level(logging.INFO, "text4vis")
    return caplog


def save_export(path, model, network):
    classes = build_classifier(Config(network=network), model, NAMES)
    export_model(path, model, network, {}, NAMES, classes, {})


def parts(model) -> dict[str, dict[str, torch.Tensor]]:
    state = model.state_dict()
    names = ("visual", "fusion_model", "logit_scale", "text_tower", "classifier")
    return {part: {name: tensor.clone() for name, tensor in state.items() if name.startswith(part)} for part in names}


def same(one: dict, other: dict) -> bool:
    return one.keys() == other.keys() and all(one[name].equal(other[name]) for name in one)


@pytest.mark.parametrize("kind", ["train", "train_nce", "export"])
@pytest.mark.parametrize("trainable", [False, True])
def test_everything_but_the_classes_is_taken_from_every_kind_of_file(network, tmp_path, log, kind, trainable):
    source, path = trained(network), tmp_path / "source"
    if kind == "export":
        save_export(path, source, network)
    else:
        path = path.with_suffix(".pt")
        (save_train if kind == "train" else save_train_nce)(path, source)
    model = build_model(network, T)
    if trainable:
        model.set_classifier(torch.eye(5, 64), list("abcde"))
    before = parts(model)
    load_pretrained(model, path)
    after, expected = parts(model), parts(source)
    assert all(same(after[part], expected[part]) for part in ("visual", "fusion_model", "logit_scale"))
    assert same(after["classifier"], before["classifier"])
    assert f"pretrain: {path}: took visual tower, logit scale, temporal head" in log.text
    assert ("text tower is another" in log.text) == (kind == "train_nce")


def test_a_text_tower_that_trains_is_taken(network, tmp_path, log):
    source = trained(network)
    save_train_nce(tmp_path / "best.pt", source, seed=7)
    model = build_model(replace(network, fix_text=False), T)
    load_pretrained(model, tmp_path / "best.pt")
    other = build_model(network, T)
    assert not torch.allclose(model.encode_text(NAMES), other.encode_text(NAMES), atol=1e-3)
    assert "temporal head, text tower" in log.text and "is another" not in log.text


@pytest.mark.parametrize(
    ("theirs", "ours", "message"),
    [
        ("Transf", "LSTM", "starts fresh: temporal head (another kind or shape in the file)"),
        ("None", "Transf", "starts fresh: temporal head (none in the file)"),
        ("Transf", "None", "took visual tower, logit scale\n"),
    ],
)
def test_another_temporal_head_starts_fresh(network, tmp_path, log, theirs, ours, message):
    save_train(tmp_path / "best.pt", trained(replace(network, sim_header=theirs)))
    model = build_model(replace(network, sim_header=ours), T)
    before = parts(model)["fusion_model"]
    load_pretrained(model, tmp_path / "best.pt")
    assert same(parts(model)["fusion_model"], before) and message in log.text


def test_a_tower_that_does_not_fit_is_an_error_that_names_the_difference(network, tmp_path):
    save_train(tmp_path / "best.pt", trained(network))
    model = build_model(network, T, image_size=64)
    with pytest.raises(ConfigError, match=r"best\.pt: visual tower does not fit .*positional_embedding .*input_size"):
        load_pretrained(model, tmp_path / "best.pt")


def test_convolutions_over_time_that_the_file_lacks_start_fresh(network, tmp_path, log):
    source = trained(network)
    save_train(tmp_path / "best.pt", source)
    model = build_model(replace(network, tm="tokent1d"), T)
    load_pretrained(model, tmp_path / "best.pt")
    ours, theirs = model.visual.state_dict(), source.visual.state_dict()
    assert ours.keys() > theirs.keys() and all(ours[name].equal(theirs[name]) for name in theirs)
    assert "starts fresh: convolutions over time" in log.text


@pytest.mark.parametrize("name", ["run", "best.pt"])
def test_what_is_not_there_is_named_with_its_key(network, tmp_path, name):
    with pytest.raises(ConfigError, match=f"^pretrain: .*{name}: not there; name the folder of an export"):
        load_pretrained(build_model(network, T), tmp_path / name)
