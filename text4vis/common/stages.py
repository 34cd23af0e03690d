"""Stages: commands that are skipped if the same commands have succeeded before.

For the tools that run several of the project's programs one after the other.
"""

from __future__ import annotations

import hashlib
import json
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from shards.text import shown


class StageError(Exception):
    """A command failed. `code` is its exit code."""

    def __init__(self, message: str, code: int) -> None:
        super().__init__(message)
        self.code = code


@dataclass(frozen=True)
class Stage:
    """Commands (lists of words) that run one after the other.

    settings: the content of files that the commands read, if the stage shall run again when it changes.
    """

    name: str
    commands: list[list[str]]
    settings: str = ""


def perform(stage: Stage, folder: Path, show: Callable[[str], None] = print, *, log: Path | None = None) -> float:
    """Runs a stage unless FOLDER/stages/NAME.json records that it is done. Returns the seconds that it took.

    show: called with each command before it runs. log: file for the commands' output, which is otherwise passed on.
    Raises StageError.
    """
    done = folder / "stages" / f"{stage.name}.json"
    # A digest, because an address in the commands may hold a password.
    digest = hashlib.sha256(json.dumps([stage.commands, stage.settings]).encode()).hexdigest()
    if done.exists():
        record = json.loads(done.read_text(encoding="utf-8"))
        if record.get("sha256") == digest:
            show(f"{stage.name}: done before, {record['seconds']:.0f} s")
            return float(record["seconds"])
    started = time.perf_counter()
    for command in stage.commands:
        show(shown(f"{stage.name}: {shlex.join(command)}"))
        code = _run(command, log)
        if code:
            where = f"see {log}" if log else "its output is above"
            raise StageError(f"stage {stage.name} failed with exit code {code}; {where}", code)
    seconds = time.perf_counter() - started
    done.parent.mkdir(parents=True, exist_ok=True)
    record = {"sha256": digest, "seconds": seconds}
    done.write_text(json.dumps(record), encoding="utf-8")
    return seconds


def with_set(settings: Sequence[str]) -> list[str]:
    """Command-line words that override keys: `--set` before each setting."""
    return [word for setting in settings for word in ("--set", setting)]


def _run(command: list[str], log: Path | None) -> int:
    """Runs a command, returns its exit code. SIGTERM to this process ends the command, its children and itself."""
    with ExitStack() as stack:
        output: dict[str, Any] = {}
        if log is not None:
            log.parent.mkdir(parents=True, exist_ok=True)
            output = {"stdout": stack.enter_context(log.open("a", encoding="utf-8")), "stderr": subprocess.STDOUT}
        stack.callback(signal.signal, signal.SIGTERM, signal.signal(signal.SIGTERM, _end))
        process = subprocess.Popen(command, **output)
        try:
            return process.wait()
        except SystemExit:
            running = psutil.Process(process.pid)
            for started in [*running.children(recursive=True), running]:
                with suppress(psutil.NoSuchProcess):
                    started.terminate()
            process.wait()
            raise


def _end(number: int, _: Any) -> None:
    sys.exit(128 + number)
