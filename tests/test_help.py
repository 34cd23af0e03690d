"""Every program explains itself: --help, with examples that its own parser takes."""

import argparse
import re
import runpy
import shlex
import subprocess
import sys

import pytest
from launch import ROOT
from pages import commands

PROGRAMS = ["text4vis/train.py", "text4vis/evaluate.py", *(f"tools/{path.name}" for path in ROOT.glob("tools/*.py"))]


def help_of(program: str, monkeypatch, capsys) -> tuple[str, argparse.ArgumentParser]:
    """What --help prints, and the parser behind it."""
    parsers = []

    def parse_args(self, *given):
        parsers.append(self)
        return self.parse_known_args(*given)

    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sys, "argv", [program, "--help"])
    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parse_args)
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(program, run_name="__main__")
    assert ended.value.code == 0
    return capsys.readouterr().out, parsers[0]


@pytest.mark.parametrize("program", sorted(PROGRAMS))
def test_help_has_examples_that_the_program_takes(program, monkeypatch, capsys):
    text, parser = help_of(program, monkeypatch, capsys)
    (examples,) = re.findall(r"^examples:\n((?: +\S.*\n)+)", text, re.MULTILINE | re.IGNORECASE)
    lines = examples.replace("\\\n", " ").splitlines()
    started = [commands(line) for line in lines]
    assert all(started) and program in [name for of_line in started for name, _ in of_line]
    for name, rest in (command for of_line in started for command in of_line):
        assert (ROOT / name).is_file()
        if name == program:
            _, unknown = parser.parse_known_args(shlex.split(rest, comments=True))
            assert not unknown


@pytest.mark.parametrize("program", sorted(PROGRAMS))
def test_help_says_what_each_option_means(program, monkeypatch, capsys):
    _, parser = help_of(program, monkeypatch, capsys)
    assert [action.dest for action in parser._actions if not action.help] == []


# Each takes a second or more to import.
SLOW_TO_IMPORT = {"torch", "deepspeed", "nvidia.dali", "open_clip", "transformers", "scipy", "sklearn", "matplotlib"}


@pytest.mark.parametrize("program", sorted(PROGRAMS))
def test_help_waits_for_no_heavy_library(program):
    command = [sys.executable, "-X", "importtime", program, "--help"]  # lists each imported module on standard error
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    imported = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}
    assert "argparse" in imported
    assert SLOW_TO_IMPORT & imported == set()
