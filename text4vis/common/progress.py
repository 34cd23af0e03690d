"""How far long work has come: the one way in which programs say it. Plain Python but for tqdm."""

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
    """On a terminal a bar on standard error with rate and remaining time; in a log a plain line a minute.

    For a `with` block. what: names the work; total: how much there is to `update`, if that is known; keep: leave the
    full bar behind; quiet: say nothing, as ranks other than 0 do.
    """

    def __init__(
        self, what: str = "", total: int | None = None, *, unit: str = "video", keep: bool = True, quiet: bool = False
    ) -> None:
        is_terminal = sys.stderr.isatty()
        self._what, self._total, self._unit = what, total, unit
        self._bar: Any = tqdm(desc=what or None, total=total, unit=unit, leave=keep, disable=quiet or not is_terminal)
        self._in_lines = not quiet and not is_terminal
        self._count = 0
        self._started = self._said = time.monotonic()

    def update(self, count: int = 1, note: str = "") -> None:
        """So much more is done. note: shown behind the rate."""
        self._bar.set_postfix_str(note, refresh=False)
        self._bar.update(count)
        self._count += count
        now = time.monotonic()
        if self._in_lines and now - self._said >= LINE_SECONDS:
            self._said = now
            line = self._bar.format_meter(
                self._count, self._total, now - self._started, ncols=0, prefix=self._what, unit=self._unit, postfix=note
            )
            print(line, file=sys.stderr, flush=True)

    def aside(self) -> AbstractContextManager[None]:
        """Within it, other lines can be printed without breaking the bar."""
        return tqdm.external_write_mode()

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()


def track(items: Iterable[Item], what: str = "", total: int | None = None, **options: Any) -> Iterator[Item]:
    """The items, with their Progress. total: by default their number, if they know it."""
    if total is None and isinstance(items, Sized):
        total = len(items)
    with Progress(what, total, **options) as progress:
        for item in items:
            yield item
            progress.update()
