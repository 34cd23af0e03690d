"""Each data set in miniature, its annotations as they are distributed: the lists get the ids of our class lists."""

import json
from pathlib import Path

import pytest
from launch import program
from videos import write_video

from shards.annotations import parse_annotations, parse_labels
from shards.format import ShardError
from shards.official import DATASETS, Entry, VideoFiles, match_videos, read_hmdb51, read_kinetics, read_ucf101
from shards.reader import open_dataset

HEADER = "label,youtube_id,time_start,time_end\n"
CLASSES = Path(__file__).parents[2] / "configs" / "classes"


def write(root: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(text.encode())


def touch(root: Path, *names: str) -> None:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(b"x")


def read(name: str, root: Path, split: int = 1):
    reader, classes = DATASETS[name]
    official = reader(root / "a", CLASSES / classes if classes else None, split)
    matched = match_videos(official, VideoFiles(root / "v"))
    named = {
        split: {path: official.names[label] for path, label in found.videos} for split, found in matched.items()
    }  # fmt: skip
    return official, named, {split: found.missing for split, found in matched.items()}


def test_kinetics(tmp_path):
    write(tmp_path / "a", {
        "kinetics_train.csv": "\ufefflabel,youtube_id,time_start,time_end,split\r\nyoga,-abc,7,17,train\r\n"
                              '"catching or throwing baseball",b_c,10,20,train\r\nyoga,gone,1,11,train\r\n'
                              "yoga,-abc,7,17,train\r\nzumba,small,0,10,train\r\n",
        "validate.csv": "label,youtube_id,time_start,time_end,split,is_cc\nYoga,val,0.0,10.0,validate,0\n"
                        "yoga,-abc,7,17,validate,0\n",
        "test.csv": "label,youtube_id,time_start,time_end,split\n,secret,1,11,test\nzumba,tst,1,11,test\n",
        "readme.csv": "nothing\n",
    })  # fmt: skip
    touch(tmp_path / "v", "train_256/yoga/-abc_000007_000017.mp4", "train_256/x/b_c_000010_000020.MKV",
          "val_256/val_000000_000010.mp4", "tst_1_11.webm", "val_256/-abc_000007_000017.mp4", "gone.mp4")  # fmt: skip
    (tmp_path / "v/train_256/small_000000_000010.mp4").write_bytes(b"")
    official, named, missing = read("kinetics400", tmp_path)
    assert named == {
        "train": {"train_256/yoga/-abc_000007_000017.mp4": "yoga",
                  "train_256/x/b_c_000010_000020.MKV": "catching or throwing baseball"},
        "val": {"val_256/val_000000_000010.mp4": "yoga", "val_256/-abc_000007_000017.mp4": "yoga"},
        "test": {"tst_1_11.webm": "zumba"},
    }  # fmt: skip
    assert missing == {"train": ["gone_000001_000011", "small_000000_000010"], "val": [], "test": []}
    assert len(official.notices) == 2 and "1 rows without a label" in official.notices[0]
    assert "1 entries of train name a video that is listed before" in official.notices[1]


def test_kinetics_700_numbers_its_classes_by_name(tmp_path):
    write(tmp_path / "a", {"train.csv": "label,youtube_id,time_start,time_end\nb,x,0,10\na,y,0,10\n"})
    touch(tmp_path / "v", "x_000000_000010.mp4")
    official, named, _ = read("kinetics700", tmp_path)
    assert official.names == ["a", "b"] and named["train"] == {"x_000000_000010.mp4": "b"}


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"x.csv": ""}, "holds none of train.csv"),
        ({"train.csv": "label,id\n"}, "train.csv:1: no column 'youtube_id'"),
        (
            {"train.csv": "label,youtube_id,time_start,time_end\nyogaa,x,0,10\n"},
            "train.csv:2: the class 'yogaa' .*'yoga'",
        ),
        ({"train.csv": "label,youtube_id,time_start,time_end\nyoga,x,a,10\n"}, "train.csv:2: the times are 'a'"),
        ({"1/train.csv": "", "2/train.csv": ""}, "lists train too"),
    ],
)
def test_bad_files_of_kinetics_are_named(tmp_path, files, message):
    write(tmp_path, files)
    with pytest.raises(ShardError, match=message):
        read_kinetics(tmp_path, CLASSES / "kinetics_400.csv", 1)


def ucf_index() -> str:
    names = ["".join(word.capitalize() for word in name.split()) for name in parse_labels(CLASSES / "ucf101.csv")]
    return "".join(f"{number} {name}\r\n" for number, name in enumerate(names, start=1))


def test_ucf101(tmp_path):
    write(tmp_path / "a", {
        "classInd.txt": ucf_index(),
        "trainlist02.txt": "ApplyLipstick/v_ApplyLipstick_g08_c01.avi 2\r\n\r\nArchery/v_Archery_g08_c01.avi 3\r\n",
        "testlist02.txt": "HandstandPushUps/v_HandStandPushups_g01_c01.avi\r\nArchery/v_Archery_g01_c01.avi\r\n",
    })  # fmt: skip
    touch(tmp_path / "v", "UCF-101/ApplyLipstick/v_ApplyLipstick_g08_c01.avi", "v_Archery_g08_c01.mp4",
          "UCF-101/HandStandPushups/v_HandstandPushups_g01_c01.avi")  # fmt: skip
    _, named, missing = read("ucf101", tmp_path, split=2)
    assert named == {
        "train": {"UCF-101/ApplyLipstick/v_ApplyLipstick_g08_c01.avi": "apply lipstick",
                  "v_Archery_g08_c01.mp4": "archery"},
        "val": {"UCF-101/HandStandPushups/v_HandstandPushups_g01_c01.avi": "handstand push ups"},
    }  # fmt: skip
    assert missing == {"train": [], "val": ["Archery/v_Archery_g01_c01"]}


@pytest.mark.parametrize(
    ("train", "message"),
    [("Archery/v.avi 2\n", "trainlist01.txt:1: .*has the number 3"), ("Nothing/v.avi 2\n", "names no class"),
     ("v.avi\n", "names no class"), (None, "holds no trainlist01.txt")],
)  # fmt: skip
def test_bad_files_of_ucf101_are_named(tmp_path, train, message):
    write(
        tmp_path, {"classInd.txt": ucf_index(), "testlist01.txt": "", **({"trainlist01.txt": train} if train else {})}
    )
    with pytest.raises(ShardError, match=message):
        read_ucf101(tmp_path, CLASSES / "ucf101.csv", 1)


def hmdb(root: Path, split: int, **lines: str) -> None:
    for name in parse_labels(CLASSES / "hmdb51.csv"):
        folder = name.replace(" ", "_")
        write(root, {f"{folder}_test_split{split}.txt": lines.get(folder, "")})


def test_hmdb51(tmp_path):
    hmdb(tmp_path / "a", 3, brush_hair="A_[vid] #1 clip.avi 1 \r\nb.avi 2 \nc.avi 0 \n", cartwheel="b.avi 1 \n")
    touch(tmp_path / "v", "brush_hair/A_[vid] #1 clip.avi", "brush_hair/b.avi", "brush_hair/c.avi")
    _, named, missing = read("hmdb51", tmp_path, split=3)
    assert named == {
        "train": {"brush_hair/A_[vid] #1 clip.avi": "brush hair"},
        "val": {"brush_hair/b.avi": "brush hair"},
    }
    assert missing["train"] == ["cartwheel/b"]
    with pytest.raises(ShardError, match=r"holds 0 files CLASS_test_split1.txt, the class list has 51"):
        read_hmdb51(tmp_path / "a", CLASSES / "hmdb51.csv", 1)


def test_activitynet(tmp_path):
    videos = {
        "x1": {"subset": "validation", "annotations": [{"label": "Playing flauta"}, {"label": "Surfing"}]},
        "x2": {"subset": "training", "annotations": [{"label": "Plataform diving"}]},
        "x3": {"subset": "testing", "annotations": []},
        "x4": {"subset": "training", "annotations": []},
        "x5": {"subset": "training", "annotations": [{"label": "Surfing"}]},
    }
    write(tmp_path / "a", {"activity_net.v1-3.min.json": json.dumps({"database": videos})})
    touch(tmp_path / "v", "v_x1.mkv", "x2.mp4", "v_x3.mp4", "v_x4.mp4")
    official, named, missing = read("activitynet", tmp_path)
    assert named == {"val": {"v_x1.mkv": "playing flute"}, "train": {"x2.mp4": "platform diving"}}
    assert missing["train"] == ["v_x5"] and len(official.notices) == 2
    write(tmp_path / "a", {"activity_net.v1-3.min.json": "[1]"})
    with pytest.raises(ShardError, match="not ActivityNet's JSON"):
        read("activitynet", tmp_path)


def test_no_video_at_all_is_an_error_with_an_example(tmp_path):
    write(tmp_path / "a", {"train.csv": "label,youtube_id,time_start,time_end\nyoga,x,0,10\n"})
    touch(tmp_path / "v", "other.mp4")
    with pytest.raises(ShardError, match=r"holds none of the videos; expected e.g. x_000000_000010.mp4"):
        read("kinetics400", tmp_path)


def test_of_several_files_that_of_the_split_is_taken(tmp_path):
    touch(tmp_path, "a/x.mp4", "val/x.mp4")
    files = VideoFiles(tmp_path)
    assert files.find(Entry(("x",), 0), "val") == "val/x.mp4" and files.find(Entry(("X",), 0), "train") == "a/x.mp4"


def test_the_command_makes_lists_and_shards_and_goes_on(tmp_path):
    write(tmp_path / "a", {
        "train.csv": "label,youtube_id,time_start,time_end\nyoga,a,0,10\nzumba,b,0,10\nyoga,gone,0,10\n",
        "val.csv": "label,youtube_id,time_start,time_end\nyoga,c,0,10\n",
    })  # fmt: skip
    for number, name in enumerate("abc"):
        write_video(tmp_path / "v" / f"{name}_000000_000010.mp4", 40 * number)
    command = ("kinetics400", "--annotations", tmp_path / "a", "--videos", tmp_path / "v", "--output", tmp_path / "d",
               "--short-side", 32)  # fmt: skip
    for _ in range(2):
        done = program("tools/prepare_dataset.py", *command)
        assert done.returncode == 0, done.stderr
        assert "2 of 3 videos of the official train list; 1 are missing: missing_train.txt" in done.stdout
    assert (tmp_path / "d/missing_train.txt").read_text() == "gone_000000_000010\n"
    assert len(parse_labels(tmp_path / "d/labels.csv")) == 400
    assert len(parse_annotations(tmp_path / "d/train.txt", 400)) == 2
    with open_dataset(str(tmp_path / "d/train")) as train:
        assert train.classes == parse_labels(CLASSES / "kinetics_400.csv") and len(train) == 2
    failed = program("tools/prepare_dataset.py", "ucf101", *command[1:])
    assert failed.returncode == 1 and "holds no classInd.txt" in failed.stderr
