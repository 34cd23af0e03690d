"""Calibration: temperature, calibration error, "unsure", sets of classes."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from text4vis.evaluation.calibration import (
    MIN_VIDEOS,
    Calibration,
    at_temperature,
    calibration_error_of_chance,
    calibration_figures,
    expected_calibration_error,
    fit_temperature,
    reliability,
    threshold_for_accuracy,
    threshold_for_coverage,
)


def drawn(num_videos: int, temperature: float, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Probabilities that are too sure by a temperature, and labels drawn from what they should be."""
    rng = np.random.default_rng(seed)
    logits = rng.normal(size=(num_videos, 6)) * 2
    true = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    labels = (true.cumsum(axis=1)[:, :-1] <= rng.random((num_videos, 1))).sum(axis=1)
    return at_temperature(true, 1 / temperature), labels


@pytest.mark.parametrize("temperature", [0.4, 1.0, 3.0])
def test_the_temperature_that_was_hidden_is_found(temperature):
    scores, labels = drawn(20_000, temperature)
    assert fit_temperature(scores, labels) == pytest.approx(temperature, rel=0.05)


def test_probabilities_at_a_temperature_are_the_softmax_of_divided_logits():
    logits = np.array([[1.0, 2.0, -3.0], [400.0, 0.0, -400.0]])

    def softmax(x):
        powers = np.exp(x - x.max(axis=1, keepdims=True))
        return powers / powers.sum(axis=1, keepdims=True)

    np.testing.assert_allclose(at_temperature(softmax(logits[:1]), 2.5), softmax(logits[:1] / 2.5), rtol=1e-12)
    extreme = at_temperature(softmax(logits), 2.0)
    assert np.isfinite(extreme).all() and extreme[1].argmax() == 0


def test_the_coldest_answers_are_certain_and_finite():
    scores = np.full((1, 1000), 1.0)
    scores[0, 3] = 1.1
    cold = at_temperature(scores / scores.sum(), 1e-4)
    assert cold[0, 3] == 1 and cold.sum() == 1


def test_the_temperature_stays_between_its_bounds():
    scores = np.array([[0.51, 0.49], [0.49, 0.51]])
    assert fit_temperature(scores, np.array([0, 1])) == pytest.approx(np.exp(-4), rel=0.01)
    assert fit_temperature(scores, np.array([1, 0])) == pytest.approx(np.exp(4), rel=0.01)


def test_calibration_error_by_hand():
    scores = np.array([[0.9, 0.1], [0.9, 0.1], [0.6, 0.4], [0.4, 0.6]])
    labels = np.array([0, 1, 0, 1])
    # 90 % sure and half right, 60 % sure and always right: (2 * 40 + 2 * 40) / 4.
    assert expected_calibration_error(scores, labels) == pytest.approx(40)
    assert [row["videos"] for row in reliability(scores, labels)] == [2, 2]
    assert expected_calibration_error(np.array([[1.0, 0.0]]), np.array([0])) == 0
    assert expected_calibration_error(np.array([[1.0, 0.0]]), np.array([1])) == 100


def test_bins_are_fifteenths_and_the_last_holds_certainty():
    confidence = np.array([0.53, 0.54, 0.59, 0.93, 0.94, 1.0])  # borders at 8/15 = 0.533, 9/15, 14/15 = 0.933
    rows = reliability(np.stack([confidence, 1 - confidence], axis=1), np.array([0, 0, 1, 1, 0, 0]))
    assert [row["videos"] for row in rows] == [1, 2, 1, 2]
    assert [row["confidence"] for row in rows] == pytest.approx([53, 56.5, 93, 97])
    assert [row["accuracy"] for row in rows] == [100, 50, 0, 100]


def test_few_videos_show_an_error_that_is_chance():
    errors = {}
    for count in (200, 5000):
        scores, labels = drawn(count, 1.0)
        errors[count] = calibration_error_of_chance(scores)
        assert expected_calibration_error(scores, labels) == pytest.approx(errors[count], abs=2.5)
    assert 3 < errors[200] < 12 and errors[5000] < errors[200] / 3
    assert calibration_error_of_chance(np.array([[1.0, 0.0], [0.0, 1.0]])) == 0


def test_the_threshold_keeps_the_accuracy_and_no_lower_one_does():
    scores, labels = drawn(500, 2.0)
    confidence, correct = scores.max(axis=1), scores.argmax(axis=1) == labels
    threshold = threshold_for_accuracy(scores, labels, 90)
    assert threshold is not None
    assert 100 * correct[confidence >= threshold].mean() >= 90
    for lower in np.unique(confidence[confidence < threshold]):
        assert 100 * correct[confidence >= lower].mean() < 90
    assert threshold_for_accuracy(np.array([[0.9, 0.1]]), np.array([1]), 50) is None
    scores = np.array([[0.9, 0.1], [0.8, 0.2], [0.7, 0.3], [0.6, 0.4]])
    assert threshold_for_accuracy(scores, np.array([0, 0, 1, 0]), 75) == 0.6
    assert threshold_for_accuracy(scores, np.array([0, 0, 1, 0]), 75.5) == 0.8
    # Equal confidences are answered all or none.
    assert threshold_for_accuracy(np.full((2, 2), 0.5), np.array([0, 1]), 60) is None
    scores[2] = scores[1]
    assert threshold_for_accuracy(scores, np.array([0, 0, 1, 1]), 100) == 0.9


@given(st.integers(1, 60), st.sampled_from([80, 90, 95]), st.integers(0, 99))
def test_sets_of_classes_cover_what_they_were_fitted_on(num_videos, coverage, seed):
    scores, labels = drawn(num_videos, 1.5, seed)
    threshold = threshold_for_coverage(scores, labels, coverage)
    assert 100 * (scores[np.arange(num_videos), labels] >= threshold).mean() >= coverage


def test_a_coverage_takes_the_rank_of_split_conformal_prediction():
    own = np.array([0.5, 0.9, 0.6, 0.95, 0.7, 0.8, 0.85, 0.55, 0.75])
    scores, labels = np.stack([1 - own, own], axis=1), np.ones(9, int)
    assert threshold_for_coverage(scores, labels, 80) == 0.55  # ceil((9 + 1) * 0.8): the eighth largest
    assert threshold_for_coverage(scores, labels, 90) == 0.5
    assert threshold_for_coverage(scores, labels, 91) == 0


def test_sets_of_classes_cover_new_videos_as_promised():
    scores, labels = drawn(4000, 1.0)
    threshold = threshold_for_coverage(scores[:2000], labels[:2000], 90)
    covered = (scores[2000:][np.arange(2000), labels[2000:]] >= threshold).mean()
    assert covered == pytest.approx(0.9, abs=0.025)


def test_figures_are_measured_on_videos_that_they_were_not_fitted_on():
    scores, labels = drawn(2000, 3.0)
    found = calibration_figures(scores, labels)
    assert found["temperature"] == pytest.approx(3, rel=0.15)
    assert found["ece_calibrated"] < found["ece"] / 2
    row = next(row for row in found["answers"] if row["accuracy"] == 80)
    assert row["right_of_answered"] == pytest.approx(80, abs=5) and 0 < row["answered"] < 100
    assert [row["covered"] for row in found["sets"]] == pytest.approx([80, 90, 95, 99], abs=3)
    kept = Calibration.of(found)
    assert Calibration.of(found | {"temperature": 0.5}).temperature == 0.5
    assert kept.temperature == found["temperature"] and kept.sets[90] == found["sets"][1]["threshold"]
    # Labels that mean nothing: what was fitted on one half does not hold on the other, and the figures say so.
    rng = np.random.default_rng(1)
    noise = np.sort(rng.dirichlet(np.ones(3), 60), axis=1)
    lucky = calibration_figures(noise, rng.integers(0, 3, 60))
    reached = [row["right_of_answered"] for row in lucky["answers"] if row["right_of_answered"] is not None]
    assert not reached or min(reached) < 80


def test_few_videos_are_no_calibration_and_damage_is_named():
    scores, labels = drawn(MIN_VIDEOS - 1, 1.0)
    assert calibration_figures(scores, labels) is None
    for damaged in ({}, {"answers": [], "sets": [], "temperature": 0}, {"answers": 1, "sets": [], "temperature": 1}):
        with pytest.raises(ValueError, match=r"calibration|temperature"):
            Calibration.of(damaged)


def test_forty_videos_are_enough():
    scores, labels = drawn(40, 1.0)
    found = calibration_figures(scores, labels)
    assert found["videos"] == 40
    assert [row["accuracy"] for row in found["answers"]] == [80, 85, 90, 95, 97, 98, 99]
    assert [row["coverage"] for row in found["sets"]] == [80, 90, 95, 99]


def test_shares_of_videos_and_numbers_of_classes_by_hand():
    """The right class has 0.7 in each of 100 videos: every video is answered, and every set holds that class alone."""
    scores = np.tile([[0.7, 0.2, 0.1]], (100, 1))
    labels = np.zeros(100, int)
    found = calibration_figures(scores, labels)
    assert [(row["answered"], row["right_of_answered"]) for row in found["answers"]] == [(100, 100)] * 7
    assert [(row["covered"], row["classes"]) for row in found["sets"]] == [(100, 1)] * 3 + [(100, 3)]
    assert sum(row["videos"] for row in found["reliability_calibrated"]) == 100
    assert found["ece"] == pytest.approx(30) and found["ece_calibrated"] == pytest.approx(0)
    wrong = calibration_figures(scores, labels + 1)
    assert [(row["threshold"], row["answered"], row["right_of_answered"]) for row in wrong["answers"]] == [
        (None, 0, None)
    ] * 7
