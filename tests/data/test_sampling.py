"""Temporal indices against the published rules, written out here a second time in the plainest way."""

import itertools

import numpy as np
import pytest

from text4vis.data.augmentation import generator
from text4vis.data.sampling import test_indices as clip_indices
from text4vis.data.sampling import train_indices, val_indices

COUNTS = range(1, 401)


@pytest.mark.parametrize("segments", [8, 16, 32])
def test_val_takes_the_first_frame_of_each_segment(segments):
    for n in COUNTS:
        expected = [int(n / segments * i) % n for i in range(segments)]
        assert val_indices(n, segments).tolist() == expected


@pytest.mark.parametrize("segments", [8, 16, 32])
@pytest.mark.parametrize("clips", range(1, 11))
def test_clips_follow_the_published_rule(segments, clips):
    for n in COUNTS:
        expected = []
        for start in np.linspace(0, n / segments - 1, num=clips, dtype=int).tolist():
            expected += [int(start + n / segments * i) % n for i in range(segments)]
        assert clip_indices(n, segments, clips).tolist() == expected


@pytest.mark.parametrize("segments", [8, 16, 32])
@pytest.mark.parametrize("clips", range(2, 11))
def test_dense_clips_follow_the_published_rule(segments, clips):
    for n in COUNTS:
        expected = []
        for k in range(clips):
            start = k * (max(0, n - 128) // (clips - 1))
            expected += [(start + i * (128 // segments)) % n for i in range(segments)]
        assert clip_indices(n, segments, clips, dense=True).tolist() == expected


@pytest.mark.parametrize("segments", [8, 16, 32])
def test_one_dense_clip_takes_the_centre_window(segments):
    for n in COUNTS:
        start = (n - 128) // 2 if n > 128 else 0
        expected = [(start + i * (128 // segments)) % n for i in range(segments)]
        assert clip_indices(n, segments, 1, dense=True).tolist() == expected


class Chosen:
    """A generator that draws the numbers it is given, over and over."""

    def __init__(self, *numbers: float) -> None:
        self.numbers = itertools.cycle(numbers)

    def random(self, size: int | None = None):
        return next(self.numbers) if size is None else np.array([next(self.numbers) for _ in range(size)])


def published_train(n, segments, dense, numbers):
    """The published rule with `randint(k)` standing for the integer part of the next number times k."""

    def randint(k):
        return int(next(numbers) * k)

    if dense:
        positions = max(1, 1 + n - 128)
        start = 0 if positions == 1 else randint(positions - 1)
        return [(start + i * (128 // segments)) % n for i in range(segments)]
    if n <= segments:
        return sorted([*range(n), *(randint(n) for _ in range(segments - n))])
    ticks = [i * n // segments for i in range(segments + 1)]
    return [ticks[i] + randint(ticks[i + 1] - ticks[i]) for i in range(segments)]


@pytest.mark.parametrize("dense", [False, True])
@pytest.mark.parametrize("segments", [8, 16, 32])
def test_training_follows_the_published_rule(segments, dense):
    numbers = [0.0, 0.999999, 0.5, 0.123, 0.77, 0.31]
    for n in COUNTS:
        expected = published_train(n, segments, dense, itertools.cycle(numbers))
        drawn = train_indices(n, segments, Chosen(*numbers), dense)
        assert drawn.dtype == np.int64 and drawn.tolist() == expected


@pytest.mark.parametrize("segments", [8, 16, 32])
def test_train_draws_one_frame_of_each_segment(segments):
    for n in COUNTS:
        drawn = train_indices(n, segments, generator(1, 0, n))
        assert drawn.dtype == np.int64 and drawn.shape == (segments,)
        if n <= segments:
            assert set(drawn.tolist()) == set(range(n)) and (np.diff(drawn) >= 0).all()
        else:
            for i, frame in enumerate(drawn.tolist()):
                assert i * n // segments <= frame < (i + 1) * n // segments


@pytest.mark.parametrize("segments", [8, 16, 32])
def test_dense_training_draws_every_window_but_the_last(segments):
    """The original never draws the last start. Windows of short videos begin at 0 and wrap around."""
    for n in (1, 100, 128, 129, 131, 160):
        drawn = [train_indices(n, segments, generator(5, 0, sample), dense=True) for sample in range(400)]
        starts = {int(indices[0]) for indices in drawn}
        assert starts == set(range(max(1, n - 128)))
        offsets = np.arange(segments) * (128 // segments)
        assert all(indices.tolist() == ((indices[0] + offsets) % n).tolist() for indices in drawn)


def test_train_reaches_every_frame_about_equally_often():
    counts = np.zeros(20, int)
    for sample in range(4000):
        np.add.at(counts, train_indices(20, 4, generator(7, 3, sample)), 1)
    assert counts.min() > 0.8 * 800 and counts.max() < 1.2 * 800


@pytest.mark.parametrize(("frames", "segments", "clips"), [(0, 8, 1), (8, 0, 1), (8, 8, 0)])
def test_impossible_counts_are_refused(frames, segments, clips):
    with pytest.raises(ValueError, match="must be at least 1"):
        clip_indices(frames, segments, clips)


@pytest.mark.parametrize("frames, segments", [(0, 8), (8, 0)])
@pytest.mark.parametrize("dense", [False, True])
def test_impossible_training_clips_are_refused(frames, segments, dense):
    with pytest.raises(ValueError, match="must be at least 1, got 0"):
        train_indices(frames, segments, np.random.default_rng(0), dense)


def test_a_video_of_as_many_frames_as_segments_draws_nothing():
    """What is drawn after the frames, the crop, depends on how many numbers they took."""
    rng = np.random.default_rng(0)
    assert train_indices(8, 8, rng).tolist() == list(range(8))
    assert rng.random() == np.random.default_rng(0).random()
