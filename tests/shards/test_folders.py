"""A folder of one's own videos: every video in one split, every class in both, lists that parse to what was found."""

import re
from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from launch import program
from videos import write_video

from shards.annotations import parse_annotations, parse_labels
from shards.folders import Video, read_table, scan_folders
from shards.format import ShardError
from shards.preparing import readable, split_videos, write_lists
from shards.reader import open_dataset


def touch(root, *paths):
    for path in paths:
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_bytes(b"")


def test_folders_name_the_classes(tmp_path):
    touch(tmp_path, "b/2.mp4", "a/deep/er/1.MOV", "a/notes.txt", "a/.hidden.mp4", "b/with space 7.avi")
    found = scan_folders(tmp_path)
    assert found == [Video("a/deep/er/1.MOV", "a"), Video("b/2.mp4", "b"), Video("b/with space 7.avi", "b")]


@pytest.mark.parametrize(
    ("paths", "message"), [([], "no videos in its sub-folders"), (["top.mp4", "a/x.mp4"], "top.mp4: lies in no class")]
)
def test_folders_without_classes_are_refused(tmp_path, paths, message):
    touch(tmp_path, *paths)
    with pytest.raises(ShardError, match=message):
        scan_folders(tmp_path)


@given(
    st.dictionaries(st.text("abcd", min_size=1, max_size=3), st.integers(1, 30), min_size=1, max_size=6),
    st.floats(0.01, 0.99),
    st.integers(0, 3),
)
def test_the_split_keeps_every_video_and_every_class(counts, share, seed):
    videos = [Video(f"{label}/{n}.mp4", label) for label, count in counts.items() for n in range(count)]
    split = split_videos(videos, share, seed)
    assert [(video.path, video.label) for video in split] == [(video.path, video.label) for video in videos]
    assert split == split_videos(videos, share, seed)
    per_class = Counter((video.label, video.split) for video in split)
    for label, count in counts.items():
        assert per_class[label, "train"] >= 1
        assert per_class[label, "val"] == min(max(1, round(share * count)), count - 1)


def test_a_split_that_somebody_chose_stays():
    videos = [Video("a.mp4", "x", "val"), Video("b.mp4", "x", "train")]
    assert split_videos(videos, 0.5, 0) == videos
    with pytest.raises(ShardError, match=r"'c.mp4' has no split"):
        split_videos([*videos, Video("c.mp4", "x")], 0.5, 0)


def test_another_seed_draws_another_split():
    videos = [Video(f"{n}.mp4", "x") for n in range(50)]
    assert split_videos(videos, 0.3, 0) != split_videos(videos, 0.3, 1)


@pytest.mark.parametrize(
    ("label", "name"),
    [("IceSkating", "ice skating"), ("ice_skating", "ice skating"), ("watching-TV", "watching TV"), ("Yoga", "yoga"),
     ("push up", "push up"), ("__", "__"), ("弓道", "弓道")],
)  # fmt: skip
def test_class_names_become_words(label, name):
    assert readable(label) == name


def test_lists_parse_to_what_was_found(tmp_path):
    videos = [
        Video(f"{label}/{n} {n}.mp4", label, "val" if n == 0 else "train")
        for label in ("Bee, b", "a_c")
        for n in range(2)
    ]
    assert write_lists(videos, tmp_path) == {"train": 2, "val": 2}
    assert parse_labels(tmp_path / "labels.csv") == ["bee, b", "a c"]
    for split, number in (("val", 0), ("train", 1)):
        parsed = parse_annotations(tmp_path / f"{split}.txt", 2)
        expected = [(f"Bee, b/{number} {number}.mp4", 0), (f"a_c/{number} {number}.mp4", 1)]
        assert [(line.name, line.label) for line in parsed] == expected


def test_classes_that_read_the_same_are_refused(tmp_path):
    videos = [Video(f"{label}/{n}.mp4", label, split) for label in ("IceHockey", "ice_hockey") for n, split in
              enumerate(("train", "val"))]  # fmt: skip
    with pytest.raises(ShardError, match="'IceHockey', 'ice_hockey' all read 'ice hockey'"):
        write_lists(videos, tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("name,label\n", "1: the header is 'name,label'"),
        ("path,label\n", "no videos below the header"),
        ("path,label\na.mp4\n", "2: 1 columns"),
        ("path,label\na.txt,x\n", "2: 'a.txt', which is no video"),
        ("path,label\na.mp4,\n", "2: no label"),
        ("path,label\na.mp4,x\na.mp4,x\n", "3: 'a.mp4' is there twice"),
        ("path,label,split\na.mp4,x,test\n", "2: split is 'test'"),
    ],
)
def test_bad_tables_are_named(tmp_path, text, message):
    (tmp_path / "v.csv").write_text(text)
    with pytest.raises(ShardError, match=message):
        read_table(tmp_path / "v.csv")


def prepare(*arguments):
    return program("tools/prepare_videos.py", *arguments)


def test_the_command_makes_lists_and_shards_and_respects_edits(tmp_path):
    for number in range(6):
        write_video(tmp_path / "v" / ("IceSkating", "yoga")[number % 2] / f"{number}.mp4", 40 * number)
    first = prepare(tmp_path / "v", "--output", tmp_path / "d", "--short-side", 32, "--lists-only")
    assert first.returncode == 0, first.stderr
    assert not (tmp_path / "d" / "shards").exists()
    labels = tmp_path / "d" / "labels.csv"
    labels.write_text(labels.read_text().replace("ice skating", "figure skating"))
    second = prepare(tmp_path / "v", "--output", tmp_path / "d", "--short-side", 32)
    assert second.returncode == 0 and "using the lists" in second.stdout, second.stderr
    with open_dataset(str(tmp_path / "d/shards/train")) as train, open_dataset(str(tmp_path / "d/shards/val")) as val:
        assert train.classes == ["figure skating", "yoga"]
        names = [dataset.name(i) for dataset in (train, val) for i in range(len(dataset))]
        assert len(train) == 4 and sorted(names) == [str(video.path) for video in scan_folders(tmp_path / "v")]
        assert {height for height, _ in train.frame_sizes(0, np.arange(6))} == {32}
    assert prepare(tmp_path / "v", "--output", tmp_path / "d", "--short-side", 32).returncode == 0
    write_video(tmp_path / "v" / "yoga" / "later.mp4", 100)
    again = prepare(tmp_path / "v", "--output", tmp_path / "d", "--short-side", 32, "--on-error", "skip")
    assert again.returncode == 0, again.stderr  # nothing was left out: what `skip` would have made
    assert "1 of 7 videos are in no list and left out, the first is 'yoga/later.mp4'" in again.stderr
    (tmp_path / "v" / "loose.mp4").touch()  # lies in no class folder, which the lists do not care about
    assert prepare(tmp_path / "v", "--output", tmp_path / "d", "--short-side", 32).returncode == 0
    train, val = (tmp_path / "d" / name for name in ("train.txt", "val.txt"))
    val.write_text(val.read_text() + train.read_text())
    seen = prepare(tmp_path / "v", "--output", tmp_path / "d", "--short-side", 32)
    assert seen.returncode == 1 and re.search(r"val\.txt:3: .* is in train\.txt too, and 3 more are", seen.stderr)
    (tmp_path / "d" / "val.txt").unlink()
    broken = prepare(tmp_path / "v", "--output", tmp_path / "d")
    assert broken.returncode == 1 and "val.txt: missing" in broken.stderr
