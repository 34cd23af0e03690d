"""Feeds every parser damaged files: it may raise only the errors that it documents.

    nice python tests/support/fuzz.py [--cases 100000] [--seed 0] [--guided] [target …]

A case takes a valid file of the target and changes it: bytes flipped, cut, repeated or spliced, tokens of the format
put in, JSON values replaced by others; every 20th case is random bytes. Case k of a target is the same in every run.
The file of a case is kept until the next one, so a crash of the process leaves it behind. A case that takes more than
20 seconds, or 2 GiB more memory than the program, is a failure too. --guided: coverage decides which cases are changed
further (atheris: pip install -e '.[fuzz]'; one target). pytest runs a few hundred cases of each (tests/test_fuzz.py).
"""

from __future__ import annotations

import argparse
import copy
import gc
import hashlib
import io
import json
import random
import resource
import signal
import sys
import tempfile
import time
import warnings
import zlib
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import FunctionType
from typing import Any

import numpy as np
import torch
import yaml
from frame_folders import jpeg
from PIL import Image
from safetensors.torch import save
from shard_data import make_dataset
from stub_index import build as build_stub
from stub_index import vectors

from shards.address import expand_sources, join_address
from shards.annotations import parse_annotations, parse_labels
from shards.checker import check_datasets
from shards.format import INDEX_ROLES, Manifest, ShardError, fingerprint, index_file
from shards.images import probe_image
from shards.index import open_index, read_local_manifest
from shards.text import redact, redact_text, shown
from shards.video import VideoError, probe_video
from text4vis.classifier.embeddings import file_classifier
from text4vis.cluster import distributed
from text4vis.config.loading import load_config
from text4vis.config.schema import Config, ConfigError
from text4vis.evaluation import comparison
from text4vis.evaluation import embedding as evaluation
from text4vis.model.tensors import read_weights
from text4vis.saved import checkpoint
from text4vis.saved.checkpoint import CheckpointError
from text4vis.saved.weights import read_index, read_text4vis
from text4vis.serving.index_store import SearchError
from text4vis.serving.search import SearchIndex
from text4vis.training.logs import _step_of

CASE_SECONDS = 20
CASE_BYTES = 2 << 30
MOST_RANDOM_BYTES = 4000


@dataclass(frozen=True)
class Target:
    """parse(data, folder) reads a file of these bytes, and may write below the folder. tokens: words of the format."""

    seeds: Callable[[Path], list[bytes]]
    parse: Callable[[bytes, Path], Any]
    errors: tuple[type[Exception], ...] = ()
    tokens: tuple[bytes, ...] = ()
    is_json: bool = False


def mutated(target: Target, seeds: list[bytes], draw: random.Random) -> bytes:
    """One damaged file."""
    if draw.random() < 0.05:
        return draw.randbytes(draw.randrange(MOST_RANDOM_BYTES))
    data = bytearray(draw.choice(seeds))
    if target.is_json and draw.random() < 0.6:
        data = bytearray(_mutated_json(bytes(data), draw))
        if draw.random() < 0.8:
            return bytes(data)
    for _ in range(draw.choice((1, 1, 1, 2, 3, 8))):
        _change(data, target.tokens, seeds, draw)
    return bytes(data)


def _change(data: bytearray, tokens: tuple[bytes, ...], seeds: list[bytes], draw: random.Random) -> None:
    """One change in place. Half of them fall into the first 256 bytes, where headers are."""
    place = draw.randrange(min(len(data), 256 if draw.random() < 0.5 else len(data)) + 1)
    kind = draw.randrange(8)
    if kind == 0 and place < len(data):
        data[place] ^= 1 << draw.randrange(8)
    elif kind == 1 and place < len(data):
        data[place] = draw.choice((0, 1, 9, 10, 32, 0x7F, 0x80, 0xFF, draw.randrange(256)))
    elif kind == 2:
        del data[place : place + draw.choice((1, 2, 4, 16, 1000))]
    elif kind == 3:
        data[place:place] = draw.choice(
            (*tokens, b"\0", b"\xff\xfe", b"-1", b"9" * 30, b"\x1b[31m", "é\u202e".encode())
        )
    elif kind == 4:
        size = draw.choice((2, 4, 8))
        value = draw.choice((0, 1, 2**31 - 1, 2**31, 2**32 - 1, 2**63, 2**64 - 1, draw.randrange(2**64)))
        data[place : place + size] = value.to_bytes(8, draw.choice(("little", "big")))[:size]
    elif kind == 5:
        data[place:place] = data[place : place + draw.choice((1, 8, 64))] * draw.choice((1, 2, 50))
    elif kind == 6:
        other = draw.choice(seeds)
        data[place:] = other[draw.randrange(len(other) + 1) :]
    else:
        del data[place:]


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


ODD_VALUES: tuple[Any, ...] = (
    None, True, 0, -1, 1.5, 1e308, 2**31, 2**63, 10**30, float("nan"), float("inf"), "", "x", "\ud800", "\0\x1b[31m",
    "../x", "/etc/passwd", "http://other/x", [], [[]], [0], {}, {"a": {}}, [None] * 50,
)  # fmt: skip


def _mutated_json(data: bytes, draw: random.Random) -> bytes:
    """The document with values replaced, taken out, repeated or renamed."""
    document = [json.loads(data)]
    for _ in range(draw.choice((1, 1, 2, 4))):
        inner: Any = document
        while True:
            keys = list(range(len(inner))) if isinstance(inner, list) else list(inner)
            key = draw.choice(keys)
            value = copy.deepcopy(inner[key])
            if not isinstance(value, list | dict) or not value or draw.random() < 0.2:
                break
            inner = inner[key]
        kind = draw.randrange(4)
        if kind == 0 and inner is not document:
            del inner[key]
            if not document[0]:
                break
        elif kind == 1 and isinstance(inner, dict):
            inner[draw.choice(("x", "", "a.b", key + "x"))] = value
        else:
            inner[key] = copy.deepcopy(draw.choice((*ODD_VALUES, [value] * 3, {"x": value})))
    return json.dumps(document[0]).encode("utf-8", "surrogatepass")


def _written(name: str, parse: Callable[[Path], Any]) -> Callable[[bytes, Path], Any]:
    """A target that reads a file of this name."""

    def write_and_parse(data: bytes, folder: Path) -> Any:
        path = folder / name
        path.write_bytes(data)
        return parse(path)

    return write_and_parse


def _text(parse: Callable[[str], Any]) -> Callable[[bytes, Path], Any]:
    return lambda data, folder: parse(data.decode("utf-8", "surrogateescape"))


def _read_file(name: str) -> Callable[[Path], list[bytes]]:
    """Seeds: the file of a data set."""

    def read(folder: Path) -> list[bytes]:
        make_dataset(folder / "seed", [2, 1, 3], frame_bytes=30)
        return [path.read_bytes() for path in sorted((folder / "seed").glob(name))]

    return read


def _image_seeds(folder: Path) -> list[bytes]:
    seeds = [jpeg(0, 16, 16), jpeg(1, 16, 16, progressive=True)]
    image = Image.fromarray(np.zeros((4, 5, 3), np.uint8))
    for kind, options in (("PNG", {}), ("WEBP", {}), ("WEBP", {"lossless": True}), ("BMP", {}), ("JPEG", {})):
        stream = io.BytesIO()
        image.save(stream, kind, **options)
        seeds.append(stream.getvalue())
    return seeds


def _video_seeds(folder: Path) -> list[bytes]:
    import av

    path = folder / "seed.mp4"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=10)
        stream.width = stream.height = 16
        for value in range(3):
            picture = np.full((16, 16, 3), 80 * value, np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode())
    return [path.read_bytes()]


def _dataset(folder: Path) -> Path:
    if not (folder / "data").exists():
        make_dataset(folder / "data", [2, 1, 3], frame_bytes=30)
    return folder / "data"


def _parse_index(data: bytes, folder: Path) -> None:
    """The bytes as one of the tables, with size, checksums and fingerprint as a stranger would make them."""
    base = _dataset(folder)
    manifest = read_local_manifest(base)
    role = "members" if b"'block'" in data else "videos" if b"'name_start'" in data else "names"
    files = {name: base / manifest.index[name]["file"] for name in INDEX_ROLES} | {role: folder / "table.npy"}
    files[role].write_bytes(data)
    tables = {}
    try:
        tables = {name: np.lib.format.open_memmap(files[name], mode="r") for name in INDEX_ROLES}
        identity = fingerprint(tables["videos"], tables["names"], manifest.classes, manifest.content)
    except Exception:  # what numpy raises is for the index reader to meet
        identity = manifest.fingerprint
    entry = {"file": index_file(role, identity), "bytes": len(data), "crc32": zlib.crc32(data)}
    counts = {"num_videos": len(tables["videos"]), "num_members": len(tables["members"])} if tables else {}
    manifest = replace(manifest, index=manifest.index | {role: entry}, fingerprint=identity, **counts)
    index = open_index("here", manifest, files)
    for video in range(len(index.videos)):
        index.name(video)
        index.ranges(video, index.member_rows(video, np.arange(min(10, int(index.videos["num_members"][video])))))


def _parse_shard(data: bytes, folder: Path) -> None:
    base = _dataset(folder)
    (base / "000000.tar").write_bytes(data)
    assert not check_datasets([base], workers=1).sound or data == _read_file("000000.tar")(folder)[0]


def _video_json(data: bytes, folder: Path) -> None:
    """The bytes as the JSON member of the first video: cut or filled up to the size that it has."""
    base = _dataset(folder)
    tar = bytearray((folder / "seed" / "000000.tar").read_bytes())
    size = int(tar[124:135], 8)
    tar[512 : 512 + size] = data[:size].ljust(size)
    (base / "000000.tar").write_bytes(tar)
    check_datasets([base], workers=1)


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


def _parse_address(text: str) -> None:
    redact(text), redact_text(text), shown(text)
    for address in expand_sources(text):
        join_address(address, "x")


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


SHELL = (
    b"{",
    b"}",
    b"..",
    b"{0..3}",
    b"{a,b}",
    b"::",
    b"pipe:",
    b"file://",
    b"s3://",
    b"@",
    b"?",
    b"#",
    b"[::1]",
    b"%00",
)
JSON_TOKENS = (
    b"{",
    b"}",
    b"[",
    b"]",
    b",",
    b":",
    b'"',
    b"1e999",
    b"NaN",
    b"[" * 3000,
    b"1" * 5000,
    b'"\\ud800"',
    b"null",
)
LIST = (
    b"\n",
    b"\r\n",
    b"\t",
    b" ",
    b"#",
    b"# ",
    b",",
    b'"',
    b".mp4",
    b"../",
    b"/",
    b"\xef\xbb\xbf",
    b"99999999999999999999",
)

TARGETS = {
    "annotations": Target(
        lambda folder: [b"class/a b 12 0\nv.mp4 2\n# note\n\r\n#x 3 1\r\n", "é/x\t3\t1\n".encode()],
        _written("list.txt", parse_annotations),
        (ShardError,),
        LIST,
    ),
    "labels": Target(
        lambda folder: [b'id,name\n0,run\n1,"a, b"\n2,walk\n', b"\xef\xbb\xbfid,name\r\n1,b\r\n0,a\r\n"],
        _written("labels.csv", parse_labels),
        (ShardError,),
        LIST,
    ),
    "config": Target(_config_seeds, _written("config.yaml", load_config), (ConfigError,), YAML_TOKENS),
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
    "address": Target(
        lambda folder: [
            b"s3://bucket/part{0..3}",
            b"https://u:p@h:80/a?t=1#x",
            b"/data/{a,b}/c",
            b"pipe:cat x",
            b"http://[::1]/",
        ],
        _text(_parse_address),
        (ShardError,),
        SHELL,
    ),
    "manifest": Target(
        _read_file("manifest.json"),
        lambda data, folder: Manifest.from_json(data, "here"),
        (ShardError,),
        JSON_TOKENS,
        True,
    ),
    "index": Target(_read_file("index/*.npy"), _parse_index, (ShardError,), (b"'descr'", b"(", b"9" * 12, b"|O")),
    "search-index": Target(_search_seeds, _parse_search, (SearchError,), JSON_TOKENS, False),
    "shard": Target(
        _read_file("000000.tar"), _parse_shard, (), (b"../x\0", b"/etc/passwd\0", b"ustar", b"00000000000\0")
    ),
    "video-json": Target(
        lambda folder: [_read_file("000000.tar")(folder)[0][512:].split(b"\0")[0]], _video_json, (), JSON_TOKENS, True
    ),
    "image": Target(
        _image_seeds,
        lambda data, folder: probe_image(data),
        (ValueError,),
        (b"\xff\xd8\xff", b"\xff\xc0", b"\xff\xda", b"IHDR"),
    ),
    "video": Target(
        _video_seeds, lambda data, folder: probe_video(data), (VideoError,), (b"moov", b"mdat", b"stsz", b"stts")
    ),
    "state": Target(_state_seeds, _parse_state, (CheckpointError,), JSON_TOKENS, True),
    "report": Target(_report_seeds, _written("report.json", _parse_report), (ConfigError,), JSON_TOKENS, True),
    "metrics": Target(
        lambda folder: [b'{"kind": "train", "step": 3, "loss": 1.5}'], _text(_step_of), (), JSON_TOKENS, True
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
        _written("export.json", lambda path: read_index(path.parent)),
        (ConfigError,),
        JSON_TOKENS,
        True,
    ),
    "safetensors": Target(
        lambda folder: [save(TENSORS)],
        _written("weights.safetensors", lambda path: read_weights(path, "key")),
        (ConfigError,),
        (*JSON_TOKENS, b"data_offsets", b"F32", b"shape"),
    ),
    "weights": Target(
        lambda folder: [_torch_bytes(TENSORS), _torch_bytes({"state_dict": TENSORS})],
        _written("weights.pt", lambda path: read_weights(path, "key")),
        (ConfigError,),
        (b"PK\x03\x04", b"c__builtin__\neval\n"),
    ),
    "checkpoint": Target(
        _checkpoint_seeds,
        _written("model.pt", read_text4vis),
        (ConfigError,),
        (b"PK\x05\x06", b"cos\nsystem\n", b"R.", b"\x80\x02"),
    ),
    "classifier": Target(
        _classifier_seeds, _parse_classifier, (ConfigError,), (b"'descr'", b"|O", b"(3, 4)", b"9" * 12, b"class_names")
    ),
    "features": Target(
        _features_seeds,
        _written("f.safetensors", lambda path: evaluation._read_features(path, {"data": "d"})),
        (ConfigError,),
        (*JSON_TOKENS, b"__metadata__"),
    ),
    "slurm": Target(
        lambda folder: [b"4(x2),3", b"gpu[07-09,12],cpu1"],
        _text(lambda text: (distributed._slurm_first_node(text), distributed._slurm_tasks_per_node(text))),
        (),
        (b"(x", b")", b"[", b"]", b",", b"-", b"9" * 9),
    ),
}


def attempt(target: Target, data: bytes, folder: Path) -> str:
    """Name of the documented error that the data give, or "accepted". Other errors pass through."""
    try:
        target.parse(data, folder)
    except target.errors as error:
        return type(error).__name__
    return "accepted"


def _too_long(*_: object) -> None:
    raise AssertionError(f"took more than {CASE_SECONDS} seconds")


def fuzz(name: str, cases: int, seed: int) -> bool:
    """Whether all cases of a target end well; prints what came out, and the first failures of each kind."""
    target = TARGETS[name]
    outcomes: Counter[str] = Counter()
    failures: dict[str, str] = {}
    slowest = 0.0
    started = time.monotonic()
    with tempfile.TemporaryDirectory(
        prefix=f"fuzz-{name}-", dir="/dev/shm" if Path("/dev/shm").is_dir() else None
    ) as place:
        folder = Path(place)
        seeds = target.seeds(folder)
        for data in seeds:
            attempt(target, data, folder)
        for case in range(cases):
            data = mutated(target, seeds, random.Random(f"{name} {seed} {case}"))
            (folder / "case").write_bytes(data)
            began = time.monotonic()
            signal.alarm(CASE_SECONDS)
            try:
                outcomes[attempt(target, data, folder)] += 1
            except BaseException as error:
                if isinstance(error, KeyboardInterrupt):
                    raise
                frame = error.__traceback__
                while frame is not None and frame.tb_next is not None:
                    frame = frame.tb_next
                place_of = f"{frame.tb_frame.f_code.co_filename}:{frame.tb_lineno}" if frame else ""
                kind = f"{type(error).__name__} at {place_of}"
                outcomes["FAILED"] += 1
                failures.setdefault(kind, f"case {case}: {str(error)[:200]!r}, file {data[:200]!r}")
            finally:
                signal.alarm(0)
            slowest = max(slowest, time.monotonic() - began)
    seconds = time.monotonic() - started
    counts = ", ".join(f"{count} {kind}" for kind, count in outcomes.most_common())
    print(f"{name}: {cases} cases in {seconds:.0f} s, slowest {slowest:.2f} s: {counts}", flush=True)
    for kind, example in failures.items():
        print(f"  {kind}: {example}", flush=True)
    return not failures


def fuzz_guided(name: str, cases: int, seed: int) -> None:
    """The same, where what reaches new lines of the program is changed further. Ends the process."""
    try:
        import atheris
    except ImportError:
        sys.exit("fuzz: error: --guided needs atheris, which is there for Linux on x86-64: pip install -e '.[fuzz]'")
    target = TARGETS[name]
    folder = Path(tempfile.mkdtemp(prefix=f"fuzz-{name}-"))
    seeds = target.seeds(folder)
    corpus = folder / "corpus"
    corpus.mkdir()
    for number, data in enumerate(seeds):
        (corpus / str(number)).write_bytes(data)

    def change(data: bytes, max_size: int, number: int) -> bytes:
        draw = random.Random(number)
        if draw.random() < 0.5:
            return atheris.Mutate(data, max_size)
        return mutated(replace(target, is_json=False), [data or b"x", *seeds], draw)[:max_size]

    for function in gc.get_objects():
        if isinstance(function, FunctionType) and str(function.__module__).split(".")[0] in ("shards", "text4vis"):
            atheris.instrument_func(function)
    options = [
        f"-runs={cases}",
        f"-seed={seed + 1}",
        f"-timeout={CASE_SECONDS}",
        "-rss_limit_mb=0",
        "-print_final_stats=1",
    ]
    atheris.Setup(
        [sys.argv[0], *options, str(corpus)], lambda data: attempt(target, data, folder), custom_mutator=change
    )
    atheris.Fuzz()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("targets", nargs="*", metavar="target", help=f"default: all of {', '.join(TARGETS)}")
    parser.add_argument("--cases", type=int, default=100_000, help="of each target")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--guided", action="store_true", help="guided by coverage, with atheris")
    arguments = parser.parse_args()
    names = arguments.targets or list(TARGETS)
    for name in names:
        if name not in TARGETS:
            parser.error(f"no target {name!r}; there are {', '.join(TARGETS)}")
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + CASE_BYTES, used + CASE_BYTES))
    warnings.simplefilter("ignore")
    if arguments.guided:
        if len(names) != 1:
            parser.error("--guided takes one target: its engine ends the process")
        fuzz_guided(names[0], arguments.cases, arguments.seed)
    signal.signal(signal.SIGALRM, _too_long)
    ends = [fuzz(name, arguments.cases, arguments.seed) for name in names]
    return 0 if all(ends) else 1


if __name__ == "__main__":
    sys.exit(main())
