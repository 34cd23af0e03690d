"""Reading from local folders: just the sampled frames, whole data sets joined, and every fault named."""

import errno
import json
import multiprocessing
import os
import pickle
import re
import shutil
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from shard_data import CLASSES, make_dataset, read_everything, send_everything, tar_members, write_index

import shards.local
from shards.address import expand_sources, join_address, scheme_of
from shards.annotations import parse_annotations
from shards.format import INDEX_ROLES, MEMBER_DTYPE, VIDEO_DTYPE, Manifest, ShardError, ShardInfo, video_key
from shards.reader import open_dataset
from shards.text import redact, redact_text
from shards.writer import build_shards


@pytest.fixture
def folder(tmp_path):
    make_dataset(tmp_path / "data")
    return tmp_path / "data"


def tables_of(folder: Path) -> tuple[dict[str, np.ndarray], Manifest]:
    manifest = Manifest.from_json((folder / "manifest.json").read_text(), "manifest")
    return {role: np.load(folder / manifest.index[role]["file"]) for role in INDEX_ROLES}, manifest


def test_reads_what_tarfile_reads(folder):
    members = tar_members(folder)
    with open_dataset(str(folder)) as dataset:
        assert len(dataset) == 7
        assert dataset.num_frames.tolist() == [3, 5, 1, 8, 2, 6, 4]
        assert dataset.labels.tolist() == [0, 1, 2, 0, 1, 2, 0]
        assert dataset.shard_of.tolist() == [0, 0, 0, 1, 1, 1, 2]
        assert dataset.classes == CLASSES
        rng = np.random.default_rng(0)
        requests = []
        for _ in range(200):
            sample = int(rng.integers(len(dataset)))
            requests.append((sample, rng.integers(0, dataset.num_frames[sample], rng.integers(1, 9))))
        for (sample, frames), got in zip(requests, dataset.read_many(requests), strict=True):
            assert got == [members[f"{video_key(sample)}.{frame:06d}.jpg"] for frame in frames]
            assert got == dataset.read(sample, frames)
        assert json.loads(members[f"{video_key(2)}.json"])["name"] == dataset.name(2)
        assert dataset.frame_sizes(3, np.array([1, 1])) == [(30, 43), (30, 43)]
        assert dataset.content(0) == "frames"
        assert dataset.describe(3) == f"some dir/vidéo 0 3.x (sample 3, 000001.tar of {folder})"
        assert dataset.read(0, np.zeros(0, np.int64)) == []


def test_reads_what_was_built(tmp_path):
    """Frame folders through the writer and back: each frame is its file, byte for byte, with its size."""
    rng = np.random.default_rng(0)
    lines = []
    for number, num_frames in enumerate([3, 1, 6, 2]):
        folder = tmp_path / "frames" / f"clip {number}"
        folder.mkdir(parents=True)
        for frame in range(num_frames):
            pixels = rng.integers(0, 256, (20 + number, 30, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / f"img_{frame + 1:05d}.jpg")
        lines.append(f"clip {number} {num_frames} {number % 3}\n")
    (tmp_path / "list.txt").write_text("".join(lines))
    output = tmp_path / "out"
    build_shards(
        parse_annotations(tmp_path / "list.txt"),
        root=tmp_path / "frames",
        labels=CLASSES,
        output=output,
        shard_bytes=8000,
        workers=1,
    )
    with open_dataset(str(output)) as dataset:
        assert sorted(dataset.name(sample) for sample in range(4)) == [f"clip {number}" for number in range(4)]
        assert len(set(dataset.shard_of.tolist())) > 1
        for sample, frames in enumerate(read_everything(dataset)):
            files = sorted((tmp_path / "frames" / dataset.name(sample)).iterdir())
            assert frames == [file.read_bytes() for file in files]
            assert dataset.labels[sample] == int(dataset.name(sample)[-1]) % 3
            sizes = dataset.frame_sizes(sample, np.arange(len(files)))
            assert sizes == [(20 + int(dataset.name(sample)[-1]), 30)] * len(files)


def test_stored_video(tmp_path):
    stored = make_dataset(tmp_path / "v", [30, 40], content="video")
    with open_dataset(str(tmp_path / "v")) as dataset:
        assert dataset.content(1) == "video"
        assert dataset.num_frames.tolist() == [30, 40]
        assert dataset.read_video(1) == stored[1][0]
        assert dataset.read_many([(1, np.array([39])), (0, np.array([0, 1]))]) == [stored[1], stored[0]]
        assert len(dataset.frame_sizes(0, np.array([3, 29]))) == 2
        with pytest.raises(ValueError, match="read_video"):
            dataset.read(0, np.array([0]))


def test_only_the_sampled_frames_are_read(tmp_path):
    make_dataset(tmp_path / "d", [300] * 4, frame_bytes=20_000)
    program = f"""
import sys, numpy as np
from shards.reader import open_dataset
from shards.writer import build_shards
dataset = open_dataset({str(tmp_path / "d")!r})
def rchar():
    return int(open('/proc/self/io').read().split()[1])
own = rchar(); own = rchar() - own
frames = np.arange(8) * 37
wanted = 0
before = rchar()
for sample in range(4):
    wanted += sum(map(len, dataset.read(sample, frames)))
print((rchar() - before - own) / wanted)
"""
    ratio = float(subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True).stdout)
    assert 1 <= ratio <= 1.05


def is_tar(descriptor: int) -> bool:
    return Path(f"/proc/self/fd/{descriptor}").readlink().suffix == ".tar"


def test_repeated_frames_are_read_once(folder, monkeypatch):
    reads = []
    pread = os.pread

    def counting(descriptor, *arguments):
        if is_tar(descriptor):
            reads.append(arguments)
        return pread(descriptor, *arguments)

    with open_dataset(str(folder)) as dataset:
        monkeypatch.setattr(os, "pread", counting)
        got = dataset.read(3, np.array([5, 2, 5, 5, 2]))
        assert len(reads) == 2
        assert got[0] is got[2] and got[1] is got[4] and got[0] != got[1]


def test_joined_data_sets(tmp_path):
    first = make_dataset(tmp_path / "part0", seed=1)
    second = make_dataset(tmp_path / "part1", [2, 9], seed=2, videos_per_shard=1)
    third = make_dataset(tmp_path / "x", [7], seed=3, content="video")
    with open_dataset([f"{tmp_path}/part{{0..1}}", f"file://{tmp_path}/x"]) as dataset:
        assert len(dataset) == 10
        assert read_everything(dataset) == first + second + third
        assert dataset.shard_of.tolist() == [0, 0, 0, 1, 1, 1, 2, 3, 4, 5]
        assert dataset.labels.tolist() == [0, 1, 2, 0, 1, 2, 0, 0, 1, 0]
        assert dataset.content(9) == "video"
        assert dataset.name(8) == "some dir/vidéo 2 1.x"
        assert dataset.describe(8).endswith(f"(sample 8, 000001.tar of {tmp_path}/part1)")
        assert [dataset.place(sample) for sample in (0, 6, 7, 8, 9)] == [
            dataset.places[number] for number in (0, 0, 1, 1, 2)
        ]
        assert dataset.part_sizes == [7, 2, 1] and dataset.skipped == [] and not dataset.is_remote
        assert [dataset.label_of(sample) for sample in range(10)] == dataset.labels.tolist()
        assert dataset.class_counts().tolist() == [5, 3, 2] and dataset.class_counts(5).tolist() == [5, 3, 2, 0, 0]
        joined = dataset.fingerprint
    with open_dataset([str(tmp_path / "part1"), str(tmp_path / "part0")]) as other:
        assert other.fingerprint != joined
    with open_dataset(str(tmp_path / "part0")) as single:
        assert single.fingerprint == tables_of(tmp_path / "part0")[1].fingerprint


def test_class_lists_must_agree(tmp_path):
    make_dataset(tmp_path / "a")
    make_dataset(tmp_path / "b", classes=["climbing", "driving", "fencing"])
    make_dataset(tmp_path / "c", classes=["climbing"])
    with pytest.raises(ShardError, match=r"a and .*b have different class lists \(class 1 is 'diving' and 'driving'"):
        open_dataset([str(tmp_path / "a"), str(tmp_path / "b")])
    with pytest.raises(ShardError, match="3 and 1 classes"):
        open_dataset([str(tmp_path / "a"), str(tmp_path / "c")])


def test_threads_and_more_shards_than_open_files(tmp_path, monkeypatch):
    monkeypatch.setattr(shards.local, "_MAX_OPEN_FILES", 3)
    stored = make_dataset(tmp_path / "d", [4] * 40, videos_per_shard=1)
    with open_dataset(str(tmp_path / "d")) as dataset:
        for _ in range(5):
            assert read_everything(dataset) == stored
        with ThreadPoolExecutor(8) as pool:
            for result in pool.map(lambda _: read_everything(dataset), range(16)):
                assert result == stored
        assert 0 < num_open(tmp_path, ".tar") <= 3
    assert num_open(tmp_path, ".tar") == 0
    with pytest.raises(ValueError, match="closed"):
        dataset.read(0, np.array([0]))


def num_open(folder: Path, suffix: str) -> int:
    """Files of a folder that this process has open."""
    names = map(os.path.realpath, Path("/proc/self/fd").iterdir())
    return sum(name.startswith(str(folder)) and name.endswith(suffix) for name in names)


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_in_a_child_process(folder, method):
    context = multiprocessing.get_context(method)
    with open_dataset(str(folder)) as dataset:
        stored = read_everything(dataset)
        ours, theirs = context.Pipe()
        process = context.Process(target=send_everything, args=(dataset, theirs))
        process.start()
        assert ours.poll(30)
        assert ours.recv() == stored
        process.join(10)
        assert process.exitcode == 0
        assert read_everything(dataset) == stored


def test_unpickling_another_data_set_is_an_error(folder):
    data = pickle.dumps(open_dataset(str(folder)))
    with pickle.loads(data) as again:
        assert len(again) == 7
    shutil.rmtree(folder)
    make_dataset(folder, seed=5)
    with pytest.raises(ShardError, match="changed while it was in use"):
        pickle.loads(data)


@pytest.mark.parametrize("frames", [[8], [-1], [0, 100]])
def test_frames_out_of_range(folder, frames):
    with (
        open_dataset(str(folder)) as dataset,
        pytest.raises(IndexError, match=r"vidéo 0 3.x \(sample 3.*frame .* of 8"),
    ):
        dataset.read(3, np.array(frames))


@pytest.mark.parametrize("sample", [-1, 7, 10**12])
def test_samples_out_of_range(folder, sample):
    with open_dataset(str(folder)) as dataset, pytest.raises(IndexError, match=f"sample {sample} of 7"):
        dataset.read(sample, np.array([0]))


# Faults of the files


def flip_bit(path: Path, offset: int) -> None:
    """In place, keeping the modification time: what a failing disk does."""
    status = path.stat()
    with path.open("r+b") as file:
        file.seek(offset)
        byte = file.read(1)[0]
        file.seek(offset)
        file.write(bytes([byte ^ 4]))
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


def test_flipped_bit_is_named(folder):
    tables, _ = tables_of(folder)
    row = tables["members"][int(tables["videos"]["first_member"][4]) + 1]
    flip_bit(folder / "000001.tar", int(row["block"]) * 512 + 5)
    with open_dataset(str(folder)) as dataset:
        dataset.read(4, np.array([0]))
        with pytest.raises(ShardError, match=r"vidéo 0 4.x \(sample 4, 000001.tar of .*frame 1 has .*check_shards"):
            dataset.read_many([(0, np.array([0])), (4, np.array([0, 1]))])
    with open_dataset(str(folder), verify=False) as dataset:
        assert len(dataset.read(4, np.array([1]))[0]) == row["size"]


def test_missing_truncated_and_foreign_shards(folder):
    shard = folder / "000001.tar"
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-1024])
    with pytest.raises(ShardError, match=rf"000001.tar: has {len(whole) - 1024} bytes, the manifest says {len(whole)}"):
        open_dataset(str(folder))
    shard.unlink()
    with pytest.raises(ShardError, match=r"000001.tar: No such file"):
        open_dataset(str(folder))


def test_file_replaced_while_in_use(folder):
    shard = folder / "000000.tar"
    with open_dataset(str(folder)) as dataset:
        dataset.read(0, np.array([0]))
        # Replaced: the open file is still the old one and right; whoever opens it anew is told.
        stored = dataset.read(0, np.array([1]))
        data = shard.read_bytes()
        shard.unlink()
        shard.write_bytes(data)
        assert dataset.read(0, np.array([1])) == stored
        dataset._renew()
        with pytest.raises(ShardError, match=r"000000.tar: the file was changed or replaced while it was in use"):
            dataset.read(0, np.array([0]))
    with open_dataset(str(folder)) as dataset:
        dataset.read(0, np.array([0]))
        os.truncate(shard, 1000)
        with pytest.raises(ShardError, match=r"000000.tar: the file was changed or replaced while it was in use"):
            dataset.read(0, np.array([0]))
        shard.unlink()
        dataset._renew()
        with pytest.raises(ShardError, match=r"000000.tar: cannot be read: No such file"):
            dataset.read(0, np.array([0]))


def test_a_table_that_is_cut_in_use_is_named(tmp_path):
    make_dataset(tmp_path / "data", [3000])
    (members,) = (tmp_path / "data").glob("index/members*.npy")
    with open_dataset(str(tmp_path / "data")) as dataset:
        os.truncate(members, 128)
        with pytest.raises(
            ShardError, match=rf"{members}: ends before the rows of video 0; .* copy the data set again"
        ):
            dataset.read(0, np.array([2900]))


@pytest.mark.parametrize("code", [errno.ESTALE, errno.EIO])
@pytest.mark.parametrize(("of_tar", "name"), [(True, "000000.tar"), (False, "index/members[^/]*.npy")])
def test_stale_handles_are_opened_again(folder, monkeypatch, code, of_tar, name):
    monkeypatch.setattr(shards.local, "_BACKOFF_SECONDS", 0.001)
    pread, failures, opened = os.pread, [3], []

    def failing(descriptor, *arguments):
        if is_tar(descriptor) == of_tar and failures[0] > 0:
            failures[0] -= 1
            raise OSError(code, os.strerror(code))
        return pread(descriptor, *arguments)

    with open_dataset(str(folder), retries=3) as dataset:
        stored = dataset.read(0, np.array([0]))
        open_file = shards.local.OpenFile
        monkeypatch.setattr(shards.local, "OpenFile", lambda path: (opened.append(path), open_file(path))[1])
        monkeypatch.setattr(os, "pread", failing)
        assert dataset.read(0, np.array([0])) == stored
        assert len(opened) == 3
        failures[0] = 4
        with pytest.raises(ShardError, match=rf"{name}: cannot be read: {os.strerror(code)}"):
            dataset.read(0, np.array([0]))


def test_a_table_that_another_has_replaced_is_not_used(folder, monkeypatch):
    """Its rows lead to frames of other videos, whose checksums they hold: nothing else would tell."""
    monkeypatch.setattr(shards.local, "_BACKOFF_SECONDS", 0.001)
    pread, failures = os.pread, [errno.ESTALE]

    def failing(descriptor, *arguments):
        if failures and not is_tar(descriptor):
            raise OSError(failures.pop(), "stale")
        return pread(descriptor, *arguments)

    (members,) = folder.glob("index/members*.npy")
    with open_dataset(str(folder)) as dataset:
        rows = np.load(members)
        members.unlink()
        np.save(members, rows[::-1].copy())
        monkeypatch.setattr(os, "pread", failing)
        with pytest.raises(ShardError, match=rf"{members}: was replaced while it was in use"):
            dataset.read(0, np.array([0]))


def rewrite(folder: Path, change, *, keep_identity: bool = False) -> None:
    """Applies `change(tables)` to the tables and writes an index and manifest that fit the result."""
    tables, manifest = tables_of(folder)
    change(tables)
    write_index(
        folder,
        tables,
        manifest.shards,
        manifest.content,
        manifest.classes,
        manifest.fingerprint if keep_identity else None,
    )


def put(role: str, column: str, row: int, value: int):
    def change(tables):
        tables[role][column][row] = value

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (put("videos", "first_member", 2, 29), r"row 2 .*members end behind the table's 29"),
        (put("videos", "first_member", 1, 2**64 - 1), r"row 1 .*members end behind"),
        (put("videos", "num_members", 6, 5), r"row 6 .*num_members does not fit"),
        (put("videos", "num_frames", 6, 0), r"row 6 .*no frames"),
        (put("videos", "shard", 0, 3), r"row 0 .*there are 3 shards"),
        (put("videos", "label", 4, 3), r"row 4 .*there are 3 classes"),
        (put("videos", "label", 4, -1), r"row 4 .*there are 3 classes"),
        (put("videos", "name_start", 6, 2**64 - 1), r"row 6 .*name ends behind"),
        (put("videos", "name_size", 6, 2**32 - 1), r"row 6 .*name ends behind"),
        (lambda tables: tables.update(videos=tables["videos"]["label"].copy()), r"videos.*holds int32"),
        (lambda tables: tables.update(members=tables["members"].reshape(-1, 1)), r"holds .*not the table of members"),
        (lambda tables: tables.update(names=tables["names"].astype("<f4")), r"holds float32"),
        (lambda tables: tables.update(videos=tables["videos"][:0]), r"manifest"),
    ],
)
def test_wrong_index_rows(folder, change, message):
    try:
        rewrite(folder, change)
    except (ValueError, IndexError):
        rewrite(folder, change, keep_identity=True)  # tables from which no fingerprint can be made
    with pytest.raises(ShardError, match=message):
        open_dataset(str(folder))


@pytest.mark.parametrize(("column", "value"), [("block", 2**32 - 1), ("block", 0), ("size", 2**32 - 1), ("size", 0)])
def test_member_rows_outside_the_shard(folder, column, value):
    rewrite(folder, put("members", column, 4, value))
    with open_dataset(str(folder)) as dataset:
        dataset.read(1, np.array([0]))
        with pytest.raises(ShardError, match=r"places a member of video 1 at bytes .* of 000000.tar"):
            dataset.read(1, np.array([0, 1]))


def test_stale_and_foreign_index(folder, tmp_path):
    make_dataset(tmp_path / "other", seed=9)
    _, manifest = tables_of(folder)
    _, other = tables_of(tmp_path / "other")
    videos = folder / manifest.index["videos"]["file"]
    own = videos.read_bytes()
    shutil.copy(tmp_path / "other" / other.index["videos"]["file"], videos)
    with pytest.raises(ShardError, match=r"videos-.*has the CRC-32"):
        open_dataset(str(folder))
    videos.write_bytes(own[:-8])
    with pytest.raises(ShardError, match=r"videos-.*bytes, the manifest says"):
        open_dataset(str(folder))
    videos.unlink()
    with pytest.raises(ShardError, match=r"videos-.*No such file"):
        open_dataset(str(folder))
    videos.write_bytes(own)
    rewrite(folder, put("videos", "label", 0, 1), keep_identity=True)
    with pytest.raises(ShardError, match=r"has the fingerprint .*, the manifest says"):
        open_dataset(str(folder))


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "null", '{"version": 7}', '{"version": 1}', "\0", '"' * 10, "[" * 100000]
)
def test_bad_manifests(folder, text):
    (folder / "manifest.json").write_text(text)
    with pytest.raises(ShardError, match=r"manifest.json: .*rebuild"):
        open_dataset(str(folder))


def test_manifest_that_points_elsewhere(folder):
    path = folder / "manifest.json"
    good = json.loads(path.read_text())
    for file in ["../index/x.npy", "/etc/passwd", "http://h/x.npy", "index/../../x.npy"]:
        bad = json.loads(path.read_text())
        bad["index"]["names"]["file"] = file
        path.write_text(json.dumps(bad))
        with pytest.raises(ShardError, match="manifest"):
            open_dataset(str(folder))
        path.write_text(json.dumps(good))


def test_folders_that_are_no_data_set(tmp_path):
    with pytest.raises(ShardError, match=r"nothing/manifest.json: not found.*build_shards"):
        open_dataset(str(tmp_path / "nothing"))
    (tmp_path / "file").write_text("x")
    with pytest.raises(ShardError, match=r"manifest.json: Not a directory"):
        open_dataset(str(tmp_path / "file"))


@given(data=st.data())
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_damaged_files_only_raise_documented_errors(tmp_path_factory, data):
    """Overwrites a few bytes of manifest or index: either nothing was lost, or a ShardError says so."""
    folder = tmp_path_factory.mktemp("fuzz") / "d"
    stored = make_dataset(folder, [2, 1, 3], frame_bytes=30)
    files = sorted([*folder.glob("index/*.npy"), folder / "manifest.json"])
    file = data.draw(st.sampled_from(files))
    content = bytearray(file.read_bytes())
    for _ in range(data.draw(st.integers(1, 3))):
        position = data.draw(st.integers(0, len(content) - 1))
        content[position] = data.draw(st.integers(0, 255))
    if data.draw(st.booleans()):
        content = content[: data.draw(st.integers(0, len(content)))]
    file.write_bytes(content)
    try:
        with open_dataset(str(folder)) as dataset:
            for sample in range(len(dataset)):
                dataset.name(sample), dataset.describe(sample)
            assert read_everything(dataset) == stored
    except ShardError as error:
        assert re.search(r"build|check|copy|again", str(error))
    finally:
        shutil.rmtree(folder)


# Addresses


def test_brace_notation(tmp_path):
    assert expand_sources("S3://B/Part") == ["s3://B/Part"]
    with pytest.raises(ShardError, match="HTTP://: names no host or bucket; give http://NAME/folder"):
        expand_sources("HTTP://")
    assert expand_sources("s3://b/part{0..3}") == [f"s3://b/part{number}" for number in range(4)]
    assert expand_sources(["a{x,y}", "https://h/p{08..10}"]) == [
        "ax",
        "ay",
        "https://h/p08",
        "https://h/p09",
        "https://h/p10",
    ]
    literal = tmp_path / "odd{1..2}"
    literal.mkdir()
    assert expand_sources(str(literal)) == [str(literal)]
    for bad in ["s3://b/{0..99999999999}", "s3://b/{0..99}{0..99}{0..99}", "s3://b/{0.." + "9" * 50 + "}"]:
        with pytest.raises(ShardError, match="more than 10000"):
            expand_sources(bad)
    with pytest.raises(ShardError, match=r"written like"):
        expand_sources("s3://b/{0..3")
    with pytest.raises(ShardError, match="no data set"):
        expand_sources([])


@pytest.mark.parametrize(
    "address",
    [
        "pipe:cat x",
        "pipe:curl http://h/x |",
        "simplecache::s3://b/x",
        "zip://x::http://h/a.zip",
        "reference://x",
        "zip://x",
        "git://x",
        "github://a:b@c/",
        "exec://rm",
        "",
        "a\0b",
    ],
)
def test_refused_addresses(address):
    with pytest.raises(ShardError, match=r"refused|no address"):
        open_dataset(address)


def test_secrets_are_not_shown():
    address = "https://user:pass@h.org:8080/data?token=abc#x"
    assert redact(address) == "https://h.org:8080/data"
    assert join_address(address, "000000.tar") == "https://user:pass@h.org:8080/data/000000.tar?token=abc"
    text = redact_text(f"cannot open {address} 'https://u:p@[::1]:80/x?t=(a'b)c'; \x1b[31m")
    assert text == "cannot open https://h.org:8080/data 'https://[::1]:80/x \\x1b[31m"
    assert scheme_of("http://[::1]:8000/x") == "http"
    assert join_address("s3://bucket/a#b/", "x") == "s3://bucket/a#b/x"


@given(st.text(max_size=60) | st.from_regex(r"[a-z0-9]{1,6}://[a-z{}.,0-9:\[\]@?]{0,20}", fullmatch=True))
@settings(deadline=None)
def test_any_address_is_expanded_or_refused(address):
    try:
        for part in expand_sources(address):
            redact(part), join_address(part, "x")
    except ShardError:
        pass


def test_damaged_member_table_is_told_from_a_damaged_shard(folder):
    _, manifest = tables_of(folder)
    rows = np.load(folder / manifest.index["members"]["file"], mmap_mode="r+")
    rows["crc32"][3] ^= 1
    rows.flush()
    with open_dataset(str(folder)) as dataset:
        assert len(dataset.read(1, np.array([1, 2]))) == 2
        with pytest.raises(ShardError, match=r"sample 1, .*its rows of the member table are damaged"):
            dataset.read(1, np.array([0]))


def test_short_reads_are_completed(folder, monkeypatch):
    """A network mount may give fewer bytes than there are."""
    with open_dataset(str(folder)) as dataset:
        stored = read_everything(dataset)
        pread = os.pread
        monkeypatch.setattr(os, "pread", lambda descriptor, size, start: pread(descriptor, min(size, 400), start))
        assert read_everything(dataset) == stored
        tables, _ = tables_of(folder)
        end = int(tables["members"]["block"][1]) * 512 + 10
        monkeypatch.setattr(
            os, "pread", lambda descriptor, size, start: pread(descriptor, max(0, min(size, end - start)), start)
        )
        with pytest.raises(ShardError, match=rf"000000.tar: ends at byte {end} while \d+ are needed"):
            read_everything(dataset)


def test_the_kernel_is_asked_for_all_ranges_at_once(folder, monkeypatch):
    asked, reads = [], []
    advise, pread = os.posix_fadvise, os.pread

    def note(descriptor, start, size, advice):
        if advice == os.POSIX_FADV_WILLNEED:
            asked.append((start, size))
        advise(descriptor, start, size, advice)

    monkeypatch.setattr(os, "posix_fadvise", note)
    with open_dataset(str(folder)) as dataset:
        reading = dataset.start([(3, np.array([1, 6])), (0, np.array([2]))])
        monkeypatch.setattr(
            os, "pread", lambda file, size, start: (reads.append((start, size)), pread(file, size, start))[1]
        )
        reading.result()
    assert len(asked) == 3 and asked == reads


def test_files_in_use_stay_open(tmp_path, monkeypatch):
    monkeypatch.setattr(shards.local, "_MAX_OPEN_FILES", 2)
    make_dataset(tmp_path / "d", [1] * 3, videos_per_shard=1)
    opened = []
    open_file = shards.local.OpenFile
    with open_dataset(str(tmp_path / "d")) as dataset:
        monkeypatch.setattr(shards.local, "OpenFile", lambda path: (opened.append(path.name[5]), open_file(path))[1])
        for sample in (0, 1, 0, 2, 0, 2, 1):
            dataset.read(sample, np.array([0]))
    assert opened == ["0", "1", "2", "1"]


def test_a_mount_is_tried_again_once_at_least_and_other_errors_are_not(folder, monkeypatch):
    monkeypatch.setattr(shards.local, "_BACKOFF_SECONDS", 0.001)
    pread, failures, tries = os.pread, [], []

    def failing(descriptor, *arguments):
        if is_tar(descriptor):
            tries.append(1)
            if failures:
                raise OSError(failures.pop(0), "failed")
        return pread(descriptor, *arguments)

    monkeypatch.setattr(os, "pread", failing)
    for retries, codes, expected in [
        (0, [errno.EIO], None),
        (0, [errno.EIO] * 2, 2),
        (1, [errno.EIO] * 2, 2),
        (2, [errno.EIO] * 2, None),
        (5, [errno.EACCES], 1),
        (5, [errno.EIO, errno.EACCES], 2),
    ]:
        with open_dataset(str(folder), retries=retries) as dataset:
            failures[:] = codes
            tries.clear()
            if expected is None:
                assert len(dataset.read(0, np.array([0]))) == 1
            else:
                with pytest.raises(ShardError, match="cannot be read: failed"):
                    dataset.read(0, np.array([0]))
                assert len(tries) == expected


def test_bad_options(folder):
    open_dataset(
        str(folder), retries=0, timeout_seconds=0.5, requests_in_flight=1, bytes_in_flight=1, cache_bytes=1
    ).close()
    counts = ("requests_in_flight", "bytes_in_flight", "timeout_seconds", "cache_bytes")
    for options in [{"retries": -1}, *({count: 0} for count in counts)]:
        with pytest.raises(ValueError, match="expected"):
            open_dataset(str(folder), **options)


def test_opening_a_large_index_is_quick_and_small(tmp_path):
    """240,000 videos of 300 frames: 72 million rows in a sparse file; the tar exists only as a size."""
    num_videos, num_frames = 240_000, 300
    videos = np.zeros(num_videos, VIDEO_DTYPE)
    videos["first_member"] = np.arange(num_videos) * num_frames
    videos["num_members"] = videos["num_frames"] = num_frames
    names = [f"class name {number % 400}/video_{number:09d}".encode() for number in range(num_videos)]
    sizes = np.array([len(name) for name in names])
    videos["name_size"], videos["name_start"] = sizes, np.cumsum(sizes) - sizes
    folder = tmp_path / "large"
    tables = {
        "videos": videos,
        "members": np.zeros(3, MEMBER_DTYPE),
        "names": np.frombuffer(b"".join(names), np.uint8),
    }
    shard = ShardInfo("000000.tar", 1024, num_videos, num_videos * num_frames)
    write_index(folder, tables, [shard])
    manifest = json.loads((folder / "manifest.json").read_text())
    members = folder / manifest["index"]["members"]["file"]
    sparse = np.lib.format.open_memmap(members, "w+", MEMBER_DTYPE, (num_videos * num_frames,))
    del sparse
    manifest["num_members"] = num_videos * num_frames
    manifest["index"]["members"]["bytes"] = members.stat().st_size
    (folder / "manifest.json").write_text(json.dumps(manifest))
    (folder / "000000.tar").write_bytes(bytes(1024))
    start, before = time.perf_counter(), resident_bytes()
    with open_dataset(str(folder)) as dataset:
        seconds, grown = time.perf_counter() - start, resident_bytes() - before
        assert len(dataset) == num_videos
        print(f"opened in {seconds:.3f} s, {grown / 1e6:.0f} MB")
        assert seconds < 2 and grown < 100e6


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGESIZE")


def test_a_local_data_set_needs_no_thread(folder):
    before = threading.active_count()
    with open_dataset(str(folder)) as dataset:
        read_everything(dataset)
        assert threading.active_count() == before
