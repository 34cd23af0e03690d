"""The builder: the same bytes whatever happens on the way, nothing lost, every bad input named."""

from __future__ import annotations

import contextlib
import errno
import io
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tarfile
import threading
import time
import zlib
from pathlib import Path

import numpy as np
import pytest
import webdataset
from frame_folders import FrameFolders, jpeg, make_frame_folders
from PIL import Image

import shards.building
import shards.shardfile
import shards.sources
import shards.writer
from shards.annotations import Annotation, parse_annotations, parse_labels
from shards.checker import check_datasets
from shards.feed import OrderedFeed
from shards.format import Manifest, ShardError
from shards.images import ImageProbe, probe_image
from shards.index import Index, open_index, read_local_manifest
from shards.sources import SourceOptions, thinned
from shards.writer import build_shards

TOOL = Path(__file__).parents[2] / "tools" / "build_shards.py"
REAL_LISTS = Path(__file__).parents[3] / "shared" / "lists"
SHARD_BYTES = 40_000


def build(folders: FrameFolders, output: Path, **options) -> Manifest:
    labels = parse_labels(folders.labels)
    options = {"shard_bytes": SHARD_BYTES, "labels": labels, "workers": 2, **options}
    annotations = parse_annotations(folders.annotations, len(options["labels"]))
    return build_shards(annotations, root=folders.root, output=output, list_name=folders.annotations, **options)


def content(output: Path) -> dict[str, bytes]:
    return {str(path.relative_to(output)): path.read_bytes() for path in sorted(output.rglob("*")) if path.is_file()}


def open_built(output: Path) -> Index:
    manifest = read_local_manifest(output)
    return open_index(str(output), manifest, {role: output / entry["file"] for role, entry in manifest.index.items()})


def command(folders: FrameFolders, output: Path, *options: str) -> list[str]:
    paths = ["--annotations", folders.annotations, "--root", folders.root, "--labels", folders.labels]
    arguments = [*paths, "--output", output, "--shard-bytes", SHARD_BYTES, *options]
    return [sys.executable, str(TOOL), *map(str, arguments)]


@pytest.fixture(scope="module")
def built(frame_folders, tmp_path_factory) -> Path:
    output = tmp_path_factory.mktemp("built") / "data"
    build(frame_folders, output)
    return output


def write_list(folders: FrameFolders, path: Path, lines: list[str]) -> FrameFolders:
    path.write_text("\n".join(lines))
    return FrameFolders(folders.root, path, folders.labels, [line.rsplit(" ", 2)[0] for line in lines])


def test_frames_round_trip_byte_for_byte(frame_folders, built):
    index = open_built(built)
    assert len(index.manifest.shards) > 3
    found = []
    for video, row in enumerate(index.videos):
        name = index.name(video)
        found.append(name)
        files = sorted((frame_folders.root / name).iterdir())
        with (built / index.manifest.shards[row["shard"]].name).open("rb") as tar:
            members = index.member_rows(video, np.arange(row["num_members"]))
            for member, file in zip(members, files, strict=True):
                tar.seek(int(member["block"]) * 512)
                data = tar.read(int(member["size"]))
                assert data == file.read_bytes()
                assert (member["crc32"], member["width"], member["height"]) == (zlib.crc32(data), 48, 32)
            tar.seek(int(row["json_block"]) * 512)
            text = json.loads(tar.read(int(row["json_size"])))
        assert text == {
            "name": name,
            "label": row["label"],
            "class": f"class {row['label']}",
            "num_frames": len(files),
            "width": 48,
            "height": 32,
            "source": {"frames": len(files)},
        }
    assert sorted(found) == sorted(frame_folders.names)
    assert found != sorted(found)
    assert all(shard.bytes >= SHARD_BYTES for shard in index.manifest.shards[:-1])


def test_tar_tarfile_and_webdataset_read_every_member(built):
    for path in sorted(built.glob("*.tar")):
        listed = subprocess.run(["tar", "tf", str(path)], capture_output=True, text=True, check=True)
        assert listed.stderr == ""
        with tarfile.open(path) as archive:
            members = {member.name: archive.extractfile(member).read() for member in archive}
        assert listed.stdout.split() == list(members)
        samples = {}
        for sample in webdataset.WebDataset(str(path), shardshuffle=False):
            key = sample["__key__"]
            samples.update({f"{key}.{name}": data for name, data in sample.items() if not name.startswith("__")})
        assert samples == members
        assert not any("." in name.split(".", 1)[0] for name in members)


@pytest.mark.parametrize("options", [{}, {"short_side": 16, "quality": 70, "max_frames": 4}])
def test_same_bytes_for_any_number_of_workers(frame_folders, tmp_path, options):
    for workers in (1, 2, 4):
        build(frame_folders, tmp_path / str(workers), workers=workers, **options)
    assert content(tmp_path / "1") == content(tmp_path / "2") == content(tmp_path / "4")


def test_seed_changes_the_order_and_shard_size_does_not_change_the_fingerprint(frame_folders, built, tmp_path):
    fingerprint = read_local_manifest(built).fingerprint
    assert build(frame_folders, tmp_path / "one", shard_bytes=10**9).fingerprint == fingerprint
    assert build(frame_folders, tmp_path / "seed", seed=1).fingerprint != fingerprint


def kill_during_build(arguments: list[str], output: Path, delay: float) -> bool:
    """Starts a build, kills it `delay` seconds after it has begun to write. False if it had ended."""
    process = subprocess.Popen(arguments, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    while process.poll() is None and not (output / ".building" / "settings.json").exists():
        time.sleep(0.001)
    time.sleep(delay)
    process.send_signal(signal.SIGKILL)
    _, errors = process.communicate()
    assert process.returncode in (0, -signal.SIGKILL), errors
    return process.returncode != 0


def test_killed_builds_end_with_the_same_bytes(frame_folders, built, tmp_path):
    rng = random.Random(0)
    output = tmp_path / "data"
    arguments = command(frame_folders, output, "--workers", "2")
    kills = 0
    for _ in range(12):
        kills += kill_during_build(arguments, output, rng.random() * 0.08)
        if (output / "manifest.json").exists() and not (output / ".building").exists():
            shutil.rmtree(output)
    subprocess.run(arguments, check=True, stdout=subprocess.DEVNULL)
    assert kills
    assert content(output) == content(built)


@pytest.mark.slow
def test_fifty_kills(frame_folders, built, tmp_path):
    rng = random.Random(1)
    for attempt in range(10):
        output = tmp_path / str(attempt)
        for _ in range(5):
            kill_during_build(command(frame_folders, output), output, rng.random() * 0.05)
        subprocess.run(command(frame_folders, output), check=True, stdout=subprocess.DEVNULL)
        assert content(output) == content(built)


KILLED = """import os, pathlib, runpy, signal, sys
kind, left = sys.argv[1], iter(range(int(sys.argv[2]), -1, -1))
original = getattr(pathlib.Path, kind)
def step(self, *arguments, **options):
    if next(left) == 0:
        os.kill(os.getpid(), signal.SIGKILL)
    return original(self, *arguments, **options)
setattr(pathlib.Path, kind, step)
sys.argv = sys.argv[3:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.mark.parametrize(
    ("kind", "number"),
    [
        *(("replace", number) for number in (0, 1, 2, 17, 20)),  # settings, a shard, its rows, index, manifest
        *(("unlink", number) for number in (0, 9)),  # the first file of the workspace, its lock
        ("rmdir", 0),
    ],
)
def test_a_kill_before_a_file_is_put_in_place_or_removed_leaves_nothing_behind(
    frame_folders, built, tmp_path, kind, number
):
    arguments = command(frame_folders, tmp_path / "data")
    program = [sys.executable, "-c", KILLED, kind, str(number), *arguments[1:]]
    killed = subprocess.run(program, stdout=subprocess.DEVNULL, check=False)
    assert killed.returncode == -signal.SIGKILL
    assert (tmp_path / "data" / "manifest.json").exists() == (kind != "replace")
    build(frame_folders, tmp_path / "data")
    assert content(tmp_path / "data") == content(built)
    assert not (tmp_path / "data" / ".building").exists()


@pytest.mark.parametrize("step", range(0, 21, 2))
def test_a_failing_write_loses_nothing(frame_folders, built, tmp_path, monkeypatch, step):
    """The disk is full at the step-th file that is put in place; the next run goes on and ends equal."""
    original, steps = Path.replace, iter(range(1000))

    def full(self: Path, target: Path) -> Path:
        if next(steps) == step:
            raise OSError(28, "No space left on device", str(target))
        return original(self, target)

    monkeypatch.setattr(Path, "replace", full)
    with pytest.raises(ShardError, match=r"No space left.*run the same command again"):
        build(frame_folders, tmp_path / "data")
    monkeypatch.undo()
    assert len(list((tmp_path / "data").glob("*.tar"))) == min(step // 2, 8)
    build(frame_folders, tmp_path / "data")
    assert content(tmp_path / "data") == content(built)


def test_a_failing_background_sync_is_not_forgotten(frame_folders, tmp_path, monkeypatch):
    def failing(file: int) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(shards.shardfile, "_SYNC_BYTES", 1)
    monkeypatch.setattr(shards.shardfile.os, "fdatasync", failing)
    with pytest.raises(ShardError, match="Input/output error"):
        build(frame_folders, tmp_path / "data")
    assert not list((tmp_path / "data").glob("*.tar"))


def test_full_disk_is_one_clear_line(frame_folders, built, tmp_path):
    """A real failing write: the process may write no file larger than 20 kB."""
    limited = "import resource, runpy, sys; resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000)); "
    limited += "sys.argv = sys.argv[1:]; runpy.run_path(sys.argv[0], run_name='__main__')"
    arguments = command(frame_folders, tmp_path / "data")
    result = subprocess.run(
        [sys.executable, "-c", limited, *arguments[1:]], capture_output=True, text=True, check=False
    )
    assert result.returncode == 1
    assert result.stderr.count("\n") == 1
    assert "File too large" in result.stderr
    assert "run the same command again" in result.stderr
    assert not list((tmp_path / "data").rglob("*.part"))
    subprocess.run(arguments, check=True, stdout=subprocess.DEVNULL)
    assert content(tmp_path / "data") == content(built)


def test_read_only_output_is_one_clear_line(frame_folders, tmp_path, monkeypatch):
    def read_only(*_: object, **__: object) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(tmp_path / "data"))

    monkeypatch.setattr(Path, "mkdir", read_only)
    with pytest.raises(ShardError, match=r"data: Read-only file system; make room, make the folder writable or"):
        build(frame_folders, tmp_path / "data")


def test_input_that_vanishes_is_named_and_nothing_is_lost(frame_folders, built, tmp_path, monkeypatch):
    """As a disk that is unplugged during the build: the run ends, and goes on when the disk is back."""
    root, gone = tmp_path / "frames", tmp_path / "gone"
    shutil.copytree(frame_folders.root, root)
    folders = FrameFolders(root, frame_folders.annotations, frame_folders.labels, frame_folders.names)
    original, calls = shards.writer.read_source, iter(range(1000))

    def unplugged(*arguments: object) -> object:
        if next(calls) == 25:
            (root / "class").rename(gone)
        return original(*arguments)

    monkeypatch.setattr(shards.writer, "read_source", unplugged)
    with pytest.raises(ShardError, match=r"frames\.txt:\d+: .*frames/class/video_"):
        build(folders, tmp_path / "data", workers=1)
    assert list((tmp_path / "data").glob("*.tar")) and not (tmp_path / "data" / "manifest.json").exists()
    gone.rename(root / "class")
    build(folders, tmp_path / "data")
    assert content(tmp_path / "data") == content(built)


@pytest.mark.parametrize(("videos", "frames"), [(1500, 1), (1, 1500)])
def test_many_tiny_videos_and_a_long_one(tmp_path, videos, frames):
    """100,000 of either are in docs/reliability.md; here what grows with their number is small."""
    image = tmp_path / "image.jpg"
    image.write_bytes(jpeg(0, 16, 16))
    for number in range(videos):
        (tmp_path / "frames" / str(number)).mkdir(parents=True)
        for frame in range(1, frames + 1):
            (tmp_path / "frames" / str(number) / f"img_{frame:05d}.jpg").hardlink_to(image)
    listed = [Annotation(str(number), frames, 0, number + 1) for number in range(videos)]
    manifest = build_shards(listed, root=tmp_path / "frames", labels=["a"], output=tmp_path / "data", shard_bytes=10**6)
    assert (manifest.num_videos, manifest.num_members) == (videos, videos * frames)
    assert len(manifest.shards) == (4 if videos > 1 else 1)  # a shard is cut between videos only
    with tarfile.open(tmp_path / "data" / "000000.tar") as archive:
        assert len(archive.getnames()) == manifest.shards[0].videos + manifest.shards[0].members


def test_rerun_of_a_finished_build_does_nothing(frame_folders, built):
    before = {path: path.stat().st_mtime_ns for path in built.rglob("*")}
    result = subprocess.run(command(frame_folders, built), capture_output=True, text=True, check=True)
    assert "already complete" in result.stdout
    assert before == {path: path.stat().st_mtime_ns for path in built.rglob("*")}


def test_other_input_is_refused(frame_folders, built, tmp_path):
    with pytest.raises(ShardError, match=r"seed differs.*--output.*--append"):
        build(frame_folders, built, seed=5)
    with pytest.raises(ShardError, match="classes differs"):
        build(frame_folders, built, labels=["x", "y", "z"])
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").touch()
    with pytest.raises(ShardError, match="holds other files"):
        build(frame_folders, tmp_path / "full")
    assert [path.name for path in (tmp_path / "full").iterdir()] == ["thesis.txt"]


def test_unfinished_build_of_other_input_is_refused(frame_folders, tmp_path):
    output = tmp_path / "data"
    lines = frame_folders.annotations.read_text().splitlines()
    bad = write_list(frame_folders, tmp_path / "bad.txt", [*lines, "nowhere 5 0"])
    seed = next(seed for seed in range(20) if shards.writer.epoch_order(41, seed, 0)[30:].max() == 40)
    with pytest.raises(ShardError, match="nowhere"):
        build(bad, output, seed=seed)
    assert list(output.glob("*.tar"))
    with pytest.raises(ShardError, match=r"quality was None and is 50.*delete"):
        build(bad, output, seed=seed, quality=50)
    skipping = build(bad, output, seed=seed, on_error="skip")  # what `fail` finished is good for `skip`
    assert [entry["line"] for entry in skipping.skipped] == [41]
    build(bad, tmp_path / "whole", seed=seed, on_error="skip")
    assert content(output) == content(tmp_path / "whole")


def test_second_builder_is_refused(frame_folders, tmp_path):
    with (
        shards.building.Workspace(tmp_path / "data"),
        pytest.raises(ShardError, match="another process is building here"),
    ):
        build(frame_folders, tmp_path / "data")
    build(frame_folders, tmp_path / "data")


def test_a_builder_that_begins_as_another_ends_keeps_its_folder(tmp_path, monkeypatch):
    """The last thing to go is the folder: by then its lock is free and closed, as NFS wants it."""
    workspaces, remove = [shards.building.Workspace(tmp_path)], Path.rmdir

    def begin_then_remove(path: Path) -> None:
        workspaces.append(shards.building.Workspace(tmp_path))
        remove(path)

    monkeypatch.setattr(Path, "rmdir", begin_then_remove)
    with workspaces[0] as workspace:
        workspace.begin({"of": "the first"})
        workspace.remove()
    with workspaces[1] as workspace:
        assert workspace.settings() is None
        assert (workspace.path / "lock").exists()
        monkeypatch.undo()
        workspace.remove()
    assert not workspace.path.exists()


def test_append_leaves_old_shards_alone(frame_folders, tmp_path):
    output = tmp_path / "data"
    lines = frame_folders.annotations.read_text().splitlines()
    first, second = (write_list(frame_folders, tmp_path / f"{k}.txt", lines[k::2]) for k in (0, 1))
    build(first, output, labels=["class 0", "class 1", "class 2"])
    before = content(output)
    labels = ["class 0", "class 1", "class 2", "class 3"]
    manifest = build(second, output, labels=labels, append=True)
    after = content(output)
    assert all(after[name] == data for name, data in before.items() if name.endswith(".tar"))
    assert len(list((output / "index").iterdir())) == 3
    assert (manifest.num_videos, manifest.classes) == (40, labels)
    assert len(manifest.build["runs"]) == 2
    assert check_datasets([output]).sound
    index = open_built(output)
    assert sorted(index.name(video) for video in range(40)) == sorted(frame_folders.names)
    assert build(second, output, labels=labels, append=True) == manifest  # again: complete
    assert content(output) == after


def test_append_refuses_what_does_not_fit(frame_folders, built, tmp_path):
    extra = write_list(frame_folders, tmp_path / "extra.txt", [frame_folders.annotations.read_text().splitlines()[3]])
    before = content(built)
    with pytest.raises(ShardError, match=r"extra\.txt:1: 'class/video_0003' is in .* already"):
        build(extra, built, append=True)
    with pytest.raises(ShardError, match="class 1 is 'class 1' there and 'other'"):
        build(extra, built, append=True, labels=["class 0", "other", "class 2"])
    with pytest.raises(ShardError, match="class 2 is 'class 2' there and None"):
        build(extra, built, append=True, labels=["class 0", "class 1"])
    with pytest.raises(ShardError, match="append with --store frames"):
        build(extra, built, append=True, store="video")
    with pytest.raises(ShardError, match="no finished data set to append to"):
        build(extra, tmp_path / "new", append=True)
    shutil.rmtree(built / ".building", ignore_errors=True)
    assert content(built) == before


@pytest.mark.parametrize("step", range(0, 24))
def test_interrupted_append_leaves_the_old_or_the_new_data_set(frame_folders, tmp_path, monkeypatch, step):
    output = tmp_path / "data"
    lines = frame_folders.annotations.read_text().splitlines()
    first, second = (write_list(frame_folders, tmp_path / f"{k}.txt", lines[k::2]) for k in (0, 1))
    old = build(first, output)
    shutil.copytree(output, tmp_path / "whole")
    new = build(second, tmp_path / "whole", append=True)

    class Killed(BaseException):
        pass

    originals = {name: getattr(Path, name) for name in ("replace", "unlink")}
    steps = iter(range(1000))

    def interrupted(name: str):
        def act(self: Path, *arguments, **options):
            if next(steps) == step:
                raise Killed
            return originals[name](self, *arguments, **options)

        return act

    for name in originals:
        monkeypatch.setattr(Path, name, interrupted(name))
    with contextlib.suppress(Killed):
        build(second, output, append=True)
    monkeypatch.undo()
    report = check_datasets([output])
    assert report.sound, report
    assert read_local_manifest(output) in (old, new)
    build(second, output, append=True)
    assert content(output) == content(tmp_path / "whole")
    assert check_datasets([output]).sound


def spoil(folders: FrameFolders, video: int, data: bytes | None) -> None:
    path = folders.root / folders.names[video] / "img_00002.jpg"
    if data is None:
        path.unlink()
    else:
        path.write_bytes(data)


def png(size: tuple[int, int] = (48, 32)) -> bytes:
    stream = io.BytesIO()
    Image.new("RGB", size).save(stream, "PNG")
    return stream.getvalue()


BAD_FRAMES = {
    "missing": (None, "no such frame"),
    "empty": (b"", "the file is empty"),
    "text": (b"hello world", "no JPEG, PNG, WebP or BMP"),
    "cut": (jpeg(1)[:-40], "cut off"),
    "header only": (jpeg(1)[:20], "cut off in its header"),
    "cut png": (png()[:-8], "cut off"),
    "cut in the png header": (png()[:18], "no header chunk"),
    "bomb": (png()[:16] + b"\xff\xff\0\0" * 2 + png()[24:], "the limits are"),
}


@pytest.mark.parametrize("kind", BAD_FRAMES)
def test_bad_frames_fail_by_default_and_are_skipped_on_request(tmp_path, kind):
    folders = make_frame_folders(tmp_path, [3, 4, 5, 4])
    data, words = BAD_FRAMES[kind]
    spoil(folders, 1, data)
    with pytest.raises(ShardError) as caught:
        build(folders, tmp_path / "failed")
    message = str(caught.value)
    assert message.startswith(f"{folders.annotations}:2: '{folders.root}/class/video_0001/img_00002.jpg': ")
    assert words in message
    assert "; " in message.split(words)[1]
    for workers in (1, 4):
        manifest = build(folders, tmp_path / str(workers), workers=workers, on_error="skip")
        assert manifest.num_videos == 3
        assert [(entry["name"], entry["line"]) for entry in manifest.skipped] == [("class/video_0001", 2)]
        assert words in manifest.skipped[0]["reason"]
        assert str(tmp_path) not in manifest.to_json()
    assert content(tmp_path / "1") == content(tmp_path / "4")
    assert check_datasets([tmp_path / "1"], deep=True).sound


def test_bad_folders_are_named(tmp_path):
    folders = make_frame_folders(tmp_path, [3])
    for line, words in [("nowhere 3 0", "no such folder"), ("class/video_0000 0 0", "0 frames")]:
        with pytest.raises(ShardError, match=rf"list\.txt:1: .*{words}"):
            build(write_list(folders, tmp_path / "list.txt", [line]), tmp_path / "data")
    with pytest.raises(ShardError, match="no such folder; give the folder"):
        build(FrameFolders(tmp_path / "gone", folders.annotations, folders.labels, []), tmp_path / "data")
    with pytest.raises(ShardError, match=r"none of the 1 videos could be stored, the first is .*1 x "):
        build(write_list(folders, tmp_path / "list.txt", ["nowhere 3 0"]), tmp_path / "data", on_error="skip")
    os.mkfifo(folders.root / "class/video_0000/pipe_00001.jpg")
    with pytest.raises(ShardError, match="not a regular file"):
        build(folders, tmp_path / "data", image_template="pipe_{:05d}.jpg")
    bad = [Annotation("a", 1, 7, 4)]
    with pytest.raises(ShardError, match="annotations:4: label 7"):
        build_shards(bad, root=tmp_path, labels=["one"], output=tmp_path / "data")


def test_frame_that_changes_while_it_is_read(tmp_path, monkeypatch):
    folders = make_frame_folders(tmp_path, [3])
    path = folders.root / folders.names[0] / "img_00002.jpg"
    read, reads = os.read, iter(range(100))

    def racing(file: int, size: int) -> bytes:
        data = read(file, size)
        if next(reads) == 1:
            path.write_bytes(jpeg(99))
        return data

    monkeypatch.setattr(shards.sources.os, "read", racing)
    with pytest.raises(ShardError, match=r"img_00002\.jpg': the file changed while it was read"):
        build(folders, tmp_path / "data", workers=1)


def test_frames_counted_from_zero(tmp_path):
    folders = make_frame_folders(tmp_path, [3, 3])
    first = folders.root / folders.names[0]
    for frame in (1, 2, 3):
        (first / f"img_{frame:05d}.jpg").rename(first / f"img_{frame - 1:05d}.jpg")
    build(folders, tmp_path / "data")
    index = open_built(tmp_path / "data")
    for video in range(2):
        stored = index.member_rows(video, np.arange(3))["crc32"].tolist()
        files = sorted((folders.root / index.name(video)).iterdir())
        assert stored == [zlib.crc32(file.read_bytes()) for file in files]


def test_kinds_of_images(tmp_path):
    """The extension follows the bytes; re-encoding gives what Pillow shows, without turning by EXIF."""
    folders = make_frame_folders(tmp_path, [7])
    folder = folders.root / folders.names[0]
    images = [
        Image.new("L", (40, 30), 99),
        Image.new("CMYK", (40, 30), (9, 80, 120, 3)),
        Image.new("RGB", (40, 30)),
    ]
    exif = Image.Exif()
    exif[0x0112] = 6
    variants = [("JPEG", {}), ("JPEG", {}), ("JPEG", {"exif": exif}), ("PNG", {}), ("WEBP", {}), ("BMP", {})]
    variants += [("JPEG", {"progressive": True})]
    expected = []
    for frame, (kind, options) in enumerate(variants, start=1):
        image = images[min(frame - 1, 2)]
        path = folder / f"img_{frame:05d}.jpg"
        image.save(path, kind, **options)
        expected.append(np.asarray(Image.open(path).convert("RGB")))
    with (folder / "img_00001.jpg").open("ab") as stream:
        stream.write(b"\0\0 left by the camera")
    build(folders, tmp_path / "kept")
    build(folders, tmp_path / "encoded", quality=100)
    names = [f"{frame:06d}.{kind}" for frame, kind in enumerate(["jpg", "jpg", "jpg", "png", "webp", "bmp", "jpg"])]
    with tarfile.open(tmp_path / "kept" / "000000.tar") as archive:
        assert archive.getnames()[1:] == [f"000000000.{name}" for name in names]
    with tarfile.open(tmp_path / "encoded" / "000000.tar") as archive:
        for member, pixels in zip(archive.getmembers()[1:], expected, strict=True):
            image = Image.open(archive.extractfile(member))
            assert (image.mode, image.size, len(image.getexif())) == ("RGB", (40, 30), 0)
            assert np.abs(np.asarray(image, int) - pixels).max() <= 3
    assert check_datasets([tmp_path / "kept"], deep=True).sound


def test_a_remembered_header_is_only_used_for_the_same_header():
    probe = ImageProbe()
    images = [jpeg(0), jpeg(1), png((10, 20)), jpeg(2), jpeg(3, 64, 64), jpeg(4), png((5, 5)), png((6, 6)), jpeg(5)]
    images += [jpeg(6) + b"trailing", jpeg(7)]
    assert [probe(data) for data in images] == [probe_image(data) for data in images]
    for _ in range(2):
        with pytest.raises(ValueError, match="cut off"):
            probe(jpeg(8)[:-30])
        assert probe(jpeg(9)) == ("jpg", 48, 32)


def test_short_side_scales_down_only(tmp_path):
    folders = make_frame_folders(tmp_path, [2])
    folder = folders.root / folders.names[0]
    (folder / "img_00001.jpg").write_bytes(jpeg(0, 200, 100))
    build(folders, tmp_path / "data", short_side=50)
    members = open_built(tmp_path / "data").members
    assert [(row["width"], row["height"]) for row in members] == [(100, 50), (48, 32)]
    with tarfile.open(tmp_path / "data" / "000000.tar") as archive:
        text = json.load(archive.extractfile("000000000.json"))
    assert (text["width"], text["height"]) == (None, None)


def test_a_rate_of_frames_that_have_no_times_is_refused(frame_folders, tmp_path):
    with pytest.raises(ShardError, match=r"frames of a folder have no times, so --fps 5 cannot .* leave --fps out"):
        build(frame_folders, tmp_path / "data", fps=5)


def test_max_frames_thins_uniformly(frame_folders, tmp_path):
    assert thinned(10, 4).tolist() == [1, 3, 6, 8]
    assert thinned(3, 4).tolist() == [0, 1, 2]
    for count in range(1, 200, 7):
        for limit in (1, 5, 32):
            steps = np.diff(thinned(count, limit))
            assert len(steps) == min(count, limit) - 1
            assert len(steps) == 0 or steps.max() - steps.min() <= 1
    build(frame_folders, tmp_path / "data", max_frames=4)
    index = open_built(tmp_path / "data")
    assert set(index.videos["num_frames"].tolist()) == {1, 2, 3, 4}
    video = next(video for video in range(40) if index.name(video) == "class/video_0008")
    files = sorted((frame_folders.root / "class/video_0008").iterdir())
    stored = index.member_rows(video, np.arange(4))["crc32"].tolist()
    assert stored == [zlib.crc32(files[frame].read_bytes()) for frame in thinned(9, 4)]


@pytest.mark.parametrize(
    "options",
    [
        {"store": "zip"},
        {"max_frames": 0},
        {"short_side": 0},
        {"quality": 101},
        {"fps": 0},
        {"store": "video", "short_side": 5},
        {"image_template": "img.jpg"},
        {"image_template": "../{:d}.jpg"},
        {"image_template": "{:d} {:d}"},
        {"image_template": "{name}"},
    ],
)
def test_bad_options_are_named(options):
    with pytest.raises(ValueError, match=r"store|max_frames|short_side|quality|fps|image_template"):
        SourceOptions(**options)


@pytest.mark.skipif(not REAL_LISTS.is_dir(), reason="the real lists are not here")
def test_awkward_names_survive(tmp_path):
    lines = (REAL_LISTS / "hmdb51_full.txt").read_text().splitlines()
    lines = [line for line in lines if not line.rsplit(" ", 2)[0].replace("/", "").replace("_", "").isalnum()][:400]
    names = [line.rsplit(" ", 2)[0] for line in lines]
    for name in names:
        (tmp_path / "frames" / name).mkdir(parents=True)
        (tmp_path / "frames" / name / "img_00001.jpg").write_bytes(jpeg(0))
    listed = tmp_path / "list.txt"
    listed.write_text("\n".join(f"{name} 1 {line.rsplit(' ', 1)[1]}" for name, line in zip(names, lines, strict=True)))
    folders = FrameFolders(tmp_path / "frames", listed, REAL_LISTS / "hmdb51_labels.csv", names)
    build(folders, tmp_path / "data", shard_bytes=10**6)
    index = open_built(tmp_path / "data")
    assert sorted(index.name(video) for video in range(len(names))) == sorted(names)


def test_command_line(frame_folders, tmp_path):
    good = subprocess.run(command(frame_folders, tmp_path / "a"), capture_output=True, text=True, check=False)
    assert (good.returncode, good.stderr) == (0, "")
    assert "40 videos, 190 frames" in good.stdout
    bad = write_list(frame_folders, tmp_path / "bad.txt", ["class/video_0000 1 9"])
    for arguments, words in [
        (command(bad, tmp_path / "b"), "bad.txt:1: label 9"),
        (command(frame_folders, tmp_path / "b", "--quality", "900"), "quality: expected 1 to 100, got 900"),
    ]:
        result = subprocess.run(arguments, capture_output=True, text=True, check=False)
        assert result.returncode == 1
        assert result.stderr.startswith("build_shards: error: ")
        assert words in result.stderr
        assert result.stderr.count("\n") == 1
    usage = subprocess.run(
        command(frame_folders, tmp_path / "b", "--shard-bytes", "much"), capture_output=True, check=False
    )
    assert usage.returncode == 2


def test_feed_keeps_order_and_memory():
    size, waiting, lock, peak = 1000, [0], threading.Lock(), [0]

    def produce(task: int):
        for item in range(50):
            with lock:
                waiting[0] += 1
                peak[0] = max(peak[0], waiting[0])
            yield task, item

    with OrderedFeed(produce, lambda item: size, start=0, stop=20, workers=4, budget_bytes=100_000) as feed:
        for task in range(20):
            for number, item in enumerate(feed.take(task)):
                with lock:
                    waiting[0] -= 1
                assert item == (task, number)
    assert peak[0] <= 100_000 // size + 4 + 3


def test_feed_raises_at_its_place_and_stops():
    def produce(task: int):
        yield task
        if task == 3:
            raise InterruptedError

    before = threading.active_count()
    with OrderedFeed(produce, lambda item: 1, start=0, stop=10**9, workers=3, budget_bytes=10**5) as feed:
        for task in range(3):
            assert list(feed.take(task)) == [task]
        items = feed.take(3)
        assert next(items) == 3
        with pytest.raises(InterruptedError):
            next(items)
    assert threading.active_count() == before


def test_frames_that_are_copied_take_two_threads_and_all_else_one_a_core(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)))
    folder, video = Annotation("a", 3, 0, 1), Annotation("b.mp4", None, 0, 2)
    for videos, options, expected in (
        ([folder], SourceOptions(max_frames=2), 2),
        ([folder], SourceOptions(short_side=32), 8),
        ([folder, video], SourceOptions(), 8),
        ([video], SourceOptions("video"), 8),
    ):
        assert shards.writer._default_workers(videos, options) == expected
