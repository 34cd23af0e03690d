"""Mixup and cutmix: who is mixed with whom, how much, and what becomes of pixels."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny import random_frames

from text4vis.config.schema import SolverConfig
from text4vis.data.mixing import Mix, draw_mix, mix_frames

SIDE = 32
IDS = st.lists(st.integers(0, 10**6), min_size=2, max_size=8, unique=True)
MIXUP, CUTMIX = SolverConfig(mixup=0.8), SolverConfig(cutmix=1.0)


def rows(mix: Mix) -> list[tuple]:
    return list(zip(mix.shares, mix.boxes, mix.weights, strict=True))


def test_nothing_is_mixed_by_default():
    assert draw_mix(SolverConfig(), 1, 0, [1, 2], SIDE) is None


@given(IDS, st.sampled_from([MIXUP, CUTMIX, SolverConfig(mixup=0.2, cutmix=1.0)]), st.integers(0, 10**6))
def test_a_video_is_mixed_alike_in_any_company_and_never_with_itself(ids, solver, position):
    whole = draw_mix(solver, 7, position, ids, SIDE)
    other = draw_mix(solver, 7, position, [*ids[::-1], 10**7], SIDE)
    assert rows(whole) == rows(other)[: len(ids)][::-1]
    assert all(partner != row and 0 <= partner < len(ids) for row, partner in enumerate(whole.partners))
    assert draw_mix(solver, 7, position, ids, SIDE) == whole
    assert (
        rows(draw_mix(solver, 8, position, ids, SIDE))
        != rows(whole)
        != rows(draw_mix(solver, 7, position + 1, ids, SIDE))
    )


def test_partners_and_shares_are_spread_as_they_should():
    ids = list(range(400))
    mixup = draw_mix(SolverConfig(mixup=0.4), 0, 0, ids, SIDE)
    distances = {(partner - row) % len(ids) for row, partner in enumerate(mixup.partners)}
    assert len(distances) > 200
    variance = 1 / (4 * (2 * 0.4 + 1))  # of Beta(0.4, 0.4)
    assert np.mean(mixup.shares) == pytest.approx(0.5, abs=0.06)
    assert np.var(mixup.shares) == pytest.approx(variance, rel=0.2)
    both = draw_mix(SolverConfig(mixup=1.0, cutmix=1.0), 0, 0, ids, SIDE)
    blended = sum(box == (0, SIDE, 0, SIDE) and weight > 0 for _, box, weight in rows(both))
    assert 150 < blended < 250


def test_mixup_blends_each_pixel_and_cutmix_replaces_a_share_of_them():
    frames = random_frames(4, 3)
    for solver in (MIXUP, CUTMIX):
        mix = draw_mix(solver, 3, 1, [5, 6, 7, 8], SIDE)
        before = frames.clone()
        mixed = mix_frames(frames, mix)
        assert mixed.dtype == torch.uint8 and frames.equal(before)
        for row, partner in enumerate(mix.partners):
            own, other = frames[row].double(), frames[partner].double()
            if solver is MIXUP:
                expected = mix.shares[row] * own + (1 - mix.shares[row]) * other
                assert (mixed[row].double() - expected).abs().max() <= 0.5 + 1e-4
            else:
                top, bottom, left, right = mix.boxes[row]
                inside = torch.zeros(SIDE, SIDE, dtype=torch.bool)
                inside[top:bottom, left:right] = True
                assert mixed[row].equal(torch.where(inside, frames[partner], frames[row]))
                assert mix.shares[row] == pytest.approx(1 - inside.double().mean().item())


def test_channels_last_frames_are_mixed_too():
    frames = random_frames(2, 2)
    last = frames.permute(0, 1, 3, 4, 2).contiguous().permute(0, 1, 4, 2, 3)
    mix = draw_mix(CUTMIX, 0, 0, [0, 1], SIDE)
    assert mix_frames(last, mix).equal(mix_frames(frames, mix))
