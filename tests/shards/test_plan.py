"""The order of samples: every sample once an epoch, at every world size, from every position."""

import time
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shards.plan import Stream, epoch_order, eval_slice, few_shot_subset, mix64, rank_slice, shuffle_window

SHUFFLES = ["global", "shards:1", "shards:3", "none"]


def shards_of(num_samples: int) -> np.ndarray:
    """Uneven shards, numbered with gaps as several joined data sets may have them."""
    return np.sort(np.arange(num_samples) ** 2 % 7 * 3)


@pytest.mark.parametrize("shuffle", SHUFFLES)
@given(num_samples=st.integers(1, 400), seed=st.integers(-(2**70), 2**70), epoch=st.integers(0, 10**6))
@settings(max_examples=50, deadline=None)
def test_every_sample_once_an_epoch(shuffle, num_samples, seed, epoch):
    order = epoch_order(num_samples, seed, epoch, shuffle=shuffle, shard_of=shards_of(num_samples))
    assert order.dtype == np.int64
    assert np.array_equal(np.sort(order), np.arange(num_samples))


def test_order_never_changes():
    # Written down once: a resumed run must find the order it was started with, whatever the numpy version.
    assert mix64(1) == 0x5692161D100B05E5
    assert epoch_order(10, 0, 0).tolist() == GOLDEN_GLOBAL
    shard_of = np.repeat(np.arange(5), 2)
    assert epoch_order(10, 1, 2, shuffle="shards:2", shard_of=shard_of).tolist() == GOLDEN_SHARDS
    assert few_shot_subset(np.arange(12) % 3, 2, 7).tolist() == GOLDEN_FEW_SHOT


GOLDEN_GLOBAL = [4, 9, 3, 0, 5, 2, 6, 7, 8, 1]
GOLDEN_SHARDS = [3, 9, 8, 2, 0, 1, 5, 4, 7, 6]
GOLDEN_FEW_SHOT = [0, 2, 7, 8, 9, 10]


@pytest.mark.parametrize("shuffle", ["global", "shards:2"])
def test_epochs_and_seeds_differ(shuffle):
    shard_of = np.repeat(np.arange(20), 50)
    orders = [
        tuple(epoch_order(1000, seed, epoch, shuffle=shuffle, shard_of=shard_of))
        for seed in (-1, 0, 1, 2**63)
        for epoch in range(5)
    ]
    assert len(set(orders)) == len(orders)


def test_permutation_is_uniform():
    """Counts of (sample's tenth, position's tenth) over many epochs, against equal chances: a chi-square test."""
    num_samples, epochs, bins = 100, 2000, 10
    counts = np.zeros((bins, bins))
    neighbours = 0
    for epoch in range(epochs):
        order = epoch_order(num_samples, 3, epoch)
        np.add.at(counts, (order * bins // num_samples, np.arange(num_samples) * bins // num_samples), 1)
        neighbours += int((np.diff(order) == 1).sum())
    expected = num_samples * epochs / bins**2
    chi_square = ((counts - expected) ** 2 / expected).sum()
    # 81 degrees of freedom, deviation 12.7; sampling without replacement makes the counts vary slightly less.
    assert 81 - 5 * 12.7 < chi_square < 81 + 5 * 12.7
    # Each of the 99 places follows on its predecessor with a chance of 1/100.
    assert abs(neighbours - 0.99 * epochs) < 5 * np.sqrt(0.99 * epochs)


def test_pairs_of_small_permutations_are_all_reached():
    seen = {tuple(epoch_order(4, 0, epoch)) for epoch in range(500)}
    assert len(seen) == 24


@pytest.mark.parametrize("window", [1, 2, 5, 100])
def test_shard_windows(window):
    rng = np.random.default_rng(0)
    shard_of = np.repeat(np.arange(11), rng.integers(1, 30, 11))
    order = epoch_order(len(shard_of), 5, 1, shuffle=f"shards:{window}", shard_of=shard_of)
    visited = shard_of[order]
    shards, first_visit = np.unique(visited, return_index=True)
    assert len(shards) == 11
    # Shards numbered by their first visit: K at a time, and each window is done before the next one begins.
    turn = np.empty(11, np.int64)
    turn[np.argsort(first_visit)] = np.arange(11)
    assert (np.diff(turn[visited] // window) >= 0).all()
    assert not np.array_equal(order, np.sort(order))


@pytest.mark.parametrize("shuffle", SHUFFLES)
def test_ranks_share_each_batch_alike_at_every_world_size(shuffle):
    num_samples, global_batch, steps = 101, 24, 13  # the batches span epochs
    shard_of = shards_of(num_samples)
    reference = Stream(num_samples, 9, shuffle, shard_of).take(0, global_batch * steps)
    for world_size in (1, 2, 3, 4, 8):
        streams = [Stream(num_samples, 9, shuffle, shard_of) for _ in range(world_size)]
        for step in range(steps):
            shares = [
                streams[rank].take(*rank_slice(step * global_batch, global_batch, rank, world_size))
                for rank in range(world_size)
            ]
            batch = slice(step * global_batch, (step + 1) * global_batch)
            assert np.array_equal(np.concatenate([ids for ids, _ in shares]), reference[0][batch])
            assert np.array_equal(np.concatenate([epochs for _, epochs in shares]), reference[1][batch])
    for epoch in range(3):
        ids = reference[0][epoch * num_samples : (epoch + 1) * num_samples]
        assert np.array_equal(np.sort(ids), np.arange(num_samples))
    assert np.array_equal(reference[1], np.arange(global_batch * steps) // num_samples)


@given(num_samples=st.integers(1, 50), start=st.integers(0, 500), count=st.integers(0, 300))
@settings(max_examples=100, deadline=None)
def test_restart_anywhere_equals_the_tail(num_samples, start, count):
    whole = Stream(num_samples, 4).take(0, start + count)
    tail = Stream(num_samples, 4).take(start, start + count)
    assert np.array_equal(whole[0][start:], tail[0])
    assert np.array_equal(whole[1][start:], tail[1])


def test_far_positions_and_few_kept_orders():
    stream = Stream(1000, 0)
    ids, epochs = stream.take(10**15, 10**15 + 5000)
    assert epochs[0] == 10**12 and epochs[-1] == 10**12 + 4
    assert np.array_equal(np.sort(ids[:1000]), np.arange(1000))
    assert len(stream._orders) <= 2


@given(global_batch=st.integers(1, 2**40), world_size=st.integers(1, 4096))
@settings(max_examples=300, deadline=None)
def test_rank_slice_arithmetic(global_batch, world_size):
    if global_batch % world_size:
        with pytest.raises(ValueError, match=rf"{global_batch} .* {world_size} ranks.*nearest that can is \d+") as info:
            rank_slice(0, global_batch, 0, world_size)
        nearest = int(str(info.value).rsplit(" ", 1)[1])
        assert nearest % world_size == 0 and nearest >= world_size
        assert abs(nearest - global_batch) <= world_size / 2 or nearest == world_size
        return
    slices = [rank_slice(7, global_batch, rank, world_size) for rank in range(world_size)]
    assert slices[0][0] == 7 and slices[-1][1] == 7 + global_batch
    assert all(left[1] == right[0] for left, right in pairwise(slices))


@given(num_samples=st.integers(0, 2**40), world_size=st.integers(1, 4096))
@settings(max_examples=100, deadline=None)
def test_eval_slices_cover_everything_once(num_samples, world_size):
    slices = [eval_slice(num_samples, rank, world_size) for rank in range(world_size)]
    sizes = [stop - start for start, stop in slices]
    assert slices[0][0] == 0 and slices[-1][1] == num_samples
    assert all(left[1] == right[0] for left, right in pairwise(slices))
    assert max(sizes) - min(sizes) <= 1


@pytest.mark.parametrize(
    "call",
    [
        lambda: rank_slice(0, 8, 2, 2),
        lambda: rank_slice(0, 8, -1, 2),
        lambda: rank_slice(0, 0, 0, 1),
        lambda: eval_slice(5, 1, 1),
        lambda: epoch_order(0, 0, 0),
        lambda: epoch_order(5, 0, 0, shuffle="shards:0"),
        lambda: epoch_order(5, 0, 0, shuffle="shards:x"),
        lambda: epoch_order(5, 0, 0, shuffle="random"),
        lambda: epoch_order(5, 0, 0, shuffle="shards:2"),
        lambda: epoch_order(5, 0, 0, shuffle="shards:2", shard_of=np.zeros(4, np.int64)),
        lambda: Stream(5, 0, "shards:2"),
        lambda: Stream(0, 0),
        lambda: Stream(5, 0).take(3, 2),
        lambda: Stream(5, 0).take(-1, 2),
        lambda: few_shot_subset(np.zeros(3, np.int64), 0, 0),
        lambda: few_shot_subset(np.zeros(0, np.int64), 1, 0),
    ],
)
def test_bad_arguments_are_named(call):
    with pytest.raises(ValueError, match=r"\d"):
        call()


def test_windows_are_read_from_their_word():
    assert [shuffle_window(word) for word in ("global", "none", "shards:1", "shards:12")] == [None, None, 1, 12]


@pytest.mark.parametrize(
    "shuffle", ["shards:0", "shards:", "shards:x", "shards:-1", "shards:9999999999", "shards:²", "windows:3", ""]
)
def test_words_for_other_windows_are_refused(shuffle):
    with pytest.raises(ValueError, match=rf"'shards:K' with K of at least 1 \(and .*\), or 'none', got '{shuffle}'"):
        shuffle_window(shuffle)


def test_few_shot_subset():
    rng = np.random.default_rng(0)
    labels = rng.permutation(np.repeat(np.arange(40), rng.integers(6, 30, 40)))
    subset = few_shot_subset(labels, 6, 1)
    assert np.array_equal(np.bincount(labels[subset]), np.full(40, 6))
    assert np.array_equal(subset, np.unique(subset))
    assert np.array_equal(subset, few_shot_subset(labels, 6, 1))
    assert not np.array_equal(subset, few_shot_subset(labels, 6, 2))
    with pytest.raises(ValueError, match=r"class 1 has 1 videos, 2 are asked for \(2 of 4 classes"):
        few_shot_subset(np.array([0, 0, 1, 3, 3]), 2, 0)
    assert sorted(labels[few_shot_subset(labels, 1, 1)].tolist()) == sorted(set(labels.tolist()))
    assert few_shot_subset(np.array([0, 0, 1, 3, 3]), 2, 0, at_most=True).tolist() == [0, 1, 2, 3, 4]
    capped = few_shot_subset(labels, 12, 1, at_most=True)
    assert np.array_equal(np.bincount(labels[capped]), np.minimum(np.bincount(labels), 12))


def test_ten_million_samples_are_quick():
    epoch_order(1000, 0, 0)
    start = time.process_time()
    order = epoch_order(10_000_000, 0, 0)
    seconds = time.process_time() - start
    # The benchmark holds the tighter limit of 1 s; this one only catches a change of the order of growth.
    assert seconds < 4
    assert np.bincount(order, minlength=10_000_000).max() == 1
