"""Programs that decode beside a model let its threads sleep while they wait."""

import os
import runpy
import sys

import pytest
from launch import ROOT


@pytest.mark.parametrize("given", [None, "ACTIVE"])
@pytest.mark.parametrize(
    "words",
    ["predict.py a.mp4 --model nowhere", "search.py find nowhere words", "app.py --model nowhere"],
    ids=lambda words: words.split(".")[0],
)
def test_programs_that_decode_beside_a_model_set_the_policy_unless_it_is_set(words, given, monkeypatch, capsys):
    monkeypatch.delenv("OMP_WAIT_POLICY", raising=False)
    if given:
        monkeypatch.setenv("OMP_WAIT_POLICY", given)
    program, *arguments = words.split()
    monkeypatch.setattr(sys, "argv", [program, *arguments])
    assert runpy.run_path(str(ROOT / "tools" / program), run_name="program")["main"]() == 1
    assert os.environ["OMP_WAIT_POLICY"] == (given or "PASSIVE") and "nowhere" in capsys.readouterr().err
