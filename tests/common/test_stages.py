"""Stages are run once; tools/repeat.py and tools/ablation.py run their trainings as stages."""

import importlib.util
import itertools
import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from launch import ROOT, program

from text4vis.common.stages import Stage, StageError, perform
from text4vis.config.loading import load_config

FAKE_TRAINING = """
import json, pathlib, sys
words = sys.argv[1:]
assert words[0].endswith("text4vis/train.py") and pathlib.Path(words[0]).exists()
output = pathlib.Path(words[words.index("--output") + 1])
seed = int(next(word for word in words if word.startswith("seed=")).removeprefix("seed="))
if seed == 13:
    sys.exit(75)
output.mkdir(parents=True)  # a second run of the same seed fails here
figures = {"top1": 70.0 + seed, "top5": 90.0, "mean_class_accuracy": 60.0 + 2 * seed}
report = {"videos": 10, "top1_correct": 7, "per_class": [], "words": words, **figures}
(output / "report.json").write_text(json.dumps(report))
"""


def appending(path: Path, code: int = 0) -> list[str]:
    """A command that leaves a trace."""
    return [sys.executable, "-c", f"import sys; open({str(path)!r}, 'a').write('x'); print('said'); sys.exit({code})"]


def test_what_is_done_is_not_done_again(tmp_path):
    trace, shown = tmp_path / "trace", []
    stage = Stage("one", [appending(trace), appending(trace)])
    seconds = perform(stage, tmp_path, shown.append, log=tmp_path / "log")
    assert seconds > 0 and trace.read_text() == "xx" and (tmp_path / "log").read_text() == "said\nsaid\n"
    assert perform(stage, tmp_path, shown.append) == seconds and trace.read_text() == "xx"
    assert len(shown) == 3 and "done before" in shown[2]
    perform(Stage("one", [[*appending(trace), "another word"]]), tmp_path, shown.append, log=tmp_path / "log")
    assert trace.read_text() == "xxx"
    for settings, expected in (("lr: 1", "xxxx"), ("lr: 1", "xxxx"), ("lr: 2", "xxxxx")):
        perform(Stage("one", [appending(trace)], settings), tmp_path, shown.append, log=tmp_path / "log")
        assert trace.read_text() == expected


def test_what_is_kept_and_shown_holds_no_password(tmp_path):
    shown = []
    command = [sys.executable, "-c", "", "data.train=https://me:planted@h/x?token=planted"]
    perform(Stage("one", [command]), tmp_path, shown.append)
    assert "https://h/x" in shown[0] and "planted" not in shown[0]
    assert "planted" not in (tmp_path / "stages" / "one.json").read_text()


def test_sigterm_reaches_what_was_started(tmp_path):
    """The command and its children end, and this process with the signal's exit code."""
    child = f"import os, time; open({str(tmp_path / 'pid')!r}, 'w').write(str(os.getpid())); time.sleep(60)"
    command = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}])"
    stage = f"Stage('one', [[sys.executable, '-c', {command!r}]])"
    program = (
        f"import sys, pathlib; from text4vis.common.stages import *; perform({stage}, pathlib.Path({str(tmp_path)!r}))"
    )
    process = subprocess.Popen([sys.executable, "-c", program])
    deadline = time.monotonic() + 60
    while not (tmp_path / "pid").exists() or not (tmp_path / "pid").read_text():
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)
    grandchild = psutil.Process(int((tmp_path / "pid").read_text()))
    process.terminate()
    assert process.wait(30) == 128 + signal.SIGTERM
    grandchild.wait(30)
    assert not (tmp_path / "stages").exists()


def test_a_failure_ends_the_stage_and_is_not_remembered(tmp_path):
    trace = tmp_path / "trace"
    stage = Stage("one", [appending(trace), appending(trace, 75), appending(trace)])
    for tries in (1, 2):
        with pytest.raises(StageError, match=r"one failed with exit code 75; see .*log") as caught:
            perform(stage, tmp_path, lambda line: None, log=tmp_path / "log")
        assert caught.value.code == 75 and trace.read_text() == "xx" * tries


def repeat(tmp_path: Path, seeds: str, *more: str, recipe: str = "") -> subprocess.CompletedProcess:
    (tmp_path / "fake.py").write_text(FAKE_TRAINING)
    (tmp_path / "recipe.yaml").write_text(recipe)
    return program(
        "tools/repeat.py", "--config", tmp_path / "recipe.yaml", "--output", tmp_path / "out", "--seeds", seeds,
        "--launcher", f"{sys.executable} {tmp_path / 'fake.py'}", *more,
    )  # fmt: skip


def test_seeds_are_trained_once_and_summarised(tmp_path):
    first = repeat(tmp_path, "1,2", "--set", "data.shot=4")
    assert first.returncode == 0, first.stderr
    again = repeat(tmp_path, "1,2,6", "--set", "data.shot=4")
    assert again.returncode == 0, again.stderr
    assert again.stdout.count("done before") == 2 and "73.00 ± 2.16" in again.stdout
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert [run["top1"] for run in summary["runs"]] == [71, 72, 76] and [run["seed"] for run in summary["runs"]] == [
        1,
        2,
        6,
    ]
    assert summary["mean"]["top1"] == pytest.approx(73) and summary["std"]["top1"] == pytest.approx((14 / 3) ** 0.5)
    assert summary["std"]["top5"] == 0 and summary["mean"]["mean_class_accuracy"] == pytest.approx(66)
    words = json.loads((tmp_path / "out" / "seed-6" / "report.json").read_text())["words"]
    assert words[-4:] == ["--set", "data.shot=4", "--set", "seed=6"]


def test_a_recipe_that_was_edited_is_not_taken_for_done(tmp_path):
    assert repeat(tmp_path, "1").returncode == 0
    edited = repeat(tmp_path, "1", recipe="solver: {lr: 1}")
    assert "done before" not in edited.stdout and edited.returncode == 1  # trained again, which this folder refuses


def test_a_seed_that_stops_stops_the_tool(tmp_path):
    stopped = repeat(tmp_path, "1,13,2")
    assert stopped.returncode == 75 and "seed-13 failed with exit code 75" in stopped.stderr
    assert (tmp_path / "out" / "seed-1").exists() and not (tmp_path / "out" / "seed-2").exists()


@pytest.mark.parametrize(
    ("seeds", "more", "message", "code"),
    [
        ("1,1", [], "--seeds", 2),
        ("one", [], "--seeds", 2),
        ("1", ["--set", "data.shots=4"], "did you mean data.shot?", 1),
    ],
)
def test_mistakes_show_before_anything_is_trained(tmp_path, seeds, more, message, code):
    refused = repeat(tmp_path, seeds, *more)
    assert refused.returncode == code and message in refused.stderr and not (tmp_path / "out").exists()


@pytest.fixture(scope="module")
def ablation():
    specification = importlib.util.spec_from_file_location("ablation_tool", ROOT / "tools" / "ablation.py")
    module = importlib.util.module_from_spec(specification)
    sys.modules["ablation_tool"] = module  # dataclasses look their module up
    specification.loader.exec_module(module)
    return module


def test_every_cell_of_the_ablation_is_a_valid_run(ablation, tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    seen = set()
    for classifier in ablation.CLASSIFIERS:
        for head in ablation.HEADS:
            for seed in ablation.SEEDS:
                stage = ablation.Cell(classifier, head, seed).stage(Path("shards"), tmp_path, 1)
                for command in stage.commands:
                    settings = [value for word, value in itertools.pairwise(command) if word == "--set"]
                    config = load_config(command[command.index("--config") + 1], settings)
                    seen.add((config.network.classifier, config.network.sim_header, config.seed, config.data.val))
    assert len(seen) == 24 + 18  # no unseen classes for lda
    assert not [which for which in seen if which[0] == "lda" and "unseen" in which[3][0]]


def test_the_table_of_the_ablation(ablation, tmp_path):
    for index, classifier in enumerate(ablation.CLASSIFIERS):
        for head in ablation.HEADS:
            for seed in ablation.SEEDS:
                folder = tmp_path / ablation.Cell(classifier, head, seed).name
                folder.mkdir()
                report = {"videos": 10, "top1": 50.0 + 10 * index + seed, "top1_correct": 5, "per_class": []}
                (folder / "report.json").write_text(json.dumps(report))
                if classifier != "lda":
                    (folder / "unseen.json").write_text(json.dumps(report | {"top1": 20.0}))
    text, rows = ablation.results(tmp_path)
    assert "| random | `None` | 52.0 ± 0.8 | 20.0 ± 0.0 |" in text.splitlines()
    assert "| lda | `Transf` | 72.0 ± 0.8 | - |" in text.splitlines()
    assert len(text.splitlines()) == 10 and len(rows) == 14
    assert rows[0]["runs"] == [51, 52, 53]
