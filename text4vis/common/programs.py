"""How the programs of tools/ end."""

from __future__ import annotations

import faulthandler
import io
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

from shards.text import shown

EXIT_CODE_OF_CTRL_C = 130
STDERR = 2  # whatever sys.stderr is at the time


def prepare_output() -> None:
    """What a program says in all circumstances.

    Where output takes no UTF-8, characters that it lacks are printed as escapes; Python would raise an error. A signal
    that kills the process (SIGBUS: a mapped file was cut; SIGSEGV) is named on stderr, with the lines that it came in.
    """
    faulthandler.enable(STDERR)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper) and stream.encoding.lower() != "utf-8":
            stream.reconfigure(errors="backslashreplace")


def unnameable(error: UnicodeEncodeError) -> str:
    """What to do where the system's encoding has no name for a file."""
    return (
        f"{error.object[:200]!a}: a name that the encoding {error.encoding} of this locale does not have; set "
        "LC_ALL=C.UTF-8, and neither PYTHONUTF8=0 nor PYTHONIOENCODING"
    )


def run_program(main: Callable[[], int | None], *errors: type[Exception], stopped: str = "stopped") -> NoReturn:
    """Calls `main` and ends the process with its code; None is 0.

    errors: end it with one line and code 1. Ctrl-C ends it with the line `stopped` and code 130, without a traceback.
    """
    name = Path(sys.argv[0]).stem
    prepare_output()
    try:
        sys.exit(main())
    except UnicodeEncodeError as error:
        print(f"{name}: error: {unnameable(error)}", file=sys.stderr)
        sys.exit(1)
    except errors as error:
        print(f"{name}: error: {shown(error)}", file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt:
        print(f"{name}: {stopped}", file=sys.stderr)
        sys.exit(EXIT_CODE_OF_CTRL_C)
