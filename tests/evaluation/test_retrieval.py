"""Figures of retrieval, against plain derivations."""

import numpy as np

from text4vis.evaluation.retrieval import ranks, retrieval_figures


def test_the_rank_is_the_place_of_the_best_right_candidate():
    rng = np.random.default_rng(0)
    scores_QN = rng.standard_normal((40, 30))
    right_QN = rng.random((40, 30)) < 0.1
    right_QN[:, 3] = True
    found = ranks(scores_QN, right_QN)
    for scores_N, right_N, rank in zip(scores_QN, right_QN, found, strict=True):
        order = np.argsort(-scores_N)
        wrong_before = [c for c in order[: next(p for p, c in enumerate(order) if right_N[c])] if not right_N[c]]
        assert rank == 1 + len(wrong_before)


def test_equal_scores_count_against_the_right_candidate():
    right_QN = np.eye(5, dtype=bool)
    assert ranks(np.zeros((5, 5)), right_QN).tolist() == [5] * 5
    assert retrieval_figures(ranks(np.eye(5), right_QN)) == {"R@1": 100, "R@5": 100, "R@10": 100, "median_rank": 1}


def test_recalls_are_shares_of_questions_and_the_median_is_of_ranks():
    assert retrieval_figures(np.array([1, 2, 5, 6, 10, 11, 40, 1])) == {
        "R@1": 25.0, "R@5": 50.0, "R@10": 75.0, "median_rank": 5.5,
    }  # fmt: skip
