"""The index of a data set: its rows at the borders of what they may say, and files that are not what they should be."""

import dataclasses
import threading
import time
import zlib

import numpy as np
import pytest
from shard_data import make_dataset, write_index

import shards.index
from shards.format import INDEX_ROLES, MANIFEST, MEMBER_DTYPE, VIDEO_DTYPE, SampleError, ShardError
from shards.index import Index, check_crc32, open_index, read_local_manifest
from shards.reader import open_dataset

COUNTS = (3, 5, 1, 8)


@pytest.fixture(params=["frames", "video"])
def folder(request, tmp_path):
    make_dataset(tmp_path / "data", COUNTS, content=request.param)
    return tmp_path / "data"


def opened(folder) -> Index:
    manifest = read_local_manifest(folder)
    return open_index("here", manifest, {role: folder / manifest.index[role]["file"] for role in INDEX_ROLES})


def write_tables(folder, index: Index, **changes) -> None:
    """Writes the tables of `index` with changes, and a manifest that fits them."""
    tables = {"videos": index.videos, "members": np.array(index.members), "names": index.names} | changes
    write_index(folder, tables, index.manifest.shards, index.manifest.content)


def test_names_and_rows_are_those_of_the_video(folder):
    index = opened(folder)
    assert [index.name(video) for video in range(4)] == [f"some dir/vidéo 0 {video}.x" for video in range(4)]
    counts = COUNTS if index.manifest.content == "frames" else (1,) * 4
    for video, count in enumerate(counts):
        rows = index.member_rows(video, np.arange(count))
        assert set(rows["width"].tolist()) == {40 + video}
        assert index.videos["crc32"][video] == zlib.crc32(rows["crc32"].astype("<u4").tobytes())


def test_a_name_of_other_bytes_than_utf8_keeps_them(folder):
    index = opened(folder)
    names = index.names.copy()
    names[0] = 0xFF
    assert dataclasses.replace(index, names=names).name(0).encode("utf-8", "surrogateescape")[0] == 0xFF


def test_a_member_lies_inside_its_shard(folder):
    index = opened(folder)
    rows = np.zeros(2, MEMBER_DTYPE)
    size = index.manifest.shards[1].bytes
    rows["block"], rows["size"] = [1, 2], [1, size - 1024]
    assert index.ranges(3, rows) == [(512, 513), (1024, size)]
    for block, length in ((2, size - 1023), (0, 5), (3, 0)):
        rows["block"][1], rows["size"][1] = block, length
        with pytest.raises(SampleError, match=r"places a member of video 3 at bytes .* of 000001.tar"):
            index.ranges(3, rows)


@pytest.mark.parametrize("role", INDEX_ROLES)
def test_a_file_that_is_not_the_table_is_refused(folder, role):
    path = folder / read_local_manifest(folder).index[role]["file"]
    own = path.read_bytes()
    for content, message in (
        (own + b"x", f"has {len(own) + 1} bytes, the manifest says {len(own)}"),
        (b"x" * len(own), "not an index table"),
        (None, "No such file.*index is not complete"),
    ):
        path.unlink()
        if content is not None:
            path.write_bytes(content)
        with pytest.raises(ShardError, match=rf"{path}: .*{message}.*copy the data set again or rebuild it"):
            opened(folder)
        path.write_bytes(own)
    opened(folder)


@pytest.mark.parametrize("role", INDEX_ROLES)
def test_a_table_of_another_kind_is_refused(folder, role):
    """Of other columns, or of two dimensions."""
    manifest = read_local_manifest(folder)
    path = folder / manifest.index[role]["file"]
    table = np.load(path)
    for other in (np.zeros(len(table), "<f4"), table[:, None]):
        np.save(path, other)
        index = manifest.index | {role: manifest.index[role] | {"bytes": path.stat().st_size}}
        files = {role: folder / entry["file"] for role, entry in index.items()}
        with pytest.raises(ShardError, match=f"{path}: holds .*, not the table of {role}"):
            open_index("here", dataclasses.replace(manifest, index=index), files)


@pytest.mark.parametrize("role", INDEX_ROLES)
def test_a_damaged_byte_is_found_but_where_rows_are_checked_later(folder, role):
    """The last byte of a table. Those of the members would cost a look at every frame's row."""
    path = folder / read_local_manifest(folder).index[role]["file"]
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    if role == "members":
        opened(folder)
    else:
        with pytest.raises(ShardError, match=rf"{path}: has the CRC-32 0x[0-9a-f]{{8}}, the manifest says"):
            opened(folder)


def test_checksums_of_files_larger_than_a_piece(tmp_path):
    content = np.random.default_rng(0).bytes((1 << 20) + 5)
    (tmp_path / "file").write_bytes(content)
    check_crc32(tmp_path / "file", zlib.crc32(content))
    with pytest.raises(ShardError, match=r"file: has the CRC-32 0x[0-9a-f]{8}, the manifest says 0x00000001"):
        check_crc32(tmp_path / "file", 1)


def test_threads_parse_headers_one_after_another(folder, monkeypatch):
    """Python 3.11.7's `ast` fails where two threads use it: openings of several data sets did."""
    free, open_memmap = threading.Lock(), np.lib.format.open_memmap

    def alone(path, mode):
        assert free.acquire(blocking=False)
        time.sleep(0.01)
        free.release()
        return open_memmap(path, mode=mode)

    monkeypatch.setattr(np.lib.format, "open_memmap", alone)
    with open_dataset([str(folder)] * 4) as dataset:
        assert len(dataset) == 4 * len(COUNTS)


def test_the_member_table_is_mapped_and_the_videos_are_not(folder):
    """Opening must not read a row for every frame, and rows that were checked must not change afterwards."""
    index = opened(folder)
    assert isinstance(index.members.base, np.memmap) and not index.members.flags.writeable
    path = folder / index.manifest.index["videos"]["file"]
    with path.open("r+b") as file:
        file.seek(-VIDEO_DTYPE.itemsize, 2)
        file.write(bytes(VIDEO_DTYPE.itemsize))
    assert index.videos["num_frames"].tolist() == list(COUNTS)


def test_rows_may_reach_the_end_of_their_tables_and_no_further(folder):
    index = opened(folder)
    videos = index.videos.copy()
    videos["name_start"][1], videos["name_size"][1] = len(index.names), 0
    write_tables(folder, index, videos=videos)
    assert opened(folder).name(1) == ""
    for column, value, message in (
        ("name_start", len(index.names) + 1, f"row 1 .*the name ends behind the {len(index.names)} bytes of names"),
        ("name_size", 1, f"row 1 .*the name ends behind the {len(index.names)} bytes of names"),
        ("first_member", len(index.members), f"row 1 .*members end behind the table's {len(index.members)}"),
        ("shard", 2, "row 1 .*there are 2 shards"),
        ("label", 3, "row 1 .*there are 3 classes"),
        ("label", -1, "row 1 .*there are 3 classes"),
        ("num_frames", 0, "row 1 .*no frames"),
        ("num_members", 2, "row 1 .*num_members does not fit num_frames"),
    ):
        wrong = videos.copy()
        wrong[column][1] = value
        write_tables(folder, index, videos=wrong)
        with pytest.raises(ShardError, match=rf"here: {message}"):
            opened(folder)


def test_tables_and_manifest_belong_together(folder):
    index = opened(folder)
    files = {role: folder / index.manifest.index[role]["file"] for role in INDEX_ROLES}
    for changes, message in (
        ({"num_videos": 5}, "the index holds 4 videos .*the manifest says 5"),
        ({"num_members": 99}, "the index holds 4 videos .* with 99"),
        ({"fingerprint": "0" * 64}, "has the fingerprint .*the manifest says 0000000000000000"),
        ({"classes": ["a", "b", "\ud800"]}, "a class name is not valid text"),
        ({"classes": ["a", "b", "d"]}, "has the fingerprint"),
    ):
        with pytest.raises(ShardError, match=f"here: .*{message}"):
            open_index("here", dataclasses.replace(index.manifest, **changes), files)


def test_a_data_set_without_videos_is_none(tmp_path):
    tables = {"videos": np.zeros(0, VIDEO_DTYPE), "members": np.zeros(0, MEMBER_DTYPE), "names": np.zeros(0, np.uint8)}
    write_index(tmp_path, tables, [])
    with pytest.raises(ShardError, match="the index holds 0 videos with 0 members"):
        opened(tmp_path)


def test_a_manifest_beyond_any_size_is_not_read(folder, monkeypatch):
    size = (folder / MANIFEST).stat().st_size
    monkeypatch.setattr(shards.index, "MAX_MANIFEST_BYTES", size)
    read_local_manifest(folder)
    monkeypatch.undo()
    with (folder / MANIFEST).open("r+b") as file:
        file.truncate((256 << 20) + 1)  # a hole in the file, no bytes on the disk
    with pytest.raises(ShardError, match=r"manifest.json: has 268435457 bytes, more than any manifest"):
        read_local_manifest(folder)


def test_a_folder_without_a_manifest_is_named(tmp_path):
    with pytest.raises(ShardError, match=r"manifest.json: not found; name a folder that build_shards wrote"):
        read_local_manifest(tmp_path)
    (tmp_path / "file").touch()
    with pytest.raises(ShardError, match=r"file/manifest.json: Not a directory"):
        read_local_manifest(tmp_path / "file")
