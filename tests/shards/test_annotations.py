"""Annotation and class lists: every real list parses, every bad line is named."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from shards.annotations import Annotation, format_annotation, parse_annotations, parse_labels
from shards.format import Manifest, ShardError
from shards.list_lines import is_video_file, lines_with_paths

REAL_LISTS = Path(__file__).parents[3] / "shared" / "lists"
IN_FILE = settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def parse(tmp_path: Path, content: str | bytes, **options) -> list[Annotation]:
    path = tmp_path / "list.txt"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return parse_annotations(path, **options)


def labels(tmp_path: Path, content: str | bytes) -> list[str]:
    path = tmp_path / "labels.csv"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return parse_labels(path)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a/b 3 1", Annotation("a/b", 3, 1, 1)),
        ("a/b\t3\t1", Annotation("a/b", 3, 1, 1)),
        ("a/b 3\t1", Annotation("a/b", 3, 1, 1)),
        ("a/b\t3 1", Annotation("a/b", 3, 1, 1)),
        ("two words 3 1", Annotation("two words", 3, 1, 1)),
        ("a/b   3   1  ", Annotation("a/b", 3, 1, 1)),
        ("ü/視頻 3 1", Annotation("ü/視頻", 3, 1, 1)),
        ("a.mp4 7", Annotation("a.mp4", None, 7, 1)),
        ("my clip 3.MKV 7", Annotation("my clip 3.MKV", None, 7, 1)),
        ("v_x.avi 120 7", Annotation("v_x.avi", 120, 7, 1)),  # a frame folder with a video's name
        ("#1_dad 30 2", Annotation("#1_dad", 30, 2, 1)),
        ("a..b/c 1 0", Annotation("a..b/c", 1, 0, 1)),
        ("failed_extraction 0 0", Annotation("failed_extraction", 0, 0, 1)),
    ],
)
def test_accepted_lines(tmp_path, text, expected):
    assert parse(tmp_path, text) == [expected]


def test_blank_lines_comments_crlf_and_bom_are_accepted(tmp_path):
    content = b"\xef\xbb\xbf# made by hand\r\n\r\na 1 0\r\n#\r\n## 2 3\r\n  \r\n#x 2 0\r\nb 3 1"
    assert parse(tmp_path, content) == [Annotation("a", 1, 0, 3), Annotation("#x", 2, 0, 7), Annotation("b", 3, 1, 8)]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("a 1 0\nfolder", [":2:", "one column"]),
        ("folder 3", ["two columns", "video.mp4 label"]),
        ("a 1 x", ["label is 'x'"]),
        ("a 1 -1", ["label is -1"]),
        ("a 1 1.5", ["label is '1.5'"]),
        ("a 1 99999999999999999999999", ["label"]),
        ("a 1 4294967296", ["label is 4294967296"]),
        ("a 1 5", ["label 5", "0 to 4", "the.csv", "add id 5", "where labels count from 1"]),
        ("a many 0", ["frames is 'many'"]),
        ("a -3 0", ["frames is -3"]),
        ("a 2000000 0", ["frames is 2000000"]),
        ("a ٣ 0", ["frames is"]),
        ("a 1 0\nb 1 0\na 2 0", [":3:", "line 1", "'a'"]),
        ("/abs/a 1 0", ["leaves the root"]),
        ("a/../../b 1 0", ["leaves the root"]),
        ("a\0b 1 0", ["control character"]),
        (b"ok 1 0\nca\xe9 1 0\n", [":2:", "0xe9", "UTF-8"]),
        ("a.mp4 0\rb.mp4 1\r", ["control character", "end lines with LF or CRLF"]),
        ("#comment without a space", ["comment begins with"]),
        ("# nothing else\n", ["no annotations"]),
    ],
)
def test_bad_lines_are_named(tmp_path, text, words):
    with pytest.raises(ShardError) as caught:
        parse(tmp_path, text, num_classes=5, labels_file="the.csv")
    message = str(caught.value)
    assert message.startswith(str(tmp_path / "list.txt"))
    assert "\n" not in message
    for word in words:
        assert word in message


def test_missing_file(tmp_path):
    with pytest.raises(ShardError, match=r"nowhere\.txt: No such file"):
        parse_annotations(tmp_path / "nowhere.txt")
    with pytest.raises(ShardError, match=r"nowhere\.csv: No such file"):
        parse_labels(tmp_path / "nowhere.csv")


def test_labels_in_any_order(tmp_path):
    content = '\ufeffid, name\r\n1, "jump, high"\r\n\r\n0, run \r\n2,"say ""hi"""'
    assert labels(tmp_path, content) == ["run", "jump, high", 'say "hi"']


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("0,run\n1,jump\n", [":1:", "id,name"]),
        ("", [":1:", "id,name"]),
        ("id,name\n", ["no classes"]),
        ("id,name\n0,run\n2,jump\n", [":3:", "id 2", "no id 1"]),
        ("id,name\n0,run\n0,jump\n", [":3:", "id 0", "line 2"]),
        ("id,name\nx,run\n", [":2:", "'x'"]),
        ("id,name\n-1,run\n", [":2:", "'-1'"]),
        ("id,name\n0,run, fast\n", [":2:", "3 columns"]),
        ("id,name\n0\n", [":2:", "1 columns"]),
        ("id,name\n0,\n", [":2:", "no name"]),
        ('id,name\n0,"run\n', ["unexpected end"]),
        ("id,name\n0,run\n2,jump\n1, run\n", [":4:", "class 0 is named 'run' too"]),
        (b"id,name\n0,caf\xe9\n", [":2:", "0xe9"]),
    ],
)
def test_bad_labels_are_named(tmp_path, text, words):
    with pytest.raises(ShardError) as caught:
        labels(tmp_path, text)
    message = str(caught.value)
    assert message.startswith(str(tmp_path / "labels.csv"))
    for word in words:
        assert word in message


@pytest.mark.skipif(not REAL_LISTS.is_dir(), reason="the real lists are not here")
@pytest.mark.parametrize(
    ("name", "classes", "num_classes", "num_videos"),
    [
        ("ucf101_train_split1.txt", "ucf_labels.csv", 101, 9537),
        ("ucf101_val_split1.txt", "ucf_labels.csv", 101, 3783),
        ("hmdb51_full.txt", "hmdb51_labels.csv", 51, 6766),
        ("anet_val.txt", "anet1.3_labels.csv", 200, 4926),
    ],
)
def test_real_lists_parse_in_full(name, classes, num_classes, num_videos):
    names = parse_labels(REAL_LISTS / classes)
    annotations = parse_annotations(REAL_LISTS / name, len(names))
    assert (len(names), len(annotations)) == (num_classes, num_videos)
    lines = (REAL_LISTS / name).read_text().splitlines()
    assert [f"{item.name} {item.num_frames} {item.label}" for item in annotations] == lines


@pytest.mark.slow
@IN_FILE
@given(
    st.lists(
        st.tuples(
            st.text(st.characters(exclude_characters="\0\n\r\t /#", exclude_categories=["Cs", "Z", "Cc"]), min_size=1),
            st.integers(1, 1000),
            st.integers(0, 400),
        ),
        min_size=1,
        unique_by=lambda row: row[0],
    ).filter(lambda rows: not any(name in (".", "..") for name, _, _ in rows))
)
def test_any_name_round_trips(tmp_path, rows):
    content = "\n".join(f"dir/{name} {frames} {label}" for name, frames, label in rows)
    parsed = parse(tmp_path, content)
    assert [(item.name, item.num_frames, item.label) for item in parsed] == [(f"dir/{n}", f, c) for n, f, c in rows]


@pytest.mark.slow
@IN_FILE
@given(st.one_of(st.binary(), st.text(alphabet="ab#/. \t\r\n-+0123456789,\"mp4'").map(str.encode)))
def test_only_shard_errors_come_out(tmp_path, content):
    for parser in (parse, labels):
        try:
            parser(tmp_path, content)
        except ShardError as error:
            assert "\n" not in str(error).replace(str(tmp_path), "")


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda children: st.lists(children, max_size=3) | st.dictionaries(st.text(max_size=5), children, max_size=3),
    max_leaves=8,
)


@pytest.mark.slow
@settings(max_examples=500, deadline=None)
@given(st.data())
def test_manifest_parser_raises_only_shard_errors(data):
    import json

    valid = json.loads(
        Manifest(
            content="frames",
            classes=["run"],
            num_videos=0,
            num_members=0,
            fingerprint="0" * 64,
            shards=[],
            index={
                role: {"file": f"index/{role}-{'0' * 32}.npy", "bytes": 1, "crc32": 2}
                for role in ("videos", "members", "names")
            },
        ).to_json()
    )
    Manifest.from_json(json.dumps(valid), "here")
    target = data.draw(st.sampled_from([valid, valid["index"], valid["index"]["videos"]]))
    target[data.draw(st.sampled_from(sorted(target)))] = data.draw(JSON)
    try:
        Manifest.from_json(json.dumps(valid), "here")
    except ShardError as error:
        assert str(error).startswith("here: ")


@pytest.mark.parametrize("file", ["../videos.npy", "/etc/passwd", "index/videos-x.npy", "http://a/b.npy"])
def test_manifest_names_no_file_outside_its_folder(file):
    index = {role: {"file": file, "bytes": 1, "crc32": 2} for role in ("videos", "members", "names")}
    manifest = Manifest("frames", [], 0, 0, "0" * 64, [], index)
    with pytest.raises(ShardError, match="is named"):
        Manifest.from_json(manifest.to_json(), "here")


def test_video_files_are_known_by_extension():
    assert is_video_file("a b/C.MP4")
    assert not is_video_file("mp4")


@pytest.fixture
def root(tmp_path):
    for name in ("sub/1.mp4", "v.mp4", "my clip.mp4", "drinking (31).mp4", r"back\slash.mp4"):
        (tmp_path / "root" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "root" / name).touch()
    for name in ("clip", "clip 3", "folder.mp4"):
        (tmp_path / "root" / name).mkdir()
    return tmp_path / "root"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("./sub/1.mp4 0", ("sub/1.mp4", None, 0)),
        ("sub//.//1.mp4 0", ("sub/1.mp4", None, 0)),
        ("sub/../sub/1.mp4 0", ("sub/1.mp4", None, 0)),
        ("clip/ 30 0", ("clip", 30, 0)),
        ("{root}/sub/1.mp4 0", ("sub/1.mp4", None, 0)),
        (r"sub\1.mp4 0", ("sub/1.mp4", None, 0)),
        (r"back\slash.mp4 0", (r"back\slash.mp4", None, 0)),
        ("clip 3 120 2", ("clip 3", 120, 2)),
        ("folder.mp4 120 2", ("folder.mp4", 120, 2)),
        ("my clip.mp4 2", ("my clip.mp4", None, 2)),
        ("drinking (31).mp4 1", ("drinking (31).mp4", None, 1)),
        ("no extension 7 - 1", ("no extension 7", None, 1)),
        ("0001.MTS 1", ("0001.MTS", None, 1)),
    ],
)
def test_paths_have_one_spelling(tmp_path, root, text, expected):
    (parsed,) = parse(tmp_path, text.format(root=root), root=root)
    assert (parsed.name, parsed.num_frames, parsed.label) == expected


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("./sub/1.mp4 0\nsub/1.mp4 0", [":2:", "'sub/1.mp4' is already on line 1"]),
        ("{root}/v.mp4 0\n./v.mp4 0", [":2:", "'v.mp4' is already on line 1"]),
        ("/else/1.mp4 0", ["does not lie below --root"]),
        ("../v.mp4 0", ["leaves the root"]),
        ("root/v.mp4 0", ["'root/v.mp4' begins with the name of --root itself; give --root "]),
        ("./ 3 0", ["names the root folder itself"]),
        (r"C:\data\1.mp4 0", ["drive of Windows"]),
        ("C:/data/1.mp4 0", ["drive of Windows"]),
        (r"\\server\1.mp4 0", ["drive of Windows"]),
        ("clip 5 120 3", ["3 numbers follow 'clip'", "offsets"]),
        ("v.mp4 0 100 3", ["3 numbers follow 'v.mp4'", "ffmpeg -ss"]),
        ("gone.mp4 0 100 3", ["3 numbers follow 'gone.mp4'"]),
        ("clip 30 3 5", ["3 numbers follow 'clip'", "several labels"]),
        ("v.mp4 3 5", ["2 numbers follow 'v.mp4'"]),
        ("v.mp4 0.0 10.5 3", ["'10.5'", "times or offsets"]),
        ("v.mp4 00:00:10 00:00:20 3", ["times or offsets"]),
        ("v.mp4 3;5", ["several labels are joined by commas"]),
        ("v.mp4 3,5,", ["several labels are joined by commas"]),
        ("v.mp4 3,5,3", ["label 3 is in", "twice"]),
        ("clip 30 [3;5]", ["several labels"]),
        ("v.mp4 surfing", ["'surfing'", "its id in the class list"]),
        ("v.mp4 ice skating", ["its id in the class list"]),
        ("clip 30 surfing", ["its id in the class list"]),
        ("path label\nv.mp4 0", [":1:", "no header"]),
        ("video_path,label\nv.mp4,0", [":1:", "no header"]),
        ("v.mp4,0", ["separated by commas"]),
        ("v.mp4, 0", ["separated by commas"]),
        ("spaghetti,--3ouPhoy2A,20,30,train", ["separated by commas"]),
        ('"my clip.mp4" 3', ["quotes"]),
        ("v.mp4", ["the label is missing"]),
        ("noext 3", ["two columns", "`path - label`"]),
        ("v.mp4 1.0", ["label is '1.0'"]),
    ],
)
def test_lists_of_other_kinds_are_understood_or_refused_with_the_fix(tmp_path, root, text, words):
    with pytest.raises(ShardError) as caught:
        parse(tmp_path, text.format(root=root), root=root)
    for word in words:
        assert word in str(caught.value)


def test_names_that_differ_in_case_are_two_files_unless_they_are_one(tmp_path, root):
    (root / "V.mp4").write_text("another")
    assert len(parse(tmp_path, "v.mp4 0\nV.mp4 0", root=root)) == 2
    (root / "V.mp4").unlink()
    (root / "V.mp4").hardlink_to(root / "v.mp4")  # as a file system that ignores case would have it
    with pytest.raises(ShardError, match=r":2: 'V.mp4' is already on line 1, spelled 'v.mp4'"):
        parse(tmp_path, "v.mp4 0\nV.mp4 0", root=root)


@IN_FILE
@given(st.text(min_size=1), st.one_of(st.none(), st.integers(0, 1000)), st.integers(0, 400))
def test_a_line_holds_a_name_or_refuses_it(tmp_path, name, frames, label):
    try:
        line = format_annotation(name, frames, label)
    except ValueError:
        return
    (parsed,) = parse(tmp_path, line + "\n")
    assert (parsed.name, parsed.num_frames, parsed.label) == (name, frames, label)


def test_a_list_of_paths_keeps_names_as_they_are_and_names_a_line_of_utf16(tmp_path):
    path = tmp_path / "list.txt"
    path.write_bytes(b"\xef\xbb\xbfa b.mp4\r\n \r\n\xe9.mp4\n")
    assert lines_with_paths(path) == ["a b.mp4", "\udce9.mp4"]
    path.write_bytes("a.mp4\nb.mp4\n".encode("utf-16"))
    with pytest.raises(ShardError, match=r"list\.txt:1: holds a NUL byte, as UTF-16 does; save the file as UTF-8"):
        lines_with_paths(path)
