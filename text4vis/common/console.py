"""Tables and lines on standard output: the one way in which programs show their results."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from rich import box
from rich.console import Console
from rich.table import Table

_WIDTH = 1000  # of a log or a pipe, where nothing may be cut or wrapped


def console() -> Console:
    """Shows text as it is: what looks like rich's markup is text. In a log or a pipe no line is cut or wrapped."""
    return Console(markup=False, highlight=False, width=None if sys.stdout.isatty() else _WIDTH)


def table(left: Sequence[str], right: Sequence[str] = (), *, title: str | None = None) -> Table:
    """A table to print on a `console`: columns of names, then columns of figures. In a log or a pipe it is Markdown.

    Without any title of a column the table has no head.
    """
    drawn = Table(
        title=title,
        title_justify="left",
        show_header=any([*left, *right]),
        box=box.ROUNDED if sys.stdout.isatty() else box.MARKDOWN,
    )
    for name in left:
        drawn.add_column(name, overflow="fold")
    for name in right:
        drawn.add_column(name, justify="right", overflow="fold")
    return drawn
