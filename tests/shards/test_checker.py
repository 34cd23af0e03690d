"""The checker: what the builder writes is sound, and every kind of damage is found and named."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tarfile
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from frame_folders import FrameFolders, jpeg, make_frame_folders

from shards.annotations import parse_annotations, parse_labels
from shards.checker import check_datasets
from shards.format import MEMBER_DTYPE, VIDEO_DTYPE, Manifest, fingerprint
from shards.writer import build_shards

TOOL = Path(__file__).parents[2] / "tools" / "check_shards.py"


def build(folders: FrameFolders, output: Path) -> None:
    labels = parse_labels(folders.labels)
    annotations = parse_annotations(folders.annotations)
    build_shards(annotations, root=folders.root, labels=labels, output=output, shard_bytes=60_000, workers=1)


@pytest.fixture(scope="module")
def sound(frame_folders, tmp_path_factory) -> Path:
    output = tmp_path_factory.mktemp("checked") / "sound"
    build(frame_folders, output)
    return output


@pytest.fixture
def data(sound, tmp_path) -> Path:
    return Path(shutil.copytree(sound, tmp_path / "data"))


def edit_bytes(path: Path, position: int, new: bytes) -> None:
    with path.open("r+b") as stream:
        stream.seek(position)
        stream.write(new)


def edit_index(data: Path, change: Callable[[np.ndarray, np.ndarray], None], keep_crc: bool = True) -> None:
    """Changes the video and member tables, with manifest and checksums made to fit."""
    manifest = json.loads((data / "manifest.json").read_text())
    paths = {role: data / entry["file"] for role, entry in manifest["index"].items()}
    tables = {role: np.load(path) for role, path in paths.items()}
    change(tables["videos"], tables["members"])
    for role, path in paths.items():
        np.save(path, tables[role])
        if keep_crc:
            manifest["index"][role]["crc32"] = zlib.crc32(path.read_bytes())
    identity = fingerprint(tables["videos"], tables["names"], manifest["classes"], manifest["content"])
    manifest["fingerprint"] = identity
    (data / "manifest.json").write_text(json.dumps(manifest))


def edit_manifest(data: Path, **changes) -> None:
    manifest = json.loads((data / "manifest.json").read_text())
    (data / "manifest.json").write_text(json.dumps({**manifest, **changes}))


def rewrite(data: Path, change: Callable[[list[tuple[tarfile.TarInfo, bytes]]], None]) -> None:
    """Writes shard 1 anew with other members, and its size into the manifest."""
    path = data / "000001.tar"
    with tarfile.open(path) as archive:
        import io

        members = [(member, archive.extractfile(member).read()) for member in archive]
        change(members)
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as archive:
        for member, content in members:
            archive.addfile(member, io.BytesIO(content))
    shards = json.loads((data / "manifest.json").read_text())["shards"]
    shards[1]["bytes"] = path.stat().st_size
    edit_manifest(data, shards=shards)


def retarget(videos: np.ndarray, members: np.ndarray) -> None:
    members["block"][3] += 1


def mislabel(videos: np.ndarray, members: np.ndarray) -> None:
    videos["label"][2] = (videos["label"][2] + 1) % 3


def resize(videos: np.ndarray, members: np.ndarray) -> None:
    members["width"][0] = 49


DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "no manifest": (lambda data: (data / "manifest.json").unlink(), "manifest.json: not found"),
    "cut tar": (
        lambda data: edit_bytes(data / "000001.tar", 0, b"") or truncate(data / "000001.tar"),
        "the manifest says",
    ),
    "missing tar": (lambda data: (data / "000001.tar").unlink(), "000001.tar: missing"),
    "extra tar": (lambda data: shutil.copy(data / "000000.tar", data / "000099.tar"), "not in the manifest"),
    "flipped frame bit": (lambda data: edit_bytes(data / "000000.tar", 2000, b"\xaa\xbb"), "another checksum"),
    "flipped header": (lambda data: edit_bytes(data / "000000.tar", 100, b"9"), "damaged"),
    "data behind a member": (lambda data: edit_bytes(data / "000000.tar", 512 + 500, b"x"), "filling"),
    "other index": (lambda data: edit_index(data, mislabel), "label is"),
    "stale checksum": (lambda data: edit_index(data, resize, keep_crc=False), "CRC-32"),
    "wrong offset": (lambda data: edit_index(data, retarget), "index places it"),
    "wrong size in pixels": (lambda data: edit_index(data, resize), "not 49x32"),
    "extra member": (lambda data: rewrite(data, lambda members: members.append(members[-1])), "lacks"),
    "link": (lambda data: rewrite(data, to_link), "header of another member"),
    "missing member": (lambda data: rewrite(data, lambda members: members.pop(1)), "000"),
    "wrong class count": (lambda data: edit_manifest(data, num_videos=39), "add up"),
}


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1000])


def to_link(members: list[tuple[tarfile.TarInfo, bytes]]) -> None:
    members[1][0].type = tarfile.SYMTYPE
    members[1][0].linkname = "/etc/passwd"


@pytest.mark.parametrize("kind", DAMAGE)
def test_damage_is_found(data, kind):
    assert check_datasets([data]).sound
    damage, words = DAMAGE[kind]
    damage(data)
    report = check_datasets([data])
    assert not report.sound
    assert words in "\n".join(report.datasets[0].problems)
    assert all(problem.startswith(str(data)) and "\n" not in problem for problem in report.datasets[0].problems)


def test_every_single_byte_of_a_shard_counts(data):
    """Damage anywhere in a tar is found, whatever it hits."""
    path = data / "000000.tar"
    original = path.read_bytes()
    for position in np.random.default_rng(0).integers(0, len(original), 60).tolist():
        edit_bytes(path, position, bytes([original[position] ^ 0x41]))
        assert not check_datasets([data]).sound, position
        edit_bytes(path, position, original[position : position + 1])
    assert check_datasets([data]).sound


def test_deep_finds_what_does_not_decode(tmp_path):
    folders = make_frame_folders(tmp_path, [3, 3])
    data = bytearray(jpeg(7))
    table = data.index(b"\xff\xc4")
    data[table + 4 : table + 60] = bytes(56)  # Huffman tables are gone; the header is in order
    (folders.root / folders.names[1] / "img_00002.jpg").write_bytes(bytes(data))
    build(folders, tmp_path / "data")
    assert check_datasets([tmp_path / "data"]).sound
    report = check_datasets([tmp_path / "data"], deep=True)
    assert not report.sound
    assert ".000001.jpg: the image does not decode" in report.datasets[0].problems[0]


def test_labels_must_be_the_same(data):
    names = ["class 0", "class 1", "class 2"]
    assert check_datasets([data], labels=names).sound
    in_another_order = ["class 0", "class 2", "class 1"]
    for other, words in [
        (names[:2], "the class list has 2"),
        (in_another_order, "class 2 as 'class 2', in the class list it is 1"),
    ]:
        report = check_datasets([data], labels=other)
        assert words in report.datasets[0].problems[0]
    for other in (["class 0", "x", "class 2"], ["class 0", "x", "x"]):
        assert check_datasets([data], labels=other).sound
    report = check_datasets([data], labels=["class 0", "x", "class 2"])
    assert report.sound and "rewords 1 of 3 names: 'class 1' to 'x'" in report.datasets[0].warnings[0]


def test_leaks_across_data_sets_and_twins_within(tmp_path):
    train = make_frame_folders(tmp_path / "a", [3, 4, 5], num_classes=2)
    val = make_frame_folders(tmp_path / "b", [3, 4], num_classes=2, prefix="val/video", first_seed=1000)
    build(train, tmp_path / "train")
    build(val, tmp_path / "val")
    report = check_datasets([tmp_path / "train", tmp_path / "val"])
    assert report.sound
    shutil.copytree(train.root / train.names[2], val.root / "copied")
    twin = val.root / "twin"
    shutil.copytree(val.root / val.names[0], twin)
    val.annotations.write_text(val.annotations.read_text() + "\ncopied 5 1\ntwin 3 1")
    build(val, tmp_path / "leaking")
    report = check_datasets([tmp_path / "train", tmp_path / "leaking"])
    assert not report.sound
    assert not any(dataset.problems for dataset in report.datasets)
    assert len(report.leaks) == 1
    assert "'copied' has the content of 'class/video_0002'" in report.leaks[0]
    assert any("has the same content as" in warning for warning in report.datasets[1].warnings)
    again = check_datasets([tmp_path / "val", tmp_path / "leaking"])
    assert sum("is in" in leak for leak in again.leaks) == 2


def test_empty_classes_and_unfinished_builds_are_warnings(tmp_path):
    folders = make_frame_folders(tmp_path, [2, 2], num_classes=4)
    build(folders, tmp_path / "data")
    (tmp_path / "data" / ".building").mkdir()
    report = check_datasets([tmp_path / "data"])
    assert report.sound
    assert "2 of 4 classes have no video: 'class 2', 'class 3'" in "\n".join(report.datasets[0].warnings)
    assert "unfinished build" in "\n".join(report.datasets[0].warnings)


def test_statistics(sound):
    statistics = check_datasets([sound]).datasets[0].statistics
    assert (statistics["videos"], statistics["frames"], statistics["classes"]) == (40, 190, 3)
    assert statistics["frames_per_video"] == {"min": 1, "median": 4, "max": 9}
    assert statistics["short_side"] == {"min": 32, "median": 32, "max": 32}
    assert statistics["bytes"] == sum(path.stat().st_size for path in sound.glob("*.tar"))


def test_hostile_tables_do_not_harm(data):
    rng = np.random.default_rng(0)

    def scramble(videos: np.ndarray, members: np.ndarray) -> None:
        for table, dtype in ((videos, VIDEO_DTYPE), (members, MEMBER_DTYPE)):
            column = rng.choice(dtype.names)
            table[column][rng.integers(len(table))] = rng.integers(0, 2**31)

    originals = {path: path.read_bytes() for path in data.rglob("*") if path.suffix in (".npy", ".json")}
    for _ in range(40):
        edit_index(data, scramble)
        assert not check_datasets([data]).sound
        for path, content in originals.items():
            path.write_bytes(content)


def run(*arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(TOOL), *map(str, arguments)], capture_output=True, text=True, check=False
    )


@pytest.mark.slow
def test_command_line(data, frame_folders, tmp_path):
    good = run(data, "--deep", "--labels", frame_folders.labels, "--json", tmp_path / "report.json")
    assert (good.returncode, good.stderr) == (0, "")
    assert good.stdout.isascii()
    assert good.stdout.endswith("\nsound\n")
    assert json.loads((tmp_path / "report.json").read_text())["sound"] is True
    edit_bytes(data / "000000.tar", 2000, b"\xaa\xbb")
    bad = run(data)
    assert bad.returncode == 1
    assert "another checksum" in bad.stdout
    assert bad.stdout.endswith("\nUNSOUND\n")
    assert run().returncode == 2
    assert run(data, "--labels", tmp_path / "nowhere.csv").returncode == 2
    assert run(tmp_path / "nowhere").returncode == 1


def test_manifest_of_the_builder_is_canonical(sound):
    text = (sound / "manifest.json").read_text()
    assert Manifest.from_json(text, "here").to_json() == text
