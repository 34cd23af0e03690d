"""Text of any origin as logs, tables and errors may show it: without secrets, without terminal escapes."""

from __future__ import annotations

import json
import re
from typing import Any

SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://")
# Matches too much rather than too little: text that follows an address without a space may belong to a token in it.
_URL_IN_TEXT = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://[^\s\"<>]+")


def redact(address: str) -> str:
    """The address as it may be shown: without user name, password, query and fragment, control characters escaped."""
    match = SCHEME.match(address)
    if match is None:
        return printable(address)
    host, slash, path = re.split(r"[?#]", address[match.end() :], maxsplit=1)[0].partition("/")
    user, _, server = host.rpartition("@")
    if match[1].lower() in ("abfs", "abfss") and ":" not in user:  # Azure's container@account
        server = host
    # Once more for an address within the address.
    return printable(match[0] + re.sub("(?<=://)[^/]*@", "", server + slash + path))


def redact_text(text: str) -> str:
    """Text of a foreign error with every address in it redacted."""
    return printable(_URL_IN_TEXT.sub(lambda match: redact(match[0]), text))


def shown(text: object) -> str:
    """Text of any origin as logs, tables and errors may show it: `redact_text` line by line, the line ends stay."""
    return "\n".join(map(redact_text, str(text).split("\n")))


def printable(text: str) -> str:
    """Text with control characters, terminal escapes and lone surrogates written as escapes."""
    if text.isprintable():
        return text
    return "".join(
        character if character.isprintable() else character.encode("unicode_escape", "surrogatepass").decode()
        for character in text
    )


def json_text(value: Any, **options: Any) -> str:
    """JSON that can be written as UTF-8. Where a file's name is not UTF-8, it is ASCII with escapes, which are read
    back as that name. options: of json.dumps."""
    text = json.dumps(value, ensure_ascii=False, **options)
    try:
        text.encode()
    except UnicodeEncodeError:
        return json.dumps(value, **options)
    return text
