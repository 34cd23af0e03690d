"""The plain samples for other programs: those of webdataset, in the loader's order, each once for all who share."""

import io
import itertools
import json
import logging
import pickle
import tarfile

import numpy as np
import pytest
import webdataset as wds
from batches import build, settings
from frame_folders import jpeg, make_frame_folders
from hypothesis import given
from hypothesis import settings as limits
from hypothesis import strategies as st
from shard_data import serve
from torch.utils.data import DataLoader

from shards import SampleError, ShardError, index_tars, open_dataset
from text4vis.config import ConfigError
from text4vis.data import build_loader, iterate_samples, sampling


def of_webdataset(folder):
    """What webdataset yields, by tar and key."""
    samples = list(wds.WebDataset([str(path) for path in sorted(folder.glob("*.tar"))], shardshuffle=False))
    for sample in samples:
        sample.pop("__local_path__", None)
    return {(sample["__url__"], sample["__key__"]): sample for sample in samples}


def take(source, split="train", count=None, **options):
    with iterate_samples(source, split, **options) as samples:
        return list(itertools.islice(samples, count))


def keys(samples):
    return [sample["__key__"] for sample in samples]


def frames_of(sample):
    return [int(name[:6]) for name in sample if name.endswith(".jpg")]


@pytest.fixture(scope="module")
def foreign(tmp_path_factory):
    """Two tars of another program with the same keys in both, and an index of them elsewhere."""
    folder, index = tmp_path_factory.mktemp("foreign"), tmp_path_factory.mktemp("index")
    for tar in range(2):
        with tarfile.open(folder / f"{tar:05d}.tar", "w") as archive:
            for key, count in (("a", 12), ("deep/b", 3)):
                files = [(f"{key}.{frame}.jpg", jpeg(100 * tar + frame)) for frame in range(count)]
                for name, data in [*files, (f"{key}.cls", b"%d" % tar)]:
                    info = tarfile.TarInfo(name)
                    info.size = len(data)
                    archive.addfile(info, io.BytesIO(data))
    index_tars(str(folder), output=index, labels=["archery", "surfing"])
    return folder, index


def test_all_frames_are_what_webdataset_yields(shards):
    ours = take(settings(shards), "val", frames="all")
    assert len(ours) == 23
    for sample in ours:
        del sample["__frames__"]
    assert {(sample["__url__"], sample["__key__"]): sample for sample in ours} == of_webdataset(shards)


def test_a_stored_video_is_what_webdataset_yields(stored_videos):
    ours = take(settings(stored_videos / "shards"), "val")
    for sample in ours:
        num_frames = json.loads(sample["json"])["num_frames"]
        assert sample.pop("__frames__") == sampling.test_indices(num_frames, 4).tolist()
    assert {(sample["__url__"], sample["__key__"]): sample for sample in ours} == of_webdataset(
        stored_videos / "shards"
    )


def test_tars_of_others_have_their_keys_and_frames(foreign):
    folder, index = foreign
    expected = of_webdataset(folder)
    ours = take(str(index), "val", frames="all")
    assert {(sample["__url__"], sample["__key__"]) for sample in ours} == expected.keys()
    for sample in ours:
        same = expected[sample["__url__"], sample["__key__"]]
        facts = json.loads(sample["json"])
        assert facts["label"] == int(same["cls"]) and facts["class"] == ["archery", "surfing"][facts["label"]]
        assert facts["num_frames"] == len(same) - 3
        for number in range(facts["num_frames"]):
            assert sample[f"{number:06d}.jpg"] == same[f"{number}.jpg"]


@pytest.mark.parametrize("split", ["train", "val"])
def test_order_and_frames_are_those_of_the_loader(shards, split):
    config = settings(shards, test_clips=2)
    with build_loader(config, split) as loader:
        planned = [video for plan in itertools.islice(loader.plans(), 40) for video in plan.videos]
        names = [loader.dataset.name(video.sample) for video in planned]
        stored = [loader.dataset.read(video.sample, video.numbers) for video in planned]
    ours = take(config, split, len(planned))
    assert len(ours) == len(planned)
    for sample, video, name, files in zip(ours, planned, names, stored, strict=True):
        facts = json.loads(sample["json"])
        assert facts["name"] == name and facts["label"] == video.label
        assert frames_of(sample) == video.numbers.tolist() == sorted(set(sample["__frames__"]))
        assert [data for key, data in sample.items() if key.endswith(".jpg")] == files


@limits(max_examples=25, deadline=None)
@given(world=st.integers(1, 5), taken=st.integers(0, 60), streams=st.sampled_from([1, 1, 2, 3]))
def test_ranks_share_the_stream_and_go_on_where_they_stopped(shards, world, taken, streams):
    """Which videos: what each of them would read, without reading."""
    config = settings(shards, shuffle="shards:3" if streams > 1 else "global", streams=streams)

    def positions(rank, **options):
        with iterate_samples(config, rank=rank, world_size=world, epochs=4, **options) as samples:
            return list(samples._rank_positions())

    turn = int(np.lcm(world, streams))
    everything = sorted(itertools.chain.from_iterable(positions(rank) for rank in range(world)))
    assert everything == list(range(4 * 23))  # each once an epoch, whoever reads it
    resumed = turn * (taken // turn)
    later = [positions(rank, consumed=resumed) for rank in range(world)]
    assert sorted(itertools.chain.from_iterable(later)) == list(range(resumed, 4 * 23))
    each = resumed // world
    assert [positions(rank)[:each] + later[rank] for rank in range(world)] == [positions(rank) for rank in range(world)]


def test_every_rank_reads_its_own_samples_and_any_number_of_ranks_goes_on(shards):
    config = settings(shards)
    whole = take(config, epochs=2)
    assert sorted(keys(whole)) == sorted(2 * [f"{number:09d}" for number in range(23)])
    halves = [take(config, rank=rank, world_size=2, epochs=2) for rank in range(2)]
    assert halves == [whole[0::2], whole[1::2]]
    assert [take(config, rank=rank, world_size=3, consumed=14, epochs=2) for rank in range(3)] == [
        whole[14 + rank :: 3] for rank in range(3)
    ]


def test_in_evaluation_every_rank_has_its_share_once(shards):
    config = settings(shards)
    shares = [keys(take(config, "val", rank=rank, world_size=5)) for rank in range(5)]
    assert list(itertools.chain(*shares)) == [f"{number:09d}" for number in range(23)]
    assert {len(share) for share in shares} == {4, 5}


@pytest.mark.slow
@pytest.mark.parametrize(("workers", "start"), [(0, None), (2, "fork"), (3, "fork")])
def test_a_dataloader_gives_each_sample_once_and_in_order(shards, workers, start):
    config = settings(shards)
    expected = take(config, epochs=2)
    with iterate_samples(config, epochs=2) as samples:
        loader = DataLoader(samples, batch_size=None, num_workers=workers, multiprocessing_context=start)
        assert list(loader) == expected
        batches = DataLoader(samples, 4, num_workers=workers, multiprocessing_context=start, collate_fn=list)
        assert sorted(keys(itertools.chain(*batches))) == sorted(keys(expected))


def test_workers_read_from_a_far_store_that_their_parent_has_opened(shards, tmp_path):
    with serve(shards.parent) as server:
        config = settings(shards, train=[f"{server.address}/{shards.name}"], cache_dir=str(tmp_path))
        with iterate_samples(config, epochs=1) as samples:
            expected = list(samples)
            assert list(DataLoader(samples, None, num_workers=2, multiprocessing_context="fork")) == expected


def test_a_pickled_stream_yields_the_same(shards):
    with iterate_samples(settings(shards), epochs=1) as samples, pickle.loads(pickle.dumps(samples)) as copy:
        assert list(copy) == list(samples)


def test_pieces_of_webdataset_take_the_samples(shards):
    with iterate_samples(settings(shards), "val") as samples:
        pipeline = wds.DataPipeline(
            samples, wds.decode("rgb8"), wds.map(lambda sample: (sample["json"], sample["000000.jpg"]))
        )
        decoded = list(pipeline)
    with open_dataset(str(shards)) as dataset:
        assert [facts["label"] for facts, _ in decoded] == dataset.labels.tolist()
    assert {pixels.shape for _, pixels in decoded} == {(32, 48, 3)}


def test_a_far_store_gives_the_same_and_is_asked_for_no_other_frames(tmp_path):
    folders = make_frame_folders(tmp_path, [24] * 5)
    for path in folders.root.rglob("*.jpg"):
        path.write_bytes(path.read_bytes() + bytes(70_000))  # too large to be fetched along with a frame beside it
    folder = build(folders.annotations, folders.root, folders.labels, tmp_path / "far" / "shards")
    near, cache = take(settings(folder), epochs=1), str(tmp_path / "cache")
    with serve(folder.parent) as server:
        address = f"{server.address}/shards"
        with iterate_samples(settings(folder, train=[address], cache_dir=cache), epochs=1) as samples:
            before = server.bytes_sent
            far = list(samples)
            sent = server.bytes_sent - before
    assert {sample["__url__"].rpartition("/")[0] for sample in far} == {address}
    assert [sample | {"__url__": ""} for sample in far] == [sample | {"__url__": ""} for sample in near]
    wanted = sum(len(value) for sample in far for name, value in sample.items() if not name.startswith("__"))
    assert wanted <= sent < 1.02 * wanted


def test_a_token_of_an_address_is_not_in_the_samples(shards, tmp_path):
    with serve(shards.parent) as server:
        address = f"{server.address}/{shards.name}?token=secret"
        (sample,) = take(settings(shards, train=[address], cache_dir=str(tmp_path)), count=1)
    assert sample["__url__"].startswith(f"{server.address}/{shards.name}/0") and "secret" not in repr(sample)


def damage(folder, sample, frame):
    """Changes a byte of a stored frame."""
    with open_dataset(str(folder)) as dataset:
        wanted = dataset._wanted(sample, np.array([frame]))
        path = folder / dataset._parts[0].index.manifest.shards[wanted.shard].name
    data = bytearray(path.read_bytes())
    data[wanted.ranges[0][0] + 40] ^= 1
    status = path.stat()
    path.write_bytes(data)
    return status


@pytest.fixture
def damaged(tmp_path):
    folders = make_frame_folders(tmp_path, [1] * 12)
    folder = build(folders.annotations, folders.root, folders.labels, tmp_path / "shards")
    damage(folder, 7, 0)
    return folder


def test_a_damaged_frame_is_an_error_that_names_it(damaged):
    with pytest.raises(SampleError, match=r"video_\d+ \(sample 7, .* frame 0 has the CRC-32"):
        take(settings(damaged), epochs=1)


def test_a_damaged_frame_is_skipped_where_the_configuration_says_so(damaged, caplog):
    config = settings(damaged, on_error="skip", max_bad_share=0.1)
    caplog.set_level(logging.WARNING, "text4vis")
    kept = take(config, "val")
    assert keys(kept) == [f"{number:09d}" for number in range(12) if number != 7]
    assert "skipped, data.val: " in caplog.text and "sample 7" in caplog.text
    stream = take(config, epochs=2)
    assert len(stream) == 24 and "000000007" not in keys(stream)
    shared = [take(config, rank=rank, world_size=2, epochs=2) for rank in range(2)]
    assert shared == [stream[0::2], stream[1::2]]  # the substitutes too
    with pytest.raises(ShardError, match=r"data\.max_bad_share"):
        take(settings(damaged, on_error="skip", max_bad_share=0.01), "val")


def test_a_json_that_contradicts_the_index_is_an_error(tmp_path):
    folders = make_frame_folders(tmp_path, [1] * 3)
    folder = build(folders.annotations, folders.root, folders.labels, tmp_path / "shards")
    (tar,) = folder.glob("*.tar")
    before = tar.read_bytes()
    for old, new, message in [(b'"label": 2', b'"label": 1', "contradicts"), (b'"label": 2', b'"label": {', "damaged")]:
        assert before.count(old) == 1
        tar.write_bytes(before.replace(old, new))
        with pytest.raises(SampleError, match=rf"video_0002 \(sample \d, .*{message}"):
            take(settings(folder), "val")


@pytest.mark.parametrize(
    "wrong",
    [
        {"split": "test"},
        {"frames": "none"},
        {"rank": 2, "world_size": 2},
        {"consumed": -1},
        {"epochs": 0},
        {"split": "val", "consumed": 4},
        {"split": "val", "epochs": 2},
    ],
)
def test_what_cannot_be_meant_is_refused(shards, wrong):
    with pytest.raises(ValueError, match="expected"):
        iterate_samples(settings(shards), **wrong)


def test_an_address_alone_has_the_defaults_of_every_key(shards, tmp_path):
    (sample, *_) = take(str(shards), count=1)
    assert len(sample["__frames__"]) == 8
    with pytest.raises(ShardError, match="nothing_here"):
        iterate_samples(str(tmp_path / "nothing_here"))
    with pytest.raises(ConfigError):
        iterate_samples([])
