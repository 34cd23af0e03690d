"""Many tasks in threads, their results in order, within a limit on memory.

Reading files, Pillow and FFmpeg all release Python's lock, so threads do the work and nothing is copied between
processes.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterator
from types import TracebackType
from typing import Generic, TypeVar

Item = TypeVar("Item")

# What an item costs beside its bytes, so that a million tiny items count too.
_OVERHEAD_BYTES = 4096


class OrderedFeed(Generic[Item]):
    """Runs `produce(task)` for tasks start, start + 1, … in threads and gives out what they yield, task by task.

    produce: makes the items of one task. size_of: bytes of an item. At most `budget_bytes` of items wait to be taken,
    plus one item a thread and two of the task whose turn it is. Use as a context manager; leaving it stops the threads.
    """

    def __init__(
        self,
        produce: Callable[[int], Iterator[Item]],
        size_of: Callable[[Item], int],
        *,
        start: int,
        stop: int,
        workers: int,
        budget_bytes: int = 256 << 20,
    ) -> None:
        self._produce = produce
        self._size_of = size_of
        self._stop = stop
        self._budget = budget_bytes
        self._next = start
        self._head = start
        self._waiting: dict[int, deque[Item | BaseException | None]] = {}
        self._waiting_bytes = 0
        self._closed = False
        lock = threading.Lock()
        self._arrived = threading.Condition(lock)  # for the taker: something of the task whose turn it is
        self._room = threading.Condition(lock)  # for the threads: fewer bytes wait, or the turn has moved on
        self._threads = [threading.Thread(target=self._work, daemon=True) for _ in range(workers)]

    def __enter__(self) -> OrderedFeed[Item]:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._room:
            self._closed = True
            self._room.notify_all()
        for thread in self._threads:
            thread.join()

    def take(self, task: int) -> Iterator[Item]:
        """The items of the next task; tasks are taken in order, each to its end. Raises what `produce` raised."""
        while True:
            with self._arrived:
                while not self._waiting.get(task):
                    self._arrived.wait()
                item = self._waiting[task].popleft()
                was_full = self._waiting_bytes >= self._budget
                if item is None or isinstance(item, BaseException):
                    del self._waiting[task]
                    self._head = task + 1
                else:
                    self._waiting_bytes -= self._size_of(item) + _OVERHEAD_BYTES
                if was_full:  # else no thread waits
                    self._room.notify_all()
            if item is None:
                return
            if isinstance(item, BaseException):
                raise item
            yield item

    def _work(self) -> None:
        while True:
            with self._room:
                while self._waiting_bytes >= self._budget and self._next != self._head and not self._closed:
                    self._room.wait()
                if self._closed or self._next >= self._stop:
                    return
                task = self._next
                self._next += 1
                self._waiting[task] = deque()
            try:
                items = self._produce(task)
                if not all(self._put(task, item) for item in items):
                    return
            except BaseException as error:
                # `take` raises it again in the caller's thread.
                self._finish(task, error)
            else:
                self._finish(task, None)

    def _put(self, task: int, item: Item) -> bool:
        """False when the feed is closed."""
        size = self._size_of(item) + _OVERHEAD_BYTES
        with self._room:
            queue = self._waiting[task]
            while not self._closed and self._waiting_bytes >= self._budget and (task != self._head or len(queue) >= 2):
                self._room.wait()
            if self._closed:
                return False
            queue.append(item)
            self._waiting_bytes += size
            if task == self._head:
                self._arrived.notify()
        return True

    def _finish(self, task: int, error: BaseException | None) -> None:
        with self._arrived:
            self._waiting[task].append(error)
            self._arrived.notify()
