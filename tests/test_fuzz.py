"""A few cases of tests/support/fuzz.py: damaged files cause only documented errors."""

from __future__ import annotations

import random

import pytest
from fuzz import TARGETS, Target, attempt, fuzz, mutated
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

QUICK = settings(max_examples=200, deadline=None, database=None, suppress_health_check=list(HealthCheck))


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
    assert name == "address" or outcomes == {"accepted"}

    @QUICK
    @given(st.integers(0, 2**64 - 1))
    def try_out(number: int) -> None:
        outcomes.add(attempt(target, mutated(target, seeds, random.Random(number)), folder))

    try_out()
    assert len(outcomes) > 1 or not target.errors


def test_the_script_tells_what_failed(monkeypatch, capsys):
    """A parser that loses its way on a cut file is found, and the case named."""

    def careless(data, folder):
        if len(data) < 9:
            raise KeyError("cut")

    monkeypatch.setitem(TARGETS, "careless", Target(lambda folder: [b"whole file"], careless, (ValueError,)))
    assert not fuzz("careless", 200, 0)
    assert "KeyError at " in capsys.readouterr().out
    assert fuzz("slurm", 20, 0)
