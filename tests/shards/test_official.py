"""Each data set in miniature, its annotations as they are distributed: the lists get the ids of our class lists."""

import json
import shutil
from pathlib import Path

import pytest
from launch import program
from videos import encode, pictures, write_video

from shards.annotations import parse_annotations, parse_labels
from shards.format import ShardError
from shards.matching import VideoFiles, match_videos
from shards.official import read_hmdb51, read_kinetics, read_official, read_ucf101
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
    """The lists, path to class names (`a; b` for several) by split, and what is missing by split."""
    official = read_official(name, root / "a", CLASSES, split)
    matched = match_videos(official, VideoFiles(root / "v"))
    named = {
        split: {path: "; ".join(official.names[label] for label in labels) for path, labels in found.videos}
        for split, found in matched.items()
    }
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
          "val_256/val_000000_000010.mp4", "tst_1_11.webm", "val_256/-abc_000007_000017.mp4", "gon.mp4")  # fmt: skip
    (tmp_path / "v/train_256/small_000000_000010.mp4").write_bytes(b"")
    official, named, missing = read("kinetics400", tmp_path)
    assert named == {
        "train": {"train_256/yoga/-abc_000007_000017.mp4": "yoga",
                  "train_256/x/b_c_000010_000020.MKV": "catching or throwing baseball"},
        "val": {"val_256/val_000000_000010.mp4": "yoga", "val_256/-abc_000007_000017.mp4": "yoga"},
        "test": {"tst_1_11.webm": "zumba"},
    }  # fmt: skip
    assert missing == {"train": ["gone_000001_000011", "small_000000_000010"], "val": [], "test": []}
    assert official.notices == ["1 entries of test have no label and are left out",
                                "1 entries of train name a video that is listed before, and are left out"]  # fmt: skip


def test_kinetics_700_numbers_its_classes_by_name_and_its_test_list_may_lack_the_labels(tmp_path):
    write(tmp_path / "a", {
        "kinetics_700_2020_train.csv": HEADER + "b,x,0,10\na,y,0,10\n",
        "k700-2020_test.csv": "youtube_id,time_start,time_end,split\nz,0,10,test\n",
    })  # fmt: skip
    touch(tmp_path / "v", "x_000000_000010.mp4", "z_000000_000010.mp4")
    official, named, _ = read("kinetics700", tmp_path)
    assert official.names == ["a", "b"] and named == {"train": {"x_000000_000010.mp4": "b"}}
    assert official.notices == ["1 entries of test have no label and are left out"]


def test_kinetics_files_named_by_their_id_alone_are_taken_where_the_lists_have_one_clip_of_it(tmp_path):
    write(tmp_path / "a", {"train.csv": HEADER + "yoga,one,3,13\nyoga,two,3,13\nzumba,all,0,10\n",
                           "val.csv": HEADER + "yoga,two,40,50\n"})  # fmt: skip
    touch(tmp_path / "v", "yoga/one.mp4", "yoga/two.mp4", "all.mp4", "all_000000_000010.mp4")
    official, named, missing = read("kinetics400", tmp_path)
    assert named["train"] == {"yoga/one.mp4": "yoga", "all_000000_000010.mp4": "zumba"} and not named["val"]
    assert missing == {"train": ["two_000003_000013"], "val": ["two_000040_000050"]}
    (notice,) = official.notices
    assert "1 videos of train have no times in their names, such as 'yoga/one.mp4'" in notice


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"x.csv": ""}, "holds none of train.csv"),
        ({"train.csv": "label,id\n"}, "train.csv:1: no column 'youtube_id'"),
        ({"train.csv": "label," + "x" * 140_000 + "\n"}, "train.csv:1: field larger than field limit"),
        (
            {"train.csv": 'label,youtube_id,time_start,time_end\nyoga,"x,0,10\nyoga,y,0,10\n'},
            "train.csv:2: unexpected end",
        ),
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


def test_ucf101s_names_may_be_other_words_but_not_those_of_another_class(tmp_path):
    train = {"trainlist01.txt": "Archery/v_Archery_g08_c01.avi 2\n", "testlist01.txt": ""}
    write(tmp_path, {"classInd.txt": "1 ApplyLipstick\n2 Archery\n3 YoYo\n", **train})
    for names, fits in (("id,name\n0,Lippenstift\n1,archery\n2,yo yo\n", True),
                        ("id,name\n0,apply lipstick\n1,yo yo\n2,archery\n", False)):  # fmt: skip
        (tmp_path / "names.csv").write_text(names)
        if fits:
            assert read_ucf101(tmp_path, tmp_path / "names.csv", 1).splits["train"][0].labels == (1,)
        else:
            with pytest.raises(ShardError, match=r"names.csv: 'yo yo' is class 2 there, and class 3 in .*classInd.txt"):
                read_ucf101(tmp_path, tmp_path / "names.csv", 1)


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
    assert missing["train"] == ["v_x5"]
    assert [notice for notice in official.notices if "as published" not in notice] == [
        f"{tmp_path}/a/activity_net.v1-3.min.json: 1 videos have several classes, and get that of their first "
        "annotation",
        "1 entries of train have no label and are left out",
    ]
    write(tmp_path / "a", {"activity_net.v1-3.min.json": "[1]"})
    with pytest.raises(ShardError, match="not ActivityNet's JSON"):
        read("activitynet", tmp_path)


# Those of its 174 classes that a mirror turns into each other, at the numbers that its labels.json gives them.
SIDED = {
    86: "Pulling something from left to right",
    87: "Pulling something from right to left",
    93: "Pushing something from left to right",
    94: "Pushing something from right to left",
    166: "Turning the camera left while filming something",
    167: "Turning the camera right while filming something",
}


def something(root: Path, prefix: str, files: dict[str, object]) -> None:
    """In the layout of the first release (with a prefix) or of the present one."""
    names = [SIDED.get(number, f"Showing something, {number}") for number in range(174)]
    numbers = {name: str(number) for number, name in reversed(list(enumerate(names)))}
    named = {f"{prefix}{name}.json": json.dumps(content) for name, content in files.items()}
    write(root, {f"{prefix}labels.json": json.dumps(numbers), **named})


@pytest.mark.parametrize("prefix", ["", "something-something-v2-"])
def test_something_v2(tmp_path, prefix):
    something(tmp_path / "a" / "labels", prefix, {
        "train": [
            {"id": "78687", "label": "pulling a cup from left to right", "placeholders": ["a cup"],
             "template": "Pulling [something] from left to right"},
            {"id": "7", "label": "", "template": "Showing [something], [5]", "placeholders": []},
            {"id": "8", "label": "", "template": "Turning the camera right while filming [something]"},
        ],
        "validation": [{"id": "9", "label": "", "template": "Pushing [Something] from right to left"}],
        "test": [{"id": "10"}, {"id": "11"}],
    })  # fmt: skip
    write(tmp_path / "a", {"labels/test-answers.csv": "10;Showing something, 6\r\n"} if not prefix else {})
    touch(tmp_path / "v", *(f"20bn-something-something-v2/{number}.webm" for number in (7, 8, 9, 10, 11)))
    official, named, missing = read("something-v2", tmp_path)
    assert named.pop("test", {}) == ({} if prefix else {"20bn-something-something-v2/10.webm": "Showing something, 6"})
    assert named == {
        "train": {"20bn-something-something-v2/7.webm": "Showing something, 5",
                  "20bn-something-something-v2/8.webm": SIDED[167]},
        "val": {"20bn-something-something-v2/9.webm": SIDED[94]},
    }  # fmt: skip
    assert missing["train"] == ["78687"]
    assert {number: official.names[number] for number in SIDED} == SIDED and len(official.names) == 174
    lengths = [notice for notice in official.notices if "as published" in notice]
    assert len(lengths) == 3 and "the train list has 3 videos and not 168,913" in lengths[0]
    (unlabelled,) = set(official.notices) - set(lengths)
    assert unlabelled == f"{2 if prefix else 1} entries of test have no label and are left out"


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({}, "holds no labels.json of Something-Something V2"),
        ({"labels.json": '{"a": "0", "b": "2"}', "train.json": "[]"}, "the 2 classes are not numbered 0 to 1"),
        ({"labels.json": '{"a": "0"}'}, "holds none of train.json, validation.json"),
        ({"labels.json": '{"a": "0"}', "train.json": "{}"}, "holds none of the videos; the official lists are empty"),
        ({"labels.json": '{"a": "0"}', "train.json": '{"1": "a"}'}, "train.json: not Something-Something's JSON"),
        ({"labels.json": '{"a": "0"}', "train.json": '[{"id": "1", "template": "[b]"}]'}, "train.json: 1: the class"),
        ({"labels.json": '{"a": "0"}', "validation.json": "[]", "1/val.json": "[]"}, "lists val too"),
    ],
)
def test_bad_files_of_something_v2_are_named(tmp_path, files, message):
    write(tmp_path / "a", {"readme.txt": "", **files})
    touch(tmp_path / "v", "1.webm")
    with pytest.raises(ShardError, match=message):
        read("something-v2", tmp_path)


CHARADES_HEADER = "id,subject,scene,quality,relevance,verified,script,objects,descriptions,actions,length\n"


def charades(root: Path, train: str, test: str) -> None:
    write(root, {
        "Charades_v1_classes.txt": "c000 Holding some clothes\r\nc001 Putting clothes somewhere\r\nc002 Eating a "
                                   "towel/s, fast\r\n",
        "Charades_v1_train.csv": CHARADES_HEADER + train,
        "Charades_v1_test.csv": CHARADES_HEADER + test,
        "Charades_v1_objectclasses.txt": "o000 None\n",
    })  # fmt: skip


def test_charades(tmp_path):
    charades(
        tmp_path / "a",
        '46GP8,HR43,Kitchen,6,7,Yes,"A person cooks, then\u2028eats.\nAfter that, he ""laughs"".",food,"Cooks.;Eats.",'
        "c002 11.90 21.20;c000 0.00 12.60;c002 25.00 24.50,24.83\r\n"
        "N11GT,0KZ7,Stairs,6,7,No,script,door,text,,29.50\r\n0IH69,V,Bed,,,Yes,s,o,d,c001 0.00 32.00,31.00\r\n"
        "GONE1,V,Bed,5,5,Yes,s,o,d,c001 0 3,31.00\r\n",
        "QT4E3,V,Bed,5,5,Yes,s,o,d,c000 0.0 3.0;c001 1.0 4.0,31.00\n",
    )
    touch(tmp_path / "v", *(f"Charades_v1_480/{name}.mp4" for name in ("46GP8", "N11GT", "0IH69", "QT4E3")))
    official, named, missing = read("charades", tmp_path)
    assert named == {
        "train": {"Charades_v1_480/46GP8.mp4": "Holding some clothes; Eating a towel/s, fast",
                  "Charades_v1_480/N11GT.mp4": "",
                  "Charades_v1_480/0IH69.mp4": "Putting clothes somewhere"},
        "val": {"Charades_v1_480/QT4E3.mp4": "Holding some clothes; Putting clothes somewhere"},
    }  # fmt: skip
    assert missing == {"train": ["GONE1"], "val": []}
    assert "the train list has 4 videos and not 7,985 as published" in official.notices[0]


@pytest.mark.parametrize("actions", ["c003 1.0 2.0", "c001", "c001 1.0 2.0,x;", "walks 1 2"])
def test_an_action_that_charades_does_not_have_is_named_with_its_line(tmp_path, actions):
    charades(tmp_path / "a", f'A,V,Bed,5,5,Yes,s,o,d,"{actions}",31.00\n', "")
    with pytest.raises(ShardError, match=r"Charades_v1_train.csv:2: the action .*classes to 2"):
        read("charades", tmp_path)


def test_a_list_as_long_as_published_passes_without_a_notice(tmp_path):
    write(tmp_path / "a", {
        "classInd.txt": ucf_index(),
        "trainlist03.txt": "".join(f"Archery/v_{number}.avi 3\n" for number in range(9624)),
        "testlist03.txt": "".join(f"Archery/t_{number}.avi\n" for number in range(3696)),
    })  # fmt: skip
    assert read_official("ucf101", tmp_path / "a", CLASSES, 3).notices == []
    write(tmp_path / "a", {"testlist03.txt": "Archery/t_0.avi\n"})
    (notice,) = read_official("ucf101", tmp_path / "a", CLASSES, 3).notices
    assert "the val list has 1 videos and not 3,696 as published" in notice


def test_no_video_at_all_is_an_error_with_an_example(tmp_path):
    write(tmp_path / "a", {"train.csv": "label,youtube_id,time_start,time_end\nyoga,x,0,10\n"})
    touch(tmp_path / "v", "other.mp4")
    with pytest.raises(ShardError, match=r"holds none of the videos; expected e.g. x_000000_000010.mp4"):
        read("kinetics400", tmp_path)


def test_names_that_differ_in_case_are_two_videos(tmp_path):
    """YouTube tells `abC` from `aBc`."""
    touch(tmp_path, "v/aBc.mp4", "v/abC.mp4", "replacement/ABC.mp4")
    files = VideoFiles(tmp_path)
    assert [files.find((key,), "val") for key in ("abC", "aBc", "abc")] == [
        "v/abC.mp4", "v/aBc.mp4", "replacement/ABC.mp4"
    ]  # fmt: skip


def test_of_several_files_that_of_the_split_is_taken_and_a_replacement_before_it(tmp_path):
    touch(tmp_path, "a/x.mp4", "a/val.mp4", "b/val.mp4", "val_256/x.mp4", "val_256/y.mp4", "replacement_k400/y.mp4")
    files = VideoFiles(tmp_path)
    assert files.find(("z", "x"), "val") == "val_256/x.mp4" and files.find(("X",), "train") == "a/x.mp4"
    assert files.find(("y",), "val") == "replacement_k400/y.mp4" and files.find(("val",), "val") == "a/val.mp4"
    assert files.find(("z",), "val") is None


@pytest.mark.slow
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
    write_video(tmp_path / "v/late/gone_0_10.mp4", 200)
    later = program("tools/prepare_dataset.py", *command)
    assert later.returncode == 1 and "1 lines of train.txt have changed since, the first is 'late/gone" in later.stderr
    assert len(parse_annotations(tmp_path / "d/train.txt", 400)) == 2
    shutil.rmtree(tmp_path / "d/train")
    assert program("tools/prepare_dataset.py", *command).returncode == 0
    with open_dataset(str(tmp_path / "d/train")) as train:
        assert len(train) == 3
    failed = program("tools/prepare_dataset.py", "ucf101", *command[1:])
    assert failed.returncode == 1 and "holds no classInd.txt" in failed.stderr
    refused = program("tools/prepare_dataset.py", *command, "--split", 2)
    assert refused.returncode == 2 and "kinetics400 has one official split" in refused.stderr


def test_the_command_packs_webm_files_and_lists_those_that_do_not_decode(tmp_path):
    videos = [{"id": str(number), "template": "Showing [something], [7]"} for number in range(3)]
    something(tmp_path / "a", "", {"train": videos[:2], "validation": videos[2:]})
    write(tmp_path / "v", {"1.webm": "\x1aE no video"})
    for number in (0, 2):
        encode(tmp_path / "v" / f"{number}.webm", "libvpx-vp9", images=pictures(4))
    done = program("tools/prepare_dataset.py", "something-v2", "--annotations", tmp_path / "a", "--videos",
                   tmp_path / "v", "--output", tmp_path / "d", "--short-side", 32, "--on-error", "skip")  # fmt: skip
    assert done.returncode == 0 and f"{tmp_path / 'd/train'}: 1 videos, 1 skipped" in done.stdout, done.stderr
    with open_dataset(str(tmp_path / "d/val")) as val:
        assert (val.name(0), val.labels.tolist(), len(val.classes)) == ("2.webm", [7], 174)
        assert val.classes[166] == SIDED[166]


def test_the_command_writes_several_labels_a_video(tmp_path):
    rows = "".join(f"{name},V,Bed,5,5,Yes,s,o,d,{actions},9\n" for name, actions in
                   (("A B", "c002 0 1;c000 0 1"), ("C", "c001 0 1"), ("D 10", "")))  # fmt: skip
    charades(tmp_path / "a", rows, "")
    touch(tmp_path / "v", "A B.mp4", "C.mp4", "D 10.mp4")
    done = program("tools/prepare_dataset.py", "charades", "--annotations", tmp_path / "a", "--videos",
                   tmp_path / "v", "--output", tmp_path / "d", "--lists-only")  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "d/train.txt").read_text() == "A B.mp4 0,2\nC.mp4 1\nD 10.mp4 -\n"
    assert [video.label for video in parse_annotations(tmp_path / "d/train.txt", 3)] == [(0, 2), 1, ()]
    assert parse_labels(tmp_path / "d/labels.csv")[2] == "Eating a towel/s, fast"
