"""The pages of keys: `docs/config.md` (type, default, meaning) and `--print-config` (value and origin)."""

from __future__ import annotations

import json
import re
import textwrap
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import TypeAdapter

from text4vis.config.loading import resolve_config
from text4vis.config.paths import NETWORK_SUFFIXES
from text4vis.config.roles import Role
from text4vis.config.schema import Config, schema

WIDTH = 118  # of the page, characters
_NAMES = {"integer": "whole number", "number": "number", "string": "text", "boolean": "true or false"}


def config_page() -> str:
    """Markdown: one list a section."""
    types = _types()
    lines = [
        "# Configuration keys",
        "",
        "A recipe is a YAML file with these keys, each with a default. `base: other.yaml` lays a file over another,",
        "`--set section.key=value` overrides one key, `$NAME` stands for an environment variable. `--print-config`",
        "shows the resolved values and where each came from. `python tools/document_config.py` writes this page.",
        "",
        "A relative path in a recipe begins at the folder of that file, so a recipe opens from any working folder.",
        "Behind `--set`, and where it begins with `$NAME`, it begins at the working folder. Addresses and absolute",
        "paths stay as they are. Where a key takes a name or a path, a path begins with `./`, `../`, `/` or `~`,",
        f"or ends with {', '.join(f'`{suffix}`' for suffix in NETWORK_SUFFIXES)}.",
        "",
        "*Decides* says what depends on a key. A run goes on with the values that it began with; those that decide",
        f"{_listed(role for role in Role if role.may_change)} may change. A run also keeps its",
        "global batch, however other ranks, micro batches and accumulation share it.",
    ]
    section = None
    for key in schema():
        if (head := key.name.rpartition(".")[0].partition(".")[0]) != section:
            section = head
            title = f"`{head}`" if head else "Top level"
            lines += ["", f"## {title}", ""]
        kind = types[key.name] if key.path == "no" else types[key.name].replace("text", key.path)
        facts = f"{kind}; default {_code(key.default)}; decides {key.role}"
        lines += _wrapped(f"- `{key.name}` ({facts}): {key.meaning}")
    return "\n".join(lines) + "\n"


def _wrapped(item: str) -> list[str]:
    """The lines of a list's item; none breaks within a span of code."""
    item = re.sub(r"`[^`]+`", lambda span: span[0].replace(" ", "\0"), item)
    lines = textwrap.wrap(item, WIDTH, subsequent_indent="  ", break_long_words=False, break_on_hyphens=False)
    return [line.replace("\0", " ") for line in lines]


def print_config(path: str | Path, overrides: Sequence[str] = ()) -> str:
    """The resolved configuration as YAML that can be used again, each value with its origin as a comment.

    Raises ConfigError as `load_config` does.
    """
    config, origins = resolve_config(path, overrides)
    lines: list[str] = []

    def add(values: dict[str, Any], prefix: str, indent: str) -> None:
        for name, value in values.items():
            key = f"{prefix}{name}"
            if isinstance(value, dict):
                lines.append(f"{indent}{name}:")
                add(value, f"{key}.", indent + "  ")
            else:
                line = f"{indent}{name}: {_one_line(value)}"
                lines.append(f"{line:<48}  # {origins.keys.get(key, 'default')}")

    add(config.to_dict(), "", "")
    return "\n".join(lines) + "\n"


def _listed(roles: Iterable[Role]) -> str:
    """A list in words: "a, b and c"."""
    *names, last = roles
    return f"{', '.join(names)} and {last}"


def _one_line(value: Any) -> str:
    style = '"' if isinstance(value, str) and not value.isprintable() else None  # escapes what breaks a line
    text = yaml.safe_dump(value, default_flow_style=True, default_style=style, allow_unicode=True, width=10**6)
    return text.removesuffix("\n").removesuffix("...").rstrip()


def _types() -> dict[str, str]:
    """A few words on what each key takes, from the declared types."""
    root = TypeAdapter(Config).json_schema()
    types: dict[str, str] = {}

    def walk(section: dict[str, Any], prefix: str) -> None:
        for name, declared in section["properties"].items():
            target = declared.get("$ref")
            if target:
                walk(root["$defs"][target.rpartition("/")[2]], f"{prefix}{name}.")
            else:
                types[f"{prefix}{name}"] = _words(declared, root["$defs"])

    walk(root, "")
    return types


def _words(declared: dict[str, Any], sections: dict[str, Any]) -> str:
    if options := declared.get("anyOf") or declared.get("oneOf"):
        return " or ".join(_words(option, sections) for option in options)
    if "$ref" in declared:
        return f"`{{{', '.join(sections[declared['$ref'].rpartition('/')[2]]['properties'])}}}`"
    if "const" in declared or "enum" in declared:
        return ", ".join(_code(value) for value in declared.get("enum", [declared.get("const")]))
    kind = declared.get("type")
    if kind == "null":
        return "nothing"
    if kind == "array":
        items = declared.get("prefixItems")
        return f"list of {len(items)}" if items else f"list of {_words(declared['items'], sections)}"
    limits = [("minimum", ">="), ("exclusiveMinimum", ">"), ("maximum", "<="), ("exclusiveMaximum", "<")]
    bounds = [f"{sign} {declared[name]:g}" for name, sign in limits if name in declared]
    return " ".join([_NAMES[str(kind)], ", ".join(bounds)]).strip()


def _code(value: Any) -> str:
    return f"`{json.dumps(value, ensure_ascii=False)}`"
