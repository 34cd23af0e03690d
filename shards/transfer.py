"""One event loop, in one thread, that fetches for a whole data set: many requests at the same time, within two bounds.

A reader hands over all requests of a batch at once and gets one `Transfer` back. Requests start in the order in which
they were handed over, those of several batches at the same time, as long as fewer than `requests_in_flight` are under
way and fewer than `bytes_in_flight` bytes are under way or wait to be taken. A few workers (coroutines) go through the
queue; there is no thread and no lock for a single request.
"""

from __future__ import annotations

import asyncio
import logging
import resource
import sys
import threading
import weakref
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, NamedTuple

REQUESTS_IN_FLIGHT = 512
BYTES_IN_FLIGHT = 256 << 20
# Each request has a socket, clients keep some that are idle, and a program may read two far data sets.
_FILES_A_REQUEST = 4

_log = logging.getLogger(__name__)


class Request(NamedTuple):
    """One thing to fetch. size: bytes that it counts against the bound. fetch: makes the coroutine that does it.

    connections: requests to the store that it makes at the same time.
    is_kept: whether it counts until its body is taken, not only while it is under way: one that is written has none.
    """

    size: int
    fetch: Callable[[], Awaitable[Any]]
    is_kept: bool = True
    connections: int = 1


class Transfer:
    """The bodies of several requests, on their way. Made by `Transfers.submit`."""

    def __init__(self, sizes: Sequence[int], release: Callable[[int], None]) -> None:
        self._bodies: list[Any] = [None] * len(sizes)
        self._left = len(sizes)
        self._size = sum(sizes)
        self._release = release
        self._done: Future[None] = Future()
        self._ended: Future[None] = Future()
        if not sizes:
            self._done.set_result(None)
            self._ended.set_result(None)

    def result(self) -> list[Any]:
        """Waits for the bodies and returns them in the order of the requests.

        Raises the error of the first request that failed, ValueError if the data set is closed before.
        """
        self._done.result()
        self._let_go()
        return self._bodies

    def wait(self) -> None:
        """Waits until no request is under way any more; after a failure those that were not begun never are."""
        self._ended.result()

    # What follows is called in the loop.

    @property
    def has_failed(self) -> bool:
        """Whether a part of the transfer has failed."""
        return self._done.done()  # else there is something left to fetch

    def put(self, position: int, body: Any) -> None:
        """Keeps the body of a request."""
        self._bodies[position] = body
        if self._left == 1 and not self._done.done():
            self._done.set_result(None)

    def fail(self, error: BaseException) -> None:
        """Ends the transfer with an error; the first one counts."""
        if not self._done.done():
            self._done.set_exception(error)

    def count_off(self, size: int) -> None:
        """Bytes that are not to be released any more when the transfer is taken."""
        self._size -= size

    def end_one(self) -> None:
        """Counts a request that is over or will never be made."""
        self._left -= 1
        if self._left == 0:
            self._ended.set_result(None)

    def _let_go(self) -> None:
        size, self._size = self._size, 0
        if size:
            self._release(size)

    def __del__(self) -> None:
        # A transfer that nobody waits for any more must not hold its share of the bound for ever.
        self._let_go()


class _Queued(NamedTuple):
    transfer: Transfer
    position: int
    request: Request


@dataclass
class _Loop:
    """A running loop and what lives in it. The finaliser of `Transfers` holds it, so it must not refer to that."""

    loop: asyncio.AbstractEventLoop = field(default_factory=asyncio.new_event_loop)
    thread: threading.Thread | None = None
    queue: deque[_Queued] = field(default_factory=deque)
    tasks: set[asyncio.Task[None]] = field(default_factory=set)
    in_flight: int = 0
    held_bytes: int = 0
    closers: list[Callable[[], Awaitable[None]]] = field(default_factory=list)

    def run(self) -> None:
        try:
            self.loop.run_forever()
            self.loop.run_until_complete(self._end())
            self.loop.run_until_complete(self.loop.shutdown_asyncgens())
            self.loop.run_until_complete(self.loop.shutdown_default_executor())
        finally:
            self.loop.close()

    async def _end(self) -> None:
        closed = ValueError("the data set was closed while it was being read")
        for queued in self.queue:
            queued.transfer.fail(closed)
            queued.transfer.end_one()
        self.queue.clear()
        others = asyncio.all_tasks() - {asyncio.current_task()}
        for task in others:
            task.cancel()
        await asyncio.gather(*others, return_exceptions=True)
        for close in self.closers:
            await close()
        await asyncio.sleep(0)  # transports report their end in the next turn of the loop

    def stop(self) -> None:
        if self.thread is not None and self.thread.is_alive():
            self.loop.call_soon_threadsafe(self.loop.stop)
            if self.thread is not threading.current_thread():  # there the owner's last reference may have gone
                self.thread.join()


# Loops of the parent in a forked child. Sockets and selectors there are the parent's too: nothing may ever be closed.
_abandoned: list[_Loop] = []


def _most_requests() -> int:
    files, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return sys.maxsize if files == resource.RLIM_INFINITY else max(1, files // _FILES_A_REQUEST)


class Transfers:
    """The loop of one data set. It starts with the first request.

    requests_in_flight: most requests at the same time, and at most a quarter of the files that the process may open.
    bytes_in_flight: bytes that are being fetched or wait to be taken, at most; a single request may be larger.
    """

    def __init__(self, requests_in_flight: int = REQUESTS_IN_FLIGHT, bytes_in_flight: int = BYTES_IN_FLIGHT) -> None:
        self._wanted = requests_in_flight
        self.requests_in_flight = min(requests_in_flight, _most_requests())
        self.bytes_in_flight = bytes_in_flight
        self._running: _Loop | None = None
        self._closed = False
        self.renew()

    def renew(self) -> None:
        """Leaves the loop to the parent; a new one starts when it is needed. For the child after a fork."""
        self._lock = threading.Lock()
        if self._running is not None:
            self._finalizer.detach()
            _abandoned.append(self._running)
            self._running = None

    def close(self) -> None:
        """Ends all that is under way, the connections and the thread."""
        with self._lock:
            running, self._running, self._closed = self._running, None, True
        if running is not None:
            self._finalizer.detach()
            running.stop()

    def _start(self) -> _Loop:
        """The loop; the caller holds the lock, so that what it schedules comes before the loop's end."""
        if self._closed:
            raise ValueError("the data set is closed")
        if self._running is None:
            if self.requests_in_flight < self._wanted:
                text = "a far store is asked for at most %d ranges at a time instead of %d: raise `ulimit -n`"
                _log.info(text, self.requests_in_flight, self._wanted)
            running = _Loop()
            running.thread = threading.Thread(target=running.run, name="shards-loop", daemon=True)
            running.thread.start()
            self._finalizer = weakref.finalize(self, running.stop)
            self._running = running
        return self._running

    def on_close(self, close: Callable[[], Awaitable[None]]) -> None:
        """`close` is awaited in the loop when it ends. Called in the loop."""
        assert self._running is not None
        self._running.closers.append(close)

    def submit(self, requests: Sequence[Request], *, first: bool = False) -> Transfer:
        """Hands requests over, to be made in this order behind all earlier ones. Waits for nothing.

        first: before the earlier ones that are not begun yet, for what a reader needs before it can take those.
        """
        with self._lock:
            running = self._start()

            def release(size: int) -> None:
                with suppress(RuntimeError):  # the loop has ended
                    running.loop.call_soon_threadsafe(self._released, running, size)

            transfer = Transfer([request.size for request in requests], release)
            queued = [_Queued(transfer, position, request) for position, request in enumerate(requests)]
            running.loop.call_soon_threadsafe(self._accept, running, queued, first)
        return transfer

    # What follows runs in the loop.

    def _accept(self, running: _Loop, queued: Sequence[_Queued], first: bool) -> None:
        if first:
            # Behind others without a size: a reader may have to wait for those before it can make room.
            place = next((place for place, one in enumerate(running.queue) if one.request.size), len(running.queue))
            for offset, one in enumerate(queued):
                running.queue.insert(place + offset, one)
        else:
            running.queue.extend(queued)
        self._admit(running)

    def _released(self, running: _Loop, size: int) -> None:
        running.held_bytes -= size
        self._admit(running)

    def _admit(self, running: _Loop) -> None:
        while (first := self._next(running)) is not None:
            task = running.loop.create_task(self._work(running, first))
            running.tasks.add(task)
            task.add_done_callback(running.tasks.discard)

    def _next(self, running: _Loop) -> _Queued | None:
        """Takes a request from the queue if the bounds allow: always if nothing else is under way."""
        while running.queue:
            size, connections = running.queue[0].request.size, running.queue[0].request.connections
            if running.in_flight and (
                running.in_flight + connections > self.requests_in_flight
                or (size and running.held_bytes + size > self.bytes_in_flight)
            ):
                return None
            running.held_bytes += size  # until the transfer is taken, whether or not the request is made
            queued = running.queue.popleft()
            if not queued.transfer.has_failed:
                running.in_flight += connections
                return queued
            queued.transfer.end_one()
        return None

    async def _body(self, running: _Loop, transfer: Transfer, request: Request) -> Any:
        try:
            return await request.fetch()
        finally:
            if not request.is_kept:  # before it is put: whoever takes the transfer then releases the others
                transfer.count_off(request.size)
                running.held_bytes -= request.size

    async def _work(self, running: _Loop, queued: _Queued | None) -> None:
        """Makes one request after another, until there is none or the bounds forbid it."""
        while queued is not None:
            transfer, position, request = queued
            try:
                body = await self._body(running, transfer, request)
                transfer.put(position, body)
                del body
            except asyncio.CancelledError:
                transfer.fail(ValueError("the data set was closed while it was being read"))
                raise
            except Exception as error:
                transfer.fail(error)
            finally:
                running.in_flight -= request.connections
                transfer.end_one()
            del transfer, request, queued  # else an idle worker's frame would keep a batch alive
            queued = self._next(running)
            self._admit(running)  # a request of several makes room for several
