"""What evaluations have fitted for a saved model, so that its probabilities mean something."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from text4vis.config.schema import Config, ConfigError
from text4vis.evaluation.calibration import Calibration
from text4vis.evaluation.multi_label import Decision


def fitted_of(card: Mapping[str, Any], config: Config, folder: str | Path) -> Calibration | Decision | None:
    """What the model's card holds: a Decision where videos may have several labels, else a Calibration, if any.

    The decision is that of the evaluation that an export quotes, or else of the one in training after which the weights
    were saved. Raises ConfigError for damaged ones, and where the model was trained with several labels a video and
    there is no decision.
    """
    quoted, own = card.get("evaluation") or {}, card.get("figures") or {}
    try:
        if not isinstance(quoted, Mapping) or not isinstance(own, Mapping):
            raise ValueError("`evaluation` and `figures` are no tables")
        if decision := quoted.get("decision") or own.get("decision"):
            return Decision.of(decision)
        calibration = quoted.get("calibration")
        known = None if calibration is None else Calibration.of(calibration)
    except ValueError as error:
        raise ConfigError(f"{folder}: its calibration is damaged ({error}); export the model again") from None
    if config.solver.multi_label:
        raise ConfigError(
            f"{folder}: was trained with several labels a video (solver.loss_type: {config.solver.loss_type}), but no "
            "evaluation tells the thresholds of its classes; evaluate it (text4vis/evaluate.py --report FILE) and "
            "export it with that report (tools/export.py --report FILE)"
        )
    return known
