"""The plan of a batch: which frames of which videos, and where each of their crops goes."""

import dataclasses
import hashlib
import itertools
import json

import numpy as np
import pytest
from batches import build, settings
from frame_folders import make_frame_folders

from shards.format import SampleError
from shards.plan import few_shot_subset
from shards.reader import ShardDataset
from text4vis.config.batches import BatchSizes
from text4vis.config.schema import ConfigError
from text4vis.data.datasets import open_split
from text4vis.data.plan import BatchPlan, Planner
from text4vis.data.sampling import test_indices as clip_indices


def planner(folder, split, **data):
    config = settings(folder, **data)
    return Planner(config, split, open_split(config, split), 0, 1)


@pytest.mark.parametrize(("clips", "crops"), [(1, 1), (1, 3), (4, 3), (2, 10)])
@pytest.mark.parametrize("dense", [False, True])
def test_every_frame_of_every_view_has_one_target(shards, clips, crops, dense):
    """Views are clip-major, and each distinct frame is planned once, also of videos shorter than a clip."""
    plans = planner(shards, "val", test_clips=clips, test_crops=crops, dense=dense)
    for sample in range(23):
        video = plans.plan_video(sample, 0)
        numbers = clip_indices(int(plans.dataset.num_frames[sample]), 4, clips, dense).reshape(clips, 4)
        expected = {(k * crops + c, t, c): numbers[k, t] for k in range(clips) for c in range(crops) for t in range(4)}
        assert {target: frame.number for frame in video.frames for target in frame.targets} == expected
        assert sum(len(frame.targets) for frame in video.frames) == len(expected)
        assert video.numbers.tolist() == sorted(set(numbers.ravel().tolist()))
        assert {frame.size for frame in video.frames} == {(32, 48)}
    assert plans.views_shape == (clips * crops, 4, 24, 24, 3)


def test_a_batch_lists_its_videos_in_their_rows(shards):
    plans = planner(shards, "train", flip=1.0, flip_swaps=[[0, 1]])
    ids, epochs = np.array([7, 2, 7]), np.array([0, 5, 1])
    plan = plans.plan(ids, epochs)
    assert plan.ids.tolist() == ids.tolist() and [video.epoch for video in plan.videos] == epochs.tolist()
    swapped = {0: 1, 1: 0, 2: 2}
    assert plan.labels.tolist() == [swapped[int(label)] for label in plans.dataset.labels[ids]]
    assert plan.ids.dtype == plan.labels.dtype == np.int64
    for (sample, numbers), video in zip(plan.requests, plan.videos, strict=True):
        assert sample == video.sample and numbers.tolist() == [frame.number for frame in video.frames]
    assert plan.videos[0] == plans.plan_video(7, 0) != plans.plan_video(7, 1) == plan.videos[2]
    empty = BatchPlan([])
    assert empty.ids.shape == empty.labels.shape == (0,) and empty.ids.dtype == np.int64


SWAPPED = {"flip_swaps": [[0, 2]], "blur": 0.3}


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (SWAPPED | {"augmentation": "released"}, "2a0bb809c9cf5a0d"),
        (SWAPPED | {"augmentation": "paper"}, "a70852a4e3a1b792"),
        (SWAPPED | {"augmentation": "something"}, "f1d3c5df8ddc76c4"),
        ({"augmentation": "none"}, "d4f3e9027995b71c"),
    ],
    ids=["released", "paper", "something", "none"],
)
def test_plans_are_what_they_always_were(shards, data, expected):
    """A run that goes on with a newer version trains on the same frames, crops and labels."""
    plans = planner(shards, "train", **data)
    seen = [plans.plan_video(sample, epoch) for epoch in range(3) for sample in range(23)]
    text = json.dumps(seen).replace('"fast"', "false").replace('"bicubic"', "true")  # a boolean when these were taken
    assert hashlib.sha256(text.encode()).hexdigest()[:16] == expected


def test_frames_that_are_too_large_when_scaled_are_refused(shards):
    plans = planner(shards, "val", scale_size=8192, input_size=24)
    with pytest.raises(SampleError, match=r"frame 0 is 48x32 pixels by the index, 12288x8192 when scaled, more than"):
        plans.plan_video(0, 0)


def test_frames_may_have_as_many_pixels_as_the_limit(shards, monkeypatch):
    """Stored 32 x 48, scaled 64 x 96."""
    plans = planner(shards, "val", scale_size=64)
    for limit, message in (
        (64 * 96, None),
        (64 * 96 - 1, "96x64 when scaled, more than 6143"),
        (32 * 48 - 1, "48x32 pixels by the index, of which 1 to 1535 can be used"),
    ):
        monkeypatch.setattr("text4vis.data.plan.MAX_FRAME_PIXELS", limit)
        if message is None:
            plans.plan_video(0, 0)
        else:
            with pytest.raises(SampleError, match=message):
                plans.plan_video(0, 0)
    monkeypatch.undo()
    plans = planner(shards, "val", scale_size=32)
    monkeypatch.setattr("text4vis.data.plan.MAX_FRAME_PIXELS", 32 * 48)
    plans.plan_video(0, 0)


def test_frames_without_pixels_are_refused(shards, monkeypatch):
    monkeypatch.setattr(ShardDataset, "frame_sizes", lambda _, __, numbers: [(0, 48)] * len(numbers))
    with pytest.raises(SampleError, match="frame 0 is 48x0 pixels by the index, of which 1 to"):
        planner(shards, "val").plan_video(0, 0)


def test_the_views_of_an_evaluation_share_the_room_of_a_training_batch(shards):
    for batch_size, videos in ((2, 1), (11, 1), (12, 2), (18, 3)):
        plans = planner(shards, "val", batch_size=batch_size, test_clips=2, test_crops=3)
        assert (plans.num_clips, plans.num_crops, plans.num_views, plans.batch_size) == (2, 3, 6, videos)
        longest = np.argsort(-plans.dataset.num_frames, kind="stable")[:videos]
        plan = plans.plan(longest, np.zeros_like(longest))
        assert sum(len(video.frames) for video in plan.videos) == plans.max_frames == videos * 2 * 4
        within = dataclasses.replace(plans, sizes=BatchSizes(6 * 4, 1, 6 * 4))  # as training evaluates
        assert within.batch_size == 4
    own = planner(shards, "val", batch_size=2, val_batch_size=18, test_clips=2, test_crops=3)
    assert own.batch_size == dataclasses.replace(own, sizes=BatchSizes(2, 1, 3)).batch_size == 3
    train = planner(shards, "train", batch_size=5, val_batch_size=9, test_clips=2, test_crops=3)
    assert (train.num_clips, train.num_crops, train.num_views, train.batch_size) == (1, 1, 1, 5)
    assert train.max_frames == 5 * 4 and train.views_shape == (1, 4, 24, 24, 3)
    assert dataclasses.replace(train, sizes=BatchSizes(3, 1, 3)).batch_size == 3


@pytest.mark.parametrize("split", ["train", "val"])
def test_a_stream_begins_at_its_first_video(shards, split):
    plans = planner(shards, split)
    for first, second in zip(itertools.islice(plans.batches(), 3), itertools.islice(plans.batches(0), 3), strict=True):
        assert first[0].tolist() == second[0].tolist()
    ids, epochs = next(plans.batches())
    assert next(plans.plans()).ids.tolist() == ids.tolist() and epochs.tolist() == [0, 0]
    if split == "train":
        following = next(plans.batches(2))[0].tolist()
        assert next(itertools.islice(plans.batches(), 1, None))[0].tolist() == following != ids.tolist()
        assert next(plans.plans(2)).ids.tolist() == following


def test_stand_ins_are_what_they_always_were(shards):
    """A run that goes on with a newer version puts the same videos in a bad one's place."""
    plans = planner(shards, "train")
    found = [list(itertools.islice(plans.substitutes(sample, epoch), 4)) for sample, epoch in ((7, 0), (7, 3), (8, 0))]
    assert found == [[17, 15, 5, 4], [3, 13, 8, 7], [14, 4, 5, 12]]
    many = list(itertools.islice(plans.substitutes(7, 0), 500))
    assert set(many) == set(range(23))
    assert list(planner(shards, "val").substitutes(7, 0)) == []


def test_labels_that_are_swapped_must_exist(shards, tmp_path):
    planner(shards, "train", flip_swaps=[[0, 2]])
    with pytest.raises(ConfigError, match=r"data.flip_swaps: a flip swaps label 3, but there are 3 classes"):
        planner(shards, "train", flip_swaps=[[0, 3]])
    planner(shards, "val", flip_swaps=[[0, 3]])
    one = make_frame_folders(tmp_path, [2, 2], num_classes=1)
    assert len(planner(build(one.annotations, one.root, one.labels, tmp_path / "shards"), "train").videos) == 2


def test_few_shot_plans_go_over_whole_passes_of_the_chosen_videos(shards):
    plans = planner(shards, "train", shot=2)
    chosen = few_shot_subset(plans.dataset.labels, 2, 5)
    assert plans.few_shot.tolist() == plans.videos.tolist() == chosen.tolist()
    assert plans.epoch_samples == 18  # 23 videos are three passes over six
    ids = np.concatenate([ids for ids, _ in itertools.islice(plans.batches(), 3)])
    assert sorted(ids.tolist()) == chosen.tolist()
    other = planner(shards, "train", shot=2, shot_seed=6)
    assert other.few_shot.tolist() == few_shot_subset(plans.dataset.labels, 2, 6).tolist() != chosen.tolist()
    listed = [
        f"{plans.dataset.name(i)} {plans.dataset.num_frames[i]} {plans.dataset.labels[i]}\n" for i in chosen.tolist()
    ]
    assert plans.few_shot_list() == "".join(listed)
    for all_videos in (planner(shards, "train"), planner(shards, "train", shot=0), planner(shards, "val", shot=2)):
        assert all_videos.few_shot is None and all_videos.few_shot_list() == ""
        assert all_videos.videos.tolist() == list(range(23)) and all_videos.epoch_samples == 23
    with pytest.raises(ConfigError, match=r"data.shot: few-shot subset: class \d has \d videos, 9 are asked for"):
        planner(shards, "train", shot=9)


def test_the_list_of_stored_videos_has_no_frames(stored_videos):
    plans = planner(stored_videos / "shards", "train", shot=1)
    assert sorted(plans.few_shot_list().splitlines()) == ["clip 0.mp4 0", "clip 1.mp4 1", "clip 2.mp4 2"]


@pytest.mark.parametrize("world_size", [1, 2, 3, 30])
def test_ranks_share_what_there_is(shards, world_size):
    """Evaluation: every video once, in order, also of a choice. Training: the global batch, cut into micro batches."""
    alone = planner(shards, "val", batch_size=4)
    for ids in (None, np.array([20, 3, 11, 5, 9])):
        ranks = [dataclasses.replace(alone, rank=rank, world_size=world_size, ids=ids) for rank in range(world_size)]
        batches = [batch for rank in ranks for batch, _ in rank.batches()]
        assert np.concatenate(batches).tolist() == (list(range(23)) if ids is None else ids.tolist())
        assert max(map(len, batches)) <= 4
    train = planner(shards, "train")
    whole = next(dataclasses.replace(train, sizes=BatchSizes(12 * world_size, 1, 1)).batches(7))
    cut = BatchSizes(4, 3, world_size)
    ranks = [dataclasses.replace(train, rank=rank, world_size=world_size, sizes=cut) for rank in range(world_size)]
    parts = [pair for rank in ranks for pair in itertools.islice(rank.batches(7), 3)]
    assert [len(ids) for ids, _ in parts] == [4] * 3 * world_size
    for part, expected in zip(zip(*parts, strict=True), whole, strict=True):
        assert np.concatenate(part).tolist() == expected.tolist()
