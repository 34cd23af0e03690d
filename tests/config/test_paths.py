"""A relative path begins at the recipe's folder; behind --set and a variable, at the working folder."""

import re
from pathlib import Path

import pytest
import yaml

from shards.format import ShardError
from text4vis.config.keys import schema
from text4vis.config.loading import load_config, resolve_config
from text4vis.config.paths import absolute, absolute_model, same_path
from text4vis.config.schema import ConfigError
from text4vis.data.datasets import open_split

ROOT = Path(__file__).resolve().parents[2]
PATHS = {key.name: key for key in schema() if key.path != "no"}
MANY = ("data.train", "data.val", "data.class_splits")


@pytest.fixture
def recipe(tmp_path, monkeypatch):
    """A recipe in a folder beside the working folder."""
    (tmp_path / "work").mkdir()
    (tmp_path / "recipes").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    return tmp_path / "recipes" / "r.yaml"


def given(recipe, key, value, overrides=()):
    """The value of a key that a recipe gives."""
    section, _, name = key.rpartition(".")
    recipe.write_text(yaml.safe_dump({section: {name: value}} if section else {name: value}))
    return value_of(load_config(recipe, overrides), key)


def value_of(config, key):
    found = config
    for name in key.split("."):
        found = getattr(found, name)
    return found[0] if key in MANY else found


@pytest.mark.parametrize("key", PATHS)
def test_every_path_begins_at_the_recipe_and_behind_set_at_the_working_folder(recipe, key, monkeypatch):
    base = recipe.parent
    assert given(recipe, key, "a/x.pt") == f"{base}/a/x.pt"
    assert given(recipe, key, "../b/./x.pt") == f"{base.parent}/b/x.pt"
    assert given(recipe, key, "./x") == f"{base}/x"
    assert given(recipe, key, "/big/x.pt") == "/big/x.pt"
    assert given(recipe, key, "c/x.pt", [f"{key}=a/x.pt"]) == f"{base.parent}/work/a/x.pt"
    monkeypatch.setenv("PLACE", "data")
    assert given(recipe, key, "$PLACE/x.pt") == f"{base.parent}/work/data/x.pt"
    monkeypatch.setenv("PLACE", "/big")
    assert given(recipe, key, "${PLACE}/x.pt") == "/big/x.pt"
    monkeypatch.setenv("HOME", "/home/me")
    assert given(recipe, key, "~/x.pt") == "/home/me/x.pt"


def test_keys_that_name_files_are_declared_as_paths():
    """By the words of their meaning, so that a new one is not forgotten."""
    words = re.compile(r"\b(file|folder|CSV|shards)\b")
    named = {key.name for key in schema() if words.search(key.meaning)}
    no_paths = {name for name in named - PATHS.keys() if name not in {"network.classifier"}}
    assert no_paths <= {"data.shuffle", "data.streams", "data.requests_in_flight", "data.bytes_in_flight",
                        "data.cache_bytes"}  # fmt: skip
    assert {"pretrain", "network.arch", "data.train", "data.cache_dir", "network.sentence_model"} <= PATHS.keys()


@pytest.mark.parametrize("value", ["s3://b/{0..3}", "https://h/x?a=1", "pipe:cat x", "zip::file:///a", "{/a,s3://b}/x"])
def test_addresses_stay_as_they_are(recipe, value):
    assert given(recipe, "data.train", [value]) == value


@pytest.mark.parametrize("key", [name for name, key in PATHS.items() if key.path == "name or path"])
def test_names_stay_as_they_are(recipe, key):
    for name in ("ViT-B/16", "ViT-L/14@336px", "openai", "hf-hub:org/name", "laion2b_s34b_b79k"):
        assert given(recipe, key, name) == name
    assert given(recipe, key, "local-dir:m") == f"local-dir:{recipe.parent}/m"


def test_sources_with_a_weight_and_braces_begin_at_the_recipe(recipe):
    train = [{"path": ["a", "s3://b/c"], "weight": "2"}, {"path": "{c,d}/e", "weight": 1}]
    first = given(recipe, "data.train", train)
    second = load_config(recipe).data.train[1]
    assert first.path == (f"{recipe.parent}/a", "s3://b/c") and first.weight == 2
    assert second.path == (f"{recipe.parent}/{{c,d}}/e",)


def test_a_base_is_relative_to_its_own_folder(recipe):
    (recipe.parent / "sub").mkdir()
    (recipe.parent / "sub" / "base.yaml").write_text("data: {train: a, val: b}\n")
    recipe.write_text("base: sub/base.yaml\ndata: {val: c}\n")
    data = load_config(recipe).data
    assert (data.train, data.val) == ((f"{recipe.parent}/sub/a",), (f"{recipe.parent}/c",))


def test_a_section_behind_set_begins_at_the_working_folder(recipe):
    recipe.write_text("data: {train: a, val: b}\n")
    data = load_config(recipe, ["data={train: c}"]).data
    assert (data.train, data.val) == ((f"{Path.cwd()}/c",), ())


def test_links_are_followed_as_the_system_does(tmp_path):
    (tmp_path / "real" / "deep").mkdir(parents=True)
    (tmp_path / "real" / "x").touch()
    (tmp_path / "link").symlink_to(tmp_path / "real" / "deep")
    for folder in (tmp_path / "link", tmp_path / "real" / ".." / "link", tmp_path / "link" / ".." / "deep"):
        assert (folder / "../x").exists()
        assert absolute("../x", folder) == str(tmp_path / "real" / "x")
    assert absolute("y", tmp_path / "link") == str(tmp_path / "link" / "y")


def test_a_home_that_is_not_known_is_said(recipe, monkeypatch):
    with pytest.raises(ConfigError, match=r"data\.label_list: '~nobody-here/x' \(from .*r\.yaml\): .*HOME"):
        given(recipe, "data.label_list", "~nobody-here/x")


def test_a_path_that_is_none_is_said(recipe):
    with pytest.raises(ConfigError, match=r"data\.train: 'a\\x00' \(from .*r\.yaml\): no file's name holds .* NUL"):
        given(recipe, "data.train", [{"path": "a\0", "weight": 1}])
    with pytest.raises(ConfigError, match=r"r\.yaml: base: expected a file name, got 'a\\x00'"):
        given(recipe, "base", "a\0")


@pytest.mark.parametrize("name", ["long" * 100, "long/" * 2000])
def test_a_path_longer_than_the_system_takes_is_named_where_it_is_opened(recipe, name):
    recipe.write_text(yaml.safe_dump({"data": {"train": [{"path": name, "weight": 1}, {"path": "b", "weight": 2}]}}))
    config = load_config(recipe)
    with pytest.raises(ShardError, match=f"data.train: {recipe.parent}/long.*: File name too long; name a folder"):
        open_split(config, "train")
    with pytest.raises(ConfigError, match=r"long.*File name too long"):
        given(recipe, "base", name)


def test_a_path_that_still_begins_at_the_working_folder_is_answered_with_what_to_write(recipe):
    (recipe.parent.parent / "work" / "names.csv").touch()
    with pytest.raises(ConfigError) as error:
        given(recipe, "data.label_list", "names.csv")
    message = str(error.value)
    for part in ("data.label_list: 'names.csv'", f"(from {recipe})", str(recipe.parent / "names.csv"),
                 "write '../work/names.csv'", "--set data.label_list=names.csv"):  # fmt: skip
        assert part in message
    assert given(recipe, "data.label_list", "../work/names.csv") == str(Path.cwd() / "names.csv")
    (recipe.parent / "names.csv").touch()
    assert given(recipe, "data.label_list", "names.csv") == str(recipe.parent / "names.csv")


def test_an_error_about_a_file_is_given_its_key_value_and_recipe(recipe):
    recipe.write_text("data: {label_list: names.csv, val: /big}\nnetwork: {arch: tiny.json}\n")
    _, origins = resolve_config(recipe, ["pretrain=x"])
    error = FileNotFoundError(f"{recipe.parent}/names.csv: no such file")
    assert origins.explain(error) == f"{error} (data.label_list: 'names.csv' in {recipe})"
    for other in (f"{recipe.parent}/names.csv2: no such file", "/big: damaged", f"{Path.cwd()}/x: damaged"):
        assert origins.explain(other) == other


def test_what_a_run_wrote_in_version_0_1_begins_at_the_working_folder(tmp_path, monkeypatch):
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    (tmp_path / "run" / "config.yaml").write_text("data: {train: [shards]}\n")
    monkeypatch.chdir(tmp_path)
    assert load_config("run/config.yaml").data.train == (str(tmp_path / "shards"),)


def test_recorded_paths_are_compared_as_seen_from_the_working_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert same_path("a/x.pt", f"{tmp_path}/a/x.pt") and same_path(None, None) and same_path(("a",), ("a",))
    assert not same_path("a/x.pt", f"{tmp_path}/b/x.pt") and not same_path(None, "a") and not same_path("", "a")


def test_the_small_recipe_opens_from_any_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("DATA", "/data")
    opened = []
    for folder in (ROOT, ROOT / "configs", tmp_path):
        monkeypatch.chdir(folder)
        opened.append(load_config(ROOT / "configs" / "own-small.yaml"))
    assert opened[0] == opened[1] == opened[2]
    assert Path(opened[0].network.arch).is_file()
    assert absolute_model("ViT-B/16", ROOT) == "ViT-B/16"
