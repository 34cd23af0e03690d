"""What tests/support/fuzz.py feeds the parsers of `shards`."""

from __future__ import annotations

import io
import json
import tarfile
import tempfile
import zlib
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import cache, partial
from pathlib import Path

import fsspec
import numpy as np
from frame_folders import jpeg
from fuzz_changes import JSON_TOKENS, Target, from_text, written
from PIL import Image
from shard_data import make_dataset, read_everything
from videos import encode

import shards.opening
from shards.address import expand_sources, join_address
from shards.annotations import Annotation, parse_annotations, parse_labels
from shards.building import Workspace
from shards.checker import check_datasets
from shards.foreign import index_tars
from shards.foreign_samples import read_tar
from shards.format import (
    INDEX_ROLES,
    PACKETS_ROLE,
    STREAM_DTYPE,
    STREAMS_ROLE,
    Manifest,
    SampleError,
    ShardError,
    fingerprint,
    index_file,
    rows_crc32,
)
from shards.images import probe_image
from shards.index import open_index, read_local_manifest
from shards.official import DATASETS, read_official
from shards.packets import PACKET_DTYPE
from shards.reader import open_dataset
from shards.stored import decode_stored
from shards.text import redact, redact_text, shown
from shards.video import VideoError, probe_video
from shards.writer import build_shards


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


def _parse_address(text: str) -> None:
    redact(text), redact_text(text), shown(text)
    for address in expand_sources(text):
        join_address(address, "x")


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

# Index version 3: stored videos that are read in parts.


def _stored(folder: Path) -> Path:
    """A data set of two stored videos whose packets are listed."""
    if not (folder / "stored").exists():
        for number in range(2):
            rng = np.random.default_rng(number)
            images = [rng.integers(0, 256, (48, 64, 3), np.uint8) for _ in range(24)]
            (folder / "videos").mkdir(exist_ok=True)
            encode(folder / "videos" / f"{number}.mp4", images=images, options={"g": "12"})
        videos = [Annotation(f"{number}.mp4", None, 0, number + 1) for number in range(2)]
        build_shards(videos, root=folder / "videos", labels=["a"], output=folder / "stored", store="video", workers=1)
    return folder / "stored"


def _packet_seeds(folder: Path) -> list[bytes]:
    base = _stored(folder)
    return [next((base / "index").glob(f"{role}-*.npy")).read_bytes() for role in (STREAMS_ROLE, PACKETS_ROLE)]


def _parse_packets(data: bytes, folder: Path) -> None:
    """The bytes as one of the two tables, with sizes and checksums as a stranger would make them."""
    base, place = _stored(folder), folder / "changed"
    manifest = read_local_manifest(base)
    (place / "index").mkdir(parents=True, exist_ok=True)
    tables = {role: (base / entry["file"]).read_bytes() for role, entry in manifest.index.items()}
    role = STREAMS_ROLE if b"'num_packets'" in data else PACKETS_ROLE
    tables[role] = data
    try:
        rows = np.load(io.BytesIO(tables[PACKETS_ROLE])).astype(PACKET_DTYPE)
        streams = np.load(io.BytesIO(tables[STREAMS_ROLE])).astype(STREAM_DTYPE)
        ends = np.cumsum(streams["num_packets"].astype(np.int64))
        starts = ends - streams["num_packets"]
        checksums = [rows_crc32(rows[start:stop]) for start, stop in zip(starts, ends, strict=True)]
        streams["packets_crc32"] = checksums
        stream = io.BytesIO()
        np.save(stream, streams)
        tables[STREAMS_ROLE] = stream.getvalue()
    except Exception:  # what numpy raises is for the index reader to meet
        pass
    index = {}
    for name, content in tables.items():
        (place / manifest.index[name]["file"]).write_bytes(content)
        index[name] = {**manifest.index[name], "bytes": len(content), "crc32": zlib.crc32(content)}
    (place / "manifest.json").write_text(replace(manifest, index=index).to_json())
    for shard in manifest.shards:
        if not (place / shard.name).exists():
            (place / shard.name).hardlink_to(base / shard.name)
    with open_dataset(str(place)) as dataset:
        for sample in range(len(dataset)):
            wanted = np.array([0, int(dataset.num_frames[sample]) - 1])
            ((video,),) = dataset.start([(sample, wanted)], in_parts=True).result()
            decode_stored(video, wanted, num_frames=int(dataset.num_frames[sample]))


# A far data set: the rows and shards of it that are kept here.


@cache
def _far(folder: Path) -> tuple[str, list[list[bytes]]]:
    """Address and content of a data set in fsspec's store in memory, which answers without a network."""
    content = make_dataset(folder / "served", [2, 1, 3], frame_bytes=30)
    fsspec.filesystem("memory").put(str(folder / "served"), f"/{folder.name}/data", recursive=True)
    return f"memory://{folder.name}/data", content


def _far_seeds(folder: Path, kind: str) -> list[bytes]:
    _read_far(folder)
    return [path.read_bytes() for path in sorted((folder / "cache").rglob(f"*.{kind}"))]


def _read_far(folder: Path) -> None:
    """Reads everything, with rows and shards kept here. What is read is right, whatever lies there."""
    address, content = _far(folder)
    limit, shards.opening.WHOLE_TABLE_BYTES = shards.opening.WHOLE_TABLE_BYTES, 0
    try:
        with open_dataset(address, cache_bytes=10**6, cache_dir=folder / "cache") as dataset:
            assert read_everything(dataset) == content, "wrong bytes from what is kept here"
    finally:
        shards.opening.WHOLE_TABLE_BYTES = limit


def _parse_kept(data: bytes, folder: Path, kind: str) -> None:
    _far(folder)
    if not (folder / "cache").exists():
        _read_far(folder)
    for path in sorted((folder / "cache").rglob(f"*.{kind}"))[:1]:
        path.write_bytes(data)
    with suppress(SampleError):  # a row that leads elsewhere, under a sound checksum, is named and not healed
        _read_far(folder)


# Tars that others made, and what a call that indexes them keeps.


def _tar(members: Sequence[tuple[str, bytes]]) -> bytes:
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w", format=tarfile.GNU_FORMAT) as archive:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return stream.getvalue()


def _foreign_seeds(folder: Path) -> list[bytes]:
    frame = jpeg(0, 16, 16)
    facts = json.dumps({"label": "run", "fps": 25}).encode()
    numbered = [(f"c.{number}.jpg", frame) for number in range(2)]
    return [
        _tar([("__meta__", b"x"), ("a.jpg", frame), ("a.cls", b"1"), *numbered, ("c.txt", b"walk")]),
        _tar([("x/" * 60 + "a.jpg", frame), ("x/" * 60 + "a.json", facts), ("x/" * 60 + "a.notes.md", b"?")]),
    ]


def _parse_foreign(path: Path) -> None:
    for on_error in ("fail", "skip"):
        with path.open("rb") as stream:
            read_tar(stream, str(path), path.name, label_key=None, on_error=on_error)


def _parse_foreign_json(data: bytes, folder: Path) -> None:
    """The bytes as KEY.json of a tar, by the usual keys and by a nested one; and indexed."""
    path = folder / "labelled.tar"
    path.write_bytes(_tar([("a.jpg", jpeg(0, 16, 16)), ("a.json", data)]))
    for label_key in (None, "label.inner"):
        with path.open("rb") as stream:
            read_tar(stream, str(path), path.name, label_key=label_key, on_error="skip")
    with tempfile.TemporaryDirectory(dir=folder) as place:
        index_tars(str(path), output=Path(place), workers=1)


def _record_seeds(folder: Path) -> list[bytes]:
    with Workspace(folder / "seed") as workspace:
        workspace.begin({"tool": "index_tars", "tars": [["a.tar", 512]]})
        workspace.record(0, {"labels": [1], "content": "frames"}, {"names": np.zeros(3, np.uint8)})
        return [path.read_bytes() for path in sorted(workspace.path.iterdir()) if path.stat().st_size]


def _parse_record(data: bytes, folder: Path) -> None:
    """The bytes as one of the files that a killed call left."""
    with Workspace(folder / "output") as workspace:
        workspace.begin({"tool": "index_tars"})
        workspace.record(0, {"labels": [1]}, {"names": np.zeros(3, np.uint8)})
        next(workspace.path.glob("*.npz" if data.startswith(b"PK") else "*.json")).write_bytes(data)
        workspace.settings()
        workspace.recorded(0)
        workspace.finished_shards(0)


# Official lists: the first file of each is damaged.

_OFFICIAL: dict[str, dict[str, str]] = {
    "kinetics700": {
        "train.csv": "label,youtube_id,time_start,time_end\nrun,abcdefghijk,10,20\n\"a, b\",x_y,0.0,9.5\n"
    },
    "ucf101": {
        "trainlist01.txt": "Run/v_Run_g01_c01.avi 1\nWalk/v_Walk_g01_c02.avi 2\n",
        "testlist01.txt": "Run/v_Run_g02_c01.avi\n",
        "classInd.txt": "1 Run\n2 Walk\n",
    },
    "hmdb51": {"run_test_split1.txt": "a.avi 1\nb.avi 2\nc.avi 0\n", "walk_test_split1.txt": "d.avi 1\n"},
    "activitynet": {
        "activity_net.v1-3.min.json": json.dumps({"database": {
            "a": {"subset": "training", "annotations": [{"label": "run", "segment": [0.0, 3.5]}]},
            "b": {"subset": "validation", "annotations": [{"label": "walk"}, {"label": "run"}]},
            "c": {"subset": "testing", "annotations": []}}, "version": "1.3"})
    },
    "something-v2": {
        "train.json": json.dumps([
            {"id": "1", "template": "Moving [something]", "label": "x"}, {"id": "2", "template": "Open"}]),
        "labels.json": json.dumps({"Moving something": "0", "Open": "1"}),
    },
    "charades": {
        "Charades_v1_train.csv": "id,subject,actions,length\nAB1,x,c000 1.0 2.0;c001 0 3,30\nAB2,y,,9\n",
        "Charades_v1_test.csv": "id,actions\nAB3,c001 1 2\n",
        "Charades_v1_classes.txt": "c000 Open a door\nc001 Close it\n",
    },
}  # fmt: skip


def _parse_official(data: bytes, folder: Path, name: str) -> None:
    for number, (file, text) in enumerate(_OFFICIAL[name].items()):
        (folder / file).write_bytes(data if number == 0 else text.encode())
    classes = folder / "classes"
    if not classes.exists():
        classes.mkdir()
        (classes / (DATASETS[name].classes or "none")).write_text("id,name\n0,run\n1,walk\n")
    read_official(name, folder, classes)


def _official(name: str) -> Target:
    first = next(iter(_OFFICIAL[name].values())).encode()
    is_json = first[:1] in b"[{"
    tokens = JSON_TOKENS if is_json else (*LIST, b";", b"nan", b"1e400")
    return Target(lambda folder: [first], partial(_parse_official, name=name), (ShardError,), tokens, is_json)


TARGETS = {
    "annotations": Target(
        lambda folder: [b"class/a b 12 0\nv.mp4 2\n# note\n\r\n#x 3 1\r\n", "é/x\t3\t1\n".encode()],
        written("list.txt", parse_annotations),
        (ShardError,),
        LIST,
    ),
    "labels": Target(
        lambda folder: [b'id,name\n0,run\n1,"a, b"\n2,walk\n', b"\xef\xbb\xbfid,name\r\n1,b\r\n0,a\r\n"],
        written("labels.csv", parse_labels),
        (ShardError,),
        LIST,
    ),
    "address": Target(
        lambda folder: [
            b"s3://bucket/part{0..3}",
            b"https://u:p@h:80/a?t=1#x",
            b"/data/{a,b}/c",
            b"pipe:cat x",
            b"http://[::1]/",
        ],
        from_text(_parse_address),
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
    "packets": Target(_packet_seeds, _parse_packets, (ShardError, VideoError), (b"'descr'", b"9" * 12, b"|O")),
    "kept-rows": Target(
        partial(_far_seeds, kind="rows"), partial(_parse_kept, kind="rows"), (), (b"'descr'", b"9" * 12)
    ),
    "kept-shards": Target(partial(_far_seeds, kind="tar"), partial(_parse_kept, kind="tar"), (), (b"ustar",)),
    "foreign-tar": Target(
        _foreign_seeds,
        written("x.tar", _parse_foreign),
        (ShardError,),
        (
            b"ustar",
            b"ustar  \0",
            b"../x\0",
            b"././@LongLink",
            b"path=/etc/passwd\n",
            b"\0" * 512,
            b"GNU.sparse.size=9\n",
        ),
    ),
    "foreign-json": Target(
        lambda folder: [json.dumps({"label": "run", "fps": 25, "x": {"inner": 1}}).encode()],
        _parse_foreign_json,
        (ShardError,),
        JSON_TOKENS,
        True,
    ),
    "records": Target(_record_seeds, _parse_record, (ShardError,), JSON_TOKENS),
    **{f"list-{name}": _official(name) for name in _OFFICIAL},
}
