"""The types of values that keys take, as they may be written in YAML or after `--set`."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BeforeValidator, Field, StrictBool, StrictInt, StrictStr


def number(value: Any) -> Any:
    """Reads numbers written as text, since YAML 1.1 takes `5e-5` (no dot) for a string. Rejects booleans."""
    if isinstance(value, bool):
        raise ValueError("expected a number")
    if isinstance(value, str):
        try:
            return float(value)
        except ValueError:
            raise ValueError("expected a number") from None
    return value


def whole_number(value: Any) -> Any:
    """Rejects booleans and floats, which a Literal of whole numbers would accept: `true` equals 1, and so does 1.0."""
    if isinstance(value, (bool, float)):
        raise ValueError("expected a whole number")
    return value


def one_or_many(value: Any) -> Any:
    """A single value stands for a list of one."""
    return (value,) if isinstance(value, str) else tuple(value) if isinstance(value, list) else value


def false_is_none(value: Any) -> Any:
    """`false` switches off what is off by None."""
    return None if value is False else value


def pair(value: Any) -> Any:
    """A list of numbers as a tuple."""
    return tuple(value) if isinstance(value, list) else value


def pairs(value: Any) -> Any:
    """A list of pairs as tuples."""
    return tuple(map(pair, value)) if isinstance(value, list) else value


Float = Annotated[float, BeforeValidator(number)]
Bool = StrictBool
Str = StrictStr
# An empty value, as in `--set key=`, takes back what a recipe gives.
OptionalStr = Annotated[StrictStr | None, BeforeValidator(lambda value: None if value == "" else value)]
Probability = Annotated[float, Field(ge=0, le=1), BeforeValidator(number)]
Rate = Annotated[float, Field(ge=0, lt=1), BeforeValidator(number)]
Share = Annotated[float, Field(gt=0, le=1), BeforeValidator(number)]
NonNegative = Annotated[float, Field(ge=0), BeforeValidator(number)]
Positive = Annotated[float, Field(gt=0), BeforeValidator(number)]
Natural = Annotated[StrictInt, Field(ge=0)]
Triple = Annotated[tuple[Float, Float, Float], BeforeValidator(pair)]
Count = Annotated[StrictInt, Field(ge=1)]
Sources = Annotated[tuple[StrictStr, ...], BeforeValidator(one_or_many)]
