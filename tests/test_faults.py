"""A disk that fails and a clock that jumps: one line that names the trouble, and the same command goes on.

tests/support/fail_disk.py does it at every call of more programs.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from fail_disk import answers, files, windows
from faults import build, compiler, failing, jumping
from frame_folders import make_frame_folders
from launch import ROOT
from project import TRAIN, losses, weights
from shard_data import make_dataset, serve
from tiny import write_export
from videos import write_video

pytestmark = pytest.mark.skipif(compiler() is None, reason="needs a C compiler")

READ = """
import sys
from shards.reader import open_dataset
sys.path.insert(0, sys.argv[3])
from shard_data import read_everything
with open_dataset(sys.argv[1], cache_bytes=10**7, cache_dir=sys.argv[2]) as dataset:
    for _ in range(2):
        print(sum(map(len, (b"".join(frames) for frames in read_everything(dataset)))))
"""


@pytest.fixture(scope="module")
def library(tmp_path_factory) -> Path:
    return build(tmp_path_factory.mktemp("faults"))


def call(library: Path, variables: dict[str, str], *words: object) -> tuple[int, str]:
    """(exit code, output) of Python with these words below a failing disk or clock."""
    environment = os.environ | variables | {"LD_PRELOAD": str(library), "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, *map(str, words)],
        cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    return done.returncode, done.stdout + done.stderr


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    """Words that build a data set of two shards, without --output; the files of one that was built undisturbed."""
    base = tmp_path_factory.mktemp("inputs")
    frames = make_frame_folders(base, [3 + number % 5 for number in range(12)])
    words = [ROOT / "tools/build_shards.py", "--annotations", frames.annotations, "--root", frames.root,
             "--labels", frames.labels, "--shard-bytes", 40_000, "--output"]  # fmt: skip
    done = subprocess.run([sys.executable, *map(str, words), str(base / "calm")], capture_output=True, check=False)
    assert done.returncode == 0, done.stderr
    return words, files(base / "calm")


@pytest.mark.parametrize(("place", "calls", "after"), [
    ("class/video", "read", 17), ("shards/.building", "read", 0), ("shards/.building", "write", 3),
    ("shards", "sync", 5), ("shards/manifest.json", "rename", 0),
])  # fmt: skip
def test_a_build_is_finished_by_the_same_command(library, inputs, tmp_path, place, calls, after):
    words, expected = inputs
    code, text = call(library, failing(place, calls, after=after), *words, tmp_path / "shards")
    assert code == 1 and "Traceback" not in text
    assert [line for line in text.splitlines() if line.startswith("build_shards: error: ") and "nput/output" in line]
    code, text = call(library, {}, *words, tmp_path / "shards")
    assert code == 0, text
    assert files(tmp_path / "shards") == expected


def test_a_slow_disk_and_a_clock_that_jumps_change_nothing(library, inputs, tmp_path):
    words, expected = inputs
    slow = failing("shards", "open write sync", code=0, slow=5)
    code, text = call(library, slow | jumping(), *words, tmp_path / "shards")
    assert code == 0, text
    assert files(tmp_path / "shards") == expected


@pytest.mark.parametrize(("name", "variables"), [
    ("a cache that cannot be written", failing("/kept/", "write", after=2)),
    ("a cache that cannot be synchronised", failing("/kept/", "sync")),
    ("a cache that cannot be read", failing("/kept/", "read", after=4)),
    ("one read that fails", failing("/kept/", "read", after=4, count=1)),
    ("a clock that jumps", jumping()),
])  # fmt: skip
def test_far_shards_are_read_whatever_the_cache_does(library, tmp_path, name, variables):
    """The bytes come from the cache, or else from the store; or the index, which must be kept, is named."""
    stored = make_dataset(tmp_path / "data")
    size = sum(len(frame) for video in stored for frame in video)
    with serve(tmp_path / "data") as store:
        words = ["-c", READ, store.address, tmp_path / "kept", ROOT / "tests/support"]
        code, text = call(library, variables, *words)
        if code:
            assert name.endswith(("written", "synchronised", "cannot be read"))
            last = text.splitlines()[-1]
            assert last.startswith("shards.format.ShardError: ") and "nput/output error" in last
        else:
            assert text.split()[-2:] == [str(size)] * 2
        code, text = call(library, {}, *words)
        assert code == 0 and text.split()[-2:] == [str(size)] * 2


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    """A folder of three videos, and a model that names them."""
    base = tmp_path_factory.mktemp("clips")
    (base / "clips").mkdir()
    for number in range(3):
        write_video(base / "clips" / f"clip{number}.mp4", 60 * number, 6 + number)
    return base / "clips", write_export(base, ["one", "two", "three"])


@pytest.mark.slow
@pytest.mark.parametrize(("words", "result"), [
    (("predict.py", "CLIPS", "--jsonl"), answers), (("search.py", "index", "CLIPS", "--output"), windows),
])  # fmt: skip
def test_a_prediction_list_and_an_index_are_finished_by_the_same_command(library, clips, tmp_path, words, result):
    folder, export = clips
    program, *others = (folder if word == "CLIPS" else word for word in words)
    calm, out = tmp_path / "calm", tmp_path / "out"

    def command(output):
        return [ROOT / "tools" / program, *others, output, "--model", export]

    assert call(library, {}, *command(calm))[0] == 0
    code, text = call(library, failing(out, "write", after=1), *command(out))
    assert code == 1 and "Traceback" not in text
    assert [line for line in text.splitlines() if str(out) in line and "nput/output error" in line], text
    code, text = call(library, {}, *command(out))
    assert code == 0, text
    assert result(out) == result(calm)


@pytest.mark.slow
def test_training_goes_on_after_a_disk_that_failed_in_a_save(library, project, tmp_path):
    settings = ("--set=solver.epochs=1", "--set=logging.save_steps=2", "--set=logging.pictures=0",
                "--set=engine.precision=fp32")  # fmt: skip
    words = [ROOT / TRAIN, "--config", project.config, *settings, "--output"]
    project.train(tmp_path / "calm", *(word.removeprefix("--set=") for word in settings), ranks=1)
    code, text = call(library, failing("run/checkpoints", "sync", after=9), *words, tmp_path / "run")
    assert code == 1 and "Traceback" not in text and "nput/output error" in text.splitlines()[-1]
    assert list((tmp_path / "run" / "checkpoints").glob("step-*/state.json"))
    code, text = call(library, jumping() | {"FAULT_PATH": ""}, *words, tmp_path / "run", "--set=engine.wall_minutes=60")
    assert code == 0 and "resumed from" in text, text
    assert losses(tmp_path / "run") == losses(tmp_path / "calm")
    ours, expected = weights(tmp_path / "run"), weights(tmp_path / "calm")
    assert all(ours[name].equal(expected[name]) for name in expected)
    assert json.loads((tmp_path / "run" / "report.json").read_text())["top1"] is not None
