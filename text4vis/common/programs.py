"""How the programs of tools/ end."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

from shards.text import shown

EXIT_CODE_OF_CTRL_C = 130


def run_program(main: Callable[[], int | None], *errors: type[Exception], stopped: str = "stopped") -> NoReturn:
    """Calls `main` and ends the process with its code; None is 0.

    errors: end it with one line and code 1. Ctrl-C ends it with the line `stopped` and code 130, without a traceback.
    """
    name = Path(sys.argv[0]).stem
    try:
        sys.exit(main())
    except errors as error:
        print(f"{name}: error: {shown(error)}", file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt:
        print(f"{name}: {stopped}", file=sys.stderr)
        sys.exit(EXIT_CODE_OF_CTRL_C)
