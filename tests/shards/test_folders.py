"""Folders and tables of one's own videos: what is a video, which class and split it has, what is left out and why."""

import os
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

import av
import numpy as np
import PIL.Image
import pytest
from frame_folders import jpeg
from videos import write_video

from shards.folders import Video, check_videos, find_videos, scan_folders, settle_splits, split_name
from shards.format import ShardError
from shards.tables import read_table
from shards.walk import describe, list_files


@cache
def video_bytes(extension: str = ".mp4", codec: str = "libx264", form: str | None = None) -> bytes:
    """A video of five frames."""
    with TemporaryDirectory() as folder:
        path = Path(folder) / f"one{extension}"
        with av.open(str(path), "w", format=form) as container:
            stream = container.add_stream(codec, rate=25)
            stream.width, stream.height, stream.pix_fmt = 64, 48, "rgb8" if codec == "gif" else "yuv420p"
            for number in range(5):
                picture = av.VideoFrame.from_ndarray(np.full((48, 64, 3), 40 * number, np.uint8), "rgb24")
                container.mux(stream.encode(picture.reformat(format=stream.pix_fmt)))
            container.mux(stream.encode())
        return path.read_bytes()


def put(root: Path, *paths: str, content: bytes | None = None) -> None:
    for path in paths:
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_bytes(video_bytes() if content is None else content)


def pairs(videos):
    return [(video.path, video.label, video.split) for video in videos]


def test_folders_name_the_classes(tmp_path):
    put(tmp_path, "b/2.mp4", "a/deep/er/1.MOV", "b/with space 7.avi")
    found = scan_folders(tmp_path)
    assert pairs(found.videos) == [
        ("a/deep/er/1.MOV", "a", None), ("b/2.mp4", "b", None), ("b/with space 7.avi", "b", None)]  # fmt: skip
    assert not found.notices and not describe(found.left_out)


@pytest.mark.parametrize(
    ("paths", "message"), [([], "no videos in its sub-folders"), (["top.mp4", "a/x.mp4"], "top.mp4: lies in no class")]
)
def test_folders_without_classes_are_refused(tmp_path, paths, message):
    put(tmp_path, *paths)
    with pytest.raises(ShardError, match=message):
        scan_folders(tmp_path)


@pytest.mark.parametrize(
    ("name", "codec", "form"),
    [("0001.MTS", "libx264", "mpegts"), ("a.m2ts", "libx264", "mpegts"), ("a.ts", "libx264", "mpegts"),
     ("a.vob", "mpeg2video", "vob"), ("a.mpg", "mpeg2video", None), ("a.f4v", "libx264", "mov"),
     ("a.3gp", "libx264", None), ("a.flv", "flv", None), ("a.wmv", "wmv2", "asf"), ("a.gif", "gif", None),
     ("a.webm", "libvpx", None), ("no_extension", "libx264", "matroska"), ("a.mp4.bak", "libx264", "mp4"),
     ("clip 3", "libx264", "avi"), ("a.y4m", "rawvideo", None)],
)  # fmt: skip
def test_what_opens_as_a_video_is_one_whatever_its_name(tmp_path, name, codec, form):
    put(tmp_path, f"a/{name}", content=video_bytes(Path(name).suffix.lower() or ".mkv", codec, form))
    assert [video.path for video in scan_folders(tmp_path).videos] == [f"a/{name}"]


def test_what_is_left_out_is_counted_and_named_by_reason(tmp_path):
    put(tmp_path, "a/1.mp4", "a/._1.mp4", "a/.hidden.mp4", "__MACOSX/a/1.mp4", ".ipynb_checkpoints/a.mp4")
    put(tmp_path, "a/Thumbs.db", "a/@eaDir/1.mp4", "a/2.mp4.part")
    put(tmp_path, "a/notes.txt", "a/b.ts", "a/1.srt", content=b"export const a: number = 1;\n" * 99)
    put(tmp_path, "a/1.jpg", "a/photo", "a/still.mp4", content=jpeg(0))
    put(tmp_path, "a/empty.mp4", "a/empty", content=b"")
    found = scan_folders(tmp_path)
    assert [video.path for video in found.videos] == ["a/1.mp4"]
    counts = {reason: len(paths) for reason, paths in found.left_out.items() if paths}
    assert counts == {"hidden": 6, "no video": 5, "picture": 1, "empty": 2, "unfinished download": 1}
    assert describe(found.left_out).startswith("15 files left out: 6 hidden ('.ipynb_checkpoints/a.mp4', ")
    assert "'a/notes.txt'" in describe(found.left_out) and not found.broken


def test_a_video_that_does_not_open_is_no_other_file(tmp_path):
    put(tmp_path, "a/1.mp4")
    put(tmp_path, "a/2.mp4", content=video_bytes()[:200])
    put(tmp_path, "a/3.ts", content=b"\0G" * 500)
    put(tmp_path, "a/4.webm", content=b"<html>404 not found</html>")
    found = scan_folders(tmp_path)
    assert list(found.broken) == ["a/2.mp4", "a/3.ts", "a/4.webm"] and [v.path for v in found.videos] == ["a/1.mp4"]


def test_a_folder_without_videos_is_no_class_and_is_named(tmp_path):
    put(tmp_path, "a/1.mp4")
    put(tmp_path, "annotations/list.csv", content=b"path,label\n")
    found = scan_folders(tmp_path)
    assert {video.label for video in found.videos} == {"a"}
    assert found.notices == ["'annotations': no videos in there, so no class"]


def test_folders_of_frames_are_refused_with_the_fix(tmp_path):
    put(tmp_path, *(f"a/clip/img_{number:05d}.jpg" for number in range(1, 4)), content=jpeg(0))
    with pytest.raises(ShardError, match=r"1 folder of pictures \(e.g. 'a/clip' with 3\) and no videos.*a/clip 3 0"):
        scan_folders(tmp_path)


def test_links_are_followed_once(tmp_path):
    root, other = tmp_path / "v", tmp_path / "other"
    put(root, "red/1.mp4", "red/2.mp4")
    put(other, "b/1.mp4")
    (root / "loop").symlink_to(root)
    (root / "above").symlink_to(tmp_path)
    (root / "red" / "round").symlink_to(root / "red")
    (root / "again").symlink_to(root / "red")
    (root / "green").symlink_to(other / "b")
    (root / "blue").symlink_to(other / "b")
    (root / "red" / "3.mp4").symlink_to("1.mp4")
    (root / "red" / "gone.mp4").symlink_to("nowhere.mp4")
    (other / "b" / "back").symlink_to(root)
    os.link(root / "red" / "2.mp4", root / "red" / "4.mp4")
    os.mkfifo(root / "red" / "pipe.mp4")
    found = scan_folders(root)
    assert pairs(found.videos) == [("blue/1.mp4", "blue", None), ("red/1.mp4", "red", None), ("red/2.mp4", "red", None)]
    assert {reason: sorted(paths) for reason, paths in found.left_out.items()} == {
        "linked twice": ["again", "blue/back", "green", "loop", "red/3.mp4 = red/1.mp4", "red/4.mp4 = red/2.mp4",
                         "red/round"],
        "linked to a folder above": ["above"], "linked to nothing": ["red/gone.mp4"],
        "no regular file": ["red/pipe.mp4"],
    }  # fmt: skip


def test_one_file_in_two_classes_is_named(tmp_path):
    put(tmp_path, "walk/1.mp4")
    (tmp_path / "run").mkdir()
    os.link(tmp_path / "walk" / "1.mp4", tmp_path / "run" / "1.mp4")
    listing = list_files(tmp_path)
    assert listing.files == ["run/1.mp4"] and "'walk/1.mp4 = run/1.mp4'" in describe(listing.left_out)


def test_a_folder_that_cannot_be_read_is_named(tmp_path, monkeypatch):
    put(tmp_path, "a/1.mp4")
    scan = os.scandir

    def refuse(path):
        if str(path).endswith("/a"):
            raise PermissionError(13, "Permission denied", str(path))
        return scan(path)

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(ShardError, match="a: Permission denied; make the folder readable"):
        list_files(tmp_path)


@pytest.mark.parametrize(
    ("name", "split"),
    [("train", "train"), ("Training", "train"), ("TEST", "test"), ("valid", "val"), ("validation", "val"),
     ("val_256", "val"), ("test-set", "test"), ("eval", "test"), ("trainer", None), ("train ride", None),
     ("trainlist01", "train"), ("Training Set", "train"), ("train_split_1", "train"), ("01_val", "val"),
     ("trainval", "train"), ("train (1)", "train"), ("bullet_train", None), ("contest", None), ("日本 train", None)],
)  # fmt: skip
def test_names_of_splits(name, split):
    assert split_name(name) == split


@pytest.mark.parametrize(
    ("folders", "splits"),
    [(("train", "val", "test"), ("train", "val", "test")), (("Training", "Validation"), ("train", "val")),
     (("TRAIN", "TEST"), ("train", "val")), (("ucf101_train", "ucf101_val"), ("train", "val")),
     (("01-train", "02-val", "03-test"), ("train", "val", "test")), (("train_rgb", "val_rgb"), ("train", "val"))],
)  # fmt: skip
@pytest.mark.parametrize("above", [True, False])
def test_existing_splits_are_used_and_reported(tmp_path, folders, splits, above):
    for folder in folders:
        put(tmp_path, *(f"{folder}/{c}/1.mp4" if above else f"{c}/{folder}/1.mp4" for c in ("Run", "Walk")))
    found = scan_folders(tmp_path)
    videos = settle_splits(found.videos, found.notices)
    assert {(video.label, video.split) for video in videos} == {(c, s) for c in ("Run", "Walk") for s in splits}
    assert all(repr(folder) in found.notices[0] for folder in folders)
    notice = "there is no val: the 2 videos of test are taken for it"
    assert (notice in found.notices) == ("TEST" in folders)


def test_train_alone_is_split_later(tmp_path):
    put(tmp_path, "train/Run/1.mp4", "train/Walk/1.mp4")
    found = scan_folders(tmp_path)
    assert {video.split for video in settle_splits(found.videos, found.notices)} == {None}
    assert found.notices[-1] == "there is a train split alone: a share of it is drawn for val"


def test_classes_that_a_split_lacks_are_named(tmp_path):
    put(tmp_path, "train/a/1.mp4", "train/b/1.mp4", "val/a/2.mp4", "val/c/1.mp4")
    found = scan_folders(tmp_path)
    settle_splits(found.videos, found.notices)
    assert found.notices[1:] == [
        "1 of 3 classes have no video in train ('c'): a model learns nothing about them",
        "1 of 3 classes have no video in val ('b'): nothing is measured for them",
    ]


@pytest.mark.parametrize(
    ("paths", "message"),
    [(["train/1.mp4", "val/1.mp4"], "train/1.mp4: lies in the split 'train' and in no class folder"),
     (["train/a/1.mp4", "test/a/1.mp4", "extra/a/1.mp4"], "named like a split: 'test', 'train'; beside them"),
     (["run/1.mp4", "walk/1.mp4", "test/1.mp4"], "named like a split: 'test'; beside them")],
)  # fmt: skip
def test_half_a_split_is_refused(tmp_path, paths, message):
    put(tmp_path, *paths)
    with pytest.raises(ShardError, match=message):
        scan_folders(tmp_path)


@pytest.mark.parametrize("other", ["holdout", "test_public"])
def test_a_split_of_another_name_beside_train_is_no_class(tmp_path, other):
    put(tmp_path, *(f"{split}/{c}/1.mp4" for split in ("train", other) for c in ("run", "walk")))
    with pytest.raises(ShardError, match=f"named like a split: 'train'; beside them, not named like one: '{other}'"):
        scan_folders(tmp_path)


def test_folders_that_may_be_splits_are_said(tmp_path):
    put(tmp_path, *(f"{split}/{c}/1.mp4" for split in ("tr", "te") for c in ("run", "walk")))
    assert scan_folders(tmp_path).notices == [
        "'te', 'tr' are taken for classes; if these are splits, for 'run', 'walk' are in several of them, rename them "
        "`train`, `val` or `test`"
    ]


def test_a_split_within_a_split_is_refused(tmp_path):
    put(tmp_path, *(f"{split}/{split}/{c}/1.mp4" for split in ("train", "test") for c in ("run", "walk")))
    with pytest.raises(ShardError, match="lies in a split within a split, 'test/test'; move the class folders up"):
        scan_folders(tmp_path)


def test_a_class_has_one_spelling_whatever_the_system_writes(tmp_path):
    put(tmp_path, "train/caf\u00e9/1.mp4", "val/cafe\u0301/2.mp4")
    assert {video.label for video in scan_folders(tmp_path).videos} == {"caf\u00e9"}
    (tmp_path / "v.csv").write_text("path,label\na.mp4,caf\u00e9\nb.mp4,cafe\u0301\n", encoding="utf-8")
    assert {video.label for video in read_table(tmp_path / "v.csv")} == {"caf\u00e9"}


def test_empty_folders_are_named(tmp_path):
    put(tmp_path, "a/1.mp4", "hidden/.1.mp4")
    (tmp_path / "surfing").mkdir()
    assert scan_folders(tmp_path).notices == ["2 empty folders: 'hidden', 'surfing'"]


@pytest.mark.parametrize("form", ["WEBP", "AVIF", "GIF", "TIFF"])
@pytest.mark.parametrize("name", ["still", "still.mp4"])
def test_a_picture_is_no_video_of_one_frame(tmp_path, form, name):
    put(tmp_path, "a/1.mp4", f"a/{name}")
    PIL.Image.new("RGB", (64, 64), "red").save(tmp_path / "a" / name, form)
    found = scan_folders(tmp_path)
    assert [video.path for video in found.videos] == ["a/1.mp4"] and found.left_out["no video"] == [f"a/{name}"]


def test_a_camera_s_small_copies_are_left_out(tmp_path):
    put(tmp_path, "a/GX01.MP4", "a/GX01.LRV")
    found = scan_folders(tmp_path)
    assert [video.path for video in found.videos] == ["a/GX01.MP4"]
    assert describe(found.left_out) == "1 file left out: 1 a camera's small copy ('a/GX01.LRV')"


def test_a_class_may_be_called_train(tmp_path):
    put(tmp_path, "bus/1.mp4", "train/1.mp4", "train/test/2.mp4", "train/val/3.mp4")
    found = scan_folders(tmp_path)
    assert {video.label for video in found.videos} == {"bus", "train"}
    assert "'train' is taken for a class" in found.notices[0] and "no splits are taken from folders" in found.notices[1]


def test_splits_without_videos_to_train_on_are_refused():
    with pytest.raises(ShardError, match="all videos are in 'val', none to train on"):
        settle_splits([Video("a.mp4", "x", "val")], [])
    with pytest.raises(ShardError, match=r"'c.mp4' has no split"):
        settle_splits([Video("a.mp4", "x", "train"), Video("c.mp4", "x")], [])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("name,label\n", "1: the header is 'name,label'"),
        ("path,label\n", "no videos below the header"),
        ("path,label\na.mp4\n", "2: 1 columns"),
        ("path,label\na.mp4,\n", "2: no label"),
        ("path,label\n,x\n", "2: no path"),
        ("path,label\na.mp4,x\na.mp4,x\n", "3: 'a.mp4' is there twice, first on line 2"),
        ("path,label\n./sub/1.mp4,a\nsub/1.mp4,a\n", "3: 'sub/1.mp4' is there twice, first on line 2"),
        ("path,label\nsub//1.mp4,a\nb/../sub/1.mp4,a\n", "3: 'sub/1.mp4' is there twice"),
        ("path,label\n../1.mp4,a\n", "2: the path '../1.mp4' leaves the root"),
        ("path,label\n/else/1.mp4,a\n", "2: the path '/else/1.mp4' leaves the root folder"),
        ("path,label\nC:\\v\\1.mp4,a\n", "2: the path .* begins with a drive of Windows"),
        ("path,label\na\0b.mp4,x\n", "2: (the path .* holds a control character|line contains NUL)"),  # Python 3.10
        ("path,label,split\na.mp4,x,tset\n", "2: split is 'tset'"),
        ('path,label\n"a.mp4,x\n', "unexpected end"),
    ],
)
def test_bad_tables_are_named(tmp_path, text, message):
    (tmp_path / "v.csv").write_text(text)
    with pytest.raises(ShardError, match=message):
        read_table(tmp_path / "v.csv", tmp_path)


@pytest.mark.parametrize(
    "text",
    ["path,label,split\n{a},run,Train\nb.mp4,walk,TESTING\n",
     "\ufeffpath;label;split\r\n{a};run;train\r\nb.mp4;walk;test\r\n",
     "label\tsplit\tpath\nrun\ttraining\t./{a}\nwalk\teval\tc/../b.mp4\n",
     'path, "label", split\n{a}, "run", trainlist01\n"b.mp4", walk, testlist01\n'],
)  # fmt: skip
@pytest.mark.parametrize("spelling", ["sub/1, 2.mp4", r"sub\1, 2.mp4"])
def test_tables_as_people_export_them(tmp_path, text, spelling):
    quoted = f'"{spelling}"' if text.startswith("path,") else spelling
    (tmp_path / "v.csv").write_text(text.format(a=quoted), newline="")
    assert read_table(tmp_path / "v.csv", tmp_path) == [
        Video("sub/1, 2.mp4", "run", "train"), Video("b.mp4", "walk", "test")]  # fmt: skip


def test_absolute_paths_below_the_root_are_relative_to_it(tmp_path):
    (tmp_path / "link").symlink_to(tmp_path / "v")
    put(tmp_path, "v/a/1.mp4")
    (tmp_path / "v.csv").write_text(f"path,label\n{tmp_path}/v/a/1.mp4,x\n")
    assert read_table(tmp_path / "v.csv", tmp_path / "v")[0].path == "a/1.mp4"
    assert read_table(tmp_path / "v.csv", tmp_path / "link")[0].path == "a/1.mp4"


def test_files_of_a_table_are_looked_at(tmp_path):
    put(tmp_path, "a.mp4")
    put(tmp_path, "b.txt", content=b"no video")
    put(tmp_path, "c.mp4", content=b"broken \0")
    table = [Video("a.mp4", "x", None, 2), Video("c.mp4", "x", None, 3)]
    found = check_videos(tmp_path, table, "v.csv")
    assert [video.path for video in found.videos] == ["a.mp4"] and list(found.broken) == ["c.mp4"]
    with pytest.raises(ShardError, match=r"v.csv:4: 'b.txt' is no video"):
        check_videos(tmp_path, [*table, Video("b.txt", "x", None, 4)], "v.csv")
    (tmp_path / "link.mp4").symlink_to("a.mp4")
    with pytest.raises(ShardError, match=r"v.csv:4: 'link.mp4' is the file of line 2, 'a.mp4'; remove one"):
        check_videos(tmp_path, [*table, Video("link.mp4", "y", None, 4)], "v.csv")
    with pytest.raises(ShardError, match=r"v.csv:4: 2 of 3 videos are not in .*: 'd.mp4', 'e.mp4'"):
        check_videos(tmp_path, [table[0], Video("d.mp4", "x", None, 4), Video("e.mp4", "x", None, 5)], "v.csv")


def test_known_files_are_not_opened(tmp_path):
    put(tmp_path, "a/1.mp4")
    put(tmp_path, "a/2.mp4", content=b"broken \0")
    looked = []
    found = scan_folders(tmp_path, known={"a/2.mp4"}, progress=looked.append)
    assert [video.path for video in found.videos] == ["a/1.mp4", "a/2.mp4"] and looked == [1]


def test_a_video_of_some_frames_is_one(tmp_path):
    write_video(tmp_path / "a" / "1.mp4", 10, frames=1)
    assert len(scan_folders(tmp_path).videos) == 1


def test_all_videos_below_a_folder_whatever_its_layout(tmp_path):
    put(tmp_path, "1.MTS", "a/b/2.mp4", "train/3.mp4", ".hidden/4.mp4")
    put(tmp_path, "a/broken.mp4", content=b"\0 no video")
    put(tmp_path, "a/notes.txt", content=b"no video")
    videos, left_out = find_videos(tmp_path)
    assert videos == ["1.MTS", "a/b/2.mp4", "a/broken.mp4", "train/3.mp4"]
    assert describe(left_out) == "2 files left out: 1 hidden ('.hidden/4.mp4'), 1 no video ('a/notes.txt')"
