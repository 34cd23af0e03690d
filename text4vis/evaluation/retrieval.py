"""Figures of retrieval: how high the right answer stands among all.

Q questions, N candidates.
"""

from __future__ import annotations

import numpy as np

DEPTHS = (1, 5, 10)


def ranks(scores_QN: np.ndarray, right_QN: np.ndarray) -> np.ndarray:
    """The place (Q,) int64, from 1, of each question's best right candidate.

    right_QN: bool, at least one true in each row. One more than the number of wrong candidates that score as high or
    higher: equal scores count against the right one, so a model that cannot tell candidates apart gains nothing.
    Several right candidates count as the best of them, as is usual for several captions of a video.
    """
    best_Q1 = np.where(right_QN, scores_QN, -np.inf).max(axis=1, keepdims=True)
    return 1 + ((scores_QN >= best_Q1) & ~right_QN).sum(axis=1)


def retrieval_figures(ranks_Q: np.ndarray) -> dict[str, float]:
    """R@1, R@5 and R@10 in per cent: questions whose right candidate is among the first K; and the median rank.

    As Miech et al. (HowTo100M, ICCV 2019) and CLIP4Clip (Luo et al., 2021) report them.
    """
    recalls = {f"R@{depth}": 100 * float((ranks_Q <= depth).mean()) for depth in DEPTHS}
    return recalls | {"median_rank": float(np.median(ranks_Q))}
