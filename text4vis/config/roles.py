"""What each configuration key decides, and how a key declares it beside its type and its meaning."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Any, Literal, cast

import pydantic.dataclasses
from pydantic import ConfigDict, Field

PathKind = Literal["no", "path", "name or path"]

# The decorator of a section: a frozen dataclass without other keys than its own.
section = pydantic.dataclasses.dataclass(frozen=True, kw_only=True, config=ConfigDict(extra="forbid"))


class Role(str, Enum):  # enum.StrEnum is of Python 3.11
    """What a key decides. Code that treats some keys in a special way asks for their role, never for their names."""

    DATA = "data"  # which videos, in which order, under which labels
    FRAMES = "frames"  # which frames and pixels of a video the model sees
    AUGMENTATION = "augmentation"  # how training varies these pixels
    VIEWS = "views"  # how often an evaluation looks at a video
    MODEL = "model"  # which network the weights of a checkpoint fit
    CLASSIFIER = "classifier"  # the embeddings of the classes
    TRAINING = "training"  # what a step computes and what the run starts from
    BATCH = "batch"  # how ranks and micro batches share the global batch, which a run keeps
    PLACE = "place"  # where the videos lie; their fingerprint says whether they are the same
    EXECUTION = "execution"  # how the job is carried out: devices, threads, memory, faults
    REPORTING = "reporting"  # what is logged, evaluated and kept

    def __str__(self) -> str:
        return self.value

    @property
    def may_change(self) -> bool:
        """Whether a run may go on with another value than it began with."""
        return self in {Role.BATCH, Role.PLACE, Role.EXECUTION, Role.REPORTING}


@dataclass(frozen=True)
class Key:
    """One key of the schema.

    name: dotted, such as "data.batch_size". classifiers: the values of `network.classifier` whose class embeddings
    depend on the key. on_card: whether an export's model card states its value. path: whether its value is a path.
    """

    name: str
    meaning: str
    default: Any
    role: Role
    classifiers: tuple[str, ...] = ()
    on_card: bool = False
    path: PathKind = "no"


def key(
    default: Any,
    role: Role,
    meaning: str,
    *,
    classifiers: tuple[str, ...] = (),
    on_card: bool = False,
    path: PathKind = "no",
) -> Any:
    """Declares a field of a section: its default, its role and its meaning in one line; see `Key` for the others."""
    facets = {"role": role, "classifiers": list(classifiers), "on_card": on_card, "path": path}
    return Field(default, description=meaning, json_schema_extra=cast(dict[str, Any], facets))


def read_key(name: str, default: Any, declared: Any) -> Key:
    """The key that a pydantic field declares. Raises TypeError for a field that was not declared by `key`."""
    facets: Mapping[str, Any] | None = declared.json_schema_extra
    if facets is None or "role" not in facets:
        raise TypeError(f"{name}: declare it with text4vis.config.roles.key, which gives it a role")
    return Key(name, declared.description, default, **{**facets, "classifiers": tuple(facets["classifiers"])})
