"""Metrics against scikit-learn, counting by hand, and the published split rule."""

import warnings

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import average_precision_score

from text4vis.evaluation.metrics import (
    confusion_matrix,
    half_class_splits,
    mean_average_precision,
    mean_class_accuracy,
    topk_correct,
)


@pytest.mark.parametrize("num_classes", [2, 51, 101, 200])
def test_half_classes_follow_the_published_rule(num_classes):
    splits = half_class_splits(num_classes)
    assert len(splits) == 10
    state = np.random.get_state()[1].copy()
    assert half_class_splits(num_classes, 3)[2].tolist() == splits[2].tolist()
    assert (np.random.get_state()[1] == state).all()
    for seed, split in enumerate(splits):
        np.random.seed(seed)
        assert split.tolist() == sorted(np.random.permutation(num_classes)[: num_classes // 2])


@st.composite
def scored_videos(draw):
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    num_videos, num_classes = draw(st.integers(1, 40)), draw(st.integers(1, 7))
    scores = rng.integers(0, draw(st.sampled_from([2, 5, 10**6])), (num_videos, num_classes)) / 7
    return scores, rng.integers(0, num_classes, num_videos)


@given(scored_videos())
def test_map_equals_scikit_learn_over_the_classes_present(data):
    scores, labels = data
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        each = [average_precision_score(labels == c, scores[:, c]) for c in np.unique(labels)]
    assert mean_average_precision(scores, labels) == pytest.approx(100 * np.mean(each))


def test_map_refuses_nan_and_nothing():
    with pytest.raises(ValueError, match="NaN"):
        mean_average_precision(np.array([[0.1, np.nan]]), np.array([0]))
    with pytest.raises(ValueError, match="no videos"):
        mean_average_precision(np.zeros((0, 3)), np.zeros(0))


@given(scored_videos(), st.integers(1, 9))
def test_topk_counts_fewer_than_k_others_as_high(data, k):
    scores, labels = data
    expected = sum(
        sum(other >= row[label] for c, other in enumerate(row) if c != label) < k
        for row, label in zip(scores, labels, strict=True)
    )
    assert topk_correct(scores, labels, ks=(k,)) == {k: expected}


def test_topk_ties_and_nan_never_help():
    ties = np.ones((4, 6))
    assert topk_correct(ties, np.arange(4), ks=(1, 5, 6, 50)) == {1: 0, 5: 0, 6: 4, 50: 4}
    broken = np.array([[0.0, np.nan, 0.0], [1.0, np.nan, 0.0], [1.0, 0.0, 0.5]])
    assert topk_correct(broken, np.array([1, 0, 0]), ks=(1, 3)) == {1: 1, 3: 1}
    assert topk_correct(np.zeros((0, 3)), np.zeros(0)) == {1: 0, 5: 0}


def test_counts_of_parts_add_up_to_the_counts_of_the_whole():
    rng = np.random.default_rng(0)
    scores, labels = rng.random((31, 9)), rng.integers(0, 9, 31)
    whole = topk_correct(scores, labels)
    parts = [topk_correct(scores[part], labels[part]) for part in (slice(0, 7), slice(7, 31))]
    assert whole == {k: sum(part[k] for part in parts) for k in whole}
    predicted = scores.argmax(axis=1)
    confusion = confusion_matrix(predicted, labels, 9)
    assert (confusion == sum(confusion_matrix(predicted[p], labels[p], 9) for p in (slice(0, 7), slice(7, 31)))).all()
    assert np.trace(confusion) == whole[1]


def test_confusion_and_mean_class_accuracy():
    confusion = confusion_matrix(np.array([0, 1, 1, 2]), np.array([0, 0, 1, 1]), 4)
    assert confusion.tolist() == [[1, 1, 0, 0], [0, 1, 1, 0], [0, 0, 0, 0], [0, 0, 0, 0]]
    assert mean_class_accuracy(confusion) == 50.0
    assert mean_class_accuracy(np.diag([1, 5, 0])) == 100.0
    with pytest.raises(ValueError, match="no videos"):
        mean_class_accuracy(np.zeros((3, 3)))
    with pytest.raises(ValueError, match=r"not in 0\.\.3"):
        confusion_matrix(np.array([4]), np.array([0]), 4)
    with pytest.raises(ValueError, match=r"labels -1\.\.-1"):
        topk_correct(np.zeros((1, 3)), np.array([-1]))


def test_a_class_of_one_video_counts_as_much_as_others():
    assert mean_class_accuracy(np.array([[0, 1], [0, 2]])) == 50.0


def test_one_class_has_no_halves():
    with pytest.raises(ValueError, match="at least 2 classes, got 1"):
        half_class_splits(1)


def test_ids_of_one_class_are_in_range():
    assert confusion_matrix(np.array([1, 1]), np.array([1, 1]), 2).tolist() == [[0, 0], [0, 2]]
    assert topk_correct(np.eye(2), np.array([1, 1]), ks=(1,)) == {1: 1}


@pytest.mark.parametrize("ids", [[-1, 1], [0, 3]])
def test_one_id_out_of_range_among_good_ones_is_refused(ids):
    good = np.array([0, 1])
    for predicted, labels in ((np.array(ids), good), (good, np.array(ids))):
        with pytest.raises(ValueError, match=r"are not in 0\.\.2"):
            confusion_matrix(predicted, labels, 3)
    with pytest.raises(ValueError, match=r"are not in 0\.\.2"):
        topk_correct(np.zeros((2, 3)), np.array(ids))


@pytest.mark.parametrize("shapes", [((2,), (3,)), ((2, 2), (2, 2))])
def test_a_confusion_of_other_shapes_is_refused(shapes):
    with pytest.raises(ValueError, match=r"expected two \(N,\) arrays"):
        confusion_matrix(*(np.zeros(shape, int) for shape in shapes), 3)


@pytest.mark.parametrize("shapes", [((2, 3), (3,)), ((2,), (2,)), ((2, 3, 1), (2,))])
def test_scores_of_other_shapes_are_refused(shapes):
    with pytest.raises(ValueError, match=r"expected scores \(N, C\) and labels \(N,\)"):
        topk_correct(*(np.zeros(shape, int) for shape in shapes))
