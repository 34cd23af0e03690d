"""The keys of the schema as a list: what each is called, means and decides."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from typing import Any

from text4vis.config.roles import Key, Role, read_key
from text4vis.config.schema import Config


def schema() -> Iterator[Key]:
    """Every key in the order of its declaration."""
    yield from _keys(Config(), "")


def keys_of(*roles: Role) -> tuple[str, ...]:
    """The dotted names of the keys that have one of the roles."""
    return tuple(declared.name for declared in schema() if declared.role in roles)


def classifier_keys(kind: str) -> tuple[str, ...]:
    """The dotted names of the keys on which the class embeddings of `network.classifier: KIND` depend."""
    return tuple(declared.name for declared in schema() if kind in declared.classifiers)


def _keys(section: Any, prefix: str) -> Iterator[Key]:
    for field in fields(section):
        value = getattr(section, field.name)
        if is_dataclass(value):
            yield from _keys(value, f"{prefix}{field.name}.")
        else:
            yield read_key(f"{prefix}{field.name}", value, type(section).__pydantic_fields__[field.name])
