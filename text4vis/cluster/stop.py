"""Reasons to end a run early: signals, Ctrl-C, a time limit, the end of its launcher, a loss that is not finite.

Each rank collects its own requests; the trainer makes all ranks stop after the same step.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from pathlib import Path

import psutil

EXIT_CODE = 75  # EX_TEMPFAIL of sysexits.h: "resume me"
_POLL_SECONDS = 1.0


class Stopped(Exception):  # noqa: N818
    """The run was asked to stop and has saved a checkpoint. The message says why and at which step."""


class NonFiniteError(Exception):
    """A loss or gradient was not finite; the step was not applied to the weights. The message names the videos."""


class StopRequest:
    """Collects requests to stop that reach this process. `code` is 0 until there is one, then an index into REASONS.

    ctrl_c: treat Ctrl-C as a request instead of a KeyboardInterrupt.
    """

    REASONS = ("", "SIGTERM", "SIGUSR1", "engine.wall_minutes", "the end of its launcher", "Ctrl-C")

    def __init__(self, *, ctrl_c: bool = False) -> None:
        self._code = 0
        self._deadline = float("inf")
        signals = {signal.SIGTERM: 1, signal.SIGUSR1: 2} | ({signal.SIGINT: 5} if ctrl_c else {})
        for number, code in signals.items():
            signal.signal(number, lambda *_, code=code: self._ask(code))
        launchers = _deepspeed_launchers()
        if launchers:
            threading.Thread(target=self._wait_for_end, args=(launchers,), name="launcher", daemon=True).start()

    def limit(self, wall_minutes: float | None) -> None:
        """Sets the time limit, which counts from the start of this process; None for no limit."""
        if wall_minutes is not None:
            self._deadline = time.monotonic() - _seconds_running() + 60 * wall_minutes

    @property
    def code(self) -> int:
        """The first request, as an index into REASONS."""
        if time.monotonic() > self._deadline:
            self._ask(3)
        return self._code

    def _ask(self, code: int) -> None:
        self._code = self._code or code

    def _wait_for_end(self, launchers: list[psutil.Process]) -> None:
        try:
            while all(launcher.is_running() and launcher.status() != psutil.STATUS_ZOMBIE for launcher in launchers):
                time.sleep(_POLL_SECONDS)
        except psutil.NoSuchProcess:
            pass
        self._ask(4)


def _seconds_running() -> float:
    """Age of this process, by the clock that counts since the machine started: setting the wall clock moves nothing."""
    after_name = Path("/proc/self/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
    began = int(after_name[19]) / os.sysconf("SC_CLK_TCK")  # field 22, `starttime`, of proc(5)
    return time.clock_gettime(time.CLOCK_BOOTTIME) - began


def _deepspeed_launchers() -> list[psutil.Process]:
    """The `deepspeed` processes among this process's parents.

    Their children must watch them: the `deepspeed` command does not pass SIGTERM on, and neither the command nor its
    launcher passes on SIGUSR1 or SIGKILL.
    """
    found = []
    for parent in psutil.Process(os.getpid()).parents():
        try:
            words = parent.cmdline()
        except psutil.Error:
            break
        is_command = any(Path(word).name == "deepspeed" for word in words[:2])
        if not is_command and "deepspeed.launcher.launch" not in " ".join(words):
            break
        found.append(parent)
    return found
