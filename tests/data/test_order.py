"""The order of training over a data set: one stream, or a mixture whose sources have their shares."""

import numpy as np
import pytest
from batches import settings
from frame_folders import make_frame_folders

from shards.annotations import parse_annotations, parse_labels
from shards.mixture import Mixture
from shards.plan import Stream, share_positions
from shards.writer import build_shards
from text4vis.config.schema import ConfigError
from text4vis.data.datasets import open_split
from text4vis.data.order import TrainOrder

NUM_VIDEOS, NUM_SMALL = 23, 9


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """Nine videos."""
    base = tmp_path_factory.mktemp("small")
    folders = make_frame_folders(base, [2] * NUM_SMALL)
    build_shards(
        parse_annotations(folders.annotations), root=folders.root, labels=parse_labels(folders.labels),
        output=base / "shards", shard_bytes=10_000,
    )  # fmt: skip
    return base / "shards"


def order_of(train, *, videos=None, epoch_samples=None, **data) -> TrainOrder:
    config = settings("unused", train=train, **data)
    with open_split(config, "train") as dataset:
        videos = np.arange(len(dataset)) if videos is None else np.array(videos)
        return TrainOrder(config, dataset, videos, epoch_samples or len(dataset))


def mixed(shards, small, weights=(1, 3), **options) -> TrainOrder:
    entries = [{"path": str(path), "weight": weight} for path, weight in zip((shards, small), weights, strict=True)]
    return order_of(entries, **options)


@pytest.mark.parametrize("streams", [1, 2])
def test_without_weights_all_shards_are_one_stream(shards, small, streams):
    order = order_of([str(shards), str(small)], shuffle="shards:2", streams=streams)
    with open_split(settings("unused", train=[str(shards), str(small)]), "train") as dataset:
        stream = Stream(len(dataset), 5, "shards:2", dataset.shard_of, num_streams=streams)
    for start in (0, 12, 60):
        ids, passes = stream.at(share_positions(start, 12, 1, 3, streams))
        found = order.share(start, 12, 1, 3)
        assert found[0].tolist() == ids.tolist() and found[1].tolist() == passes.tolist()
    assert order.mixture == [] and order.shares() == order.samples_by_source(100) == {}
    assert order.peers(30).tolist() == list(range(NUM_VIDEOS + NUM_SMALL))
    assert order.source_of(np.array([0, 22, 23, 31])).tolist() == [0, 0, 1, 1]


def test_the_videos_of_a_mixture_come_by_weight(shards, small):
    order = mixed(shards, small, (1, 3), epoch_samples=40, shuffle="shards:2", streams=2)
    with open_split(settings("unused", train=[str(shards), str(small)]), "train") as dataset:
        expected = Mixture([NUM_VIDEOS, NUM_SMALL], [10, 30], 5, "shards:2", dataset.shard_of, num_streams=2)
    ids, passes = order.share(40, 80, 0, 1)
    places = expected.at(share_positions(40, 80, 0, 1, 2))
    assert ids.tolist() == places[0].tolist() and passes.tolist() == places[1].tolist()
    assert np.bincount(order.source_of(ids)).tolist() == [20, 60]
    assert order.mixture == [(NUM_VIDEOS, 1), (NUM_SMALL, 3)]
    assert order.shares() == {str(shards): 0.25, str(small): 0.75}
    assert order.samples_by_source(120) == {str(shards): 30, str(small): 90}
    huge = mixed(shards, small, (1e308, 1e308), epoch_samples=40)
    assert huge.shares() == {str(shards): 0.5, str(small): 0.5}


def test_a_video_is_replaced_by_one_of_its_source(shards, small):
    order = mixed(shards, small)
    for sample in (0, NUM_VIDEOS - 1):
        assert order.peers(sample).tolist() == list(range(NUM_VIDEOS))
    for sample in (NUM_VIDEOS, NUM_VIDEOS + NUM_SMALL - 1):
        assert order.peers(sample).tolist() == list(range(NUM_VIDEOS, NUM_VIDEOS + NUM_SMALL))


def test_chosen_videos_keep_their_sources(shards, small):
    """With `data.shot` the order goes over some videos only; ids stay those of the data set."""
    videos = [1, 5, 20, 24, 30]
    order = mixed(shards, small, (1, 1), videos=videos, epoch_samples=10)
    ids, passes = order.share(0, 30, 0, 1)
    assert set(ids.tolist()) == set(videos)
    assert (order.source_of(ids) == 0).sum() == 15
    assert passes[ids < NUM_VIDEOS].max() == 4 and passes[ids >= NUM_VIDEOS].max() == 7
    assert order.peers(5).tolist() == [1, 5, 20] and order.peers(24).tolist() == [24, 30]
    alone = order_of([str(shards)], videos=videos[:3], epoch_samples=21)
    assert sorted(alone.share(0, 3, 0, 1)[0].tolist()) == alone.peers(1).tolist() == videos[:3]


def test_windows_are_those_of_the_chosen_videos_shards(shards):
    """shards:1 takes each shard's videos together, also where only some videos are chosen."""
    videos = np.arange(0, NUM_VIDEOS, 2)
    order = order_of([str(shards)], videos=videos, shuffle="shards:1")
    with open_split(settings(shards), "train") as dataset:
        visited = dataset.shard_of[order.share(0, len(videos), 0, 1)[0]]
    assert np.count_nonzero(np.diff(visited)) + 1 == len(np.unique(visited)) > 2


def test_sources_are_named_apart(shards, small):
    """A path that occurs twice is numbered by its place; an entry of several paths has all their names."""
    entries = [
        {"path": str(shards), "weight": 1},
        {"path": [str(small), str(shards)], "weight": 1},
        {"path": str(shards), "weight": 2},
    ]
    order = order_of(entries)
    both = f"{small} + {shards}"
    assert order.shares() == {f"{shards} (1)": 0.25, both: 0.25, f"{shards} (3)": 0.5}
    assert [(source.start, source.stop) for source in order.sources] == [(0, 23), (23, 55), (55, 78)]


def test_impossible_mixtures_are_named(shards, small):
    with pytest.raises(ConfigError, match=f"data.train: {small} has a weight, but data.shot chose none of its videos"):
        mixed(shards, small, videos=[0, 3, 22])
    with pytest.raises(ConfigError, match=r"data.train: the weight 1 of 1001 is none of an epoch's 32 samples"):
        mixed(shards, small, (1000, 1))


def test_more_streams_than_shards_are_refused(shards):
    with open_split(settings(shards), "train") as dataset:
        shard_of = dataset.shard_of
    num_shards = len(np.unique(shard_of))
    assert num_shards > 2
    order_of([str(shards)], shuffle="shards:1", streams=num_shards)
    with pytest.raises(ConfigError, match=rf"data.streams: {num_shards + 1} streams cannot share {num_shards} shards"):
        order_of([str(shards)], shuffle="shards:1", streams=num_shards + 1)
    few = np.flatnonzero(shard_of < 2)
    order_of([str(shards)], videos=few, shuffle="shards:1", streams=2)
    with pytest.raises(ConfigError, match=r"data.streams: 3 streams cannot share 2 shards"):
        order_of([str(shards)], videos=few, shuffle="shards:1", streams=3)
    one = np.flatnonzero(shard_of == 1)
    with pytest.raises(ConfigError, match=r"data.streams: 2 streams cannot share 1 shards"):
        order_of([str(shards)], videos=one, shuffle="shards:1", streams=2)
    assert sorted(order_of([str(shards)], videos=one).share(0, len(one), 0, 1)[0].tolist()) == one.tolist()
