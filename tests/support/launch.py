"""Starts the real programs as a launcher would: one process a rank, with the launcher's environment variables.

A rank spends most of a test's time on imports. So ranks are forked from one process that has imported the libraries;
each then runs its script as `python SCRIPT` would, with an environment, a folder and an output of its own.
"""

from __future__ import annotations

import atexit
import functools
import multiprocessing
import os
import runpy
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from multiprocessing import forkserver
from pathlib import Path
from typing import IO

ROOT = Path(__file__).resolve().parents[2]
_LIBRARIES = (
    "torch", "torch._dynamo", "torchvision", "open_clip", "deepspeed", "nvidia.dali.fn", "cv2", "av", "pandas",
    "sklearn.covariance", "torch.utils.tensorboard", "matplotlib.figure", "webdataset", "rich.console", "fsspec",
    "torch._inductor.compile_fx", "peft",
)  # fmt: skip
_ranks = multiprocessing.get_context("forkserver")
_ranks.set_forkserver_preload(list(_LIBRARIES))


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


class Rank:
    """A forked `python SCRIPT ARGUMENTS`, to be used as a subprocess.Popen whose output is text.

    with_errors: standard error is written to the same file as standard output.
    """

    def __init__(
        self, script: Path, arguments: Sequence[str], environment: Mapping[str, str], *, with_errors: bool = True
    ) -> None:
        self._stdout = _text_file()
        self._stderr = self._stdout if with_errors else _text_file()
        names = self._stdout.name, self._stderr.name
        _start_server()
        self._process = _ranks.Process(target=_run, args=(str(script), list(arguments), dict(environment), *names))
        self._process.start()
        self.pid: int = self._process.pid

    @property
    def returncode(self) -> int | None:
        return self._process.exitcode

    def poll(self) -> int | None:
        return self._process.exitcode

    def wait(self, timeout: float | None = None) -> int:
        self._process.join(timeout)
        if self._process.exitcode is None:
            raise subprocess.TimeoutExpired(self._stdout.name, timeout or 0)
        return self._process.exitcode

    def communicate(self, timeout: float | None = None) -> tuple[str, str]:
        self.wait(timeout)
        for file in (self._stdout, self._stderr):
            file.seek(0)
        return self._stdout.read(), self._stderr.read()

    def send_signal(self, number: int) -> None:
        os.kill(self.pid, number)

    def kill(self) -> None:
        self._process.kill()


@functools.cache
def _start_server() -> None:
    """Starts the process that ranks are forked from. It sees no GPU: after CUDA was used, forks cannot use it."""
    environment = dict(os.environ)
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    try:
        forkserver.ensure_running()
    finally:
        os.environ.clear()
        os.environ.update(environment)


def _text_file() -> IO[str]:
    return tempfile.NamedTemporaryFile("r", prefix="rank-", encoding="utf-8", errors="replace")


def _run(script: str, arguments: list[str], environment: dict[str, str], stdout: str, stderr: str) -> None:
    """Runs the script in the forked process."""
    os.setpgid(0, 0)  # a terminal's Ctrl-C is for pytest alone, which then kills the ranks
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for stream, path in ((sys.stdout, stdout), (sys.stderr, stderr)):
        os.dup2(os.open(path, os.O_WRONLY | os.O_APPEND), stream.fileno())
        stream.reconfigure(line_buffering=True)
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(ROOT)
    sys.argv = [script, *arguments]
    others = [path for path in sys.path if Path(path) not in (ROOT, ROOT / "tests" / "support")]
    sys.path[:] = [str(Path(script).parent), *others, str(ROOT)]  # the project comes last, as what is installed does
    try:
        runpy.run_path(script, run_name="__main__")
    finally:
        atexit._run_exitfuncs()


def start_rank(script: str | Path, *arguments: object, variables: Mapping[str, object] | None = None) -> Rank:
    """variables: what a launcher adds to the environment."""
    environment = os.environ | {name: str(value) for name, value in (variables or {}).items()}
    return Rank(ROOT / script, [str(argument) for argument in arguments], environment)


def start(script: str | Path, *arguments: object, ranks: int = 1) -> list[Rank]:
    job = {"WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
    places = [{"RANK": rank, "LOCAL_RANK": rank} for rank in range(ranks)]
    return [start_rank(script, *arguments, variables=job | place) for place in places]


def finish(processes: Sequence[Rank], timeout: float = 480) -> list[tuple[int, str]]:
    """(exit code, output) of each rank."""
    try:
        outputs = [process.communicate(timeout=timeout)[0] for process in processes]
        return [(process.returncode, output) for process, output in zip(processes, outputs, strict=True)]
    finally:
        kill(processes)


def run(script: str | Path, *arguments: object, ranks: int = 1) -> str:
    """Output of rank 0 of a job that must succeed."""
    results = finish(start(script, *arguments, ranks=ranks))
    assert all(code == 0 for code, _ in results), "\n".join(output for _, output in results)
    return results[0][1]


def program(script: str | Path, *arguments: object, timeout: float = 480) -> subprocess.CompletedProcess[str]:
    """Runs `python SCRIPT ARGUMENTS` to its end."""
    process = Rank(ROOT / script, [str(argument) for argument in arguments], os.environ, with_errors=False)
    try:
        stdout, stderr = process.communicate(timeout)
    finally:
        kill([process])
    return subprocess.CompletedProcess([str(script), *map(str, arguments)], process.returncode, stdout, stderr)


def kill(processes: Sequence[Rank | subprocess.Popen]) -> None:
    for process in processes:
        if process.poll() is None:
            process.kill()
            process.wait()


def wait_for(condition: Callable[[], bool], processes: Sequence[Rank | subprocess.Popen], timeout: float = 360) -> None:
    deadline = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < deadline, "waited too long"
        if any(process.poll() is not None for process in processes):
            results = finish(processes)
            raise AssertionError("ended too early:\n" + "\n".join(output for _, output in results))
        time.sleep(0.02)
