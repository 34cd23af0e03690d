"""How fuzzing damages a file: bytes flipped, cut, repeated or spliced, tokens put in, JSON values replaced."""

from __future__ import annotations

import copy
import json
import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

MOST_RANDOM_BYTES = 4000


@dataclass(frozen=True)
class Target:
    """parse(data, folder) reads a file of these bytes, and may write below the folder. tokens: words of the format."""

    seeds: Callable[[Path], list[bytes]]
    parse: Callable[[bytes, Path], Any]
    errors: tuple[type[Exception], ...] = ()
    tokens: tuple[bytes, ...] = ()
    is_json: bool = False


def mutated(target: Target, seeds: list[bytes], draw: random.Random) -> bytes:
    """One damaged file."""
    if draw.random() < 0.05:
        return draw.randbytes(draw.randrange(MOST_RANDOM_BYTES))
    data = bytearray(draw.choice(seeds))
    if target.is_json and draw.random() < 0.6:
        data = bytearray(mutated_json(bytes(data), draw))
        if draw.random() < 0.8:
            return bytes(data)
    for _ in range(draw.choice((1, 1, 1, 2, 3, 8))):
        change(data, target.tokens, seeds, draw)
    return bytes(data)


def change(data: bytearray, tokens: tuple[bytes, ...], seeds: list[bytes], draw: random.Random) -> None:
    """One change in place. Half of them fall into the first 256 bytes, where headers are."""
    place = draw.randrange(min(len(data), 256 if draw.random() < 0.5 else len(data)) + 1)
    kind = draw.randrange(8)
    if kind == 0 and place < len(data):
        data[place] ^= 1 << draw.randrange(8)
    elif kind == 1 and place < len(data):
        data[place] = draw.choice((0, 1, 9, 10, 32, 0x7F, 0x80, 0xFF, draw.randrange(256)))
    elif kind == 2:
        del data[place : place + draw.choice((1, 2, 4, 16, 1000))]
    elif kind == 3:
        data[place:place] = draw.choice(
            (*tokens, b"\0", b"\xff\xfe", b"-1", b"9" * 30, b"\x1b[31m", "é\u202e".encode())
        )
    elif kind == 4:
        size = draw.choice((2, 4, 8))
        value = draw.choice((0, 1, 2**31 - 1, 2**31, 2**32 - 1, 2**63, 2**64 - 1, draw.randrange(2**64)))
        data[place : place + size] = value.to_bytes(8, draw.choice(("little", "big")))[:size]
    elif kind == 5:
        data[place:place] = data[place : place + draw.choice((1, 8, 64))] * draw.choice((1, 2, 50))
    elif kind == 6:
        other = draw.choice(seeds)
        data[place:] = other[draw.randrange(len(other) + 1) :]
    else:
        del data[place:]


ODD_VALUES: tuple[Any, ...] = (
    None, True, 0, -1, 1.5, 1e308, 2**31, 2**63, 10**30, float("nan"), float("inf"), "", "x", "\ud800", "\0\x1b[31m",
    "../x", "/etc/passwd", "http://other/x", [], [[]], [0], {}, {"a": {}}, [None] * 50,
)  # fmt: skip


def mutated_json(data: bytes, draw: random.Random) -> bytes:
    """The document with values replaced, taken out, repeated or renamed."""
    document = [json.loads(data)]
    for _ in range(draw.choice((1, 1, 2, 4))):
        inner: Any = document
        while True:
            keys = list(range(len(inner))) if isinstance(inner, list) else list(inner)
            key = draw.choice(keys)
            value = copy.deepcopy(inner[key])
            if not isinstance(value, list | dict) or not value or draw.random() < 0.2:
                break
            inner = inner[key]
        kind = draw.randrange(4)
        if kind == 0 and inner is not document:
            del inner[key]
            if not document[0]:
                break
        elif kind == 1 and isinstance(inner, dict):
            inner[draw.choice(("x", "", "a.b", key + "x"))] = value
        else:
            inner[key] = copy.deepcopy(draw.choice((*ODD_VALUES, [value] * 3, {"x": value})))
    return json.dumps(document[0]).encode("utf-8", "surrogatepass")


def written(name: str, parse: Callable[[Path], Any]) -> Callable[[bytes, Path], Any]:
    """A target that reads a file of this name."""

    def write_and_parse(data: bytes, folder: Path) -> Any:
        path = folder / name
        path.write_bytes(data)
        return parse(path)

    return write_and_parse


def from_text(parse: Callable[[str], Any]) -> Callable[[bytes, Path], Any]:
    return lambda data, folder: parse(data.decode("utf-8", "surrogateescape"))


JSON_TOKENS = (
    b"{",
    b"}",
    b"[",
    b"]",
    b",",
    b":",
    b'"',
    b"1e999",
    b"NaN",
    b"[" * 3000,
    b"1" * 5000,
    b'"\\ud800"',
    b"null",
)
