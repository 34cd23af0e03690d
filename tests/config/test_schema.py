"""The configuration: what it accepts, and that each mistake is answered with key, value, origin and fix."""

import re
from pathlib import Path

import pytest
import yaml

from text4vis.config.keys import schema
from text4vis.config.loading import config_from_dict, load_config
from text4vis.config.schema import ConfigError
from text4vis.config.sources import addresses
from text4vis.model.video_clip import build_model

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def recipe(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text("seed: 3\ndata:\n  train: shards/a\n  batch_size: 8\nsolver:\n  lr: 5e-4\n")
    return path


def test_values_types_and_overrides(recipe, monkeypatch):
    monkeypatch.setenv("PLACE", "/big")
    config = load_config(recipe, ["data.batch_size=16", "data.val=[$PLACE/v1, $PLACE/v2]", "network.sim_header=None"])
    assert (config.seed, config.data.batch_size, config.solver.lr) == (3, 16, 5e-4)
    assert config.data.train == (f"{recipe.parent}/shards/a",) and config.data.val == ("/big/v1", "/big/v2")
    assert config.network.sim_header == "None"
    assert config.scale_size == 256
    with pytest.raises(AttributeError):
        config.seed = 4


def test_a_resolved_configuration_reads_back_equal(recipe, tmp_path):
    config = load_config(recipe, ["data.crop_area=[0.5, 1]"])
    written = tmp_path / "config.yaml"
    written.write_text(config.to_yaml())
    assert load_config(written) == config
    assert config_from_dict(yaml.safe_load(config.to_yaml()), "here") == config


def test_a_mixture_reads_back_equal_and_without_secrets(recipe):
    settings = ["data.train=[{path: 's3://me:word@b/x?token=1', weight: 2}, {path: [/b, /c], weight: 0.5}]"]
    config = load_config(recipe, settings)
    assert [(source.path, source.weight) for source in config.data.train] == [
        (("s3://me:word@b/x?token=1",), 2), (("/b", "/c"), 0.5),
    ]  # fmt: skip
    assert addresses(config.data.train)[1:] == ["/b", "/c"] and addresses(("x", "y")) == ["x", "y"]
    kept = yaml.safe_load(config.to_yaml())
    assert kept["data"]["train"] == [{"path": ["s3://b/x"], "weight": 2.0}, {"path": ["/b", "/c"], "weight": 0.5}]
    assert config_from_dict(kept, "here").to_dict() == kept


def test_base_files_are_laid_under(recipe, tmp_path):
    child = tmp_path / "sub" / "child.yaml"
    child.parent.mkdir()
    child.write_text("base: ../recipe.yaml\ndata:\n  batch_size: 2\n")
    config = load_config(child)
    assert (config.seed, config.data.batch_size, config.data.train) == (3, 2, (f"{tmp_path}/shards/a",))
    recipe.write_text("base: sub/child.yaml\n")
    with pytest.raises(ConfigError, match="include each other"):
        load_config(child)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("solver.lr=fast", "solver.lr: expected a number, got 'fast' (from --set)"),
        ("solver.lr=true", "solver.lr: expected a number, got True (from --set)"),
        ("data.bach_size=3", "data.bach_size: unknown key (from --set); did you mean data.batch_size?"),
        ("data.colour=3", "data.colour: unknown key (from --set); docs/config.md lists all keys"),
        ("dta.batch_size=3", "dta: unknown key (from --set); did you mean data?"),
        ("lr=3", "lr: unknown key (from --set); did you mean solver.lr?"),
        ("data.batch_size=0", "data.batch_size: input should be greater than or equal to 1, got 0 (from --set)"),
        ("data.batch_size=2.5", "data.batch_size: input should be a valid integer, got 2.5 (from --set)"),
        ("data.test_crops=2", "data.test_crops: input should be 1, 3, 5 or 10, got 2 (from --set)"),
        ("data.train_list=x", "data.train_list: not used here (from --set); build shards"),
        ("data.crop_area=[1, 0.5]", "data.crop_area: expected 0 < low <= high <= 1, got [1.0, 0.5] (from --set)"),
        ("data.scale_size=100", "data.scale_size: 100 is smaller than data.input_size 224 (from --set)"),
        ("network.template=a person", "network.template: expected exactly one {} for the class name"),
        ("data.train.x=1", "data.train.x: train is a value ('shards/a'), not a section"),
        ("data.batch_size", "expected section.key=value"),
        ("." * 2000 + "=1", "sections within sections, more than any recipe has"),
        ("data.train=[a", "the value is not valid YAML"),
        ("data.train=[{path: /a}]", "data.train: expected a path or {path, weight}, got {'path': '/a'} (from --set)"),
        ("data.train=[{path: a, weight: 0}]", "data.train: input should be greater than 0, got 0 (from --set)"),
        ("data.train=[{path: a, weight: .inf}]", "data.train: input should be a finite number, got inf"),
        ("data.train=[{path: a, weight: 1}, b]", "data.train: expected a {path, weight} for each source or for none"),
        ("data.train=[{path: [], weight: 1}]", "data.train: a source with a weight names no path (from --set)"),
        (
            "data.train=[{path: $NONE/a, weight: 1}]",
            "data.train: the environment variable NONE in '$NONE/a' is",
        ),
        ("data.val=[{path: a, weight: 1}]", "data.val: input should be a valid string"),
        ("data.shuffle=shards:10000000000", "data.shuffle: string should match pattern"),
        ("data.streams=4", "data.streams: 4 streams need data.shuffle shards:K"),
        ("network.template=[a {}, b {}]", '; quote a text with braces, e.g. "a video of {}."'),
    ],
)
def test_a_mistake_is_answered_with_key_value_origin_and_fix(recipe, override, message):
    with pytest.raises(ConfigError) as error:
        load_config(recipe, [override])
    assert message in str(error.value)


def test_an_empty_value_takes_a_choice_back(recipe):
    settings = ["data.label_list=/names.csv", "network.classifier_file=x.npy"]
    assert load_config(recipe, settings).data.label_list == "/names.csv"
    config = load_config(recipe, [*settings, "data.label_list=", "network.classifier_file="])
    assert (config.data.label_list, config.network.classifier_file) == (None, None)


def test_the_file_is_named_as_origin(recipe, tmp_path):
    recipe.write_text("data:\n  batch_size: many\n")
    with pytest.raises(ConfigError, match=re.escape(f"got 'many' (from {recipe})")):
        load_config(recipe)
    recipe.write_text("data: [\n")
    with pytest.raises(ConfigError, match=r"not valid YAML \(line"):
        load_config(recipe)
    with pytest.raises(ConfigError, match="no such file"):
        load_config(tmp_path / "none.yaml")


def test_true_is_no_number():
    numbers = [key.name for key in schema() if type(key.default) in (int, float)]
    assert {"data.test_crops", "engine.zero_stage", "data.batch_size", "solver.lr"} <= set(numbers)
    for key in numbers:
        with pytest.raises(ConfigError, match=f"{key}: .*got True"):
            load_config(ROOT / "configs/demo.yaml", [f"{key}=true"])
    with pytest.raises(ConfigError, match=r"data.test_crops: expected a whole number, got 3.0"):
        load_config(ROOT / "configs/demo.yaml", ["data.test_crops=3.0"])


def test_yaml_cannot_construct_objects(recipe, tmp_path):
    recipe.write_text(f"seed: !!python/object/apply:os.system ['touch {tmp_path}/owned']\n")
    with pytest.raises(ConfigError, match="not valid YAML"):
        load_config(recipe)
    assert not (tmp_path / "owned").exists()


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*.yaml")), ids=lambda path: path.name)
def test_every_shipped_recipe_is_complete(path, monkeypatch):
    """It loads, opens with its command, and its network can be built; the demo's CLIP ships with it."""
    monkeypatch.chdir("/")
    monkeypatch.setenv("DATA", "data")
    config = load_config(path)
    assert f"--config configs/{path.name}" in path.read_text().split("seed:")[0]
    if config.network.arch.endswith(".json"):
        model = build_model(config.network, config.data.num_segments, image_size=config.data.input_size)
        assert model.image_size == config.data.input_size
