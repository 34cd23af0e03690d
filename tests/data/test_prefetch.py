"""What keeps a loop from waiting: overlapping steps, a thread that works ahead, no garbage collection."""

import gc
import sys
import threading
import weakref

import pytest

from text4vis import train
from text4vis.cluster.stop import StopRequest
from text4vis.config.schema import Config
from text4vis.data.prefetch import SWITCH_SECONDS, Prefetcher, pipelined, settled


class Knot:
    """An object that only the garbage collector can free."""

    def __init__(self):
        self.itself = self


def test_what_exists_is_left_alone_until_the_end():
    old = Knot()
    is_alive = weakref.ref(old)
    with settled():
        assert len(gc.get_objects()) < 1000  # of the hundreds of thousands that there are
        del old
        gc.collect()
        assert is_alive()
    gc.collect()
    assert not is_alive()


def test_what_comes_into_being_inside_is_collected_as_ever():
    with settled():
        is_alive = weakref.ref(Knot())
        others = [[] for _ in range(2 * gc.get_threshold()[0])]  # so many that the collector comes by itself
        assert others and not is_alive()


def test_an_error_ends_it():
    before = sys.getswitchinterval()
    with pytest.raises(ValueError), settled():
        raise ValueError
    assert gc.get_freeze_count() == 0 and sys.getswitchinterval() == before


@pytest.mark.parametrize(("before", "inside"), [(0.005, SWITCH_SECONDS), (0.0001, 0.0001)])
def test_threads_take_short_turns(before, inside):
    usual = sys.getswitchinterval()
    try:
        sys.setswitchinterval(before)
        with settled():
            assert sys.getswitchinterval() == pytest.approx(inside, abs=2e-6)
        assert sys.getswitchinterval() == pytest.approx(before, abs=2e-6)
    finally:
        sys.setswitchinterval(usual)


@pytest.mark.parametrize(("depth", "ahead"), [(1, 2), (2, 2), (3, 3), (5, 5)])
def test_a_prefetcher_works_so_far_ahead_and_no_farther(depth, ahead):
    made = threading.Semaphore(0)

    def items():
        for number in range(100):
            made.release()
            yield number

    running = Prefetcher(items(), depth, "test")
    for _ in range(ahead):
        assert made.acquire(timeout=30)
    assert not made.acquire(timeout=0.3)
    assert next(running) == 0 and made.acquire(timeout=30)
    running.close()


@pytest.mark.parametrize("dry_run", [False, True])
def test_training_is_settled(monkeypatch, tmp_path, dry_run):
    seen = []

    class Trainer:
        def __init__(self, *_):
            assert gc.get_freeze_count() == 0  # the model is built before

        def __enter__(self):
            return self

        def __exit__(self, *_):
            pass

        def fit(self):
            seen.append(gc.get_freeze_count())

        def dry_run(self):
            seen.append(gc.get_freeze_count())

    monkeypatch.setattr("text4vis.training.trainer.Trainer", Trainer)
    monkeypatch.setattr("text4vis.training.logs.log_to", lambda _: None)
    monkeypatch.setattr("sys.argv", ["train.py", "--config", "x.yaml", *["--dry-run"] * dry_run])
    train.train(train.parse_arguments(), Config(), tmp_path, StopRequest())
    assert (seen[0] > 100_000) is not dry_run


@pytest.mark.parametrize("depth", [0, 1, 3])
def test_steps_finish_in_order_with_so_many_started_ahead(depth):
    events = []
    results = pipelined(
        range(5), lambda item: events.append(("start", item)) or item, lambda item: events.append(("end", item)), depth
    )
    next(results)
    assert events == [*(("start", item) for item in range(depth + 1)), ("end", 0)]
    list(results)
    assert [item for kind, item in events if kind == "end"] == list(range(5)) and len(events) == 10


def test_a_gradual_pipeline_starts_with_one_item_alone():
    events = []
    results = pipelined(range(7), events.append, lambda item: events.append("end"), 2, gradual=True)
    list(results)
    assert events == [0, "end", 1, 2, "end", 3, 4, "end", 5, "end", 6, *["end"] * 3]


def test_an_item_whose_step_fails_is_recovered_in_its_place():
    def finish(item):
        if item % 2:
            raise KeyError(item)
        return item

    def run(**recovery):
        return list(pipelined(range(5), lambda item: item, finish, 2, **recovery))

    assert run(recover=lambda item: -item, errors=(KeyError,)) == [0, -1, 2, -3, 4]
    for recovery in ({}, {"recover": lambda item: -item, "errors": (OSError,)}, {"errors": (KeyError,)}):
        with pytest.raises(KeyError):
            run(**recovery)


def test_a_prefetcher_gives_the_items_then_the_error_again_and_again():
    def items():
        yield from range(3)
        raise OSError("torn")

    running = Prefetcher(items(), 2, "test")
    assert [next(running) for _ in range(3)] == [0, 1, 2]
    for _ in range(2):
        with pytest.raises(OSError, match="torn"):
            next(running)
    assert list(Prefetcher(iter_of(()), 1, "test")) == []


def iter_of(values):
    yield from values


def test_closing_a_prefetcher_closes_its_generator():
    closed = []

    def items():
        try:
            yield from range(10**9)
        finally:
            closed.append(True)

    running = Prefetcher(items(), 2, "test")
    assert next(running) == 0
    running.close()
    assert closed == [True] and list(running) == []


def test_items_are_received_in_the_consumers_thread_before_it_gets_them():
    received: list[tuple[int, str]] = []
    made_in: list[str] = []

    def make():
        for number in range(3):
            made_in.append(threading.current_thread().name)
            yield number

    running = Prefetcher(make(), 2, "maker", lambda item: received.append((item, threading.current_thread().name)))
    here = threading.current_thread().name
    for number in range(3):
        assert next(running) == number
        assert received == [(n, here) for n in range(number + 1)]
    with pytest.raises(StopIteration):
        next(running)
    running.close()
    assert len(received) == 3 and set(made_in) == {"maker"}
