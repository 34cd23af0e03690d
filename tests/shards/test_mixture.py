"""Mixtures: exact shares an epoch, evenly spread, whole passes over each source, at any position and world size."""

import hashlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shards.mixture import Mixture, exact_shares
from shards.plan import share_positions

sources = st.lists(st.tuples(st.integers(1, 40), st.integers(1, 60)), min_size=1, max_size=6)  # (size, count)


def mixture(given, seed=3, num_streams=1) -> Mixture:
    sizes, counts = zip(*given, strict=True)
    shard_of = np.arange(sum(sizes)) // 3
    return Mixture(sizes, counts, seed, "shards:2", shard_of, num_streams=num_streams)


def source_of(given, ids: np.ndarray) -> np.ndarray:
    return np.searchsorted(np.cumsum([size for size, _ in given]), ids, side="right")


@given(given=sources, num_streams=st.integers(1, 5))
@settings(max_examples=100, deadline=None)
def test_each_epoch_has_the_exact_counts_evenly_spread(given, num_streams):
    total = sum(count for _, count in given)
    ids, _ = mixture(given, num_streams=num_streams).at(np.arange(3 * total))
    by_source = source_of(given, ids)
    for source, (_, count) in enumerate(given):
        here = by_source == source
        assert [here[epoch * total : (epoch + 1) * total].sum() for epoch in range(3)] == [count] * 3
        due = np.arange(1, 3 * total + 1) * count / total
        assert np.abs(np.cumsum(here) - due).max() <= len(given) / 2 + 1


@given(given=sources, num_streams=st.integers(1, 5))
@settings(max_examples=100, deadline=None)
def test_no_sample_comes_again_before_all_of_its_source_came(given, num_streams):
    total = sum(count for _, count in given)
    ids, passes = mixture(given, num_streams=num_streams).at(np.arange(4 * total))
    by_source, start = source_of(given, ids), 0
    for source, (size, _) in enumerate(given):
        own, own_passes = ids[by_source == source], passes[by_source == source]
        assert np.array_equal(own_passes, np.arange(len(own)) // size)
        for first in range(0, len(own) - size + 1, size):
            assert np.array_equal(np.sort(own[first : first + size]), np.arange(start, start + size))
        start += size


@given(given=sources, start=st.integers(0, 500), num_streams=st.sampled_from([1, 2, 4]), steps=st.integers(1, 3))
@settings(max_examples=60, deadline=None)
def test_any_position_and_world_size_gives_the_same_batches(given, start, num_streams, steps):
    whole_ids, whole_passes = mixture(given, num_streams=num_streams).at(np.arange(start + steps * 8))
    for step in range(steps):
        first = start + step * 8
        batches = []
        for world_size in (1, 2, 4, 8):
            resumed = mixture(given, num_streams=num_streams)
            shares = [
                resumed.at(share_positions(first, 8, rank, world_size, num_streams)) for rank in range(world_size)
            ]
            batches.append([np.concatenate(parts).tolist() for parts in zip(*shares, strict=True)])
        assert batches[0] == batches[1] == batches[2] == batches[3]
        expected = zip(whole_ids[first : first + 8].tolist(), whole_passes[first : first + 8].tolist(), strict=True)
        assert sorted(zip(*batches[0], strict=True)) == sorted(expected)


@given(given=sources, position=st.integers(0, 2000))
@settings(max_examples=100, deadline=None)
def test_consumed_counts_what_came(given, position):
    mixed = mixture(given)
    ids, _ = mixed.at(np.arange(position))
    assert mixed.consumed(position) == np.bincount(source_of(given, ids), minlength=len(given)).tolist()


@given(
    weights=st.lists(st.floats(0.01, 100), min_size=1, max_size=8),
    total=st.integers(100_000, 10**9),
)
@settings(max_examples=200, deadline=None)
def test_shares_are_exact(weights, total):
    counts = exact_shares(weights, total)
    assert sum(counts) == total
    for weight, count in zip(weights, counts, strict=True):
        assert abs(count - weight / sum(weights) * total) < 1 + 1e-6


def test_shares_by_hand():
    assert exact_shares([2, 1], 9) == [6, 3]
    assert exact_shares([0.7, 0.3], 10) == [7, 3]
    assert exact_shares([1, 1, 1], 10) == [4, 3, 3]
    assert exact_shares([5], 7) == [7]
    with pytest.raises(ValueError, match="the weight 1 of 1001 is none of an epoch's 10 samples; raise it"):
        exact_shares([1000, 1], 10)
    with pytest.raises(ValueError, match="expected numbers above 0, got"):
        exact_shares([1, 0], 10)


def test_order_never_changes():
    ids, passes = mixture([(5, 4), (3, 8)], seed=7).at(np.arange(24))
    assert ids.tolist() == GOLDEN_IDS
    assert passes.tolist() == GOLDEN_PASSES
    mixed = Mixture([9000, 400], [7000, 2400], 1, "shards:8", np.arange(9400) // 50, num_streams=4)
    assert hashlib.sha256(mixed.at(np.arange(30_000))[0].astype("<i8").tobytes()).hexdigest()[:16] == GOLDEN_STREAMS


GOLDEN_IDS = [6, 0, 7, 5, 3, 7, 5, 4, 6, 5, 2, 7, 6, 1, 6, 7, 0, 5, 6, 3, 5, 7, 1, 6]
GOLDEN_PASSES = [0, 0, 0, 0, 0, 1, 1, 0, 1, 2, 0, 2, 2, 0, 3, 3, 1, 3, 4, 1, 4, 4, 1, 5]
GOLDEN_STREAMS = "b153b63b52f0c267"


def test_streams_keep_their_shards_where_an_epoch_ends_within_a_pass():
    """A source of 60 shards that two epochs of 321 samples go through: a border cuts one shard at most."""
    mixed = Mixture([600, 30], [301, 20], 0, "shards:2", np.arange(630) // 10, num_streams=4)
    positions = np.arange(5 * 321)
    ids, passes = mixed.at(positions)
    for number in range(2):
        here = (ids < 600) & (passes == number)
        met = [np.unique(ids[here & (positions % 4 == stream)] // 10) for stream in range(4)]
        assert 60 <= sum(map(len, met)) <= 60 + 3


def test_far_positions_cost_nothing_more():
    mixed = Mixture([1000, 10], [900, 110], 0)
    far = 1010 * 10**9 + 500
    ids, passes = mixed.at(np.arange(far, far + 32))
    assert mixed.consumed(far)[0] == 900 * 10**9 + int((mixed.at(np.arange(500))[0] < 1000).sum())
    assert passes.max() > 10**9 and ids.max() < 1010


def test_bad_counts_are_named():
    for counts in ([1], [1, 0], [2**31, 1]):
        with pytest.raises(ValueError, match="counts: expected 1 to 2147483648 samples of each of 2 sources, got"):
            Mixture([5, 5], counts, 0)
    Mixture([5, 5], [2**31 - 1, 1], 0)
    with pytest.raises(ValueError, match="of each of 0 sources"):
        Mixture([], [], 0)
