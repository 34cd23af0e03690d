"""The logs of a run: log.txt, metrics.jsonl, TensorBoard, the table of settings. Only rank 0 writes."""

from __future__ import annotations

import io
import json
import logging
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich import box
from rich.console import Console
from rich.table import Table
from torch.utils.tensorboard import SummaryWriter

from shards.files import write_atomically
from shards.text import redact_text, shown
from text4vis.cluster import distributed

logger = logging.getLogger("text4vis")

END_MARK = "the job failed: "
GRACE_SECONDS = 3.0


class _HostMoment:
    """Stands for a torch.cuda.Event where the host itself computes."""

    def record(self) -> None:
        """Is now."""
        self.seconds = time.perf_counter()

    def elapsed_time(self, later: _HostMoment) -> float:
        """Milliseconds from this moment to a later one."""
        return 1000 * (later.seconds - self.seconds)


@dataclass
class Meter:
    """Sums since the last log line. updates: the steps that were not skipped, whose losses are summed.

    A GPU is waited for in `wait_seconds` alone.
    """

    loss: torch.Tensor
    started: float
    steps: int = 0
    updates: int = 0
    waits: list[tuple[Any, Any]] = field(default_factory=list)

    @classmethod
    def new(cls, device: torch.device) -> Meter:
        """A meter that starts now."""
        return cls(torch.zeros((), device=device), time.perf_counter())

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Counts the time within as waiting for data: on a GPU the time that it has nothing to do, not the host's."""
        first, last = (torch.cuda.Event(enable_timing=True) if self.loss.is_cuda else _HostMoment() for _ in range(2))
        first.record()
        yield
        last.record()
        self.waits.append((first, last))

    def wait_seconds(self) -> float:
        """The seconds counted so far. A GPU must have done all of them: read the loss first."""
        return sum(first.elapsed_time(last) for first, last in self.waits) / 1000


class Metrics:
    """metrics.jsonl and TensorBoard of the run in `output`, cut back to `step`, the one that the run goes on from.

    board: TensorBoard's writer. Readers leave out what an earlier job wrote for later steps than `step`.
    """

    def __init__(self, output: Path, step: int) -> None:
        self._path = output / "metrics.jsonl"
        lines = self._path.read_text(encoding="utf-8").splitlines() if self._path.exists() else []
        kept = [line for line in lines if _step_of(line) <= step]
        write_atomically(self._path, "".join(f"{line}\n" for line in kept).encode())
        self.board = SummaryWriter(str(output / "tensorboard"), purge_step=step + 1)

    def write(self, kind: str, record: Mapping[str, Any]) -> None:
        """One line of metrics.jsonl, and the scalars `kind/key`. Values: numbers, or None where there is nothing."""
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"kind": kind, "time": time.time(), **record}) + "\n")
        for key, value in record.items():
            if key != "step" and value is not None:
                self.board.add_scalar(f"{kind}/{key}", value, record["step"])
        self.board.flush()

    def close(self) -> None:
        """Closes TensorBoard's file."""
        self.board.close()


def _step_of(line: str) -> float:
    """The step of a record; infinite for the half line that a killed job leaves, and for any other damage."""
    try:
        return float(json.loads(line)["step"])
    except (ValueError, TypeError, KeyError, OverflowError, RecursionError):
        return float("inf")


class _Formatter(logging.Formatter):
    """Names come from strangers' files and addresses may carry passwords: lines show neither escapes nor secrets."""

    def format(self, record: logging.LogRecord) -> str:
        return shown(super().format(record))


def log_to(output: Path | None) -> None:
    """Sends the program's log to the screen and, with `output`, to OUT/log.txt. Other ranks than 0: only warnings."""
    handlers: list[logging.Handler] = [logging.StreamHandler(sys.stderr)]
    main = distributed.ranks().is_main
    if main and output is not None:
        output.mkdir(parents=True, exist_ok=True)
        handlers.append(logging.FileHandler(output / "log.txt", encoding="utf-8"))
    for handler in handlers:
        handler.setFormatter(_Formatter("%(asctime)s %(message)s", "%Y-%m-%d %H:%M:%S"))
        logger.addHandler(handler)
    logger.setLevel(logging.INFO if main else logging.WARNING)
    logger.propagate = False


def end_log(output: Path, cause: str) -> None:
    """Makes the cause of a failed job the last line of OUT/log.txt, once. Does nothing where there is no log.

    Rank 0 writes it; the others wait for that, and one of them writes it only if rank 0 is gone.
    """
    path, place = output / "log.txt", distributed.ranks()
    deadline = time.monotonic() + (0 if place.is_main else GRACE_SECONDS + place.rank / place.world_size)
    while path.exists() and END_MARK not in path.read_text(encoding="utf-8", errors="replace").rstrip().split("\n")[-1]:
        if time.monotonic() >= deadline:
            with path.open("a", encoding="utf-8") as file:
                file.write(
                    f"{time.strftime('%Y-%m-%d %H:%M:%S')} {END_MARK}{redact_text(' '.join(cause.splitlines()))}\n"
                )
            return
        time.sleep(0.2)


def table(title: str, rows: Mapping[str, Any]) -> str:
    """Names and values as a table of plain characters, for the screen and the log file alike."""
    drawn = Table(title=title, box=box.ASCII2, show_header=False)
    for name, value in rows.items():
        drawn.add_row(name, str(value))
    stream = io.StringIO()
    Console(file=stream, width=100, markup=False, highlight=False).print(drawn)
    return stream.getvalue().rstrip()


def memory_bytes() -> float:
    """Peak memory of this rank: allocated on the GPU, or resident on a CPU."""
    if torch.cuda.is_available():
        return float(torch.cuda.max_memory_allocated())
    return float(resident_bytes("VmHWM"))


def resident_bytes(counter: str) -> int:
    """This process's VmRSS (resident now) or VmHWM (at most so far) of Linux's /proc, in bytes.

    Not getrusage: its peak begins with that of the process which started this one.
    """
    status = Path("/proc/self/status").read_text(encoding="ascii")
    return next(int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith(f"{counter}:"))


def gpu_utilisation() -> float | None:
    """Share of recent time in which this rank's GPU computed, in [0, 1]; None if there is no GPU."""
    if not torch.cuda.is_available():
        return None
    try:
        return torch.cuda.utilization() / 100
    except (RuntimeError, ModuleNotFoundError):  # no driver interface in this container
        return None
