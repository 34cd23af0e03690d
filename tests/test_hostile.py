"""Files from strangers: nothing in them is executed, leads out of its place, fills the memory, or marks the screen."""

from __future__ import annotations

import gzip
import io
import json
import logging
import os
import pickle
import tarfile
import time
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from fuzz_text4vis import _report_seeds
from launch import finish, run, start
from project import EVALUATE, TRAIN
from shard_data import make_dataset, serve

from shards.annotations import parse_annotations, parse_labels
from shards.checker import check_datasets
from shards.format import ShardError
from shards.index import read_local_manifest
from shards.reader import open_dataset
from shards.text import redact_text, shown
from text4vis.classifier.embeddings import file_classifier
from text4vis.config.loading import MAX_YAML_BYTES, load_config
from text4vis.config.schema import Config, ConfigError, DataConfig
from text4vis.evaluation.embedding import _read_features
from text4vis.model.tensors import read_weights
from text4vis.saved import checkpoint
from text4vis.saved.checkpoint import CheckpointError
from text4vis.saved.weights import read_text4vis
from text4vis.training.logs import log_to, table


class Trap:
    """Leaves a file behind when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return os.makedirs, (str(self.path), 0o777, True)


READERS = {
    "weights": (lambda path: read_weights(path, "network.pretrained"), ConfigError),
    "checkpoint of the original": (read_text4vis, ConfigError),
    "classifier": (lambda path: file_classifier(path, ["a"], 4), ConfigError),
    "features": (lambda path: _read_features(path, {}), ConfigError),
}


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("kind", ["torch", "torch, old", "pickle", "pickle named safetensors", "array"])
def test_pickled_code_is_never_run(tmp_path, reader, kind):
    sprung, path = tmp_path / "sprung", tmp_path / "file.pt"
    content = {"model_state_dict": {"visual.a": Trap(sprung)}, "class_embeddings": Trap(sprung), "x": torch.ones(1)}
    if kind.startswith("torch"):
        torch.save(content, path, _use_new_zipfile_serialization=kind == "torch")
    elif kind == "array":
        path = path.with_suffix(".npy")
        with path.open("wb") as file:
            np.save(file, np.array([Trap(sprung)], object), allow_pickle=True)
    else:
        path = path.with_suffix(".safetensors") if "safetensors" in kind else path
        path.write_bytes(pickle.dumps(content))
    read, error = READERS[reader]
    with pytest.raises(error, match=path.name):
        read(path)
    assert not sprung.exists()
    torch.load(path, weights_only=False) if kind.startswith("torch") else None
    assert sprung.exists() or not kind.startswith("torch"), "the trap is none"


def test_archives_that_grow_are_refused(tmp_path):
    """A torch file holds its tensors as they are; a compressed one of 100 kB could take any amount of memory."""
    torch.save({"a": torch.zeros(20_000_000, dtype=torch.uint8)}, tmp_path / "plain.pt")
    bomb = tmp_path / "bomb.pt"
    with zipfile.ZipFile(tmp_path / "plain.pt") as plain, zipfile.ZipFile(bomb, "w", zipfile.ZIP_DEFLATED) as packed:
        for name in plain.namelist():
            packed.writestr(name, plain.read(name))
    assert bomb.stat().st_size < 100_000
    with pytest.raises(ConfigError, match=r"bomb\.pt would grow to \d+ bytes"):
        read_weights(bomb, "key")
    read_weights(tmp_path / "plain.pt", "key")


@pytest.mark.parametrize("tensor", [
    torch.ones(1).expand(10**6, 10**6), torch.empty(3, 10**12, device="meta"),
    torch.sparse_coo_tensor(torch.zeros(2, 1, dtype=torch.int64), torch.ones(1), (10**6, 10**6)),
])  # fmt: skip
def test_tensors_that_are_not_what_they_seem_are_refused(tmp_path, tensor):
    path = tmp_path / "t.pt"
    torch.save({"class_embeddings": tensor}, path)
    with pytest.raises(ConfigError, match=r"t\.pt"):
        read_weights(path, "key")
    with pytest.raises(ConfigError, match=r"t\.pt must hold one tensor"):
        file_classifier(path, ["a"], tensor.shape[1])


def test_headers_that_promise_too_much_are_refused_before_memory_is_taken(tmp_path):
    array, tensors = tmp_path / "huge.npy", tmp_path / "huge.safetensors"
    with array.open("wb") as file:
        np.lib.format.write_array_header_1_0(file, {"descr": "<f4", "fortran_order": False, "shape": (2**40, 4)})
    header = json.dumps({"a": {"dtype": "F32", "shape": [2**40, 4], "data_offsets": [0, 2**44]}}).encode()
    tensors.write_bytes(len(header).to_bytes(8, "little") + header)
    longer = tmp_path / "longer.safetensors"
    longer.write_bytes((2**62).to_bytes(8, "little") + header)
    for path in (array, tensors, longer):
        with pytest.raises(ConfigError, match=f"{path.name} is not readable"):
            file_classifier(path, ["a"], 4)
    for path in (tensors, longer):
        with pytest.raises(ConfigError, match=path.name):
            read_weights(path, "key")


# Texts


@pytest.mark.parametrize("text", [
    "a: &a [x, x]\nb: &b [*a, *a]\nseed: [*b, *b]\n", "a: &a {x: 1}\n<<: *a\n", "[" * 5000, "seed: 2001-99-99\n",
    "seed: !!timestamp x\n", "seed: !!bool x\n", "seed: 1" + "1" * 5000, "seed: !!python/name:os.system\n",
    "seed: !!int \n", "seed: !!python/object/new:os.system [x]\n", "? [a]\n: b\n",
])  # fmt: skip
def test_yaml_is_plain_values_only(tmp_path, text):
    recipe = tmp_path / "c.yaml"
    recipe.write_text(text)
    with pytest.raises(ConfigError, match=r"c\.yaml: not valid YAML \("):
        load_config(recipe)


def test_yaml_bombs_cost_nothing(tmp_path):
    """Thirty lines that stand for 9**30 values, in a file and on the command line."""
    lines = ["a0: &a0 [x, x]"] + [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]" for n in range(1, 30)]
    recipe = tmp_path / "c.yaml"
    recipe.write_text("\n".join(lines))
    with pytest.raises(ConfigError, match=r"line 2: aliases \(\*name\) are not read"):
        load_config(recipe)
    recipe.write_text("seed: 1\n")
    with pytest.raises(ConfigError, match="aliases"):
        load_config(recipe, ["data.train=[&a x, *a]"])
    recipe.write_text("#" * (MAX_YAML_BYTES + 1))
    with pytest.raises(ConfigError, match="has more than"):
        load_config(recipe)


def test_names_with_control_characters_are_refused(tmp_path):
    (tmp_path / "labels.csv").write_text('id,name\n0,"run\x1b[2J"\n')
    with pytest.raises(ShardError, match=r"labels.csv:2: the name 'run\\x1b\[2J' of class 0 holds a control"):
        parse_labels(tmp_path / "labels.csv")
    (tmp_path / "list.txt").write_text("ok 1 0\nevil\x1b]0;x\x07 1 0\n")
    with pytest.raises(ShardError, match=r"list.txt:2: the path 'evil\\x1b"):
        parse_annotations(tmp_path / "list.txt")
    make_dataset(tmp_path / "data", classes=["a", "b\x1b[31m", "c"])
    with pytest.raises(ShardError, match=r"the class name 'b\\x1b\[31m' holds a control character"):
        open_dataset(str(tmp_path / "data"))


def test_logs_show_neither_escapes_nor_secrets(tmp_path, monkeypatch):
    logger = logging.getLogger("text4vis")
    monkeypatch.setattr(logger, "handlers", [])
    monkeypatch.setattr(logger, "propagate", logger.propagate)
    log_to(tmp_path)
    logger.info("%s", table("settings", {"class": "a\x1b[31m<b>", "data": "https://me:word@h.org/d?sig=key"}))
    logger.warning("two\nlines \u202e https://me:word@h.org/d?sig=key: HTTP 403")
    for handler in logger.handlers:
        handler.close()
    text = (tmp_path / "log.txt").read_text()
    assert "a\\x1b[31m<b>" in text and "\ntwo" not in text and "two\nlines \\u202e https://h.org/d" in text
    assert not [secret for secret in ("\x1b", "\u202e", "word", "key") if secret in text]


def test_a_comparison_shows_no_escapes_of_reports(tmp_path):
    report = json.loads(_report_seeds(tmp_path)[0])
    for row in report["per_class"]:
        row["class"] += "\x1b[2J\u202e\ud800"
    for name in "ab":
        (tmp_path / f"{name}.json").write_text(json.dumps(report | {"weights": f"\x1b[31m{name}"}))
    command = "tools/compare_reports.py", tmp_path / "a.json", tmp_path / "b.json", "--json", tmp_path / "out.json"
    ((code, output),) = finish(start(*command))
    out = json.loads((tmp_path / "out.json").read_text())
    assert code == 0 and "a\x1b[2J\u202e\ud800" in {pair["name"] for pair in out["confused"]}
    assert "| a\\x1b[2J\\u202e\\ud800 " in output and "| \\x1b[31ma" in output
    assert output.replace("\n", "").isprintable()


def test_what_is_kept_of_a_configuration_holds_no_secret(tmp_path):
    data = DataConfig(train=("https://me:word@h.org/part{0..3}?sig=key", "s3://bucket/a#b"), val=("/data/what?@x",))
    kept = Config(data=data).to_dict()["data"]
    assert kept["train"] == ["https://h.org/part{0..3}", "s3://bucket/a#b"] and kept["val"] == ["/data/what?@x"]
    assert "word" not in Config(data=data).to_yaml()


@pytest.mark.parametrize("address", ["https://me:word@[::1/{x}", "https://me:word@h{0..1/?sig=key", "zip://me:word@h/x",
                                     "https://me:word@h::s3://x?sig=key"])  # fmt: skip
def test_refused_addresses_show_no_secret(address):
    with pytest.raises(ShardError) as error:
        open_dataset(address)
    assert "word" not in str(error.value) and "key" not in str(error.value)


def test_foreign_text_of_any_length_is_shown_in_time():
    started = time.process_time()
    assert "word" not in redact_text("x://me:word@" * 20_000 + "{" * 20_000) + shown("a://" * 50_000)
    assert time.process_time() - started < 20


# Data sets


def _hostile_members() -> list[tarfile.TarInfo]:
    members = []
    for name, kind in [("../escaped", tarfile.REGTYPE), ("/tmp/text4vis-escaped", tarfile.REGTYPE),
                       ("link", tarfile.SYMTYPE), ("hard", tarfile.LNKTYPE), ("device", tarfile.CHRTYPE),
                       ("pipe", tarfile.FIFOTYPE), ("000000000.json", tarfile.REGTYPE)]:  # fmt: skip
        info = tarfile.TarInfo(name)
        info.type, info.linkname = kind, "/etc/passwd" if kind in (tarfile.SYMTYPE, tarfile.LNKTYPE) else ""
        info.size = 4 if kind == tarfile.REGTYPE else 0
        members.append(info)
    return members


@pytest.mark.parametrize("place", ["in front", "behind"])
def test_hostile_members_of_a_tar_go_nowhere(tmp_path, place):
    """Shards are read by the index, and never unpacked: what else is in them is found, and has no effect."""
    folder = tmp_path / "in" / "data"
    stored = make_dataset(folder, [2, 1], frame_bytes=30)
    shard = folder / "000000.tar"
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w", format=tarfile.USTAR_FORMAT) as archive:
        for info in _hostile_members():
            archive.addfile(info, io.BytesIO(b"evil") if info.size else None)
    size, extra = shard.stat().st_size, stream.getvalue().rstrip(b"\0")
    extra += bytes(-len(extra) % 512)
    sound = shard.read_bytes()
    changed = (extra + sound if place == "in front" else sound[:-1024] + extra)[:size].ljust(size, b"\0")
    shard.write_bytes(changed)
    before = sorted(tmp_path.rglob("*"))
    report = check_datasets([folder])
    assert not report.sound
    with open_dataset(str(folder), verify=True) as dataset:
        requests = [(0, np.array([0, 1])), (1, np.array([0]))]
        if place == "in front":
            with pytest.raises(ShardError):
                dataset.read_many(requests)
        else:
            assert [bytes(frame) for frame in dataset.read_many(requests)[0]] == stored[0]
    assert sorted(tmp_path.rglob("*")) == before and not Path("/tmp/text4vis-escaped").exists()


def test_a_manifest_of_absurd_size_is_not_read(tmp_path):
    make_dataset(tmp_path / "data")
    with (tmp_path / "data" / "manifest.json").open("r+b") as file:
        file.truncate(2**40)  # sparse: takes no room
    with pytest.raises(ShardError, match="more than any manifest"):
        read_local_manifest(tmp_path / "data")


@pytest.mark.parametrize(
    "name", ["../../x.safetensors", "/dev/zero", "/etc/passwd", "a/b.safetensors", "a.safetensors\n"]
)
def test_a_checkpoint_names_no_file_outside_its_folder(tmp_path, name):
    state = checkpoint.State(1, 4, 4, "f", {}, ["a"], files={name: "0" * 64})
    values = state.__dict__
    (tmp_path / "state.json").write_text(json.dumps({**values, "sha256": checkpoint._digest(values)}))
    with pytest.raises(CheckpointError, match=r"state\.json: not a readable checkpoint"):
        checkpoint.verify(tmp_path)


@pytest.mark.slow
def test_no_output_of_a_run_holds_a_credential(project, tmp_path):
    """Training, evaluation and a job that fails, with shards behind an address that carries two secrets."""
    with serve(project.base) as server:
        address = server.address.replace("://", "://me:planted-word@") + "/shards?sig=planted-key"
        settings = [
            f"data.train={address}",
            f"data.val={address}",
            "solver.epochs=1",
            f"data.cache_dir={tmp_path}/cache",
        ]
        text = run(TRAIN, *project.arguments(tmp_path / "run", *settings))
        arguments = project.arguments(tmp_path / "x", *settings)[:2] + project.arguments(tmp_path / "x", *settings)[4:]
        text += run(EVALUATE, *arguments, "--model", tmp_path / "run", "--report", tmp_path / "report.json")
        wrong = [setting.replace("/shards?", "/nothing?") for setting in settings]
        for failing in (wrong, [*settings, f"data.batch_size={address}"], [*settings, f"nonsense={address}"]):
            [(code, output)] = finish(start(TRAIN, *project.arguments(tmp_path / "failed", *failing)))
            assert code == 1 and "error" in output
            text += output
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert {"log.txt", "config.yaml", "state.json", "report.json"} <= {path.name for path in files}
    contents = {str(path): path.read_bytes() for path in files} | {"output": text.encode()}
    contents |= {f"{name} unpacked": gzip.decompress(data) for name, data in contents.items() if name.endswith(".gz")}
    assert [name for name, data in contents.items() if b"planted" in data or b"planted" in name.encode()] == []


@pytest.mark.parametrize(
    ("address", "as_shown"),
    [
        ("abfss://frames@account.dfs.core.windows.net/k400", "abfss://frames@account.dfs.core.windows.net/k400"),
        ("abfs://me:secret@account/k400?sig=secret", "abfs://account/k400"),
        ("s3://me@bucket/k400", "s3://bucket/k400"),
    ],
)
def test_a_container_is_part_of_an_address_and_no_user(address, as_shown):
    assert redact_text(address) == as_shown
