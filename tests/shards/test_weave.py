"""Shards dealt to streams: each host meets its own, batches are the same on any number of hosts, nothing is lost."""

import hashlib
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from shard_data import make_dataset, serve

from shards.plan import Stream, epoch_order, mix64, share_positions
from shards.reader import open_dataset
from shards.weave import arranged, small_numbers, stable_places, windows_of_samples

sizes_of_shards = st.lists(st.integers(1, 12), min_size=1, max_size=30)


def shard_numbers(sizes) -> np.ndarray:
    return np.repeat(np.arange(len(sizes)), sizes)


def woven(sizes, seed=0, window=2, num_streams=4) -> Stream:
    shard_of = shard_numbers(sizes)
    return Stream(len(shard_of), seed, f"shards:{window}", shard_of, num_streams=num_streams)


def fetched(stream: Stream, num_hosts: int, epoch: int = 0) -> int:
    """Shards that all hosts together meet in an epoch, counted once a host."""
    positions = np.arange(epoch * stream.num_samples, (epoch + 1) * stream.num_samples)
    ids, _ = stream.at(positions)
    hosts = positions % stream.num_streams * num_hosts // stream.num_streams
    return sum(len(np.unique(stream.shard_of[ids[hosts == host]])) for host in range(num_hosts))


@given(sizes=sizes_of_shards, seed=st.integers(0, 2**64), num_streams=st.integers(1, 9), window=st.integers(1, 4))
@settings(max_examples=150, deadline=None)
def test_every_sample_once_an_epoch(sizes, seed, num_streams, window):
    stream = woven(sizes, seed, window, num_streams)
    ids, epochs = stream.take(0, 3 * stream.num_samples)
    for epoch in range(3):
        assert np.array_equal(np.sort(ids[epochs == epoch]), np.arange(stream.num_samples))
    assert np.array_equal(epochs, np.arange(len(ids)) // stream.num_samples)


@given(sizes=sizes_of_shards, start=st.integers(0, 300), count=st.integers(1, 200), num_streams=st.integers(1, 8))
@settings(max_examples=100, deadline=None)
def test_restart_anywhere_equals_the_tail(sizes, start, count, num_streams):
    whole = woven(sizes, num_streams=num_streams).take(0, start + count)
    tail = woven(sizes, num_streams=num_streams).take(start, start + count)
    assert np.array_equal(whole[0][start:], tail[0]) and np.array_equal(whole[1][start:], tail[1])


@given(
    sizes=sizes_of_shards,
    num_streams=st.sampled_from([1, 2, 4, 8]),
    per_stream=st.integers(1, 3),
    start=st.integers(0, 99),
)
@settings(max_examples=100, deadline=None)
def test_batches_are_the_same_in_the_same_order_at_every_world_size(sizes, num_streams, per_stream, start):
    global_batch = 8 * per_stream
    for step in range(3):
        batches = []
        for world_size in (1, 2, 4, 8):
            stream = woven(sizes, num_streams=num_streams)
            shares = [
                stream.at(share_positions(start + step * global_batch, global_batch, rank, world_size, num_streams))[0]
                for rank in range(world_size)
            ]
            batches.append(np.concatenate(shares).tolist())
        assert batches[0] == batches[1] == batches[2] == batches[3]
        first = start + step * global_batch
        assert sorted(batches[0]) == sorted(woven(sizes, num_streams=num_streams).take(first, first + global_batch)[0])


@given(
    position=st.integers(0, 10**9),
    per_stream=st.integers(1, 5),
    num_streams=st.sampled_from([2, 4, 6, 12]),
    data=st.data(),
)
@settings(max_examples=100, deadline=None)
def test_a_host_has_the_same_streams_in_every_batch(position, per_stream, num_streams, data):
    num_hosts = data.draw(st.sampled_from([number for number in (1, 2, 3, 4, 6) if num_streams % number == 0]))
    ranks_per_host = data.draw(st.sampled_from([1, per_stream]))
    global_batch, world_size = num_streams * per_stream, num_hosts * ranks_per_host
    for host in range(num_hosts):
        ranks = range(host * ranks_per_host, (host + 1) * ranks_per_host)
        shares = [share_positions(position, global_batch, rank, world_size, num_streams) for rank in ranks]
        width = num_streams // num_hosts
        assert set(np.concatenate(shares) % num_streams) == set(range(host * width, (host + 1) * width))


@pytest.mark.parametrize("num_hosts", [1, 2, 4, 8])
@pytest.mark.parametrize(
    "sizes", [np.full(64, 17), np.random.default_rng(0).integers(5, 12, 64)], ids=["equal", "unequal"]
)
def test_hosts_together_meet_each_shard_once_an_epoch(sizes, num_hosts):
    stream = woven(sizes, num_streams=8)
    for epoch in range(3):
        assert fetched(stream, num_hosts, epoch) == 64
    assert fetched(woven(sizes, num_streams=1), 1) == 64


@given(sizes=sizes_of_shards, num_streams=st.integers(1, 9), seed=st.integers(0, 99))
@settings(max_examples=200, deadline=None)
def test_a_border_cuts_one_shard_at_most(sizes, num_streams, seed):
    assert fetched(woven(sizes, seed, num_streams=num_streams), num_streams) <= len(sizes) + num_streams - 1


def test_without_streams_every_host_meets_every_shard():
    """What the streams are for: the measure above must tell the difference."""
    shard_of = shard_numbers(np.full(64, 17))
    ids = epoch_order(len(shard_of), 0, 0, shuffle="shards:8", shard_of=shard_of)
    met = [len(np.unique(shard_of[ids[host::4]])) for host in range(4)]
    assert min(met) > 60


@given(
    sizes=st.lists(st.integers(1, 30), min_size=1, max_size=40),
    parts=st.lists(st.integers(0, 9), min_size=1, max_size=6),
)
@settings(max_examples=200, deadline=None)
def test_arranging_keeps_every_shard(sizes, parts):
    total, weights = sum(sizes), sum(parts) or 1
    targets = np.diff(np.cumsum(parts) * total // weights, prepend=0).tolist()
    targets[-1] += total - sum(targets)
    assert sorted(arranged(sizes, targets)) == list(range(len(sizes)))


@pytest.mark.parametrize("window", [1, 2, 5, 100])
def test_each_stream_has_windows_of_its_own(window):
    rng = np.random.default_rng(2)
    stream = woven(rng.integers(1, 30, 45), 5, window, 3)
    ids, _ = stream.take(0, stream.num_samples)
    for number in range(3):
        visited = stream.shard_of[ids[number::3]]
        shards, first_visit = np.unique(visited, return_index=True)
        turn = np.empty(45, np.int64)
        turn[shards[np.argsort(first_visit)]] = np.arange(len(shards))
        assert (np.diff(turn[visited] // window) >= 0).all()
        assert window == 1 or not np.array_equal(visited, visited[np.argsort(turn[visited], kind="stable")])


def test_a_shard_on_a_border_is_cut_once_through_its_ids():
    shard_of = shard_numbers([5, 5, 5])
    windows = windows_of_samples(shard_of, np.array([2, 0, 1]), 1, np.array([8, 7]))
    assert windows.tolist() == [1, 1, 1, 2, 2, 3, 3, 3, 3, 3, 0, 0, 0, 0, 0]
    one = windows_of_samples(shard_numbers([3, 3]), np.array([0, 1]), 1, np.array([1, 5]))
    assert one.tolist() == [0, 1, 1, 2, 2, 2]
    assert windows_of_samples(shard_of[::-1], np.array([2, 0, 1]), 1, np.array([8, 7])).tolist() == [
        0, 0, 0, 0, 0, 3, 3, 3, 3, 3, 1, 1, 1, 2, 2,
    ]  # fmt: skip


@pytest.mark.parametrize("num_values", [1, 1 << 16, (1 << 16) + 1, 1 << 40])
def test_numbers_fit_their_type_and_have_16_bits_where_they_can(num_values):
    kind = small_numbers(num_values)
    assert np.iinfo(kind).max >= num_values - 1 and (kind is np.uint16) == (num_values <= 1 << 16)


def test_places_are_those_of_a_stable_sort_over_all_blocks(monkeypatch):
    monkeypatch.setattr("shards.weave._BLOCK_SAMPLES", 7)
    keys = np.random.default_rng(3).integers(0, 5, 100)
    places = np.concatenate([places for _, places in stable_places(keys)])
    assert np.array_equal(np.argsort(places), np.argsort(keys, kind="stable"))


def test_orders_never_change():
    """Hashes written down once, those of one stream before there were several."""
    found = {}
    for num_samples, num_shards, shuffle in (
        (1000, 37, "shards:1"),
        (1000, 37, "shards:5"),
        (100003, 900, "shards:16"),
    ):
        shard_of = np.sort(np.arange(num_samples) * 7919 % num_shards)
        order = epoch_order(num_samples, 3, 1, shuffle=shuffle, shard_of=shard_of)
        found[num_samples, shuffle] = digest(order)
    assert found == GOLDEN_WINDOWS
    unsorted = np.arange(1000) * 7919 % 37
    assert digest(epoch_order(1000, 3, 1, shuffle="shards:5", shard_of=unsorted)) == "0c4c590390d5e4ff"
    sizes = np.arange(900) % 7 + 110
    assert digest(woven(sizes, 3, 16, 8).take(5000, 200_000)[0]) == GOLDEN_STREAMS


def test_arrangements_never_change():
    """Few and many shards, of sizes that fill streams exactly and of sizes that rarely do."""
    found = []
    for case in range(200):
        largest, num_streams = (8, 300, 3, 30)[case % 4], 1 + case % 6
        sizes = [1 + mix64(1000 * case + shard) % largest for shard in range(1 + mix64(case) % 80)]
        targets = np.bincount(np.arange(sum(sizes)) % num_streams, minlength=num_streams).tolist()
        found.append(arranged(sizes, targets))
    assert hashlib.sha256(repr(found).encode()).hexdigest()[:16] == "39d5bb0e7a95fc32"


def digest(ids: np.ndarray) -> str:
    return hashlib.sha256(ids.astype("<i8").tobytes()).hexdigest()[:16]


GOLDEN_WINDOWS = {
    (1000, "shards:1"): "375747748b2e1e95",
    (1000, "shards:5"): "0433c17361c22cdb",
    (100003, "shards:16"): "361b8e65e03a1381",
}
GOLDEN_STREAMS = "181a578193c62be9"


def test_streams_differ_from_epoch_to_epoch():
    stream = woven(np.full(40, 10), num_streams=4)
    ids, _ = stream.take(0, 3 * stream.num_samples)
    first = [set(stream.shard_of[ids[epoch * 400 : (epoch + 1) * 400 : 4]]) for epoch in range(3)]
    assert first[0] != first[1] != first[2]


@pytest.mark.parametrize(
    "call",
    [
        lambda: Stream(5, 0, num_streams=2),
        lambda: Stream(5, 0, "none", np.zeros(5, np.int64), num_streams=2),
        lambda: Stream(5, 0, "shards:1", np.zeros(5, np.int64), num_streams=0),
    ],
)
def test_bad_arguments_are_named(call):
    with pytest.raises(ValueError, match=r"num_streams: expected 1, or more with shuffle='shards:K', got \d"):
        call()


def test_the_order_of_a_large_data_set_is_quick():
    sizes = np.random.default_rng(4).integers(150, 193, 1400)  # Kinetics-400 in shards of 1 GB
    stream = woven(sizes, 0, 32, 16)
    started = time.process_time()
    stream.take(0, 1)
    assert time.process_time() - started < 0.6


@pytest.mark.slow
@pytest.mark.parametrize("num_hosts", [1, 2, 4])
def test_hosts_with_caches_download_the_data_set_once_together(tmp_path, num_hosts):
    """Through the reader, from a server that counts: each host has a cache of its own, with room for all."""
    counts = np.random.default_rng(5).integers(1, 4, 96).tolist()
    make_dataset(tmp_path / "data", counts, videos_per_shard=4)
    tars = {path.name: path.stat().st_size for path in (tmp_path / "data").glob("*.tar")}
    with serve(tmp_path / "data") as server:
        for host in range(num_hosts):
            with open_dataset(server.address, cache_dir=tmp_path / f"host{host}", cache_bytes=1 << 30) as dataset:
                stream = Stream(len(dataset), 1, "shards:2", dataset.shard_of, num_streams=4)
                for start in range(0, len(dataset), 12):
                    ids, _ = stream.at(share_positions(start, 12, host, num_hosts, 4))
                    for sample in ids.tolist():
                        dataset.read(sample, np.array([0]))
        assert {name: server.requests[name] for name in tars} == dict.fromkeys(tars, 1)
