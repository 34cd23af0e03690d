"""Model folders from strangers: nothing runs or is fetched, no file outside is read, and refusals cost nothing."""

import copy
import gzip
import json
import os
import socket
from dataclasses import replace

import pytest
from tiny import CONFIG, PIXELS, write_clip

from text4vis.config.schema import ConfigError, NetworkConfig
from text4vis.model import strangers
from text4vis.model.sources import find_source
from text4vis.model.tokenizing import Tokenizer
from text4vis.model.towers import build_towers


@pytest.fixture(autouse=True)
def _no_network(monkeypatch):
    def refuse(*_: object) -> None:
        raise AssertionError("a stranger's folder made a call")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


def write_folder(folder, config=CONFIG, preprocess=PIXELS):
    write_clip(folder).unlink()
    path = folder / "open_clip_config.json"
    path.write_text(json.dumps({"model_cfg": config, "preprocess_cfg": preprocess}))
    return NetworkConfig(arch=f"local-dir:{folder}", init=False)


def changed(key: str, value: object) -> dict:
    config = copy.deepcopy(CONFIG)
    *sections, name = key.split(".")
    place = config
    for section in sections:
        place = place[section]
    place[name] = value
    return config


def refusal(folder, config=CONFIG, preprocess=PIXELS) -> str:
    with pytest.raises(ConfigError) as error:
        build_towers(write_folder(folder, config, preprocess))
    assert "\n" not in str(error.value) and "Traceback" not in str(error.value)
    return str(error.value)


def test_such_a_folder_is_read_where_nothing_is_wrong(tmp_path):
    assert build_towers(write_folder(tmp_path)).embed_dim == 64


@pytest.mark.parametrize("value", [10**12, -1, 0, 1.5, float("nan"), float("inf"), True, "64", [], {"a": 1}])
@pytest.mark.parametrize("key", ["embed_dim", "vision_cfg.width", "vision_cfg.patch_size", "text_cfg.vocab_size"])
def test_numbers_out_of_range_are_named(tmp_path, key, value):
    message = refusal(tmp_path, changed(key, value))
    assert key in message and str(tmp_path) in message
    assert "expected a whole number from 1 to" in message or "it lacks embed_dim" in message


@pytest.mark.parametrize("key", ["vision_cfg.layers", "vision_cfg.image_size"])
@pytest.mark.parametrize("value", [[3, -1, 1, 1], [1] * 1000, [10**9, 10**9]])
def test_lists_of_numbers_are_looked_at(tmp_path, key, value):
    assert key in refusal(tmp_path, changed(key, value))


@pytest.mark.parametrize(("key", "value"), [
    ("vision_cfg", {"layers": 512, "width": 32_768, "patch_size": 32, "image_size": 224}),
    ("text_cfg", {"layers": 512, "width": 32_768, "heads": 8, "context_length": 77, "vocab_size": 1000}),
    ("vision_cfg", {"layers": [512, 512, 512, 512], "width": 4096, "image_size": 224}),
    ("vision_cfg", {"layers": 1, "width": 32_768, "patch_size": 1, "image_size": 4096}),
])  # fmt: skip
def test_a_model_larger_than_memory_is_refused_before_it_is_built(tmp_path, key, value):
    assert "of memory; is the file damaged?" in refusal(tmp_path, {**CONFIG, key: value})


@pytest.mark.parametrize("name", ["../../x", "/etc", "a/../../b", "~/x", "..\\x", "a\nb", 5, ["x"]])
@pytest.mark.parametrize("key", ["hf_model_name", "hf_tokenizer_name", "tokenizer_kwargs.bpe_path"])
def test_names_that_lead_out_of_the_folder_are_refused(tmp_path, key, name):
    message = refusal(tmp_path, changed(f"text_cfg.{key}", name))
    assert f"text_cfg.{key}: " in message
    assert "leads out of the model's folder; put the file into it" in message or "is no name of a file" in message


@pytest.mark.parametrize("name", ["hf-hub:evil/model", "hf_hub:evil/model", "local-dir:/tmp/x", "../x", 7, ["x"]])
def test_a_timm_name_fetches_nothing(tmp_path, name):
    assert "vision_cfg.timm_model_name" in refusal(tmp_path, changed("vision_cfg.timm_model_name", name))


@pytest.mark.parametrize("name", ["hf-hub:../../x", "hf-hub:a/../../b", "hf-hub:/etc/passwd", "hf-hub:a\nb"])
def test_names_of_repositories_that_are_none(name):
    with pytest.raises(ConfigError, match=r"network\.arch"):
        find_source(NetworkConfig(arch=name))


@pytest.mark.parametrize(("name", "value"), [
    ("mean", [0.5, 0.5]), ("mean", "x"), ("mean", [0.5, float("nan"), 0.5]), ("std", [0, 1, 1]), ("std", [1, 1, 1e9]),
    ("interpolation", "lanczos"), ("interpolation", {}), ("resize_mode", "x"), ("resize_mode", 5),
])  # fmt: skip
def test_pixels_that_are_none_are_named(tmp_path, name, value):
    assert f"preprocess_cfg.{name}: " in refusal(tmp_path, preprocess={**PIXELS, name: value})


@pytest.mark.parametrize("kind", ["deep", "large", "pipe", "device", "folder"])
def test_a_configuration_that_never_ends_is_refused(tmp_path, kind):
    network = write_folder(tmp_path)
    path = tmp_path / "open_clip_config.json"
    path.unlink()
    if kind == "deep":
        path.write_text("[" * 100_000)
    elif kind == "large":
        with path.open("wb") as file:
            file.truncate(1 << 40)  # takes no room
    elif kind == "pipe":
        os.mkfifo(path)
    elif kind == "device":
        path.symlink_to("/dev/zero")
    else:
        path.mkdir()
    with pytest.raises(ConfigError, match=r"open_clip_config\.json"):
        find_source(network)


def test_a_vocabulary_that_grows_is_refused(tmp_path, monkeypatch):
    network = write_folder(tmp_path)
    monkeypatch.setattr(strangers, "MOST_VOCABULARY_BYTES", 1 << 20)
    with gzip.open(tmp_path / "tiny-bpe.txt.gz", "wb") as file:
        file.write(bytes(3 << 20))
    with pytest.raises(ConfigError, match=r"bpe_path: .*tiny-bpe\.txt\.gz has more than 1048576 bytes"):
        build_towers(network)


def test_weights_that_are_no_file_are_not_opened(tmp_path):
    network = replace(write_folder(tmp_path), init=True)
    (tmp_path / "tiny.safetensors").unlink()
    os.mkfifo(tmp_path / "open_clip_model.safetensors")
    with pytest.raises(ConfigError, match="holds no weights"):
        find_source(network)


CODE = "import pathlib\npathlib.Path({!r}).write_text('')\nclass Evil:\n    pass\n"


def test_code_of_an_encoder_is_never_run(tmp_path):
    pytest.importorskip("transformers")
    encoder, sprung = tmp_path / "own", tmp_path / "sprung"
    config = changed("text_cfg.hf_model_name", "own")
    network = write_folder(tmp_path, config)
    encoder.mkdir()
    (encoder / "evil.py").write_text(CODE.format(str(sprung)))
    auto = {"AutoConfig": "evil.Evil", "AutoModel": "evil.Evil", "AutoTokenizer": ["evil.Evil", None]}
    (encoder / "config.json").write_text(json.dumps({"model_type": "evil", "auto_map": auto}))
    with pytest.raises(ConfigError, match="the configuration of its text tower own cannot be read"):
        build_towers(network)
    assert not sprung.exists()


def test_code_of_a_tokenizer_is_never_run(tmp_path):
    pytest.importorskip("transformers")
    sprung = tmp_path / "sprung"
    (tmp_path / "evil.py").write_text(CODE.format(str(sprung)))
    (tmp_path / "tokenizer.json").write_text("{}")
    facts = {"tokenizer_class": "Evil", "auto_map": {"AutoTokenizer": ["evil.Evil", None]}, "trust_remote_code": True}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(facts))
    with pytest.raises(ConfigError, match="its tokenizer"):
        Tokenizer({"hf_tokenizer_name": "own", "context_length": 8}, tmp_path, "arch")
    assert not sprung.exists()


def test_an_encoder_larger_than_memory_is_refused(tmp_path):
    pytest.importorskip("transformers")
    network = write_folder(tmp_path, changed("text_cfg.hf_model_name", "own"))
    (tmp_path / "own").mkdir()
    values = {"model_type": "roberta", "hidden_size": 32_768, "num_hidden_layers": 1000, "intermediate_size": 65_536}
    (tmp_path / "own" / "config.json").write_text(json.dumps(values))
    with pytest.raises(ConfigError, match=r"own/config\.json: its layers and widths make"):
        build_towers(network)
