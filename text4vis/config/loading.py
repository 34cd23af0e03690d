"""Reads a configuration: YAML files laid over their `base`, overrides, environment variables.

An unknown key, a wrong type or a value out of range raises ConfigError, which names the key, the value, where it came
from and the nearest valid name.
"""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from pydantic import TypeAdapter, ValidationError

from text4vis.config.contradictions import check
from text4vis.config.keys import schema
from text4vis.config.paths import absolute, absolute_model, start_of
from text4vis.config.retired import EARLIER, FORMER, RETIRED
from text4vis.config.schema import Config, ConfigError

# Far above any recipe: the largest that ships has 2 kB.
MAX_YAML_BYTES = 1 << 20
# Deeper than any key: data.randaug.N has two.
MAX_SECTIONS = 8


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Reads `path` and applies overrides of the form `section.key=value` (value in YAML), the last one winning.

    A file may start from another with `base: other.yaml` (relative to itself). Environment variables in values are
    expanded (`$DATA/k400`). Paths become absolute: those in a file begin at its folder, overrides and what begins with
    a variable at the working folder. Raises ConfigError.
    """
    return resolve_config(path, overrides)[0]


@dataclass(frozen=True)
class Origins:
    """Where a configuration's values come from.

    keys: by dotted key, the file, or "--set". written: by absolute path, the key, and the relative path as it is
    written there.
    """

    keys: Mapping[str, str]
    written: dict[str, str] = field(default_factory=dict)

    def explain(self, message: object) -> str:
        """An error's message, with the origin of each path of the configuration that it names."""
        text = str(message)
        named = [words for path, words in self.written.items() if re.search(rf"{re.escape(path)}(?!\w)", text)]
        return f"{text} ({'; '.join(named)})" if named else text


def resolve_config(path: str | Path, overrides: Sequence[str] = ()) -> tuple[Config, Origins]:
    """`load_config`, and where each value that was given comes from."""
    values, origin = _read_yaml(Path(path))
    for override in overrides:
        key, equals, text = override.partition("=")
        if not equals or not key:
            raise ConfigError(f"--set {override!r}: expected section.key=value, e.g. --set data.batch_size=8")
        try:
            value = _parse_yaml(text) if text else ""
        except ValueError as error:
            hint = '; quote a text with braces, e.g. "a video of {}."' if "{}" in text else ""
            raise ConfigError(f"--set {override!r}: the value is not valid YAML ({error}){hint}") from None
        key = key.strip()
        _assign(values, key, value)
        origin = {name: place for name, place in origin.items() if not name.startswith(f"{key}.")}
        origin |= dict.fromkeys([key, *(name for name, _ in _leaves({key: value}))], "--set")
    origins = Origins(origin)
    return _validate(_expand(values, origins, str(path)), origin, str(path)), origins


def config_from_dict(values: Mapping[str, Any], where: str) -> Config:
    """The inverse of `Config.to_dict`, also for what an earlier version saved; `where` names the source in errors.

    Raises ConfigError.
    """
    kept = {
        section: {name: value for name, value in inner.items() if f"{section}.{name}" not in FORMER}
        if isinstance(inner, Mapping)
        else inner
        for section, inner in values.items()
    }
    for section, done in EARLIER.items():
        if isinstance(inner := kept.get(section, {}), dict):
            kept[section] = done | inner
    return _validate(kept, {}, where)


def _read_yaml(path: Path, including: tuple[Path, ...] = ()) -> tuple[dict[str, Any], dict[str, str]]:
    """Values of a file laid over those of its `base`, and the file that each dotted key came from."""
    if path.resolve() in including:
        raise ConfigError(f"{path}: base files include each other: {' -> '.join(map(str, (*including, path)))}")
    try:
        if path.stat().st_size > MAX_YAML_BYTES:
            raise ConfigError(f"{path}: has more than {MAX_YAML_BYTES} bytes; give a recipe, such as those in configs/")
        values = _parse_yaml(path.read_text(encoding="utf-8-sig"))
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such file; the recipes that ship are in configs/") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read as UTF-8 text ({error})") from None
    except ValueError as error:
        raise ConfigError(f"{path}: not valid YAML ({error})") from None
    values = {} if values is None else values
    if not isinstance(values, dict):
        raise ConfigError(f"{path}: expected sections such as `data:`, got {type(values).__name__}")
    base = values.pop("base", None)
    merged: dict[str, Any] = {}
    origin: dict[str, str] = {}
    if base is not None:
        if not isinstance(base, str) or "\0" in base:
            raise ConfigError(f"{path}: base: expected a file name, got {base!r}")
        merged, origin = _read_yaml(path.parent / base, (*including, path.resolve()))
    for key, value in _leaves(values):
        _assign(merged, key, value)
        origin[key] = str(path)
    return merged, origin


class _PlainLoader(yaml.SafeLoader):
    """YAML's plain values. No aliases: a few lines of them stand for more values than any memory holds."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            event = self.get_event()
            raise yaml.composer.ComposerError(
                None, None, "aliases (*name) are not read; write it out", event.start_mark
            )
        return super().compose_node(parent, index)


def _parse_yaml(text: str) -> Any:
    """The plain values of one YAML document. Raises ValueError that says what is wrong."""
    try:
        loader = _PlainLoader(text)
        try:
            return loader.get_single_data()
        finally:
            loader.dispose()
    except yaml.YAMLError as error:
        raise ValueError(_yaml_reason(error)) from None
    except RecursionError:
        raise ValueError("nested too deeply") from None
    except (ValueError, LookupError, TypeError, AttributeError, OverflowError) as error:
        # What looks like a date or a number and is none, or is tagged as one, fails within the parser.
        raise ValueError(f"a value is not what it looks like or is tagged as: {error}") from None


def _yaml_reason(error: yaml.YAMLError) -> str:
    mark = getattr(error, "problem_mark", None)
    place = f"line {mark.line + 1}: " if mark else ""
    return place + str(getattr(error, "problem", error)).replace("\n", " ")


def _leaves(values: Mapping[Any, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        if isinstance(value, dict) and value:
            yield from _leaves(value, f"{prefix}{key}.")
        elif value is not None or prefix:
            yield f"{prefix}{key}", value


def _assign(values: dict[str, Any], dotted: str, value: Any) -> None:
    *sections, key = dotted.split(".")
    if len(sections) > MAX_SECTIONS:
        raise ConfigError(f"{dotted[:80]!r}: sections within sections, more than any recipe has; keys are section.key")
    for section in sections:
        inner = values.setdefault(section, {})
        if not isinstance(inner, dict):
            raise ConfigError(f"{dotted}: {section} is a value ({inner!r}), not a section")
        values = inner
    values[key] = value


def _expand(value: Any, origins: Origins, where: str, key: str = "") -> Any:
    """The values with environment variables expanded and paths made absolute. Raises ConfigError."""
    if isinstance(value, dict):
        return {
            name: _expand(inner, origins, where, f"{key}.{name}" if key else str(name)) for name, inner in value.items()
        }
    if isinstance(value, list):
        return [_expand_item(inner, origins, where, key) for inner in value]
    if not isinstance(value, str):
        return value
    expanded = os.path.expandvars(value)
    origin = origins.keys.get(key, where)
    if unknown := re.search(r"\$([A-Za-z_]\w*|\{[A-Za-z_]\w*\})", expanded):
        name = unknown[1].strip("{}")
        raise ConfigError(
            f"{key}: the environment variable {name} in {value!r} is not set (from {origin}); "
            f"export {name}=/folder, or --set {key}=/path"
        )
    kind = _PATHS.get(key)
    if kind is None:
        return expanded
    begins_here = value.startswith("$")  # as in the shell that set the variable
    folder = Path() if begins_here else start_of(origin)
    try:
        found = (absolute if kind == "path" else absolute_model)(expanded, folder)
    except ValueError as error:
        raise ConfigError(f"{key}: {value!r} (from {origin}): {error}") from None
    if found != expanded and not begins_here and origin != "--set":
        _refuse_former_start(key, expanded, found, origin)
        origins.written[found] = f"{key}: {value!r} in {origin}"
    return found


_PATHS = {declared.name: declared.path for declared in schema() if declared.path != "no"}


def _expand_item(value: Any, origins: Origins, where: str, key: str) -> Any:
    """An item of a list; of a section in a list, such as `{path, weight}`, the path stands for the whole key."""
    if isinstance(value, dict):
        return {
            name: _expand(inner, origins, where, key if name == "path" else f"{key}.{name}")
            for name, inner in value.items()
        }
    return _expand(value, origins, where, key)


def _refuse_former_start(key: str, value: str, found: str, origin: str) -> None:
    """In version 0.1 the paths of recipes began at the working folder. Raises ConfigError for one that still does:
    it is there from the working folder, but not from the recipe's.
    """
    here = Path(value).absolute()
    try:
        if Path(found).exists() or not here.exists():
            return
    except OSError:  # the name is too long, or a folder is closed: who opens it says so
        return
    there = os.path.relpath(here, Path(origin).parent)
    raise ConfigError(
        f"{key}: {value!r} (from {origin}) is {found}, which is not there: paths in a recipe begin at the recipe's "
        f"folder, no longer at the working folder, where {here} is; write {there!r}, or --set {key}={value}"
    )


def _validate(values: dict[str, Any], origin: Mapping[str, str], where: str) -> Config:
    try:
        return check(TypeAdapter(Config).validate_python(values), origin, where)
    except ValidationError as error:
        lines = [_explain(problem, origin, where) for problem in error.errors()]
        raise ConfigError("\n".join(dict.fromkeys(lines))) from None


def _explain(problem: Any, origin: Mapping[str, str], where: str) -> str:
    """One line for one of pydantic's errors: key, what was expected, value, origin, nearest name."""
    path = [part for part in problem["loc"] if isinstance(part, str) and "[" not in part]
    known = [declared.name for declared in schema()]
    # pydantic adds the branch of a union to the location: the key is the longest prefix that is declared
    key = next((".".join(path[:n]) for n in range(len(path), 0, -1) if ".".join(path[:n]) in known), ".".join(path))
    source = next((place for given, place in origin.items() if f"{given}.".startswith(f"{key}.")), where)
    if problem["type"] == "unexpected_keyword_argument":
        if key in RETIRED:
            return f"{key}: not used here (from {source}); {RETIRED[key]}"
        section, _, last = key.rpartition(".")
        names = [*known, *dict.fromkeys(name.rpartition(".")[0] for name in known if "." in name)]
        for keys in ([name for name in names if name.rpartition(".")[0] == section], names):  # or in another section
            by_name = {name.rpartition(".")[2]: name for name in keys}
            if near := difflib.get_close_matches(last, by_name, n=1, cutoff=0.7):
                break
        hint = f"; did you mean {by_name[near[0]]}?" if near else "; docs/config.md lists all keys"
        return f"{key}: unknown key (from {source}){hint}"
    value = problem["input"]
    return f"{key}: {_lower_first(problem['msg'].removeprefix('Value error, '))}, got {value!r} (from {source})"


def _lower_first(text: str) -> str:
    return text[:1].lower() + text[1:]
