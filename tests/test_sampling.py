"""Temporal indices against the published rules, written out here a second time in the plainest way."""

import numpy as np
import pytest

from text4vis.augmentation import generator
from text4vis.sampling import test_indices as clip_indices
from text4vis.sampling import train_indices, val_indices

COUNTS = range(1, 401)


@pytest.mark.parametrize("segments", [8, 16, 32])
def test_val_takes_the_first_frame_of_each_segment(segments):
    for n in COUNTS:
        expected = [int(n / segments * i) % n for i in range(segments)]
        assert val_indices(n, segments).tolist() == expected


@pytest.mark.parametrize("segments", [8, 16, 32])
@pytest.mark.parametrize("clips", [1, 2, 3, 4, 10])
def test_clips_follow_the_published_rule(segments, clips):
    for n in COUNTS:
        expected = []
        for start in np.linspace(0, n / segments - 1, num=clips, dtype=int).tolist():
            expected += [int(start + n / segments * i) % n for i in range(segments)]
        assert clip_indices(n, segments, clips).tolist() == expected


@pytest.mark.parametrize("segments", [8, 16, 32])
@pytest.mark.parametrize("clips", [2, 3, 4, 10])
def test_dense_clips_follow_the_published_rule(segments, clips):
    for n in COUNTS:
        expected = []
        for k in range(clips):
            start = k * (max(0, n - 128) // (clips - 1))
            expected += [(start + i * (128 // segments)) % n for i in range(segments)]
        assert clip_indices(n, segments, clips, dense=True).tolist() == expected


def test_one_dense_clip_takes_the_centre_window():
    assert clip_indices(328, 8, 1, dense=True).tolist() == [100 + 16 * i for i in range(8)]
    assert clip_indices(5, 8, 1, dense=True).tolist() == [16 * i % 5 for i in range(8)]


@pytest.mark.parametrize("segments", [8, 16])
def test_train_draws_one_frame_of_each_segment(segments):
    for n in COUNTS:
        drawn = train_indices(n, segments, generator(1, 0, n))
        assert drawn.dtype == np.int64 and drawn.shape == (segments,)
        if n <= segments:
            assert set(drawn.tolist()) == set(range(n)) and (np.diff(drawn) >= 0).all()
        else:
            for i, frame in enumerate(drawn.tolist()):
                assert i * n // segments <= frame < (i + 1) * n // segments


def test_train_reaches_every_frame_about_equally_often():
    counts = np.zeros(20, int)
    for sample in range(4000):
        np.add.at(counts, train_indices(20, 4, generator(7, 3, sample)), 1)
    assert counts.min() > 0.8 * 800 and counts.max() < 1.2 * 800


def test_dense_training_covers_the_original_range_of_starts():
    starts = {int(train_indices(131, 8, generator(5, 0, sample), dense=True)[0]) for sample in range(200)}
    assert starts == {0, 1, 2}  # 131 - 128 starts: the original never draws the last one
    assert {int(train_indices(100, 8, generator(5, 0, s), dense=True)[0]) for s in range(20)} == {0}


@pytest.mark.parametrize(("frames", "segments", "clips"), [(0, 8, 1), (8, 0, 1), (8, 8, 0)])
def test_impossible_counts_are_refused(frames, segments, clips):
    with pytest.raises(ValueError, match="must be at least 1"):
        clip_indices(frames, segments, clips)
