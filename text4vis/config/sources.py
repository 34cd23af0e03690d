"""What `data.train` names: paths and addresses of shards, each with a weight in a mixture."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any

from pydantic import BeforeValidator, ConfigDict, Discriminator, Field, StrictStr, Tag
from pydantic.dataclasses import dataclass

from text4vis.config.values import Sources, number, one_or_many


@dataclass(frozen=True, kw_only=True, config=ConfigDict(extra="forbid"))
class WeightedSource:
    """One entry of `data.train` in a mixture. weight: above 0; the entries' weights need not add up to anything."""

    path: Sources
    weight: Annotated[float, Field(gt=0, allow_inf_nan=False), BeforeValidator(number)]


def _path_or_weighted(value: Any) -> Any:
    if isinstance(value, str | WeightedSource) or (isinstance(value, dict) and value.keys() == {"path", "weight"}):
        return value
    raise ValueError("expected a path or {path, weight}")


TrainSource = Annotated[
    Annotated[StrictStr, Tag("path")] | Annotated[WeightedSource, Tag("weighted")],
    Discriminator(lambda value: "path" if isinstance(value, str) else "weighted"),
    BeforeValidator(_path_or_weighted),
]
TrainSources = Annotated[tuple[TrainSource, ...], BeforeValidator(one_or_many)]


def addresses(sources: Sequence[str | WeightedSource]) -> list[str]:
    """All folders and addresses that `data.train` or `data.val` names, in order."""
    return [path for source in sources for path in ((source,) if isinstance(source, str) else source.path)]
