"""What keeps a loop from waiting: a thread that fills a bounded queue, steps that overlap, no long garbage collections.

Knows nothing of videos.
"""

from __future__ import annotations

import gc
import queue
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, Generic, TypeVar

Item = TypeVar("Item")
Started = TypeVar("Started")
Done = TypeVar("Done")


@contextmanager
def settled() -> Iterator[None]:
    """The garbage collector leaves alone what exists now, until the end; what comes into being inside is collected.

    Else it goes every now and then through all objects of all libraries, half a million, while no thread runs Python:
    the next batch is not started, and the other ranks wait for this one.
    """
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


def pipelined(
    items: Iterable[Item],
    start: Callable[[Item], Started],
    finish: Callable[[Started], Done],
    depth: int,
    *,
    recover: Callable[[Item], Done] | None = None,
    errors: tuple[type[Exception], ...] = (),
) -> Iterator[Done]:
    """Yields finish(start(item)) in order, with `depth` items started ahead of the one that is being finished.

    Where `finish` raises one of `errors`, yields recover(item) instead.
    """
    pending: deque[tuple[Item, Started]] = deque()

    def finish_oldest() -> Done:
        item, started = pending.popleft()
        try:
            return finish(started)
        except errors:
            if recover is None:
                raise
        return recover(item)

    for item in items:
        pending.append((item, start(item)))
        if len(pending) > depth:
            yield finish_oldest()
    while pending:
        yield finish_oldest()


class Prefetcher(Iterator[Item], Generic[Item]):
    """Runs the generator `items` in a thread of its own, up to `depth` items ahead. An error there is raised here."""

    def __init__(self, items: Generator[Item, None, None], depth: int, name: str) -> None:
        self._items = items
        self._queue: queue.Queue[Any] = queue.Queue(maxsize=depth)
        self._stopped = threading.Event()
        self._end: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    def __next__(self) -> Item:
        if self._end is not None:  # the end, or an error, stays the answer of every later call
            raise self._end
        kind, value = self._queue.get()
        if kind == "end":
            self._end = value
            raise value
        return value

    def close(self) -> None:
        """Ends the generator between two items, and waits until it has let go of what it holds."""
        self._stopped.set()
        self._end = self._end or StopIteration()
        while self._thread.is_alive():
            try:
                self._queue.get(timeout=0.05)
            except queue.Empty:
                continue

    def _run(self) -> None:
        end: BaseException = StopIteration()
        try:
            for item in self._items:
                if not self._put(("item", item)):
                    break
            self._items.close()
        except BaseException as error:  # whatever it is, the consumer must see it
            end = error
        self._put(("end", end))

    def _put(self, item: tuple[str, Any]) -> bool:
        while not self._stopped.is_set():
            try:
                self._queue.put(item, timeout=0.1)
                return True
            except queue.Full:
                continue
        return False
