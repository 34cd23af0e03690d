"""Keeps a loop from waiting: steps that overlap, a thread that works ahead, short turns, no long garbage collections.

Nothing here knows about videos.
"""

from __future__ import annotations

import gc
import queue
import sys
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Generic, TypeVar

SWITCH_SECONDS = 0.0005

Item = TypeVar("Item")
Started = TypeVar("Started")
Done = TypeVar("Done")


@contextmanager
def settled() -> Iterator[None]:
    """A context for a long loop: the threads of the loader need not wait long until they may run Python.

    The garbage collector ignores all objects that existed before; it still collects newer ones. Otherwise a full
    collection now and then visits the half a million objects of all libraries, and no thread can run Python meanwhile:
    the next batch is not started, and the other ranks wait for this one.

    A thread that computes in Python gives way to others after SWITCH_SECONDS, a tenth of Python's own limit. A batch
    takes some fifty turns of the loader's threads, and each would wait that long.
    """
    before = sys.getswitchinterval()
    gc.collect()
    gc.freeze()
    sys.setswitchinterval(min(before, SWITCH_SECONDS))
    try:
        yield
    finally:
        sys.setswitchinterval(before)
        gc.unfreeze()


def pipelined(
    items: Iterable[Item],
    start: Callable[[Item], Started],
    finish: Callable[[Started], Done],
    depth: int,
    *,
    gradual: bool = False,
    recover: Callable[[Item], Done] | None = None,
    errors: tuple[type[Exception], ...] = (),
) -> Iterator[Done]:
    """Yields finish(start(item)) in order, with `depth` items started ahead of the one that is being finished.

    gradual: the first item is alone, so that nothing delays it; then there is one ahead, then two …
    Where `finish` raises one of `errors`, yields recover(item) instead.
    """
    pending: deque[tuple[Item, Started]] = deque()
    ahead = 0 if gradual else depth

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
        if len(pending) > ahead:
            yield finish_oldest()
            ahead = min(depth, ahead + 1)
    while pending:
        yield finish_oldest()


@dataclass(frozen=True)
class _End:
    """What follows the last item: StopIteration, or the error that the generator raised."""

    error: BaseException


class Prefetcher(Iterator[Item], Generic[Item]):
    """Runs a generator in a thread of its own, up to `depth` items ahead, at least two. `next` raises its errors.

    receive: called with each item in the consumer's thread, before the consumer gets it.
    """

    def __init__(
        self,
        items: Generator[Item, None, None],
        depth: int,
        name: str,
        receive: Callable[[Item], object] = lambda item: None,
    ) -> None:
        self._items, self._receive = items, receive
        self._queue: queue.Queue[Item | _End] = queue.Queue(maxsize=max(1, depth - 1))  # one more is in the thread
        self._stopped = threading.Event()
        self._end: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    def __next__(self) -> Item:
        if self._end is not None:  # every later call ends, or fails, in the same way
            raise self._end
        item = self._queue.get()
        if isinstance(item, _End):
            self._end = item.error
            raise item.error
        self._receive(item)
        return item

    def close(self) -> None:
        """Stops the generator between two items and waits until it is closed."""
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
                if not self._put(item):
                    break
            self._items.close()
        except BaseException as error:  # raised again by `__next__`
            end = error
        self._put(_End(end))

    def _put(self, item: Item | _End) -> bool:
        """Waits for room in the queue. Returns False if the consumer has closed it."""
        while not self._stopped.is_set():
            try:
                self._queue.put(item, timeout=0.1)
                return True
            except queue.Full:
                continue
        return False
