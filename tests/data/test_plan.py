"""The plan of a batch: which frames of which videos, and where each of their crops goes."""

import hashlib
import json

import numpy as np
import pytest
from batches import settings

from shards.format import SampleError
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
