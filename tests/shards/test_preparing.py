"""Lists for one's own videos: every video in one split, every class in both, and corrections that take effect."""

import os
import re
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from launch import program
from videos import write_video

from shards.annotations import parse_annotations, parse_labels
from shards.checker import check_datasets
from shards.folders import Video, scan_folders
from shards.format import ShardError
from shards.preparing import prepare_lists, readable, split_videos, write_lists
from shards.reader import open_dataset
from shards.writer import build_shards


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


def test_a_chosen_split_stays():
    videos = [Video("a.mp4", "x", "val"), Video("b.mp4", "x", "train")]
    assert split_videos(videos, 0.5, 0) == videos


def test_another_seed_draws_another_split():
    videos = [Video(f"{n}.mp4", "x") for n in range(50)]
    assert split_videos(videos, 0.3, 0) != split_videos(videos, 0.3, 1)


def test_a_correction_moves_no_other_video():
    videos = [Video(f"{n}.mp4", "x") for n in range(20)]
    kept = {video.path: str(video.split) for video in split_videos(videos, 0.25, 0)}
    replaced = next(path for path, split in kept.items() if split == "val")
    now = [Video("new.mp4", "x"), *(video for video in videos if video.path != replaced)]
    after = {video.path: video.split for video in split_videos(now, 0.25, 0, kept=kept)}
    assert after.pop("new.mp4") == "val"
    assert after == {path: split for path, split in kept.items() if path != replaced}
    closed = split_videos(now, 0.25, 0, kept=kept, closed=["val"])
    assert [video.path for video in closed if video.split is None] == ["new.mp4"]


@pytest.mark.parametrize(
    ("label", "name"),
    [("IceSkating", "ice skating"), ("ice_skating", "ice skating"), ("watching-TV", "watching TV"), ("Yoga", "yoga"),
     ("push up", "push up"), ("__", "__"), ("弓道", "弓道")],
)  # fmt: skip
def test_class_names_become_words(label, name):
    assert readable(label) == name


def test_lists_parse_to_what_was_found(tmp_path):
    names = ("{n} {n}.mp4", "no extension", "clip {n} 30", "#a.mp4", "# b.avi", "## c", 'say "hi", 3.mov', "a 5.ts")
    videos = [
        Video(
            f"{label}/{n}/{name.format(n=n)}" if label != "#" else f"{'#' * (n + 1)} {name.format(n=n)}", label, split
        )
        for label in ("Bee, b", "a_c", "#")
        for n, split in enumerate(("train", "val", "test"))
        for name in names
    ]
    size = len(names) * 3
    assert write_lists(videos, tmp_path) == {"train": size, "val": size, "test": size}
    labels = parse_labels(tmp_path / "labels.csv")
    assert sorted(labels) == ["#", "a c", "bee, b"]
    for split in ("train", "val", "test"):
        parsed = parse_annotations(tmp_path / f"{split}.txt", 3)
        own = [video for video in videos if video.split == split]
        assert [(line.name, labels[line.label], line.num_frames) for line in parsed] == [
            (video.path, readable(video.label), None) for video in own
        ]
    write_lists([video for video in videos if video.split != "test"], tmp_path)
    assert not (tmp_path / "test.txt").exists()


@pytest.mark.parametrize("name", ["a\nb.mp4", "a.mp4 ", "tab\t.mp4", "bell\a.mp4", os.fsdecode(b"caf\xe9.mp4")])
def test_names_that_no_list_can_hold_are_refused(tmp_path, name):
    good = [Video(f"a/{n}.mp4", "a", split) for n, split in enumerate(("train", "val"))]
    with pytest.raises(ShardError, match=r"the (name|path) .*rename the file"):
        write_lists([*good, Video(f"a/{name}", "a", "val")], tmp_path)
    assert not list(tmp_path.iterdir())


def test_classes_that_read_the_same_are_refused(tmp_path):
    videos = [Video(f"{label}/{n}.mp4", label, split) for label in ("IceHockey", "ice_hockey") for n, split in
              enumerate(("train", "val"))]  # fmt: skip
    with pytest.raises(ShardError, match="'IceHockey', 'ice_hockey' all read 'ice hockey'"):
        write_lists(videos, tmp_path)
    assert not list(tmp_path.iterdir())


def some_videos(root: Path, per_class: int = 4) -> None:
    for label in ("run", "walk"):
        for number in range(per_class):
            write_video(root / label / f"{number}.mp4", 40 * number + len(label))


def listed(prepared) -> dict[str, set[str]]:
    return {split: {item.name for item in videos} for split, videos in prepared.lists.items()}


def test_nothing_is_written_before_every_video_opens(tmp_path):
    some_videos(tmp_path / "v")
    (tmp_path / "v/run/bad.mp4").write_bytes(b"\0 no video")
    (tmp_path / "v/walk/bad.avi").write_bytes(b"\0 no video")
    with pytest.raises(ShardError, match=r"run/bad.mp4.*; 1 more do not open: 'walk/bad.avi'"):
        prepare_lists(tmp_path / "v", tmp_path / "d")
    assert not (tmp_path / "d").exists()
    skipped = prepare_lists(tmp_path / "v", tmp_path / "s", skip_broken=True)
    assert "2 files left out: 2 video that does not open ('run/bad.mp4', 'walk/bad.avi')" in skipped.notices
    (tmp_path / "v/run/bad.mp4").unlink()
    write_video(tmp_path / "v/walk/bad.avi", 7)
    prepared = prepare_lists(tmp_path / "v", tmp_path / "d")
    assert prepared.made and sum(map(len, prepared.lists.values())) == 9


def test_unedited_lists_follow_the_input_and_edited_ones_do_not(tmp_path):
    some_videos(tmp_path / "v")
    first = listed(prepare_lists(tmp_path / "v", tmp_path / "d"))
    assert prepare_lists(tmp_path / "v", tmp_path / "d").notices == []
    gone = min(first["train"])
    (tmp_path / "v" / gone).unlink()
    write_video(tmp_path / "v/walk/new.mp4", 3)
    second = prepare_lists(tmp_path / "v", tmp_path / "d")
    assert listed(second)["train"] == first["train"] - {gone} | {"walk/new.mp4"}
    assert listed(second)["val"] == first["val"]
    assert f"1 gone ('{gone}'), 1 new ('walk/new.mp4')" in second.notices[-1]
    labels = tmp_path / "d/labels.csv"
    labels.write_text(labels.read_text().replace("run", "jog"))
    (tmp_path / "v/walk/new.mp4").unlink()
    with pytest.raises(ShardError, match=r"train.txt:\d+: 1 of 6 videos are not in .*'walk/new.mp4'"):
        prepare_lists(tmp_path / "v", tmp_path / "d")
    assert prepare_lists(tmp_path / "v", tmp_path / "d", skip_broken=True).labels == ["jog", "walk"]


def test_a_root_one_folder_too_high_is_no_class(tmp_path):
    for name in ("v/data/train/run/1.mp4", "v/data/train/walk/1.mp4", "v/data/val/run/1.mp4", "v/data/val/walk/1.mp4"):
        write_video(tmp_path / name, 10)
    with pytest.raises(ShardError, match=rf"one class, 'data': .* \('train', 'val'\), give {tmp_path}/v/data$"):
        prepare_lists(tmp_path / "v", tmp_path / "d")
    assert not (tmp_path / "d").exists()
    assert prepare_lists(tmp_path / "v" / "data", tmp_path / "d").labels == ["run", "walk"]


def test_another_seed_makes_other_lists_until_shards_are_there(tmp_path):
    for number in range(12):
        write_video(tmp_path / "v/a" / f"{number}.mp4", number, frames=1)
    lists = [listed(prepare_lists(tmp_path / "v", tmp_path / "d", seed=seed, val_share=0.4)) for seed in (0, 1, 0)]
    assert lists[0] != lists[1] and lists[0] == lists[2]


def prepare(*arguments):
    return program("tools/prepare_videos.py", *arguments)


@pytest.mark.slow
def test_the_command_makes_lists_and_shards_and_respects_edits(tmp_path):
    for number in range(6):
        write_video(tmp_path / "v" / ("IceSkating", "yoga")[number % 2] / f"{number}.mp4", 40 * number)
    first = prepare(tmp_path / "v", "--output", tmp_path / "d", "--short-side", 32, "--lists-only")
    assert first.returncode == 0, first.stderr
    assert not (tmp_path / "d" / "shards").exists()
    labels = tmp_path / "d" / "labels.csv"
    labels.write_text(labels.read_text().replace("ice skating", "figure skating"))
    second = prepare(tmp_path / "v", "--output", tmp_path / "d", "--short-side", 32)
    assert second.returncode == 0 and "using the existing lists" in second.stdout, second.stderr
    with open_dataset(str(tmp_path / "d/shards/train")) as train, open_dataset(str(tmp_path / "d/shards/val")) as val:
        assert train.classes == ["figure skating", "yoga"]
        names = [dataset.name(i) for dataset in (train, val) for i in range(len(dataset))]
        assert len(train) == 4 and sorted(names) == [video.path for video in scan_folders(tmp_path / "v").videos]
        assert {height for height, _ in train.frame_sizes(0, np.arange(6))} == {32}
    assert prepare(tmp_path / "v", "--output", tmp_path / "d", "--short-side", 32).returncode == 0
    write_video(tmp_path / "v" / "yoga" / "later.mp4", 100)
    again = prepare(tmp_path / "v", "--output", tmp_path / "d", "--short-side", 32, "--on-error", "skip")
    assert again.returncode == 0, again.stderr  # nothing was left out: what `skip` would have made
    assert "1 of 7 videos are in no list and left out, the first is 'yoga/later.mp4'" in again.stderr
    write_video(tmp_path / "v" / "loose.mp4", 10)  # lies in no class folder, which the lists do not care about
    assert prepare(tmp_path / "v", "--output", tmp_path / "d", "--short-side", 32).returncode == 0
    train, val = (tmp_path / "d" / name for name in ("train.txt", "val.txt"))
    val.write_text(val.read_text() + train.read_text())
    seen = prepare(tmp_path / "v", "--output", tmp_path / "d", "--short-side", 32)
    assert seen.returncode == 1 and re.search(r"val\.txt:3: .* is in train\.txt too, and 3 more are", seen.stderr)
    (tmp_path / "d" / "val.txt").unlink()
    broken = prepare(tmp_path / "v", "--output", tmp_path / "d")
    assert broken.returncode == 1 and "val.txt: missing" in broken.stderr


def test_the_command_goes_on_after_a_failure_half_way_and_a_correction(tmp_path):
    """A video that opens, but whose later frames are damaged, is found when train is built already."""
    for split in ("train", "val", "test"):
        for number in range(2):
            write_video(tmp_path / "v" / split / "a" / f"{number}.mp4", 50 * number + len(split), frames=60)
    bad = tmp_path / "v/val/a/1.mp4"
    data = bytearray(bad.read_bytes())
    first, last = data.index(b"mdat"), data.index(b"moov")
    data[(first + last) // 2 : last - 8] = b"\xff" * (last - 8 - (first + last) // 2)
    bad.write_bytes(data)
    command = (tmp_path / "v", "--output", tmp_path / "d", "--short-side", 32)
    failed = prepare(*command)
    assert failed.returncode == 1 and "val.txt:2: " in failed.stderr and "does not decode" in failed.stderr
    built = (tmp_path / "d/shards/train/manifest.json").stat().st_mtime_ns
    bad.unlink()
    write_video(tmp_path / "v/val/a/other.mkv", 90)
    again = prepare(*command)
    assert again.returncode == 0, again.stderr
    with open_dataset(str(tmp_path / "d/shards/val")) as val:
        assert sorted(val.name(i) for i in range(len(val))) == ["val/a/0.mp4", "val/a/other.mkv"]
    assert (tmp_path / "d/shards/train/manifest.json").stat().st_mtime_ns == built
    assert (tmp_path / "d/shards/test/manifest.json").exists()


def test_an_unfinished_build_of_other_input_is_replaced_where_that_is_asked_for(tmp_path):
    some_videos(tmp_path / "v", 3)
    one, other = tmp_path / "one.txt", tmp_path / "other.txt"
    one.write_text("run/0.mp4 0\nrun/1.mp4 0\nrun/gone.mp4 0\n")
    other.write_text("walk/0.mp4 0\nwalk/1.mp4 0\n")
    options = {"root": tmp_path / "v", "labels": ["a"], "output": tmp_path / "d", "shard_bytes": 1, "workers": 1}
    for seed in range(20):  # until the missing video is not the first of the order
        with pytest.raises(ShardError, match="no such file"):
            build_shards(parse_annotations(one), seed=seed, **options)
        if list((tmp_path / "d").glob("*.tar")):
            break
    with pytest.raises(ShardError, match="holds an unfinished build of other input"):
        build_shards(parse_annotations(other), seed=seed, **options)
    manifest = build_shards(parse_annotations(other), seed=seed, replace_unfinished=True, **options)
    assert manifest.num_videos == 2 and check_datasets([tmp_path / "d"]).sound
