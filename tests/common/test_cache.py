"""The folder of the cache: the configuration's, or the usual one, or with a warning one for temporary files."""

import logging
import tempfile
from pathlib import Path

import pytest

from text4vis.common import cache
from text4vis.config.schema import Config, DataConfig


@pytest.fixture(autouse=True)
def fresh(tmp_path, monkeypatch):
    """Each test asks anew; temporary files lie below the test's folder."""
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    (tmp_path / "temporary").mkdir()
    cache._default.cache_clear()
    yield
    cache._default.cache_clear()


def denied(monkeypatch, *folders):
    """These cannot be written, whoever runs the test."""
    access = cache.os.access
    monkeypatch.setattr(cache.os, "access", lambda path, mode: Path(path) not in folders and access(path, mode))


def test_the_configuration_s_folder_counts():
    assert cache.cache_dir(Config(data=DataConfig(cache_dir="/x"))) == Path("/x")


def test_the_usual_folder_is_the_default(tmp_path, monkeypatch, caplog):
    assert cache.cache_dir(Config()) == tmp_path / "home" / ".cache" / "text4vis"
    cache._default.cache_clear()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache.cache_dir(Config()) == tmp_path / "xdg" / "text4vis"
    cache._default.cache_clear()
    (tmp_path / "xdg").write_text("a file")
    assert cache.cache_dir(Config()) == tmp_path / "home" / ".cache" / "text4vis"
    assert not caplog.records


def test_a_home_that_cannot_be_written_is_said_once(tmp_path, monkeypatch, caplog):
    denied(monkeypatch, tmp_path)
    with caplog.at_level(logging.WARNING):
        folder = cache.cache_dir(Config())
        assert folder == cache.cache_dir(Config())
    assert folder.parent == tmp_path / "temporary" and folder.stat().st_mode & 0o777 == 0o700
    (record,) = caplog.records
    assert f"{tmp_path}/home/.cache/text4vis cannot be written" in record.message and "data.cache_dir" in record.message


def test_without_a_home_it_is_a_temporary_folder(tmp_path, monkeypatch, caplog):
    def unknown(_=None):
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(cache.Path, "home", unknown)
    assert cache.cache_dir(Config()).parent == tmp_path / "temporary"
    assert "there is no home (HOME is not set)" in caplog.text


def test_a_temporary_folder_that_others_may_write_is_not_used(tmp_path, monkeypatch):
    denied(monkeypatch, tmp_path)
    usual = cache.cache_dir(Config())
    usual.chmod(0o777)
    cache._default.cache_clear()
    other = cache.cache_dir(Config())
    assert other != usual and other.parent == usual.parent and other.stat().st_mode & 0o777 == 0o700
    usual.rmdir()
    usual.symlink_to(tmp_path)
    cache._default.cache_clear()
    assert cache.cache_dir(Config()) not in {usual, other, tmp_path}
