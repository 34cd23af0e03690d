"""What the coming batches need: uses of shards in order, and how far ahead they and the rows of the index are known."""

import itertools
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import shards.ahead
from shards.ahead import UpcomingShards, look_ahead, rows_ahead


def test_a_plan_knows_what_is_needed_next():
    plan = UpcomingShards()
    for shards_of_batch in ([0, 1], [1, 2], *[[3]] * 300, [0]):
        plan.add(shards_of_batch)
    assert plan.in_order() == [0, 1, 2, 3]
    assert [plan.next_use(shard) for shard in (0, 1, 2, 3, 9)] == [0, 0, 1, 2, math.inf]
    for _ in range(60):
        plan.advance()
    # 0 is needed again in the last batch, 1 and 2 never are; 3 is in use.
    assert plan.in_order() == [3, 0] and plan.next_use(0) == 302 and plan.next_use(1) == math.inf
    assert plan.next_use(3) == 2


def test_uses_of_a_plan_are_kept_apart_where_an_epoch_is_short():
    """On many ranks an epoch is a few batches for each."""
    plan = UpcomingShards()
    for number in range(40):
        plan.add([number % 8])
    for _ in range(10):
        plan.advance()
    assert plan.in_order() == [0, 1, 2, 3, 4, 5, 6, 7]
    assert [plan.next_use(shard) for shard in range(8)] == [8, 9, 10, 11, 12, 13, 14, 15]


@given(st.lists(st.sets(st.integers(0, 3), max_size=3), max_size=30), st.integers(0, 40))
def test_upcoming_uses_are_those_of_the_batches(batches, advanced):
    """Each use begins where the shard was not needed in the two batches before, and counts until two batches after."""
    plan = UpcomingShards()
    for batch in batches:
        plan.add(batch)
    for _ in range(advanced):
        plan.advance()
    expected = {}
    for shard in range(4):
        needed = [number for number, batch in enumerate(batches) if shard in batch]
        firsts = [number for number in needed if not {number - 1, number - 2} & set(needed)]
        lasts = [
            number for place, number in enumerate(needed) if needed[place + 1 :] == [] or needed[place + 1] > number + 2
        ]
        # A batch is left behind two batches later, one use of a shard at a time.
        left = 0
        for now in range(1, advanced + 1):
            left += left < len(lasts) and lasts[left] < now - 2
        expected[shard] = firsts[left] if left < len(firsts) else math.inf
    assert {shard: plan.next_use(shard) for shard in range(4)} == expected
    known = [shard for shard in range(4) if expected[shard] < math.inf]
    assert sorted(plan.in_order()) == known
    assert [expected[shard] for shard in plan.in_order()] == sorted(expected[shard] for shard in known)


class Source:
    """A follower of `look_ahead` that notes how many uses it knew at each advance."""

    def __init__(self, num_shards: int) -> None:
        self.num_shards = num_shards
        self.known: list[list[int]] = []

    def follow(self, upcoming: UpcomingShards) -> None:
        self.upcoming = upcoming

    def advanced(self) -> None:
        self.known.append(self.upcoming.in_order())


def test_each_source_knows_its_own_shards_in_time():
    """Three data sets of 2, 1 and 3 shards, of which the second is a local one."""
    first, third = Source(2), Source(3)
    batches = [[0, 3], [3], [1, 2], [5], [2, 4]]
    coming = look_ahead(iter(batches), np.array, [(first, 0), (third, 3)], most_samples=100)
    assert next(coming) == [0, 3]
    assert (first.known, third.known) == ([[0, 1]], [[0, 2, 1]])
    assert third.upcoming.next_use(1) == 4 and first.upcoming.next_use(1) == 2
    assert list(coming) == batches[1:] and len(first.known) == len(third.known) == 5
    assert (first.known[-1], third.known[-1]) == ([], [2, 1])  # the last two have only been begun


@pytest.mark.parametrize(("most_samples", "most_of_all"), [(12, 99), (99, 12)])
def test_no_more_samples_are_known_than_asked_for(monkeypatch, most_samples, most_of_all):
    """Nor is more taken from the batches: whoever makes them may have no end."""
    monkeypatch.setattr(shards.ahead, "_MAX_KNOWN_SAMPLES", most_of_all)
    drawn = itertools.count()
    source = Source(50)
    batches = ([number % 50] * 3 for number in drawn)
    coming = look_ahead(batches, np.array, [(source, 0)], most_samples=most_samples)
    for number in range(8):
        assert next(coming) == [number] * 3
        assert sorted(source.known[-1])[-1] == number + 3  # four batches of three are known before one goes
    assert next(drawn) == 11


def test_far_uses_become_known_little_by_little():
    """What is needed first must not wait until a whole epoch is known."""
    source = Source(500)
    coming = look_ahead(([number] for number in range(500)), np.array, [(source, 0)], most_samples=10**6)
    for number in range(4):
        next(coming)
        assert len(source.known[-1]) == min(500, 64 * (number + 1)) - max(0, number - 1)


def test_rows_are_wanted_a_few_batches_ahead():
    wanted: list[int] = []

    def want(batch: list[int]) -> int:
        wanted.append(batch[0])
        return len(batch)

    batches = [[number] * 100 for number in range(20)]
    coming = rows_ahead(iter(batches), want)
    for number, batch in enumerate(coming):
        assert batch == batches[number]
        # Four batches more each time, up to 512 samples: six batches, less those that were given out.
        assert wanted == list(range(min(20, [4, 7][number] if number < 2 else number + 6)))
    assert number == 19
    monotone = rows_ahead(([number] * 256 for number in range(9)), len)
    assert [batch[0] for batch in monotone] == list(range(9))
