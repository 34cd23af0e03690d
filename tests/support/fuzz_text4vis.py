"""What tests/support/fuzz.py feeds the parsers of `text4vis`."""

from __future__ import annotations

import hashlib
import io
import json
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
import yaml
from fuzz_changes import JSON_TOKENS, Target, from_text, written
from open_clip.tokenizer import SimpleTokenizer
from safetensors.torch import save
from stub_index import build as build_stub
from stub_index import vectors

from text4vis.classifier.embeddings import file_classifier
from text4vis.cluster import distributed
from text4vis.config.loading import load_config
from text4vis.config.schema import Config, ConfigError, NetworkConfig
from text4vis.evaluation import comparison
from text4vis.evaluation import embedding as evaluation
from text4vis.model import tokenizing
from text4vis.model.tensors import read_weights
from text4vis.model.tokenizing import Tokenizer
from text4vis.model.towers import build_towers
from text4vis.saved import checkpoint
from text4vis.saved.checkpoint import CheckpointError
from text4vis.saved.weights import read_index, read_text4vis
from text4vis.serving.captions import read_captions
from text4vis.serving.fitted import fitted_of
from text4vis.serving.index_store import SearchError, remembered_model
from text4vis.serving.jobs import WorkList, WorkListError
from text4vis.serving.search import SearchIndex
from text4vis.training.logs import _step_of


def _search_seeds(folder: Path) -> list[bytes]:
    """The lines of an index of three files, one of them broken, whose vectors have a fixed name."""
    for name, content in (("a", "1 3"), ("b", "2 3"), ("c", "none")):
        (folder / name).write_text(content)
    build_stub(folder / "searched", [str(folder / name) for name in "abc"])
    (part,) = (folder / "searched" / "vectors").iterdir()
    fixed = part.rename(part.with_stem("0" * 32))
    return [(folder / "searched" / "videos.jsonl").read_bytes().replace(part.name.encode(), fixed.name.encode())]


def _parse_search(data: bytes, folder: Path) -> None:
    index = folder / "searched"
    if not index.exists():
        _search_seeds(folder)
    (index / "videos.jsonl").write_bytes(data)
    opened = SearchIndex.open(index)
    opened.nearest(vectors(0, 1, opened.catalogue.settings.dims)[0])


def _config_seeds(folder: Path) -> list[bytes]:
    settings = {"seed": 1, "data": {"train": ["a", "b"], "crop_area": [0.2, 1.0]}, "solver": {"type": "cosine"}}
    return [
        yaml.safe_dump(settings).encode(),
        b"# with comments\r\nnetwork: {arch: ViT-B-32, template: 'a {}.'}\r\nsolver: {lr: 1.0e-3, epochs: 3}\r\n",
    ]


YAML_TOKENS = (
    b"&a ",
    b"*a",
    b"!!python/object:os.x ",
    b"!!int ",
    b"!!timestamp ",
    b"!!binary ",
    b"!!bool ",
    b"<<: ",
    b"? ",
    b"- ",
    b": ",
    b"{",
    b"[",
    b"\n  ",
    b"|\n",
    b"---\n",
    b"2001-99-99",
    b"0b",
    b"1:99:99",
    b".inf",
    b"base: x\n",
    b"[" * 400,
    b"$HOME",
    b"${X}",
    b"data:\n",
    b"'",
    b'"',
    b"1" * 5000,
)


def _parse_override(data: bytes, folder: Path) -> None:
    recipe = folder / "empty.yaml"
    recipe.write_text("seed: 1\n")
    load_config(recipe, [data.decode("utf-8", "surrogateescape")])


def _state_seeds(folder: Path) -> list[bytes]:
    (folder / checkpoint.WEIGHTS).write_bytes(b"weights")
    files = {checkpoint.WEIGHTS: hashlib.sha256(b"weights").hexdigest()}
    state = checkpoint.State(3, 12, 4, "f" * 64, Config().to_dict(), ["a", "b"], figures={"top1": 50.0}, files=files)
    return [json.dumps(asdict(state)).encode()]


def _parse_state(data: bytes, folder: Path) -> None:
    """With the digest that belongs to the content, as a stranger would write it."""
    try:
        values = json.loads(data)
        values["sha256"] = checkpoint._digest(values)
        data = json.dumps(values).encode()
    except (ValueError, TypeError, RecursionError):
        pass
    (folder / "state.json").write_bytes(data)
    checkpoint.verify(folder)


def _report_seeds(folder: Path) -> list[bytes]:
    rng = np.random.default_rng(0)
    features, classes = rng.standard_normal((8, 1, 6)), rng.standard_normal((4, 6))
    labels = np.arange(8) % 4
    found = evaluation.figures(features, labels, classes, list("abcd"), class_splits={"one": np.array([0, 1])})
    card = {"data_fingerprint": "f", "views": {"clips": 1}, "skipped": [{"id": 3, "name": "v", "reason": "r"}]}
    return [json.dumps({**card, **found}).encode()]


def _parse_report(path: Path) -> None:
    report = comparison.read_report(path)
    comparison.compare(report, report)
    comparison.summarise([report, report])


TENSORS = {"visual.a": torch.arange(6.0).reshape(2, 3), "visual.b": torch.zeros(2, dtype=torch.float16)}


def _torch_bytes(content: Any, **options: Any) -> bytes:
    stream = io.BytesIO()
    torch.save(content, stream, **options)
    return stream.getvalue()


def _checkpoint_seeds(folder: Path) -> list[bytes]:
    content = {"epoch": 3, "model_state_dict": TENSORS, "fusion_model_state_dict": {"x": torch.ones(2)}}
    return [_torch_bytes(content), _torch_bytes(content, _use_new_zipfile_serialization=False)]


def _classifier_seeds(folder: Path) -> list[bytes]:
    stream = io.BytesIO()
    rows = torch.eye(3, 4)
    np.save(stream, rows.numpy())
    named = save({"class_embeddings": rows}, {"class_names": json.dumps(list("abc"))})
    return [stream.getvalue(), named, _torch_bytes({"class_embeddings": rows, "class_names": list("abc")})]


def _parse_classifier(data: bytes, folder: Path) -> None:
    suffix = ".npy" if data.startswith(b"\x93") else ".pt" if data.startswith(b"PK") else ".safetensors"
    path = folder / f"classifier{suffix}"
    path.write_bytes(data)
    file_classifier(path, ["a", "b", "c"], 4)


def _features_seeds(folder: Path) -> list[bytes]:
    tensors = {"embeddings_NVD": torch.ones(3, 1, 2), "labels_N": torch.arange(3), "ids_N": torch.arange(3)}
    return [save(tensors, {evaluation.FEATURES: json.dumps({"data": "d"})})]


# Search indexes: a line, the settings, the note of the model.


def _line_seeds(folder: Path) -> list[bytes]:
    lines = _search_seeds(folder)[0].splitlines()
    return [json.dumps([json.loads(line) for line in lines]).encode()]


def _parse_lines(data: bytes, folder: Path) -> None:
    """The values of a JSON list as the lines of an index; what is none goes in as it is."""
    with suppress(ValueError, TypeError, RecursionError):
        data = b"".join(json.dumps(value).encode() + b"\n" for value in json.loads(data))
    _parse_search(data, folder)
    (folder / "searched" / "model.json").write_bytes(data)
    remembered_model(folder / "searched")


# Prediction lists and other work lists.

_SETTINGS = {"model": "a" * 8, "classes": ["x", "y"], "top": 5}


def _work_seeds(folder: Path) -> list[bytes]:
    records = [
        {"video": "a.mp4", "top": [["x", 0.9]], "frames": [0, 3]},
        {"video": "b.mp4", "error": "b.mp4: no such file"},
    ]
    path = folder / "seed.jsonl"
    with WorkList(path, ["a.mp4", "b.mp4", "c.mp4"], _SETTINGS, key="video") as work:
        work.append(records)
    return [path.read_bytes()]


def _parse_work(path: Path) -> None:
    """Opened, gone on with, and opened again: an item that had a record keeps it."""
    before = path.read_bytes()
    try:
        with WorkList(path, ["a.mp4", "b.mp4", "c.mp4"], _SETTINGS, key="video") as work:
            for video in work.claim():
                work.append([{"video": video}])
            assert not work.is_unfinished()
    except WorkListError:
        assert path.read_bytes() == before, "a refused file was changed"
        raise
    kept = before[: before.rfind(b"\n") + 1]
    assert path.read_bytes().startswith(kept), "records that were there are gone"


def _parse_captions(path: Path) -> None:
    read_captions(path, ["/v/a.mp4", "/v/b/a.mp4", "/v/c.mkv"])


# Model folders.

_PREPROCESS = {"mean": [0.5, 0.5, 0.5], "std": [0.5, 0.5, 0.5], "interpolation": "bicubic", "resize_mode": "shortest"}
_VISION = {"layers": 1, "width": 64, "patch_size": 16, "image_size": 32, "head_width": 64}
_TEXT = {"context_length": 8, "vocab_size": 49408, "width": 8, "heads": 1, "layers": 1}


def _model_seeds(folder: Path) -> list[bytes]:
    plain = {"embed_dim": 8, "vision_cfg": _VISION, "text_cfg": _TEXT}
    resnet = {**plain, "vision_cfg": {**_VISION, "layers": [1, 1, 1, 1], "width": 8}}
    other = {**plain, "quick_gelu": True, "custom_text": True, "init_logit_bias": -10}
    options = {"pool_type": "argmax", "proj_type": "linear", "no_causal_mask": True}
    other |= {"text_cfg": {**_TEXT, **options, "tokenizer_kwargs": {"clean": "canonicalize"}}}
    return [
        json.dumps({"model_cfg": config, "preprocess_cfg": _PREPROCESS}).encode() for config in (plain, resnet, other)
    ]


class _QuickTokenizer(SimpleTokenizer):
    """Reads a vocabulary once, which takes 0.2 s."""

    _read: ClassVar[dict[str, dict[str, Any]]] = {}

    def __init__(self, **arguments: Any) -> None:
        if (key := repr(arguments)) in self._read:
            self.__dict__.update(self._read[key])
            return
        super().__init__(**arguments)
        if len(self._read) < 4:
            self._read[key] = dict(self.__dict__)


def _parse_model(data: bytes, folder: Path) -> None:
    """A stranger's folder without weights."""
    tokenizing.SimpleTokenizer = _QuickTokenizer
    place = folder / "model"
    place.mkdir(exist_ok=True)
    (place / "open_clip_config.json").write_bytes(data)
    network = NetworkConfig(arch=f"local-dir:{place}", init=False, activation="gelu")
    towers = build_towers(network)
    towers.text.tokenize(["a video"])


def _tokenizer_seeds(folder: Path) -> list[bytes]:
    from tokenizers import Tokenizer as Made
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace

    words = {word: number for number, word in enumerate(["[PAD]", "[UNK]", "a", "video", "of", "person"])}
    made = Made(WordLevel(words, unk_token="[UNK]"))
    made.pre_tokenizer = Whitespace()
    made.save(str(folder / "made.json"))
    return [(folder / "made.json").read_bytes()]


def _parse_tokenizer(data: bytes, folder: Path) -> None:
    place = folder / "tokens"
    place.mkdir(exist_ok=True)
    (place / "tokenizer.json").write_bytes(data)
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "pad_token": "[PAD]", "unk_token": "[UNK]"}
    (place / "tokenizer_config.json").write_text(json.dumps(settings))
    Tokenizer({"hf_tokenizer_name": "own", "context_length": 8}, place, "arch").facts()


def _parse_tokenizer_settings(data: bytes, folder: Path) -> None:
    place = folder / "settings"
    if not place.exists():
        place.mkdir()
        (place / "tokenizer.json").write_bytes(_tokenizer_seeds(folder)[0])
    (place / "tokenizer_config.json").write_bytes(data)
    Tokenizer({"hf_tokenizer_name": "own", "context_length": 8}, place, "arch").facts()


# Checkpoints with adapters, and what exports say of themselves.


def _adapter_seeds(folder: Path) -> list[bytes]:
    low = {"lora_A.default.weight": torch.ones(2, 6), "lora_B.default.weight": torch.ones(4, 2)}
    layer = {"visual.mlp.base_layer.weight": torch.ones(4, 6), "visual.mlp.base_layer.bias": torch.ones(4)}
    tensors = layer | {f"visual.mlp.{name}": value for name, value in low.items()} | {"logit_scale": torch.ones(1)}
    network = {"adapter": "lora", "adapter_rank": 2, "adapter_alpha": 4}
    return [save(tensors, {"network": json.dumps({"network": network})})]


def _parse_adapters(data: bytes, folder: Path) -> None:
    """A checkpoint with these tensors, and the configuration that their metadata hold in place of state.json's."""
    place = folder / "adapted"
    place.mkdir(exist_ok=True)
    (place / checkpoint.WEIGHTS).write_bytes(data)
    try:
        size = int.from_bytes(data[:8], "little")
        config = json.loads(json.loads(data[8 : 8 + size])["__metadata__"]["network"])
    except (ValueError, TypeError, KeyError, RecursionError):
        config = {"network": {"adapter_rank": 2, "adapter_alpha": 4}}
    values = asdict(checkpoint.State(3, 12, 4, "f" * 64, config, ["a", "b"]))
    values["sha256"] = checkpoint._digest(values)
    (place / "state.json").write_text(json.dumps(values))
    checkpoint.read_parts(place)


def _card_seeds(folder: Path) -> list[bytes]:
    answers = [{"accuracy": 90.0, "threshold": 0.5}, {"accuracy": 95.0, "threshold": None}]
    calibration = {"temperature": 1.5, "answers": answers, "sets": [{"coverage": 90.0, "threshold": 0.2}]}
    return [json.dumps({"evaluation": {"calibration": calibration}, "figures": {"top1": 50.0}}).encode()]


def _parse_card(data: bytes, folder: Path) -> None:
    try:
        card = json.loads(data)
    except (ValueError, RecursionError):
        return
    if isinstance(card, dict):
        fitted_of(card, Config(), folder)


def _parse_two_reports(data: bytes, folder: Path) -> None:
    """Compared with a sound one."""
    (folder / "other.json").write_bytes(data)
    if not (folder / "sound.json").exists():
        (folder / "sound.json").write_bytes(_report_seeds(folder)[0])
    sound, other = (comparison.read_report(folder / f"{name}.json") for name in ("sound", "other"))
    for pair in ((sound, other), (other, sound)):
        comparison.compare(*pair)
        comparison.summarise(list(pair))


TARGETS = {
    "config": Target(_config_seeds, written("config.yaml", load_config), (ConfigError,), YAML_TOKENS),
    "override": Target(
        lambda folder: [
            b"data.batch_size=8",
            b"solver.betas=[0.9, 0.98]",
            b"data.randaug.N=2",
            b"network.template=a {}",
        ],
        _parse_override,
        (ConfigError,),
        (*YAML_TOKENS, b"=", b".", b"data."),
    ),
    "search-index": Target(_search_seeds, _parse_search, (SearchError,), JSON_TOKENS, False),
    "state": Target(_state_seeds, _parse_state, (CheckpointError,), JSON_TOKENS, True),
    "report": Target(_report_seeds, written("report.json", _parse_report), (ConfigError,), JSON_TOKENS, True),
    "metrics": Target(
        lambda folder: [b'{"kind": "train", "step": 3, "loss": 1.5}'], from_text(_step_of), (), JSON_TOKENS, True
    ),
    "export": Target(
        lambda folder: [
            json.dumps(
                {
                    "format": "text4vis-export-1",
                    "network": {},
                    "num_segments": 8,
                    "class_names": ["a"],
                    "card": {},
                    "config": {},
                }
            ).encode()
        ],
        written("export.json", lambda path: read_index(path.parent)),
        (ConfigError,),
        JSON_TOKENS,
        True,
    ),
    "safetensors": Target(
        lambda folder: [save(TENSORS)],
        written("weights.safetensors", lambda path: read_weights(path, "key")),
        (ConfigError,),
        (*JSON_TOKENS, b"data_offsets", b"F32", b"shape"),
    ),
    "weights": Target(
        lambda folder: [_torch_bytes(TENSORS), _torch_bytes({"state_dict": TENSORS})],
        written("weights.pt", lambda path: read_weights(path, "key")),
        (ConfigError,),
        (b"PK\x03\x04", b"c__builtin__\neval\n"),
    ),
    "checkpoint": Target(
        _checkpoint_seeds,
        written("model.pt", read_text4vis),
        (ConfigError,),
        (b"PK\x05\x06", b"cos\nsystem\n", b"R.", b"\x80\x02"),
    ),
    "classifier": Target(
        _classifier_seeds, _parse_classifier, (ConfigError,), (b"'descr'", b"|O", b"(3, 4)", b"9" * 12, b"class_names")
    ),
    "features": Target(
        _features_seeds,
        written("f.safetensors", lambda path: evaluation._read_features(path, {"data": "d"})),
        (ConfigError,),
        (*JSON_TOKENS, b"__metadata__"),
    ),
    "slurm": Target(
        lambda folder: [b"4(x2),3", b"gpu[07-09,12],cpu1"],
        from_text(lambda text: (distributed._slurm_first_node(text), distributed._slurm_tasks_per_node(text))),
        (),
        (b"(x", b")", b"[", b"]", b",", b"-", b"9" * 9),
    ),
    "search-lines": Target(_line_seeds, _parse_lines, (SearchError,), JSON_TOKENS, True),
    "work-list": Target(_work_seeds, written("work.jsonl", _parse_work), (WorkListError,), (*JSON_TOKENS, b"\n")),
    "captions": Target(
        lambda folder: [b'video,caption\nc.mkv,"a dog, running"\nb/a.mp4,x\n', b"video_id,x,sentence\r\nc,,y\r\n"],
        written("captions.csv", _parse_captions),
        (SearchError,),
        (b'"', b"\n", b",", b"\xef\xbb\xbf", b"../", b"/", b"\r"),
    ),
    "mixture": Target(
        lambda folder: [
            yaml.safe_dump({"data": {"train": [{"path": "a", "weight": 0.5}, {"path": "b", "weight": 2}]}}).encode()
        ],
        written("mixture.yaml", load_config),
        (ConfigError,),
        (*YAML_TOKENS, b"weight: ", b"path: "),
    ),
    "model-config": Target(_model_seeds, _parse_model, (ConfigError,), JSON_TOKENS, True),
    "tokenizer": Target(_tokenizer_seeds, _parse_tokenizer, (ConfigError,), JSON_TOKENS, True),
    "tokenizer-config": Target(
        lambda folder: [
            json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", "pad_token": "[PAD]", "auto_map": {}}).encode()
        ],
        _parse_tokenizer_settings,
        (ConfigError,),
        JSON_TOKENS,
        True,
    ),
    "adapters": Target(_adapter_seeds, _parse_adapters, (CheckpointError,), (*JSON_TOKENS, b"adapter_rank", b"lora_A")),
    "card": Target(_card_seeds, _parse_card, (ConfigError,), JSON_TOKENS, True),
    "two-reports": Target(_report_seeds, _parse_two_reports, (ConfigError,), JSON_TOKENS, True),
}
