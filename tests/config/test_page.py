"""docs/config.md is what is generated, and --print-config is a recipe that gives the same configuration."""

from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from text4vis.config.keys import schema
from text4vis.config.loading import config_from_dict, load_config
from text4vis.config.page import config_page, print_config
from text4vis.config.schema import ConfigError

ROOT = Path(__file__).resolve().parents[2]


def test_the_page_in_docs_is_the_generated_one():
    written = (ROOT / "docs" / "config.md").read_text(encoding="utf-8")
    assert written == config_page(), "run `python tools/document_config.py`"


def test_every_key_says_what_it_means():
    rows = {item.split("`")[1]: item for item in config_page().split("\n- ")[1:]}
    assert list(rows) == [key.name for key in schema()]
    assert all(key.meaning for key in schema())
    assert "number > 0" in rows["solver.lr"] and "`1`, `3`, `5`, `10`" in rows["data.test_crops"]


@pytest.mark.parametrize("recipe", sorted(ROOT.glob("configs/**/*.yaml")), ids=lambda path: path.stem)
def test_the_printed_configuration_gives_the_same_one(recipe, monkeypatch):
    monkeypatch.setenv("DATA", "/data")
    overrides = ["data.train=[a, b]", "solver.lr=1e-5", "data.dataset='yes: {}'"]
    printed = print_config(recipe, overrides)
    assert config_from_dict(yaml.safe_load(printed), "printed") == load_config(recipe, overrides)
    origin = {line.split(":")[0].strip(): line.rpartition("# ")[2] for line in printed.splitlines() if "#" in line}
    assert origin["lr"] == "--set"
    assert any(value.endswith(recipe.name) for value in origin.values()) and "default" in origin.values()


@given(st.text(max_size=20))
def test_any_text_survives_being_printed(tmp_path_factory, text):
    path = tmp_path_factory.mktemp("page") / "c.yaml"
    path.write_text(yaml.safe_dump({"data": {"dataset": text}}), encoding="utf-8")
    try:
        config = load_config(path)
    except ConfigError:  # a `$NAME` of nothing
        return
    assert config_from_dict(yaml.safe_load(print_config(path)), "printed") == config
