"""Makes the disk fail below real programs, at one call after another, and the clock jump; then runs them undisturbed.

    python tests/support/fail_disk.py [--tries 40] [--only NAME …]

For each program and kind of call (open, read, write, sync, rename) the calls on the program's files are counted, and up
to --tries of them, spread over all, fail with EIO: that call alone, or it and all that follow. A program must end in
words: no traceback, no signal, one line that names the trouble if the exit code is not 0. Then the same command runs
again without faults, must succeed, and must leave what it leaves when nothing ever failed.

pytest does the same with a few calls (tests/test_faults.py).
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from faults import build, failing, jumping
from launch import finish, start_rank
from project import EVALUATE, TRAIN, Project, losses, weights
from tiny import write_export
from videos import write_video

from text4vis.serving.index_store import read_catalogue

CALLS = ("open", "read", "write", "sync", "rename")


@dataclass(frozen=True)
class Program:
    """command: script and arguments; OUTPUT in them is a folder of this try. place: part of the paths that count.

    result: what the finished output must equal, taken from the folder and the printed text. obey: does in the folder
    what the program asks for before it is called again.
    """

    name: str
    command: tuple[object, ...]
    places: tuple[object, ...]
    result: Callable[[Path, str], object]
    obey: Callable[[Path], object] = lambda output: None


def files(folder: Path, pattern: str = "**/*") -> dict[str, str]:
    """SHA-256 of the files by their paths."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.glob(pattern))
        if path.is_file()
    }


def run(command: tuple[object, ...], output: Path, variables: dict[str, str]) -> tuple[int, str]:
    words = [str(word).replace("OUTPUT", str(output)) for word in command]
    ((code, text),) = finish([start_rank(words[0], *words[1:], variables=variables)], timeout=300)
    return code, text


def count_calls(program: Program, calls: str, place: str, scratch: Path) -> int:
    """How many calls of an undisturbed run count."""
    log = scratch / "count"
    log.unlink(missing_ok=True)
    output = scratch / "counted"
    shutil.rmtree(output, ignore_errors=True)
    output.mkdir()
    code, text = run(program.command, output, failing(place, calls, code=0) | {"FAULT_LOG": str(log)})
    assert code == 0, text
    return len(log.read_text().splitlines()) if log.exists() else 0


def try_one(program: Program, variables: dict[str, str], expected: object, output: Path) -> str:
    """What went wrong, or nothing."""
    shutil.rmtree(output, ignore_errors=True)
    output.mkdir()
    return judge(program, output, expected, *run(program.command, output, variables))


def judge(program: Program, output: Path, expected: object, code: int, text: str) -> str:
    """What is wrong with an end, and with what an undisturbed run makes of what it left; or nothing."""
    if "Traceback" in text or code < 0 or (code and "error" not in text):
        return f"exit code {code}: {text[-1500:]}"
    if not code and program.result(output, text) != expected:
        return f"ended with 0 and another result: {text[-1500:]}"
    if code:
        program.obey(output)
        again, text = run(program.command, output, {})
        if again or program.result(output, text) != expected:
            return f"afterwards, exit code {again} or another result: {text[-1500:]}"
    return ""


def answers(path: Path) -> dict[str, object]:
    """The answers of a prediction list by video."""
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert all("error" not in line for line in lines), lines
    return {line["video"]: line["top"] for line in lines if "video" in line}


def delete_errors(path: Path) -> None:
    """Deletes the lines of a prediction list that have an `error`."""
    if path.exists():
        path.write_text("".join(line for line in path.read_text().splitlines(True) if '"error"' not in line))


def windows(folder: Path) -> dict[str, object]:
    """The vectors of an index by video."""
    catalogue = read_catalogue(folder)
    return {path: catalogue.vectors(video).tobytes() for path, video in catalogue.videos.items()}


def trained(output: Path) -> object:
    """Losses by step, and the final weights."""
    return losses(output), {name: hash(value.numpy().tobytes()) for name, value in weights(output).items()}


def programs(base: Path) -> dict[str, Program]:
    """By name; their inputs are made below `base`."""
    project = Project(base / "project")
    lists, clips = project.base, base / "clips"
    export = write_export(base, ["one", "two", "three"])
    clips.mkdir()
    for number in range(4):
        write_video(clips / f"clip{number}.mp4", 60 * number, 6 + number)
    build_shards = (
        "tools/build_shards.py", "--annotations", lists / "frames.txt", "--root", project.frames,
        "--labels", lists / "labels.csv", "--output", "OUTPUT/shards", "--shard-bytes", 200_000,
    )  # fmt: skip
    train = (TRAIN, "--config", project.config, "--output", "OUTPUT/run", "--set=solver.epochs=1",
             "--set=logging.save_steps=2", "--set=logging.pictures=0", "--set=engine.precision=fp32")  # fmt: skip
    evaluate = (EVALUATE, "--config", project.config, "--model", export, "--report", "OUTPUT/report.json",
                "--features", "OUTPUT/features.safetensors", "--set=data.dataset=tiny")  # fmt: skip
    predict = ("tools/predict.py", clips, "--model", export, "--jsonl", "OUTPUT/all.jsonl")
    index = ("tools/search.py", "index", clips, "--model", export, "--output", "OUTPUT/index")
    check = ("tools/check_shards.py", project.shards)
    known = (
        Program("build", build_shards, ("OUTPUT/shards", project.frames), lambda output, _: files(output / "shards")),
        Program("check", check, (project.shards,), lambda _, text: text.splitlines()[-1]),
        Program(
            "predict",
            predict,
            ("OUTPUT/all.jsonl", clips),
            lambda output, _: answers(output / "all.jsonl"),
            lambda output: delete_errors(output / "all.jsonl"),
        ),
        Program(
            "search",
            index,
            ("OUTPUT/index", clips),
            lambda output, _: windows(output / "index"),
            lambda _: [clip.touch() for clip in clips.iterdir()],
        ),
        Program("train", train, ("OUTPUT/run", project.shards), lambda output, _: trained(output / "run")),
        Program("evaluate", evaluate, ("OUTPUT/", project.shards), lambda output, _: evaluated(output)),
    )
    return {program.name: program for program in known}


def evaluated(output: Path) -> object:
    """The figure, and the hash of the features."""
    return json.loads((output / "report.json").read_text())["top1"], files(output, "features.safetensors")


def spread(number: int, tries: int) -> list[int]:
    """At most `tries` of range(number), over all of it."""
    return sorted({round(place) for place in np.linspace(0, number - 1, min(number, tries))}) if number else []


def attack(program: Program, tries: int, scratch: Path, say: Callable[[str], None]) -> int:
    """Tries all calls; returns the number of mistakes."""
    calm = scratch / "calm"
    calm.mkdir()
    code, text = run(program.command, calm, {})
    assert code == 0, text
    expected, mistakes, tried = program.result(calm, text), 0, 0
    cases: list[tuple[str, dict[str, str]]] = [("clock", jumping())]
    for place in program.places:
        shown = str(place).replace("OUTPUT", str(scratch / "try"))
        for calls in CALLS:
            number = count_calls(program, calls, str(place).replace("OUTPUT", str(scratch / "counted")), scratch)
            for turn, after in enumerate(spread(number, tries)):
                cases.append((f"{calls} {after} of {number} below {place}",
                              failing(shown, calls, after=after, count=None if turn % 2 else 1)))  # fmt: skip
    for name, variables in cases:
        tried += 1
        if wrong := try_one(program, variables, expected, scratch / "try"):
            mistakes += 1
            say(f"{program.name}, {name}: {wrong}\n")
    say(f"{program.name}: {tried} tried, {mistakes} mistakes")
    return mistakes


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tries", type=int, default=40, help="of each kind of call")
    parser.add_argument("--only", nargs="+", help="names of programs")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        base = Path(folder)
        os.environ["LD_PRELOAD"] = str(build(base))  # for the process that ranks are forked from, too
        os.environ["XDG_CACHE_HOME"] = str(base / "cache")
        known = programs(base)
        mistakes = 0
        for name in arguments.only or known:
            scratch = base / f"scratch-{name}"
            scratch.mkdir()
            mistakes += attack(known[name], arguments.tries, scratch, lambda text: print(text, flush=True))
    return 1 if mistakes else 0


if __name__ == "__main__":
    sys.exit(main())
