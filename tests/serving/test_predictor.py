"""Prediction: what one video gives alone it gives in a batch, in a window and through the command."""

import csv
import json
import os
import re
import shutil
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from launch import finish, program, start
from PIL import Image
from shard_data import serve
from tiny import write_export
from videos import encode, pictures, write_video

import text4vis
from shards.frames import PacketTable
from text4vis.saved.checkpoint import CheckpointError
from text4vis.serving.footage import FRAMES_IN_FLIGHT
from text4vis.serving.pictures import save_timeline
from text4vis.serving.predictor import PredictionError

NAMES = ["archery", "surfing", "playing the flute"]


@pytest.fixture(scope="module")
def export(tmp_path_factory) -> Path:
    return write_export(tmp_path_factory.mktemp("export"), NAMES)


@pytest.fixture(scope="module")
def videos(tmp_path_factory) -> Path:
    """Three videos of different grey values and lengths (10 frames a second), one folder of frames."""
    base = tmp_path_factory.mktemp("videos")
    for number, frames in enumerate((12, 30, 6)):
        write_video(base / "deep" / f"video{number}.mp4", 80 * number, frames)
    (base / "frames").mkdir()
    for number in range(1, 11):
        Image.fromarray(np.full((40, 60, 3), 10 * number, np.uint8)).save(base / "frames" / f"img_{number}.png")
    (base / "frames" / "._img_1.png").write_bytes(b"what macOS keeps about img_1.png on other disks")
    return base


@pytest.mark.parametrize("dense", [False, True])
def test_frames_are_those_of_an_evaluation_of_one_clip(export, dense):
    recogniser = text4vis.load(export)
    config = recogniser.config
    recogniser.config = replace(config, data=replace(config.data, dense=dense))
    frames = np.zeros((300, 8, 8, 3), np.uint8)
    expected = [86, 118, 150, 182] if dense else [0, 75, 150, 225]
    assert recogniser.predict(frames).indices.tolist() == expected


def test_probabilities_are_calibrated_and_unsure_answers_say_so(export, videos, tmp_path):
    path = videos / "deep" / "video0.mp4"
    plain = text4vis.load(export).predict(path, top=3)
    assert (plain.calibrated, plain.sure, plain.candidates) == (False, None, None)
    best = dict(plain.top)
    figures = {
        "temperature": 50.0,
        "answers": [
            {"accuracy": 80, "threshold": 0.0},
            {"accuracy": 95, "threshold": 0.9},
            {"accuracy": 99, "threshold": None},
        ],
        "sets": [{"coverage": 90, "threshold": 0.0}],
    }
    shutil.copytree(export, tmp_path / "export")
    facts = json.loads((tmp_path / "export" / "export.json").read_text())
    facts["card"] = {"evaluation": {"calibration": figures}}
    (tmp_path / "export" / "export.json").write_text(json.dumps(facts))
    recogniser = text4vis.load(tmp_path / "export")
    found = recogniser.predict(path, top=1, accuracy=80, coverage=90)
    (name, probability), *_ = found.top
    powers = {key: value ** (1 / 50) for key, value in best.items()}
    assert probability == pytest.approx(powers[name] / sum(powers.values()), rel=1e-6)
    assert found.calibrated and found.sure and found.candidates == [name for name, _ in plain.top]
    assert recogniser.predict(path, accuracy=95).sure is False
    assert not recogniser.predict(path, labels=["a cat", "a dog"]).calibrated
    for options, message in (
        ({"accuracy": 99}, "does not reach 99 %"),
        ({"accuracy": 50}, "accuracy: 50 was not measured; choose 80, 95, 99"),
        ({"coverage": 90, "labels": ["a", "b"]}, "leave the labels out"),
    ):
        with pytest.raises(PredictionError, match=message):
            recogniser.predict(path, **options)
    with pytest.raises(PredictionError, match="the model has no calibration; evaluate it"):
        text4vis.load(export).predict(path, accuracy=80)


@pytest.mark.slow
def test_a_prediction_loads_neither_dali_nor_deepspeed(export, videos):
    """Both take seconds to import, and neither is needed where models only serve."""
    code = (
        "import sys, text4vis\n"
        f"print(text4vis.load({str(export)!r}).predict({str(videos / 'deep' / 'video0.mp4')!r}).top[0][0])\n"
        "print(*sorted({name.partition('.')[0] for name in sys.modules} & {'nvidia', 'deepspeed'}))\n"
    )
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    name, loaded = ended.stdout.splitlines()
    assert name in NAMES and loaded == ""


def test_labels_that_a_model_cannot_take_are_refused_before_any_video(export):
    recogniser = text4vis.load(export)
    config = recogniser.config
    recogniser.config = replace(config, network=replace(config.network, classifier="random"))
    with pytest.raises(PredictionError, match="trained with the classifier random"):
        recogniser.predict_many(["one.mp4", "two.mp4"], labels=["a", "b"])


def test_many_at_once_are_what_each_is_alone(export, videos):
    recogniser = text4vis.load(export)
    paths = [*sorted((videos / "deep").iterdir()), videos / "frames"]
    together = list(recogniser.predict_many([*paths[:2], videos / "nothing.mp4", *paths[2:]], batch_size=2))
    assert isinstance(together[2], PredictionError) and "nothing.mp4: no such video" in str(together[2])
    for path, prediction in zip(paths, together[:2] + together[3:], strict=True):
        alone = recogniser.predict(path)
        assert [name for name, _ in prediction.top] == [name for name, _ in alone.top]
        np.testing.assert_allclose([p for _, p in prediction.top], [p for _, p in alone.top], atol=1e-5)
        assert np.array_equal(prediction.frames, alone.frames) and sum(p for _, p in alone.top) == pytest.approx(1)


@pytest.mark.parametrize(("odd", "message"), [
    ("foo://bar/x.mp4", "foo"),
    (b"bytes", "expected a path, an address or an array of frames, got bytes"),
    (None, "got NoneType"),
    (np.zeros((3, 0, 4, 3), np.uint8), r"expected frames .*got \(3, 0, 4, 3\)"),
    ("bomb", "1.png: not a readable image .*20000x19000 pixels; the limits are"),
    ("text", "1.png: not a readable image"),
])  # fmt: skip
def test_what_is_no_video_costs_no_other(export, videos, tmp_path, odd, message):
    if isinstance(odd, str) and odd in {"bomb", "text"}:
        (tmp_path / "frames").mkdir()
        path = tmp_path / "frames" / "1.png"
        if odd == "bomb":
            Image.new("1", (20_000, 19_000)).save(path)
        else:
            path.write_text("no image")
        odd = path.parent
    sound = videos / "deep" / "video0.mp4"
    first, error, last = text4vis.load(export).predict_many([sound, odd, sound])
    assert first.top == last.top and isinstance(error, PredictionError) and re.search(message, str(error))


def test_arguments_that_are_something_else_are_named(export, videos):
    recogniser = text4vis.load(export, device="cpu")
    for labels in ("surfing", ["surfing", 2]):
        with pytest.raises(PredictionError, match=r"labels: .*give a list of class names"):
            recogniser.predict(videos / "frames", labels=labels)
    with pytest.raises(PredictionError, match=r"labels: .*empty name"):
        recogniser.predict(videos / "frames", labels=["surfing", ""])
    with pytest.raises(PredictionError, match=r"'clip.mp4' is one video; give a list"):
        recogniser.predict_many("clip.mp4")
    for call in (recogniser.predict_many, recogniser.scan):
        with pytest.raises(PredictionError, match="batch_size 0"):
            call(videos / "deep" / "video0.mp4" if call == recogniser.scan else [], batch_size=0)


def test_what_is_no_model_is_told_apart(tmp_path):
    (tmp_path / "train.pt").touch()
    (tmp_path / "folder").mkdir()
    for name, message in (
        ("gone", r"gone: not there; name the folder of an export"),
        ("train.pt", r"train\.pt: a \.pt file does not hold its recipe and classes; export it first: tools/export\.py"),
        ("folder", r"folder: neither an export nor a checkpoint nor a run"),
    ):
        with pytest.raises(CheckpointError, match=message):
            text4vis.load(tmp_path / name)


def test_labels_are_embedded_once(export, videos, monkeypatch):
    recogniser = text4vis.load(export)
    first = recogniser.predict(videos / "frames", labels=(name for name in ("juggling", "skating"))).top
    rows_CD = recogniser.embed(["juggling", "skating"])
    assert rows_CD.shape == (2, recogniser.class_embeddings_CD.shape[1])
    monkeypatch.setattr("text4vis.serving.predictor.text_classifier", lambda *_: pytest.fail("embedded again"))
    assert recogniser.predict(videos / "frames", labels=["juggling", "skating"]).top == first


def test_a_long_scan_keeps_one_small_picture_a_window(export, videos, monkeypatch):
    """Neither the frames of the windows nor what the packets tell, which is read once."""
    tables, read = [], PacketTable.read
    monkeypatch.setattr(PacketTable, "read", lambda *given: tables.append(read(*given)) or tables[-1])
    timeline = text4vis.load(export).scan(videos / "deep" / "video1.mp4", window_seconds=0.5, batch_size=2)
    assert len(timeline.thumbnails) == len(timeline.seconds_W2) > 8 and len(tables) == 1
    assert all(picture.base is None and picture.shape == (32, 32, 3) for picture in timeline.thumbnails)


def test_windows_cover_the_video_and_see_their_own_frames(export, videos, tmp_path):
    recogniser = text4vis.load(export)
    path = videos / "deep" / "video1.mp4"
    timeline = recogniser.scan(path, window_seconds=1.0, batch_size=2)
    starts, ends = timeline.seconds_W2.T
    assert starts[0] == 0 and ends[-1] == pytest.approx(3.0) and np.all(starts[1:] <= ends[:-1])
    assert np.allclose(ends - starts, 1.0) and np.allclose(np.diff(starts), 0.5)
    first_second = [np.asarray(frame) for frame in _frames(path)[:10]]
    alone = recogniser.predict(np.stack(first_second))
    np.testing.assert_allclose(sorted(timeline.scores_WC[0]), sorted(p for _, p in alone.top), atol=1e-5)
    assert [name for name, _ in timeline.top(0, 3)] == [name for name, _ in alone.top]
    whole = recogniser.scan(path, window_seconds=60)
    assert whole.seconds_W2.tolist() == [[0, pytest.approx(3.0)]]
    np.testing.assert_allclose([p for _, p in whole.top(0)], [p for _, p in recogniser.predict(path).top], atol=1e-5)
    save_timeline(timeline, "a $title$ <b>", tmp_path / "timeline.png")
    assert Image.open(tmp_path / "timeline.png").size[0] > 800


def _frames(path):
    from shards.video import iter_frames

    return list(iter_frames(path))


def test_other_labels_need_no_training(export, videos):
    top = text4vis.load(export).predict(videos / "frames", labels=["juggling", "skating"]).top
    assert {name for name, _ in top} == {"juggling", "skating"}


def predict(*arguments):
    return program("tools/predict.py", *arguments)


@pytest.mark.slow
def test_the_command_finds_videos_and_writes_files(export, videos, tmp_path):
    """A folder, a pattern that repeats a video, frames, and one that is missing: all but that are recognised."""
    result = predict(
        videos / "deep", videos / "deep" / "*0.mp4", videos / "frames", tmp_path / "gone.mp4", "--model", export,
        "--top", 2, "--json", tmp_path / "all.json", "--csv", tmp_path / "all.csv", "--picture", tmp_path / "p.png",
    )  # fmt: skip
    assert result.returncode == 1 and "1 of 5 videos could not be read" in result.stderr
    rows = json.loads((tmp_path / "all.json").read_text())
    assert [Path(row["video"]).name for row in rows] == [
        "video0.mp4", "video1.mp4", "video2.mp4", "frames", "gone.mp4",
    ]  # fmt: skip
    assert all(len(row["top"]) == 2 for row in rows[:4]) and "no such video" in rows[4]["error"]
    with (tmp_path / "all.csv").open(newline="") as file:
        lines = list(csv.DictReader(file))
    assert len(lines) == 9 and lines[0]["class"] == rows[0]["top"][0]["class"] and lines[8]["error"]
    expected = text4vis.load(export).predict(videos / "deep" / "video0.mp4", top=2).top
    assert [(entry["class"], entry["probability"]) for entry in rows[0]["top"]] == [
        (name, pytest.approx(probability, abs=1e-5)) for name, probability in expected
    ]
    probabilities = [entry["probability"] for row in rows[:4] for entry in row["top"]]
    assert probabilities == [round(p, 6) for p in probabilities] == [float(line["probability"]) for line in lines[:8]]
    assert len(list(tmp_path.glob("p-*.png"))) == 4 and f"{tmp_path / 'p-1.png'} to p-4.png" in result.stdout


@pytest.mark.slow
def test_the_command_keeps_what_was_done_when_it_is_stopped(export, videos, tmp_path):
    """Ctrl-C at the second of a folder's videos. A picture beside them does not make the folder a video."""
    folder = tmp_path / "mine"
    shutil.copytree(videos / "deep", folder)
    shutil.copy(videos / "frames" / "img_1.png", folder / "cover.png")
    code = "import runpy, sys, text4vis.serving.footage as f\nread = f.sample_frames\n"
    code += "def sample(path, *given):\n    if path.name == 'video1.mp4': raise KeyboardInterrupt\n"
    code += "    return read(path, *given)\n"
    code += "f.sample_frames = sample\nsys.argv = sys.argv[1:]\nrunpy.run_path(sys.argv[0], run_name='__main__')"
    output = tmp_path / "all.json"
    command = ["-c", code, "tools/predict.py", folder, "--model", export, "--batch-size", "1", "--json", output]
    result = subprocess.run([sys.executable, *command], capture_output=True, text=True, check=False)
    assert result.returncode == 130 and "predict: stopped" in result.stderr, result.stderr
    assert [Path(row["video"]).name for row in json.loads(output.read_text())] == ["video0.mp4"]


@pytest.mark.slow
@pytest.mark.parametrize(("option", "place", "message"), [
    ("--json", "file/all.json", "--json: the folder .*file cannot be written"),
    ("--csv", "", "--csv: .* is a folder; name a file in it"),
    ("--picture", "p.txt", r"--picture: expected a name that ends with \.png"),
])  # fmt: skip
def test_the_command_tries_its_outputs_first(tmp_path, option, place, message):
    (tmp_path / "file").touch()
    result = predict("gone.mp4", "--model", "gone", option, tmp_path / place)
    assert result.returncode == (2 if option == "--picture" else 1)
    assert re.search(message, result.stderr), result.stderr


@pytest.mark.slow
def test_the_command_scans_an_address_and_hides_its_secret(export, videos):
    with serve(videos) as server:
        address = server.address.replace("://", "://user:secret@") + "/deep/video1.mp4?token=secret"
        found = predict(address, "--model", export, "--window", 1)
        missing = predict(address.replace("video1", "video9"), "--model", export)
    assert found.returncode == 0 and "0.5 to 1.5" in found.stdout, found.stderr
    assert missing.returncode == 1 and "cannot be fetched" in missing.stdout
    assert "secret" not in found.stdout + found.stderr + missing.stdout + missing.stderr


def listed(folder: Path, count: int) -> list[Path]:
    """Copies of one video, one file that is none among them."""
    folder.mkdir()
    write_video(folder / "video000.mp4", 40, 12)
    for number in range(1, count):
        shutil.copy(folder / "video000.mp4", folder / f"video{number:03d}.mp4")
    (folder / "video001.mp4").write_bytes(b"no video")
    return sorted(folder.iterdir())


def lines_of(path: Path) -> list[dict]:
    """Its complete lines without the first one, which holds the settings."""
    _, *records = path.read_text().split("\n")[:-1]
    return [json.loads(record) for record in records]


@pytest.mark.slow
def test_processes_share_a_list_and_the_same_command_goes_on(export, tmp_path):
    """Two ranks; then one, of a list with more videos; then with settings that would change the answers."""
    paths, answers = listed(tmp_path / "videos", 9), tmp_path / "answers.jsonl"
    (tmp_path / "list.txt").write_text("".join(f"{path}\n" for path in paths[:6]))
    command = ["--list", tmp_path / "list.txt", "--model", export, "--top", 2, "--jsonl", answers, "--batch-size", 2]
    for code, output in finish(start("tools/predict.py", *command, ranks=2)):
        assert code == 1, output
    assert "1 of 6 videos could not be read" in output or "error" in answers.read_text()
    before = answers.read_text()
    records = lines_of(answers)
    assert sorted(record["video"] for record in records) == [str(path) for path in paths[:6]]
    assert [Path(record["video"]).name for record in records if "error" in record] == ["video001.mp4"]
    assert len({json.dumps(record["top"]) for record in records if "top" in record}) == 1
    with answers.open("a") as file:
        file.write('{"video": "half a li')
    result = predict(*command, tmp_path / "videos")
    assert result.returncode == 1 and "1 of 9 videos could not be read" in result.stderr, result.stderr
    assert answers.read_text().startswith(before) and len(lines_of(answers)) == 9
    assert {record["video"] for record in lines_of(answers)} == {str(path) for path in paths}
    expected = text4vis.load(export).predict(paths[0], top=2).top
    assert [entry["class"] for entry in records[0].get("top", records[1].get("top"))] == [name for name, _ in expected]
    other = predict(*command, "--labels", "a cat,a dog")
    assert other.returncode == 1 and re.search(
        r"other settings \(classes: .*, now \[\"a cat\", \"a dog\"\]", other.stderr
    )


HOSTILE = [
    b"-rf.mp4", b"=1+1.mp4", b"a\nb.mp4", b"a\\nb.mp4", b"\x1b[31mred.mp4", "\u202e4pm.\u2028x.mp4".encode(),
    b"\xff\xfe.mp4", b"<script>alert(1)</script>.mp4".replace(b"/", b"\\"), b"n" * 251 + b".mp4", b"{}$x$%s\".mp4",
]  # fmt: skip


@pytest.mark.slow
def test_files_are_found_again_by_the_names_in_the_output(tmp_path):
    """Names and classes made to hurt, of files that are read and of one that is not, in every kind of output."""
    export = write_export(tmp_path / "export", ["=HYPERLINK(1)", "surf\u202e", "<b>"])
    folder = tmp_path / "v"
    paths = {str(folder / os.fsdecode(name)) for name in [*HOSTILE, b"broken\xff.mp4"]}
    for path in paths:
        write_video(folder / "one.mp4", 40, 4)
        (folder / "one.mp4").rename(path)
    (folder / os.fsdecode(b"broken\xff.mp4")).write_bytes(b"none")
    (tmp_path / "list.txt").write_bytes(b"".join(os.fsencode(path) + b"\n" for path in paths if "\n" not in path))
    arguments = ["--model", export, "--top", 2]
    files = "--json", tmp_path / "a.json", "--csv", tmp_path / "a.csv", "--picture", tmp_path / "p.png"
    once = predict(folder, *arguments, *files)
    again = [predict(*given, *arguments, "--jsonl", tmp_path / "a.jsonl") for given in
             ((folder,), ("--list", tmp_path / "list.txt", folder))]  # fmt: skip
    for result in (once, *again):
        assert result.returncode == 1 and "1 of 11 videos could not be read" in result.stderr, result.stderr
        assert not [text for text in ("\x1b", "\u202e", "Traceback") if text in result.stdout + result.stderr]
    records = lines_of(tmp_path / "a.jsonl")
    assert len(records) == 11
    assert {record["video"] for record in records} == paths
    assert {row["video"] for row in json.loads((tmp_path / "a.json").read_text("utf-8"))} == paths
    assert len(list(tmp_path.glob("p-*.png"))) == 10
    with (tmp_path / "a.csv").open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert len({row["video"] for row in rows}) == 10  # two names with the same escapes
    assert {row["class"] for row in rows} <= {"'=HYPERLINK(1)", "surf\\u202e", "<b>", ""}
    assert all(cell.isprintable() and cell[:1] not in "=+-@" for row in rows for cell in row.values() if cell)


@pytest.mark.slow
@pytest.mark.parametrize(("options", "code", "message"), [
    (["--jsonl", "a.jsonl", "--json", "b.json"], 2, "--jsonl: leave --json, --csv and --picture out"),
    (["--json", "a.out", "--csv", "./a.out"], 2, "--json and --csv: both name a.out; name two files"),
    (["--window", "nan"], 2, "--window: expected seconds above 0, got nan"),
    ([], 2, "no videos: give VIDEO or --list FILE"),
    (["--list", "/dev/null"], 1, "--list: /dev/null names no video"),
])  # fmt: skip
def test_wrong_usage_of_lists_is_named(options, code, message):
    result = predict("--model", "gone", *options, *(["x.mp4"] if options and "--list" not in options else []))
    assert result.returncode == code and message in result.stderr


def test_windows_that_are_too_short_to_count_are_refused(export, videos):
    with pytest.raises(PredictionError, match=r"windows of 1e-09 s every 5e-10 s: expected at least 0\.001 s"):
        text4vis.load(export).scan(videos / "deep" / "video0.mp4", window_seconds=1e-9)


def test_frames_ahead_of_the_model_are_bounded_and_batches_fill_across_unreadable_videos(export, videos, monkeypatch):
    recogniser, sound = text4vis.load(export), videos / "deep" / "video0.mp4"
    taken, batches, score = [], [], recogniser._scores
    monkeypatch.setattr(
        recogniser, "_scores", lambda frames, *given: batches.append(len(frames)) or score(frames, *given)
    )
    given = [sound, "gone.mp4"] * 60
    answers = recogniser.predict_many((taken.append(video) or video for video in given), batch_size=4, threads=2)
    for number, answer in enumerate(answers):
        assert isinstance(answer, PredictionError) == (given[number] == "gone.mp4")
        assert len(taken) <= number + 2 * 4 + FRAMES_IN_FLIGHT // 4 + 1
    assert number == 119 and batches == [4] * 15


def test_a_scan_decodes_each_frame_once_in_several_parts(export, tmp_path, monkeypatch):
    from shards import frames

    path = encode(tmp_path / "v.mp4", images=pictures(300), options={"g": "25", "bf": "2"})
    monkeypatch.setattr(frames, "_PART_FRAMES", 50)
    recogniser, decoded, received = text4vis.load(export), [], frames._Feed.received
    monkeypatch.setattr(frames._Feed, "received", lambda *given: decoded.append(received(*given)) or decoded[-1])
    timeline = recogniser.scan(path, window_seconds=2, threads=3)
    assert len(timeline.scores_WC) == 14 and len(decoded) == len(set(decoded))
    decoded.clear()
    alone = recogniser.scan(path, window_seconds=2, threads=1, batch_size=1)
    np.testing.assert_allclose(timeline.scores_WC, alone.scores_WC, atol=1e-5)


def test_a_frame_of_several_windows_is_encoded_once_unless_the_model_joins_frames(export, tmp_path):
    path = encode(tmp_path / "v.mp4", images=pictures(80))  # 20 a second
    recogniser, encoded = text4vis.load(export), []
    recogniser.model.visual.register_forward_pre_hook(lambda _, given: encoded.append(len(given[0])))
    scores = {}
    for together in (False, True):
        recogniser.model.takes_fixed_frames = together  # as with network.tm and network.joint_st
        scores[together] = recogniser.scan(path, window_seconds=2, step_seconds=0.5, batch_size=3).scores_WC
        encoded.append(0)
    windows, alone, joined = len(scores[True]), sum(encoded[: encoded.index(0)]), sum(encoded[encoded.index(0) :])
    num_segments = recogniser.config.data.num_segments
    assert windows == 5 and joined == windows * num_segments and alone <= num_segments + 4 * (num_segments // 4 + 1)
    np.testing.assert_allclose(scores[False], scores[True], atol=1e-6)


def test_a_scan_of_a_video_whose_packets_say_nothing_or_lie_sees_the_same(export, tmp_path, monkeypatch):
    from shards import frames

    path = encode(tmp_path / "v.mp4", images=pictures(60), options={"g": "25", "bf": "2"})
    expected = text4vis.load(export).scan(path, window_seconds=1)
    monkeypatch.setattr(frames._Feed, "received", lambda *_: (_ for _ in ()).throw(frames.PacketsError()))
    found = text4vis.load(export).scan(path, window_seconds=1)
    np.testing.assert_array_equal(found.scores_WC, expected.scores_WC)
    np.testing.assert_array_equal(found.thumbnails, expected.thumbnails)


@pytest.mark.slow
def test_a_kill_loses_only_what_was_in_work(export, tmp_path):
    paths, answers = listed(tmp_path / "videos", 60), tmp_path / "answers.jsonl"
    command = [tmp_path / "videos", "--model", export, "--jsonl", answers, "--batch-size", "2"]
    ranks = start("tools/predict.py", *command, ranks=2)
    while not answers.exists() or answers.read_text().count("\n") < 4:
        time.sleep(0.01)
    for rank in ranks:
        rank.kill()
        rank.wait()
    before = lines_of(answers)
    for code, output in finish(start("tools/predict.py", *command, ranks=3)):
        assert code == 1, output
    after = lines_of(answers)
    assert after[: len(before)] == before
    assert sorted(record["video"] for record in after) == [str(path) for path in paths]
