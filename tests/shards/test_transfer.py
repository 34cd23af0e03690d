"""The loop that fetches: order, the two bounds, failures, and its end. Requests end when they are told to."""

import asyncio
import gc
import resource
import threading
from concurrent.futures import Future

import pytest

import shards.transfer
from shards.transfer import Request, Transfers

pytestmark = pytest.mark.timeout(20)  # what never ends is a failure


class Requests:
    """Makes requests that say when they are begun, and end when they are told to."""

    def __init__(self, transfers: Transfers) -> None:
        self.transfers = transfers
        self.begun: list[str] = []
        self.ends: dict[str, Future[str]] = {}

    def request(self, name: str, size: int = 0, *, is_kept: bool = True) -> Request:
        self.ends[name] = Future()

        async def fetch() -> str:
            self.begun.append(name)
            return await asyncio.wrap_future(self.ends[name])

        return Request(size, fetch, is_kept)

    def submit(self, *named: tuple[str, int], first: bool = False, is_kept: bool = True) -> shards.transfer.Transfer:
        requests = [self.request(name, size, is_kept=is_kept) for name, size in named]
        transfer = self.transfers.submit(requests, first=first)
        self.settle()
        return transfer

    def end(self, *names: str) -> None:
        for name in names:
            self.ends[name].set_result(name.upper())
            self.settle()

    def settle(self) -> None:
        """Waits until the loop has nothing to do."""
        for _ in range(8):
            asyncio.run_coroutine_threadsafe(asyncio.sleep(0), self.transfers._running.loop).result(10)


@pytest.fixture
def make():
    """Makes `Requests`, of a loop of their own."""
    made: list[Transfers] = []

    def make(**bounds: int) -> Requests:
        made.append(Transfers(**bounds))
        return Requests(made[-1])

    yield make
    for transfers in made:
        transfers.close()


def test_requests_are_begun_in_order_and_so_many_at_a_time(make):
    requests = make(requests_in_flight=2)
    one = requests.submit(("a", 1), ("b", 1), ("c", 1))
    two = requests.submit(("d", 1))
    assert requests.begun == ["a", "b"]
    requests.end("b")
    assert requests.begun == ["a", "b", "c"]
    requests.end("a", "c", "d")
    assert one.result() == ["A", "B", "C"] and two.result() == ["D"]
    one.wait()
    empty = requests.submit()
    empty.wait()
    assert empty.result() == []


@pytest.mark.parametrize(("files", "most"), [(40, 10), (3, 1), (4000, 500), (resource.RLIM_INFINITY, 500)])
def test_requests_leave_room_for_other_files(make, monkeypatch, caplog, files, most):
    """A process that may open few files makes fewer requests and says so: else imports and saves would fail."""
    caplog.set_level("INFO")
    monkeypatch.setattr(resource, "getrlimit", lambda kind: (files, files))
    requests = make(requests_in_flight=500)
    requests.submit(*((str(number), 1) for number in range(600)))
    assert len(requests.begun) == most
    assert ("ulimit -n" in caplog.text) == (most < 500)
    requests.end(*list(requests.ends))


def test_bytes_count_until_they_are_taken(make):
    requests = make(bytes_in_flight=10)
    one = requests.submit(("a", 4), ("b", 6))
    two = requests.submit(("c", 1))
    three = requests.submit(("d", 9))
    assert requests.begun == ["a", "b"]
    requests.end("a")
    assert requests.begun == ["a", "b"]
    requests.end("b")
    assert requests.begun == ["a", "b", "c"]  # always one, else a reader that takes nothing would wait for ever
    assert one.result() == ["A", "B"] and one.result() == ["A", "B"]
    requests.settle()
    assert requests.begun == ["a", "b", "c", "d"]
    four = requests.submit(("e", 1))
    assert requests.begun == ["a", "b", "c", "d"]
    requests.end("c")
    del two  # nobody will take it: as good as taken
    requests.settle()
    assert requests.begun == ["a", "b", "c", "d", "e"]
    requests.end("d", "e")
    assert three.result() + four.result() == ["D", "E"]
    requests.settle()
    running = requests.transfers._running
    assert running.held_bytes == running.in_flight == 0 and not running.tasks


def test_what_is_larger_than_the_bound_comes_alone(make):
    requests = make(bytes_in_flight=10)
    transfer = requests.submit(("a", 11), ("b", 11))
    other = requests.submit(("c", 0))
    assert requests.begun == ["a"]
    requests.end("a")
    assert requests.begun == ["a", "b", "c"]  # what has no size disturbs nobody
    requests.end("b", "c")
    assert transfer.result() + other.result() == ["A", "B", "C"]


def test_bytes_that_are_written_count_only_on_their_way(make):
    requests = make(bytes_in_flight=10)
    requests.submit(("busy", 0))
    transfer = requests.submit(("a", 6), ("b", 6), ("c", 6), is_kept=False)
    assert requests.begun == ["busy", "a"]
    requests.end("a")
    assert requests.begun == ["busy", "a", "b"]
    requests.end("b", "c", "busy")
    assert requests.transfers._running.held_bytes == 0
    assert transfer.result() == ["A", "B", "C"]
    requests.settle()
    assert requests.transfers._running.held_bytes == 0


def test_what_is_asked_for_first_passes_all_that_has_a_size(make):
    requests = make(requests_in_flight=1)
    requests.submit(("a", 5))
    requests.submit(("b", 5))
    requests.submit(("c", 0), ("d", 0), first=True)
    requests.submit(("e", 0), ("f", 7), first=True)
    requests.submit(("g", 0))
    for name in "acdefbg":
        requests.end(name)
    assert requests.begun == list("acdefbg")


def test_the_first_failure_counts_and_ends_a_transfer(make):
    requests = make(requests_in_flight=2, bytes_in_flight=10)
    transfer = requests.submit(("a", 2), ("b", 2), ("c", 2))
    requests.ends["b"].set_exception(OSError("b fails"))
    requests.settle()
    with pytest.raises(OSError, match="b fails"):
        transfer.result()
    waiting = threading.Thread(target=transfer.wait, daemon=True)
    waiting.start()
    waiting.join(0.05)
    assert waiting.is_alive()  # a is under way
    requests.ends["a"].set_exception(OSError("a fails"))
    waiting.join(10)
    assert not waiting.is_alive() and requests.begun == ["a", "b"]
    with pytest.raises(OSError, match="b fails"):
        transfer.result()
    del transfer
    requests.ends.clear()  # the errors know where they were raised
    gc.collect()
    requests.settle()
    other = requests.submit(("d", 5), ("e", 5))
    assert requests.begun == ["a", "b", "d", "e"]
    requests.end("d", "e")
    assert other.result() == ["D", "E"]


def test_the_end_of_the_loop(make):
    closed, generators = [], []

    async def close() -> None:
        closed.append(threading.current_thread().name)

    async def numbers():
        try:
            yield 1
        finally:
            closed.append("generator")

    async def fetch() -> int:
        requests.transfers.on_close(close)
        generators.append(numbers())
        return await asyncio.to_thread(lambda: 5) + await anext(generators[0])

    before = set(threading.enumerate())
    requests = make(requests_in_flight=1)
    assert requests.transfers.submit([Request(0, fetch)]).result() == [6]
    under_way, queued = requests.submit(("a", 1)), requests.submit(("b", 1), ("c", 1))
    (loop_thread,) = [thread for thread in set(threading.enumerate()) - before if thread.name == "shards-loop"]
    assert loop_thread.daemon  # a program that closes nothing ends all the same
    loop = requests.transfers._running.loop
    requests.transfers.close()
    for transfer in (under_way, queued):
        transfer.wait()
        with pytest.raises(ValueError, match="closed while it was being read"):
            transfer.result()
    assert closed == ["shards-loop", "generator"] and requests.begun == ["a"]
    assert set(threading.enumerate()) <= before and loop.is_closed()
    requests.transfers.close()
    with pytest.raises(ValueError, match="is closed"):
        requests.transfers.submit([])


def test_requests_of_which_only_the_loop_knows_are_kept(make):
    """A loop refers to its tasks weakly."""

    async def fetch() -> None:
        await asyncio.get_running_loop().create_future()

    requests = make()
    transfer = requests.transfers.submit([Request(0, fetch)])
    requests.settle()
    gc.collect()
    requests.settle()
    assert requests.transfers._running.in_flight == 1 and not transfer.has_failed


@pytest.mark.filterwarnings("error::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("where", ["main", "loop"])
def test_the_loop_ends_with_its_owner(where):
    requests = Requests(Transfers())
    requests.submit()
    running = requests.transfers._running
    thread = running.thread
    if where == "loop":  # which cannot wait for its own end
        running.loop.call_soon_threadsafe([requests.transfers].clear)
    del requests, running
    gc.collect()
    thread.join(10)
    assert not thread.is_alive()


def test_a_renewed_owner_leaves_its_loop_alone(make):
    """In a forked child the parent's sockets and selectors must never be closed."""
    requests = make()
    transfer = requests.submit(("a", 1))
    old = requests.transfers._running
    requests.transfers.renew()
    try:
        assert requests.submit(("b", 1)) and requests.begun == ["a", "b"]
        assert old.thread.is_alive() and old is not requests.transfers._running and old in shards.transfer._abandoned
        requests.end("b")
        requests.ends["a"].set_result("A")
        assert transfer.result() == ["A"]
    finally:
        shards.transfer._abandoned.remove(old)
        old.stop()
