"""The shard format: names, headers, checksums and the manifest, which may come from a stranger."""

import json
import random
import tarfile
import zlib

import numpy as np
import pytest

from shards.format import (
    BLOCK_BYTES,
    INDEX_ROLES,
    MAX_FRAMES,
    MAX_MEMBER_BYTES,
    MEMBER_DTYPE,
    MULTI_LABEL_VIDEO_DTYPE,
    VIDEO_DTYPE,
    Manifest,
    ShardError,
    ShardInfo,
    fingerprint,
    frame_suffix,
    index_file,
    padding,
    shard_name,
    tar_header,
    tar_place_problem,
    video_crc32,
    video_key,
)

IDENTITY = "0123456789abcdef" * 4


def manifest_of(**changes) -> Manifest:
    """Two shards with three videos of seven frames."""
    index = {role: {"file": index_file(role, IDENTITY), "bytes": 5, "crc32": 6} for role in INDEX_ROLES}
    shards = [ShardInfo("000000.tar", 10240, 2, 4), ShardInfo("000001.tar", 0, 1, 3)]
    return Manifest("frames", ["Zürich", "b"], 3, 7, IDENTITY, shards, index, **changes)


def damaged(*path, value) -> str:
    """The manifest's text with one value replaced; path: its keys."""
    raw = json.loads(manifest_of().to_json())
    place = raw
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    return json.dumps(raw)


def test_tar_header_equals_tarfiles():
    rng = random.Random(0)
    names = [("a" * 100, 8 * 2**30 - 1), ("", 0), ("000000000.json", 0)]
    names += [(f"{rng.randrange(10**9):09d}.{rng.randrange(10**6):06d}.jpg", rng.randrange(2**32)) for _ in range(1000)]
    for name, size in names:
        info = tarfile.TarInfo(name)
        info.size = size
        assert tar_header(name, size) == info.tobuf(tarfile.USTAR_FORMAT)
    for name, size in [("a" * 101, 0), ("a", 8 * 2**30), ("ä", 0)]:
        with pytest.raises(ValueError, match=r"header|ascii"):
            tar_header(name, size)


@pytest.mark.parametrize("size", [0, 1, 511, 512, 513, 10_000])
def test_padding_fills_the_last_block(size):
    assert 0 <= padding(size) < BLOCK_BYTES == tarfile.BLOCKSIZE and (size + padding(size)) % BLOCK_BYTES == 0


def test_names_sort_as_their_numbers():
    assert (shard_name(7), video_key(12), frame_suffix(7, "jpg")) == ("000007.tar", "000000012", "000007.jpg")
    assert (
        len(frame_suffix(MAX_FRAMES - 1, "jpg")) == len(frame_suffix(0, "jpg")) < len(frame_suffix(MAX_FRAMES, "jpg"))
    )
    assert index_file("names", IDENTITY) == "index/names-0123456789abcdef0123456789abcdef.npy"
    assert np.iinfo(MEMBER_DTYPE["size"]).max == MAX_MEMBER_BYTES


def test_the_checksum_of_a_video_is_that_of_its_members_checksums():
    members = np.zeros(3, MEMBER_DTYPE)
    members["crc32"] = [1, 2**32 - 1, 77]
    assert video_crc32(members) == zlib.crc32(np.array([1, 2**32 - 1, 77], "<u4").tobytes())


def test_a_fingerprint_is_of_content_and_order_and_never_changes():
    videos, names = np.zeros(2, VIDEO_DTYPE), np.frombuffer(b"ab", np.uint8)
    for number, column in enumerate(VIDEO_DTYPE.names):
        videos[column] = [number, number + 1]
    first = fingerprint(videos, names, ["x", "é"], "frames")
    assert first == "6e54353a6e663978ea0f647d3254a82553517a8c9ba74af4334734189da9a306"
    assert len({first, fingerprint(videos, names, ["x"], "frames"), fingerprint(videos, names, ["x", "é"], "video"),
                fingerprint(videos, names[::-1], ["x", "é"], "frames")}) == 4  # fmt: skip
    for column in VIDEO_DTYPE.names:
        other = videos.copy()
        other[column][1] += 1
        of_content = column in {"name_size", "num_frames", "crc32", "label"}
        assert (fingerprint(other, names, ["x", "é"], "frames") != first) == of_content, column


def test_a_fingerprint_is_of_the_labels_where_a_video_has_several():
    videos, names = np.ones(2, MULTI_LABEL_VIDEO_DTYPE), np.frombuffer(b"ab", np.uint8)
    prints = [fingerprint(videos, names, ["x", "y"], "frames", np.array(labels, "<i4")) for labels in ([0, 1], [1, 0])]
    assert prints[0] != prints[1]


@pytest.mark.parametrize("tars", [None, ".", "s3://bucket/tars"])
def test_a_manifest_is_read_as_it_was_written(tars):
    manifest = manifest_of(build={"seed": 3}, skipped=[{"name": "n", "line": 2, "reason": "r"}], tars=tars)
    if tars == ".":
        manifest.shards[1] = ShardInfo("train/b.tar", 2**63 - 1, 1, 3)
        manifest.shards[0] = ShardInfo("train/a.tar", 1, 2, 4)
    text = manifest.to_json()
    if tars is None or tars == ".":
        assert Manifest.from_json(text, "here") == Manifest.from_json(text.encode(), "here") == manifest
    raw = json.loads(text)
    assert ("tars" in raw) == (tars is not None)
    assert text == json.dumps(raw, ensure_ascii=False, indent=1, sort_keys=True) + "\n" and "Zürich" in text


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (damaged("version", value=4), "format version 4, this program reads 1 to 3"),
        (damaged("version", value=3), "index has the roles"),
        (damaged("version", value=2), "index has the roles"),
        (damaged("surplus", value=1), "surplus"),
        (damaged("content", value="sound"), "content is 'sound', not 'frames' or 'video'"),
        (damaged("classes", value="ab"), "classes is not a list"),
        (damaged("classes", value=["a", 3]), "a class name is not a string"),
        (damaged("classes", value=["a\x07"]), "holds a control character"),
        (damaged("fingerprint", value=IDENTITY[:-1]), "fingerprint is not 64 hex digits"),
        (damaged("fingerprint", value=IDENTITY.upper()), "fingerprint is not 64 hex digits"),
        (damaged("build", value=[]), "build or skipped has a bad type"),
        (damaged("skipped", value={}), "build or skipped has a bad type"),
        (damaged("tars", value=3), "tars is no address"),
        (damaged("num_videos", value=4), "shards do not add up to num_videos"),
        (damaged("num_members", value=8), "shards do not add up to num_members"),
        (damaged("shards", 1, "name", value="000000.tar"), "shard 1 is named '000000.tar', not 000001.tar"),
        (damaged("tars", value="."), None),
        (damaged("index", "more", value={}), "index has the roles"),
        (damaged("index", "names", "mode", value=1), "index names has the keys"),
        (damaged("index", "names", "file", value=index_file("videos", IDENTITY)), "index names is named 'index/videos"),
        (damaged("index", "names", "file", value="../names.npy"), "index names is named"),
        ("[" * 100_000, "recursion"),
        ("{", "not a valid manifest"),
        ("[]", "not a valid manifest"),
    ],
)  # fmt: skip
def test_a_manifest_that_cannot_be_right_is_refused(text, message):
    if message is None:
        Manifest.from_json(text, "a/manifest.json")
        return
    with pytest.raises(ShardError, match=message) as error:
        Manifest.from_json(text, "a/manifest.json")
    assert str(error.value).startswith("a/manifest.json: ") and "rebuild" in str(error.value)


@pytest.mark.parametrize("value", [-1, 2**63, True, 1.0, "1", None])
@pytest.mark.parametrize(
    "path",
    [
        ("num_videos",), ("num_members",), ("shards", 0, "bytes"), ("shards", 0, "videos"), ("shards", 0, "members"),
        ("index", "videos", "bytes"), ("index", "videos", "crc32"),
    ],
)  # fmt: skip
def test_what_is_no_count_is_refused(path, value):
    with pytest.raises(ShardError, match=r"no count|bad count|bad size or checksum"):
        Manifest.from_json(damaged(*path, value=value), "manifest")
    for good in (0, 2**63 - 1):
        if path[-1] in {"bytes", "crc32"}:
            Manifest.from_json(damaged(*path, value=good), "manifest")


@pytest.mark.parametrize("name", ["a.tar", "a/b.tar", "..a/b..tar", "a b.tar", "vidéo.tar"])
def test_places_of_tars_below_their_own(name):
    assert tar_place_problem(name) is None


@pytest.mark.parametrize(
    "name", ["", "/a", "a//b", "../a", "a/../b", "a/.", "a/", "a?b", "a#b", "a\\b", "a\nb", 3, None]
)
def test_places_of_tars_that_lead_elsewhere(name):
    assert tar_place_problem(name)
    text = json.loads(damaged("tars", value="."))
    text["shards"][0]["name"] = name
    with pytest.raises(ShardError, match="the name of shard 0"):
        Manifest.from_json(json.dumps(text), "manifest")
