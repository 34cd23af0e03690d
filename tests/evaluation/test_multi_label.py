"""Figures of videos with several labels: against Charades' script, a search by hand, and videos made for them."""

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.special import expit

from text4vis.evaluation.comparison import compare, read_report
from text4vis.evaluation.embedding import Embeddings
from text4vis.evaluation.metrics import any_topk_correct, average_precisions, topk_correct
from text4vis.evaluation.multi_label import Decision, best_thresholds, fit_scale, multi_label_figures
from text4vis.evaluation.protocols import Views, deciding_figure, main_figures, write_report

NAMES = [f"class {number}" for number in range(6)]


def made(num_videos=200, noise=1.5, seed=0, views=1):
    """Embeddings (N, V, D), targets (N, C) with some videos of no class, class embeddings (C, D)."""
    rng = np.random.default_rng(seed)
    classes_CD = rng.normal(size=(6, 16)).astype(np.float32)
    targets_NC = rng.random((num_videos, 6)) < 0.3
    targets_NC[:3] = False
    videos_NVD = (targets_NC @ classes_CD)[:, None] + noise * rng.normal(size=(num_videos, views, 16))
    return videos_NVD.astype(np.float32), targets_NC, classes_CD


def charades_map(submission_NC, truth_NC):
    """As `map.py` of gsig/charades-algorithms says, step by step."""
    scores_NC = submission_NC.copy()
    scores_NC[truth_NC.sum(axis=1) == 0] = -np.inf
    precisions = []
    for label in range(truth_NC.shape[1]):
        ranked = truth_NC[np.argsort(-scores_NC[:, label], kind="stable"), label]
        if not ranked.any():
            continue
        hits, found = 0, []
        for rank, hit in enumerate(ranked, start=1):
            hits += int(hit)
            if hit:
                found.append(hits / rank)
        precisions.append(sum(found) / len(found))
    return 100 * np.mean(precisions)


@given(st.integers(0, 2**32 - 1), st.integers(2, 40), st.integers(1, 7))
def test_map_is_that_of_charades(seed, num_videos, num_classes):
    rng = np.random.default_rng(seed)
    scores = rng.normal(size=(num_videos, num_classes))
    targets = rng.random((num_videos, num_classes)) < 0.4
    targets[0, 0] = True
    labelled = targets.any(axis=1)
    found = np.nanmean(average_precisions(scores[labelled], targets[labelled]))
    assert found == pytest.approx(charades_map(scores, targets))


def test_average_precisions_refuse_what_they_cannot_rank():
    with pytest.raises(ValueError, match="NaN"):
        average_precisions(np.array([[np.nan]]), np.array([[True]]))
    with pytest.raises(ValueError, match=r"got \(2, 3\) and \(3, 2\)"):
        average_precisions(np.zeros((2, 3)), np.zeros((3, 2), bool))


@given(st.integers(0, 2**32 - 1), st.integers(1, 6))
def test_with_one_label_a_video_the_best_classes_are_counted_as_ever(seed, k):
    rng = np.random.default_rng(seed)
    scores, labels = rng.integers(0, 4, (20, 5)) / 3, rng.integers(0, 5, 20)
    scores[3, 2] = np.nan
    assert any_topk_correct(scores, np.eye(5, dtype=bool)[labels], (k,)) == topk_correct(scores, labels, (k,))


def test_one_label_among_the_best_is_enough_and_none_never_is():
    scores = np.array([[3.0, 2, 1], [3, 2, 1], [3, 2, 1], [1, 1, 1]])
    targets = np.array([[0, 1, 1], [1, 0, 1], [0, 0, 0], [1, 0, 0]], bool)
    assert any_topk_correct(scores, targets, (1, 2, 3)) == {1: 1, 2: 2, 3: 3}


def test_the_scale_that_made_the_labels_is_found():
    rng = np.random.default_rng(0)
    logits = rng.normal(20, 3, (2000, 10))
    targets = rng.random(logits.shape) < expit(0.8 * logits - 17)
    slope, intercept = fit_scale(logits, targets)
    assert slope == pytest.approx(0.8, rel=0.05) and intercept == pytest.approx(-17, rel=0.05)


@pytest.mark.parametrize("sign", [1, -1])
def test_the_scale_stays_finite_and_upright_where_pairs_are_told_apart_without_an_error(sign):
    targets = np.arange(40).reshape(10, 4) % 4 == 0
    slope, intercept = fit_scale(sign * np.where(targets, 30.0, 10.0), targets)
    assert 0 < slope < 100 and np.isfinite(intercept)


@given(st.integers(0, 2**32 - 1), st.integers(1, 25), st.sampled_from([3, 1000]))
def test_no_other_threshold_has_a_better_f1(seed, num_videos, levels):
    rng = np.random.default_rng(seed)
    scores, targets = rng.integers(0, levels, (num_videos, 1)) / levels, rng.random((num_videos, 1)) < 0.5

    def f1(threshold):
        said = scores >= threshold
        return 2 * (said & targets).sum() / max(1, said.sum() + targets.sum())

    (found,) = best_thresholds(scores, targets)
    assert 0 <= found <= 1
    if targets.any():
        assert f1(found) == pytest.approx(max(f1(threshold) for threshold in scores))
    else:
        assert found == 0.5


def test_figures_can_be_written_read_and_compared(tmp_path):
    reports = []
    for noise in (1.5, 0.5):
        videos, targets, classes = made(noise=noise)
        figures = {"data_fingerprint": "x", "missing": 0} | multi_label_figures(videos, targets, classes, NAMES)
        write_report(tmp_path / "report.json", figures)
        reports.append(read_report(tmp_path / "report.json"))
        assert reports[-1] == json.loads(json.dumps(figures))
    unsure, sure = reports
    labelled = int(targets.any(axis=1).sum())
    assert (sure["videos"], sure["unlabelled"]) == (labelled, 200 - labelled)
    assert sure["map"] > unsure["map"] > 60 and sure["f1"] > unsure["f1"] > 60
    assert set(main_figures(sure)) == {"map", "f1", "top1", "top5", "videos", "missing"}
    assert deciding_figure(sure) == sure["map"]
    found = compare(unsure, sure)
    assert {figure.name: figure.difference for figure in found.figures}["map"] == sure["map"] - unsure["map"]
    assert found.significance is not None and found.classes[0].b <= 100 and not found.confused


def test_what_is_said_is_what_the_kept_decision_says():
    videos, targets, classes = made()
    figures = multi_label_figures(videos, targets, classes, NAMES)
    decision = Decision.of(json.loads(json.dumps(figures["decision"])))
    unit = [x / np.linalg.norm(x, axis=1, keepdims=True) for x in (videos[:, 0].astype(float), classes.astype(float))]
    said = decision.shown(decision.probabilities(100 * unit[0] @ unit[1].T))
    assert [np.flatnonzero(row).tolist() for row in said] == figures["predictions"]["said"]
    for label, row in enumerate(figures["per_class"]):
        assert (row["videos"], row["said"]) == (targets[:, label].sum(), said[:, label].sum())
        assert row["correct"] == (targets & said)[:, label].sum()


def test_f1_is_measured_on_videos_that_the_thresholds_were_not_fitted_on():
    """Scores that tell nothing: fitted thresholds look better than chance on the videos they were fitted on."""
    rng = np.random.default_rng(3)
    targets = rng.random((60, 6)) < 0.1
    videos, classes = rng.normal(size=(60, 1, 16)).astype(np.float32), rng.normal(size=(6, 16)).astype(np.float32)
    figures = multi_label_figures(videos, targets, classes, NAMES)
    seen = [2 * row["correct"] / (row["said"] + row["videos"]) for row in figures["per_class"] if row["videos"]]
    assert 100 * np.mean(seen) > figures["f1"] + 10


def test_few_videos_have_thresholds_and_no_f1():
    videos, targets, classes = made(num_videos=12)
    figures = multi_label_figures(videos, targets, classes, NAMES)
    assert figures["f1"] is None and len(figures["decision"]["thresholds"]) == 6


def test_a_video_without_finite_scores_and_one_without_labels_spoil_nothing():
    videos, targets, classes = made()
    targets[10] = [True, *[False] * 5]
    videos[10] = np.nan
    figures = multi_label_figures(videos, targets, classes, NAMES)
    assert figures["not_finite"] == 1 and figures["map"] is None
    assert figures["predictions"]["probability"][10] is None and figures["predictions"]["labels"][0] == []
    assert figures["predictions"]["label_probability"][0] is None
    json.dumps(figures, allow_nan=False)


def test_nothing_labelled_gives_a_report_without_figures():
    videos, targets, classes = made(num_videos=50)
    figures = multi_label_figures(videos, np.zeros_like(targets), classes, NAMES)
    assert (figures["videos"], figures["map"], figures["decision"], figures["f1"]) == (0, None, None, None)
    json.dumps(figures, allow_nan=False)


def test_views_are_averaged_and_one_of_them_decides():
    videos, targets, classes = made(views=4)
    figures = multi_label_figures(videos, targets, classes, NAMES, views=Views(4, 1))
    single = multi_label_figures(videos[:, :1], targets, classes, NAMES)
    assert [(row["clips"], row["crops"]) for row in figures["by_views"]] == [(1, 1), (4, 1)]
    assert figures["by_views"][0]["map"] == single["map"] < figures["by_views"][1]["map"] == figures["map"]
    assert figures["decision"] == single["decision"]


def test_kept_embeddings_hold_several_labels():
    videos, targets, _ = made(num_videos=5)
    Embeddings(videos, targets, np.arange(5)).check()
    for labels in (targets[:, 0], targets.astype(np.int64), targets[:3]):
        with pytest.raises(ValueError, match="labels_N is"):
            Embeddings(videos, labels, np.arange(5)).check()


@pytest.mark.parametrize(
    "change", [{"slope": -1}, {"slope": "x"}, {"thresholds": None}, {"intercept": float("nan")}, {"thresholds": ["x"]}]
)
def test_a_damaged_decision_is_refused(change):
    good = {"slope": 1.0, "intercept": 0.0, "thresholds": [0.5]}
    assert Decision.of(good).thresholds == (0.5,)
    with pytest.raises(ValueError, match="decision"):
        Decision.of(good | change)
