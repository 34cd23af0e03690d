"""A step that was taken, until the device has told whether it changed the weights; and why it did not."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from text4vis.cluster import distributed
from text4vis.training.logs import Meter

MOST_VIDEOS_NAMED = 32


@dataclass(frozen=True)
class MicroBatchLoss:
    """The videos of a micro batch and its loss (), which stays on the device."""

    ids: list[int]
    loss: torch.Tensor


@dataclass(frozen=True)
class TakenStep:
    """A step whose outcome is still on its way from the device. meter: where it counts. applied: waits for it."""

    number: int
    seen: list[MicroBatchLoss]
    meter: Meter
    applied: Callable[[], bool]


def why_skipped(taken: TakenStep, describe: Callable[[int], str], *, searches_loss_scale: bool) -> str:
    """Why a step was skipped, with the videos to suspect as `describe` names them; the same on all ranks. Collective.

    Those are the videos of losses that are not finite, else all of the step's. searches_loss_scale: as fp16 and amp do,
    which skip steps meanwhile. If all losses are finite, nothing is wrong then: "".
    """
    wrong = [micro.ids for micro in taken.seen if not bool(torch.isfinite(micro.loss))]
    gathered = distributed.gather_to_main((wrong, [micro.ids for micro in taken.seen]))

    def explain() -> str:
        assert gathered is not None
        suspects = [sample for wrong, _ in gathered for ids in wrong for sample in ids]
        if not suspects and searches_loss_scale:
            return ""
        what = "loss" if suspects else "gradient"
        suspects = suspects or [sample for _, all_ids in gathered for ids in all_ids for sample in ids]
        names = [describe(sample) for sample in suspects[:MOST_VIDEOS_NAMED]]
        more = f" and {len(suspects) - len(names)} more" if len(suspects) > len(names) else ""
        return f"step {taken.number}: the {what} is not finite; videos: {'; '.join(names)}{more}"

    return distributed.from_main(explain)
