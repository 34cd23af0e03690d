"""Mixtures of the weights that a training began with and those that it ended with."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tiny import random_frames, tiny_network, write_clip

from text4vis.classifier.embeddings import build_classifier
from text4vis.config.schema import Config, ConfigError, DataConfig
from text4vis.model.preprocessing import settle
from text4vis.model.video_clip import build_model
from text4vis.saved.interpolation import MARK, Interpolation
from text4vis.saved.opening import TrainedModel, open_saved
from text4vis.serving.exporting import export

NAMES = ["archery", "surfing", "running"]
FRAMES = random_frames(2, 4)


def trained_model(folder: Path, pretrain: Path | None = None, **network) -> TrainedModel:
    """A tiny CLIP whose weights have moved, as training moves them."""
    config = settle(Config(
        network=tiny_network(folder, **network), data=DataConfig(num_segments=4, input_size=32, scale_size=36),
        pretrain=pretrain and str(pretrain),
    ))  # fmt: skip
    model = build_model(config.network, 4)
    if network.get("classifier_trainable"):
        model.set_classifier(build_classifier(config, model, NAMES), NAMES)
    torch.manual_seed(5)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    return TrainedModel(
        model, config, NAMES, build_classifier(config, model, NAMES), {"step": 3, "figures": {"top1": 5}}
    )


def exported(folder: Path, **options):
    trained = trained_model(folder, **options)
    export(folder / "export", trained)
    return open_saved(folder / "export")


def logits(trained: TrainedModel) -> torch.Tensor:
    with torch.no_grad():
        return trained.model.eval()(FRAMES, trained.class_embeddings_CD)


def test_the_line_goes_from_clip_itself_to_the_trained_model(tmp_path):
    saved = exported(tmp_path, sim_header="None")
    whole = saved.trained()
    expected, last = logits(whole), {name: value.clone() for name, value in whole.model.state_dict().items()}
    line = Interpolation(saved, saved.trained())
    first = build_model(whole.config.network, 4)
    clip = replace(whole, model=first)
    assert torch.equal(logits(line.at(0)), logits(clip)) and not torch.allclose(logits(clip), expected, atol=1e-2)
    half = line.at(0.5).model.state_dict()
    for name, value in first.state_dict().items():
        torch.testing.assert_close(half[name], (value + last[name]) / 2)
    end = line.at(1)
    assert torch.equal(logits(end), expected) and end.card == whole.card


def test_a_mixture_says_so_and_quotes_no_figures_of_other_weights(tmp_path):
    saved = exported(tmp_path)
    mixed = Interpolation(saved, saved.trained()).at(0.25)
    assert mixed.card[MARK] == 0.25 and not mixed.card["figures"] and mixed.card["step"] == 3
    export(tmp_path / "mixed", mixed)
    again = open_saved(tmp_path / "mixed")
    assert torch.allclose(logits(again.trained()), logits(mixed), atol=1e-5)
    assert "| interpolation | 0.25 |" in (tmp_path / "mixed" / "README.md").read_text()
    with pytest.raises(ConfigError, match=r"is a mixture already \(0\.25\)"):
        Interpolation(again, again.trained())


def test_a_head_that_began_random_stays_and_one_that_was_given_moves(tmp_path):
    saved = exported(tmp_path / "a")
    trained = saved.trained()
    head = {name: value.clone() for name, value in trained.model.fusion_model.state_dict().items()}
    found = Interpolation(saved, trained).at(0).model.fusion_model.state_dict()
    assert all(value.equal(head[name]) for name, value in found.items())
    later = exported(tmp_path / "b", pretrain=tmp_path / "a" / "export")
    first = Interpolation(later, later.trained()).at(0).model.state_dict()
    assert all(value.equal(first[name]) for name, value in saved.parts().video.items())


@pytest.mark.parametrize("part", [{"fix_text": False}, {"classifier_trainable": True}])
def test_what_makes_the_classes_moves_where_it_trained(tmp_path, part):
    saved = exported(tmp_path, sim_header="None", **part)
    last_CD = saved.trained().class_embeddings_CD.clone()
    line = Interpolation(saved, saved.trained())
    frozen = build_model(replace(line.trained.config.network, fix_text=True), 4)
    first_CD = build_classifier(line.trained.config, frozen, NAMES)
    torch.testing.assert_close(line.at(0).class_embeddings_CD, first_CD)
    torch.testing.assert_close(line.at(1).class_embeddings_CD, last_CD)
    assert not torch.allclose(first_CD, last_CD, atol=1e-3)


def test_weights_that_cannot_be_had_are_an_error_that_names_the_key(tmp_path):
    saved = exported(tmp_path, init=False, sim_header="None")
    with pytest.raises(ConfigError, match=r"network\.init: .* began with random weights"):
        Interpolation(saved, saved.trained())
    saved = exported(tmp_path / "gone", sim_header="None")
    trained = saved.trained()
    for file in (tmp_path / "gone").glob("tiny.*"):
        file.unlink()
    with pytest.raises(ConfigError, match=r"network\.arch: no such file: .*tiny\.json"):
        Interpolation(saved, trained)


def test_a_run_wants_the_weights_that_it_began_with(tmp_path, monkeypatch):
    from types import SimpleNamespace

    from text4vis.saved import interpolation

    saved = exported(tmp_path, sim_header="None")
    trained = saved.trained()
    run = SimpleNamespace(path=saved.path, state=SimpleNamespace(inputs=interpolation.digests(trained.config)))
    monkeypatch.setattr(interpolation, "SavedRun", SimpleNamespace)
    Interpolation(run, trained)
    other = write_clip(tmp_path, seed=1)
    other.write_text(other.read_text() + " ")
    with pytest.raises(ConfigError, match=r"network\.arch: holds other weights than"):
        Interpolation(run, trained)
