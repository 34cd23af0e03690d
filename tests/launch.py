"""Starts the real programs as a launcher would: one process a rank, with the launcher's environment variables."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def start(script: str, *arguments: object, ranks: int = 1) -> list[subprocess.Popen]:
    port = free_port()
    processes = []
    for rank in range(ranks):
        place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks, "MASTER_PORT": port}
        environment = os.environ | {name: str(value) for name, value in place.items()} | {"MASTER_ADDR": "127.0.0.1"}
        command = [sys.executable, ROOT / script, *map(str, arguments)]
        processes.append(
            subprocess.Popen(
                command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
            )
        )
    return processes


def finish(processes: Sequence[subprocess.Popen], timeout: float = 480) -> list[tuple[int, str]]:
    """(exit code, output) of each rank."""
    try:
        return [
            (process.returncode, output)
            for process in processes
            for output in [process.communicate(timeout=timeout)[0]]
        ]
    finally:
        kill(processes)


def run(script: str, *arguments: object, ranks: int = 1) -> str:
    """Output of rank 0 of a job that must succeed."""
    results = finish(start(script, *arguments, ranks=ranks))
    assert all(code == 0 for code, _ in results), "\n".join(output for _, output in results)
    return results[0][1]


def kill(processes: Sequence[subprocess.Popen]) -> None:
    for process in processes:
        if process.poll() is None:
            process.kill()
            process.wait()


def wait_for(condition: Callable[[], bool], processes: Sequence[subprocess.Popen], timeout: float = 360) -> None:
    deadline = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < deadline, "waited too long"
        if any(process.poll() is not None for process in processes):
            results = finish(processes)
            raise AssertionError("ended too early:\n" + "\n".join(output for _, output in results))
        time.sleep(0.02)
