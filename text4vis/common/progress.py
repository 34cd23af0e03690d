"""Progress of long work. Every program shows it with these."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Iterator, Sized
from contextlib import AbstractContextManager
from typing import Any, TypeVar

from tqdm import tqdm

Item = TypeVar("Item")

LINE_SECONDS = 60.0  # between two lines in a log


class Progress:
    """Shows a bar with rate and remaining time on a terminal's standard error, or a plain line a minute in a log.

    Use it in a `with` block. what: name of the work; total: the sum of all updates, if it is known; keep: leave the
    full bar on the screen; quiet: show nothing, as on ranks other than 0.
    """

    def __init__(
        self, what: str = "", total: int | None = None, *, unit: str = "video", keep: bool = True, quiet: bool = False
    ) -> None:
        is_terminal = sys.stderr.isatty()
        self._what, self._total, self._unit = what, total, unit
        self._bar: Any = tqdm(desc=what or None, total=total, unit=unit, leave=keep, disable=quiet or not is_terminal)
        self._in_lines = not quiet and not is_terminal
        self._count = 0
        self._started = self._last_line = time.monotonic()

    def update(self, count: int = 1, note: str = "") -> None:
        """Advances by `count`. note: text to show after the rate."""
        self._bar.set_postfix_str(note, refresh=False)
        self._bar.update(count)
        self._count += count
        now = time.monotonic()
        if self._in_lines and now - self._last_line >= LINE_SECONDS:
            self._last_line = now
            line = self._bar.format_meter(
                self._count, self._total, now - self._started, ncols=0, prefix=self._what, unit=self._unit, postfix=note
            )
            print(line, file=sys.stderr, flush=True)

    def aside(self) -> AbstractContextManager[None]:
        """A context in which other lines can be printed without breaking the bar."""
        return tqdm.external_write_mode()

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()


def track(items: Iterable[Item], what: str = "", total: int | None = None, **options: Any) -> Iterator[Item]:
    """Yields the items and shows their progress. total: by default `len(items)`, if they have a length."""
    if total is None and isinstance(items, Sized):
        total = len(items)
    with Progress(what, total, **options) as progress:
        for item in items:
            yield item
            progress.update()
