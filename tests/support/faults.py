"""The environment of programs whose disk fails or is slow, or whose clock jumps. See faults.c beside this."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

SOURCE = Path(__file__).with_suffix(".c")
DAY = 86400


def compiler() -> str | None:
    """The C compiler, if there is one."""
    return shutil.which("cc") or shutil.which("gcc")


def build(folder: Path) -> Path:
    """Compiles the library into the folder."""
    library, program = folder / "faults.so", compiler()
    assert program, "needs a C compiler"
    subprocess.run([program, "-O2", "-shared", "-fPIC", "-o", library, SOURCE, "-ldl"], check=True)
    return library


def failing(
    path: str | Path, calls: str, *, after: int = 0, count: int | None = None, code: int = 5, slow: int = 0
) -> dict[str, str]:
    """Calls on files whose path holds `path` fail with `code` (EIO): `count` of them, or all, after the first `after`.

    calls: some of "open read write sync rename". slow: milliseconds that each takes longer; code 0: no more than that.
    """
    variables = {"FAULT_PATH": path, "FAULT_CALLS": calls, "FAULT_FROM": after, "FAULT_ERRNO": code, "FAULT_SLOW": slow}
    return {name: str(value) for name, value in variables.items()} | ({"FAULT_COUNT": str(count)} if count else {})


def jumping(seconds: int = DAY) -> dict[str, str]:
    """The wall clock jumps forwards and backwards by so much at every tenth look at it."""
    return {"FAULT_CLOCK": str(seconds)}
