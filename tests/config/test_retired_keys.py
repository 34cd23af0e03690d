"""Keys of earlier versions: errors with a fix in recipes, ignored in saved configurations."""

import pytest

from text4vis.config.loading import config_from_dict, load_config
from text4vis.config.schema import Config, ConfigError


def test_a_former_key_is_explained_in_a_recipe_and_ignored_in_a_saved_configuration(tmp_path):
    saved = Config().to_dict()
    saved["data"]["io_threads"] = 16
    assert config_from_dict(saved, "export.json") == Config()
    (tmp_path / "c.yaml").write_text("data: {io_threads: 16}")
    with pytest.raises(ConfigError, match=r"data.io_threads: not used here .*data.requests_in_flight"):
        load_config(tmp_path / "c.yaml")
