"""Videos with several labels or none: what a list says of them is in the shards; single labels stay as they were."""

from __future__ import annotations

import json
import shutil
import tarfile
import zlib

import numpy as np
import pytest
from frame_folders import make_frame_folders

from shards.annotations import Annotation, format_annotation, parse_annotations, parse_labels
from shards.checker import check_datasets
from shards.folders import Video
from shards.format import FORMAT_VERSION, MULTI_LABEL_VERSION, Manifest, ShardError
from shards.index import open_index, read_local_manifest
from shards.preparing import split_videos, write_lists
from shards.reader import open_dataset
from shards.tables import read_table
from shards.writer import build_shards

LABELS = ["2,0", "1", "-", "0,1,2", "2", "1,2"]
SETS = [(0, 2), (1,), (), (0, 1, 2), (2,), (1, 2)]


def write(base, labels, **options):
    return make_frame_folders(base, [3] * len(labels), labels=labels, **options)


def build(folders, output, **options) -> Manifest:
    labels = parse_labels(folders.labels)
    annotations = parse_annotations(folders.annotations, len(labels))
    return build_shards(annotations, root=folders.root, labels=labels, output=output, workers=1, **options)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return write(tmp_path_factory.mktemp("several"), LABELS)


@pytest.fixture(scope="module")
def built(folders, tmp_path_factory):
    output = tmp_path_factory.mktemp("shards") / "several"
    build(folders, output, shard_bytes=4000)
    return output


@pytest.mark.parametrize(
    ("line", "annotation"),
    [
        ("a 3 17,3,42", Annotation("a", 3, (3, 17, 42), 1)),
        ("a.mp4 3,17", Annotation("a.mp4", None, (3, 17), 1)),
        ("two words - 3,17", Annotation("two words", None, (3, 17), 1)),
        ("a 3 -", Annotation("a", 3, (), 1)),
        ("a.mp4 -", Annotation("a.mp4", None, (), 1)),
        ("a - -", Annotation("a", None, (), 1)),
        ("a 3 5", Annotation("a", 3, 5, 1)),
    ],
)
def test_a_label_field_holds_one_label_or_several_or_none(tmp_path, line, annotation):
    path = tmp_path / "list.txt"
    path.write_text(line)
    assert parse_annotations(path) == [annotation]
    again = format_annotation(annotation.name, annotation.num_frames, annotation.label)
    path.write_text(again)
    assert parse_annotations(path) == [annotation]


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("a 3 1,1", "label 1 is in '1,1' twice"),
        ("a 3 0,9", "label 9 of 'a' has no class"),
        ("a 3 0,3", "subtract 1 from each"),
        ("a 3 1,,2", "label is ''"),
        ("a 3 -1,2", "label is -1"),
        ("a 3 1,-", "label is '-'"),
        ("a 3 1,2,", "joined by commas: 3,17,42"),
        ("a 3 1|2", "joined by commas: 3,17,42"),
    ],
)
def test_what_is_no_set_of_labels_is_refused(tmp_path, line, words):
    path = tmp_path / "list.txt"
    path.write_text(line)
    with pytest.raises(ShardError) as caught:
        parse_annotations(path, 3)
    assert words in str(caught.value) and f"{path}:1:" in str(caught.value)


def test_every_video_keeps_its_labels(folders, built):
    with open_dataset(str(built)) as dataset:
        assert dataset.multi_label
        assert {dataset.name(n): dataset.label_of(n) for n in range(len(dataset))} == dict(
            zip(folders.names, SETS, strict=True)
        )
        assert dataset.class_counts(4).tolist() == [2, 3, 4, 0]
        with pytest.raises(ShardError, match="several labels"):
            _ = dataset.labels


def test_the_tar_tells_the_labels_too(folders, built):
    wanted = dict(zip(folders.names, SETS, strict=True))
    found = {}
    for path in built.glob("*.tar"):
        with tarfile.open(path) as tar:
            for member in tar.getmembers():
                if member.name.endswith(".json"):
                    facts = json.loads(tar.extractfile(member).read())
                    assert facts["classes"] == [f"class {label}" for label in facts["labels"]]
                    assert "label" not in facts and "class" not in facts
                    found[facts["name"]] = tuple(facts["labels"])
    assert found == wanted


def test_only_such_a_data_set_is_of_the_new_version(tmp_path, built):
    single = write(tmp_path, ["0", "1", "2"])
    assert build(single, tmp_path / "single").version == FORMAT_VERSION
    assert read_local_manifest(built).version == MULTI_LABEL_VERSION
    with open_dataset([str(built), str(tmp_path / "single")]) as joined:
        assert joined.multi_label
        assert [len(joined.label_of(n)) for n in range(6, 9)] == [1, 1, 1]


def test_an_interrupted_build_and_a_longer_one_end_alike(folders, built, tmp_path):
    output = tmp_path / "again"
    labels, annotations = parse_labels(folders.labels), parse_annotations(folders.annotations)

    class Stop(Exception):
        pass

    def stop(*_):
        if len(list(output.glob("*.tar"))) == 2:
            raise Stop

    with pytest.raises(Stop):
        build_shards(
            annotations, root=folders.root, labels=labels, output=output, workers=1, shard_bytes=4000, progress=stop
        )
    build(folders, output, shard_bytes=4000)
    wanted, found = (
        {str(file.relative_to(base)): file.read_bytes() for file in base.rglob("*") if file.is_file()}
        for base in (built, output)
    )
    assert found == wanted


def test_videos_can_be_added_where_each_may_have_several(tmp_path):
    first = write(tmp_path / "1", ["0,1", "-"], prefix="first")
    build(first, tmp_path / "shards")
    second = write(tmp_path / "2", ["2", "1"], prefix="second", first_seed=50)
    build(second, tmp_path / "shards", append=True)
    with open_dataset(str(tmp_path / "shards")) as dataset:
        found = {dataset.name(n): dataset.label_of(n) for n in range(len(dataset))}
    assert found == dict(zip([*first.names, *second.names], [(0, 1), (), (2,), (1,)], strict=True))
    assert check_datasets([tmp_path / "shards"]).sound


def test_videos_with_several_labels_are_not_added_to_those_with_one(tmp_path):
    build(write(tmp_path / "1", ["0", "1"], prefix="first"), tmp_path / "shards")
    second = write(tmp_path / "2", ["2", "0,1"], prefix="second", first_seed=50)
    with pytest.raises(ShardError, match=r":2: 'second_0001' has 2 labels, but every video in .* has one"):
        build(second, tmp_path / "shards", append=True)


def test_a_list_without_a_single_label_is_refused(tmp_path):
    with pytest.raises(ShardError, match="none of the 2 videos has a label"):
        build(write(tmp_path, ["-", "-"]), tmp_path / "shards")


def test_videos_without_a_label_are_added_to_those_with_several(built, tmp_path):
    shutil.copytree(built, tmp_path / "shards")
    manifest = build(write(tmp_path / "2", ["-", "-"], prefix="second"), tmp_path / "shards", append=True)
    assert manifest.num_videos == len(LABELS) + 2 and check_datasets([tmp_path / "shards"]).sound


def test_the_checker_proves_it_sound_and_counts(built):
    report = check_datasets([built], deep=True)
    assert report.sound, report.to_json()
    assert report.datasets[0].statistics["labels_per_video"] == {"min": 0, "median": 1, "max": 3}


def exchanged(labels: np.ndarray) -> np.ndarray:
    """The labels of the video that has all three, as 1 0 2."""
    place = labels.tobytes().index(np.arange(3, dtype=labels.dtype).tobytes()) // labels.itemsize
    return np.concatenate([labels[:place], labels[[place + 1, place]], labels[place + 2 :]])


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda labels: labels[:-1], "labels in the index for"),
        (lambda labels: np.where(labels == 2, 3, labels), "for 3 classes"),
        (lambda labels: np.sort(labels)[::-1], "not in ascending order"),
        (exchanged, "not in ascending order"),
        (lambda labels: labels.astype(np.int64), "not the table of labels"),
    ],
)
def test_a_wrong_table_of_labels_is_named(folders, tmp_path, change, words):
    output = tmp_path / "shards"
    manifest = build(folders, output)
    table = output / manifest.index["labels"]["file"]
    np.save(table, change(np.load(table)))
    text = (output / "manifest.json").read_text()
    entry = manifest.index["labels"]
    text = text.replace(f'"bytes": {entry["bytes"]}', f'"bytes": {table.stat().st_size}')
    text = text.replace(str(entry["crc32"]), str(zlib.crc32(table.read_bytes())))
    (output / "manifest.json").write_text(text)
    manifest = read_local_manifest(output)
    with pytest.raises(ShardError, match=words):
        open_index(str(output), manifest, {role: output / entry["file"] for role, entry in manifest.index.items()})


def test_one_label_may_be_that_of_all_videos(tmp_path):
    build(write(tmp_path, ["1", "-", "1"]), tmp_path / "shards")
    with open_dataset(str(tmp_path / "shards")) as dataset:
        assert sorted(map(dataset.label_of, range(3))) == [(), (1,), (1,)]
        assert dataset.class_counts(3).tolist() == [0, 2, 0]


def test_labels_that_were_exchanged_change_the_fingerprint(folders, tmp_path, built):
    other = write(tmp_path, [*LABELS[1:], LABELS[0]])
    assert build(other, tmp_path / "other").fingerprint != read_local_manifest(built).fingerprint


TABLE = "path,labels,split\na.mp4,surf|swim,train\nb.mp4,swim,train\nc.mp4,,train\nd.mp4,swim | surf,val\n"


def test_a_table_names_several_classes_a_video(tmp_path):
    path = tmp_path / "videos.csv"
    path.write_text(TABLE)
    videos = read_table(path)
    assert [video.label for video in videos] == [("surf", "swim"), ("swim",), (), ("surf", "swim")]
    assert write_lists(videos, tmp_path / "lists") == {"train": 3, "val": 1}
    assert parse_labels(tmp_path / "lists" / "labels.csv") == ["surf", "swim"]
    assert (tmp_path / "lists" / "train.txt").read_text() == "a.mp4 0,1\nb.mp4 1\nc.mp4 -\n"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("path,labels\na.mp4,x|x\n", ":2: 'x' twice"),
        ("path,labels\na.mp4,x|\n", ":2: an empty name"),
        ("path,label,labels\na.mp4,x,y\n", ":1: the header"),
        ("path,label\na.mp4,x\na.mp4,y\n", "name the column `labels`"),
        ("path,label\na.mp4,\n", "no label"),
    ],
)
def test_a_table_that_says_it_otherwise_gets_the_words_it_needs(tmp_path, text, words):
    path = tmp_path / "videos.csv"
    path.write_text(text)
    with pytest.raises(ShardError) as caught:
        read_table(path)
    assert words in str(caught.value)


def test_videos_of_several_classes_are_split_as_a_whole():
    videos = [Video(f"{number}.mp4", (f"class {number}", "all")) for number in range(10)]
    splits = [video.split for video in split_videos(videos, 0.2, seed=0)]
    assert splits.count("val") == 2 and splits.count("train") == 8
