"""A few cases of tests/support/fuzz.py and fuzz_videos.py: damaged files cause only documented errors."""

from __future__ import annotations

import json
import random
import subprocess
import sys

import pytest
from fuzz import TARGETS, Target, attempt, fuzz, mutated
from fuzz_text4vis import _PREPROCESS, _TEXT, _VISION
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from launch import ROOT

SLOW = {"model-config", "tokenizer", "two-reports", "kept-rows", "kept-shards", "packets"}
QUICK = settings(max_examples=200, deadline=None, database=None, suppress_health_check=list(HealthCheck))


# Some of what they begin with is refused: addresses of shells, uploads that are too large.
WITH_REFUSED_SEEDS = ("address", "page-form", "page-http")


# Libraries warn in the words of damaged files, which may be half letters that no report of pytest-xdist can hold.
pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(scope="module")
def seeded(tmp_path_factory):
    """For each target its folder and its valid files, all of which it accepts."""
    made = {}
    for name, target in TARGETS.items():
        folder = tmp_path_factory.mktemp(name)
        seeds = target.seeds(folder)
        made[name] = folder, seeds
    return made


@pytest.mark.parametrize("name", TARGETS)
def test_damaged_files_give_documented_errors(name, seeded):
    target, (folder, seeds) = TARGETS[name], seeded[name]
    outcomes = {attempt(target, data, folder) for data in seeds}
    assert name in WITH_REFUSED_SEEDS or outcomes == {"accepted"}

    @settings(QUICK, max_examples=25 if name in SLOW else 200)
    @given(st.integers(0, 2**64 - 1))
    def try_out(number: int) -> None:
        outcomes.add(attempt(target, mutated(target, seeds, random.Random(number)), folder))

    try_out()
    assert len(outcomes) > 1 or not target.errors


PLAIN = {"embed_dim": 8, "vision_cfg": _VISION, "text_cfg": _TEXT}
FOUND = {
    "list-activitynet": [
        {"database": {"a": {"subset": {"a": 1}, "annotations": [{"label": "run"}]}}},
        {"database": {"a": {"subset": "training", "annotations": [{"label": {"a": 1}}]}}},
    ],
    "list-something-v2": [[{"id": "1", "template": -1}]],
    "foreign-json": [{"label": "\ud800"}],
    "card": [{"evaluation": [[]], "figures": {}}, {"evaluation": {}, "figures": [1]}],
    "model-config": [
        {"model_cfg": PLAIN, "preprocess_cfg": _PREPROCESS | {"mean": ["x", 1, 1]}},
        {"model_cfg": PLAIN, "preprocess_cfg": _PREPROCESS | {"std": [0.5, 0.5]}},
    ],
    "list-kinetics700": [b"label,youtube_id,time_start,time_end\nrun,a,10,1e999\n"],
    "records": [b"[" * 100_000],
    "search-lines": [[{"settings": {"format": 1, "model": {}, "dims": True, "window": 4, "stride": 2}}]],
    "config": [{"base": "\0"}],
    "mixture": [{"data": {"train": [{"path": "a\0", "weight": 1}]}}],
    "work-list": [b'{"settings": ' + b"[" * 100_000 + b"\n"],
}


@pytest.mark.parametrize("name", FOUND)
def test_what_was_found_stays_an_error_in_words(name, seeded):
    for content in FOUND[name]:
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        assert attempt(TARGETS[name], data, seeded[name][0]) != "accepted"


def test_damaged_videos_crash_nothing():
    """Each in a child process with limits, at every door."""
    command = [sys.executable, ROOT / "tests/support/fuzz_videos.py", "--cases", "150", "--seed", "7"]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "150 cases in " in result.stdout and "build: " in result.stdout


def test_a_child_that_dies_is_noticed_and_another_goes_on():
    code = """
import os, signal, sys
sys.path.insert(0, "tests/support")
import fuzz_videos
def crash(path, data):
    if len(data) % 2:
        os.kill(os.getpid(), signal.SIGSEGV)
fuzz_videos.DOORS = {"crash": crash}
found = fuzz_videos.fuzz_videos([b"RIFF" + bytes(60)], cases=40)
died = [case for case, how in found.deaths if how == "SIGSEGV"]
odd = [case for case in range(40) if len(fuzz_videos.damaged([b"RIFF" + bytes(60)], 0, case)) % 2]
assert died == odd and odd and found.cases + len(died) == 40, (died, odd, found)
"""
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr


def test_the_script_tells_what_failed(monkeypatch, capsys):
    """A parser that loses its way on a cut file is found, and the case named."""

    def careless(data, folder):
        if len(data) < 9:
            raise KeyError("cut")

    monkeypatch.setitem(TARGETS, "careless", Target(lambda folder: [b"whole file"], careless, (ValueError,)))
    assert not fuzz("careless", 200, 0)
    assert "KeyError at " in capsys.readouterr().out
    assert fuzz("slurm", 20, 0)
