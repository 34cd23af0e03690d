"""Tables and lines on standard output. Every program shows its results with these."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from shards.text import printable

_WIDTH = 1000  # in a log or a pipe, where no line may be cut or wrapped


def console() -> Console:
    """A console that ignores rich's markup in text, and that neither cuts nor wraps lines in a log or a pipe."""
    return Console(markup=False, highlight=False, width=None if sys.stdout.isatty() else _WIDTH)


class _Table(Table):
    """Shows control characters of its cells, which may be of any origin, as escapes."""

    def add_row(self, *cells: Any, **options: Any) -> None:
        super().add_row(*(printable(cell) if isinstance(cell, str) else cell for cell in cells), **options)


def table(left: Sequence[str], right: Sequence[str] = (), *, title: str | None = None) -> Table:
    """A table for a `console`: left-aligned columns of names, then right-aligned columns of numbers.

    In a log or a pipe it is Markdown. If no column has a title, the table has no header.
    """
    drawn = _Table(
        title=title,
        title_justify="left",
        show_header=any([*left, *right]),
        box=box.ROUNDED if sys.stdout.isatty() else box.MARKDOWN,
    )
    for name in left:
        drawn.add_column(printable(name), overflow="fold")
    for name in right:
        drawn.add_column(printable(name), justify="right", overflow="fold")
    return drawn
