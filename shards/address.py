"""Addresses of data sets: brace notation, which schemes are allowed, how a file's address is formed.

An address is a local path, `file://...`, or a scheme of fsspec. Only schemes that store plain files are let through:
nothing that runs a shell (`pipe:`), unpacks archives, or chains file systems (`a::b`).
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from urllib.parse import unquote, urlsplit, urlunsplit

from braceexpand import braceexpand

from shards.format import ShardError
from shards.text import SCHEME, printable, redact

REMOTESCHEMES = frozenset(
    (
        *("http", "https", "ftp", "sftp", "smb", "hdfs", "webhdfs", "memory"),
        *("s3", "s3a", "gcs", "gs", "abfs", "abfss", "adl", "az", "oci", "oss", "hf"),
    )
)
_BRACE_RANGE = re.compile(r"\{(-?\d+)\.\.(-?\d+)")
_IPV6_HOST = re.compile(r"\[[0-9A-Fa-f:.]+\]")
_MAX_PARTS = 10_000
_MAX_LISTS = 30


def expand_sources(sources: str | Sequence[str]) -> list[str]:
    """Addresses that one string or a list of them stands for, braces expanded: 's3://b/part{0..3}' gives four.

    Raises ShardError for an empty list, bad braces, more than 10,000 parts and refused addresses.
    """
    given = [sources] if isinstance(sources, str) else list(sources)
    addresses = [address for source in given for address in _expand_braces(str(source))]
    if not addresses:
        raise ShardError("no data set given; name at least one shard folder or address")
    return [_normalised(address) for address in addresses]


def _normalised(address: str) -> str:
    """The address with its scheme in lower case, as drivers want it. Raises ShardError if it is refused."""
    scheme = scheme_of(address)
    if scheme is None:
        return address
    rest = address[len(scheme) :]
    if not rest.strip(":/"):
        raise ShardError(f"{redact(address)}: names no host or bucket; give {scheme}://NAME/folder")
    return scheme + rest


def _expand_braces(source: str) -> list[str]:
    if "{" not in source or _is_existing_path(source):
        return [source]
    redacted = redact(source)
    ranges, bound = _BRACE_RANGE.findall(source), 1
    for low, high in ranges:
        if len(low) > 18 or len(high) > 18 or abs(int(high) - int(low)) >= _MAX_PARTS:
            raise ShardError(f"{redacted}: the braces stand for more than {_MAX_PARTS} data sets; check the range")
        bound *= abs(int(high) - int(low)) + 1
    # Inner braces are expanded in memory: what they can stand for at most, commas shared out evenly among the rest.
    lists = source.count("{") - len(ranges)
    if lists > _MAX_LISTS or bound * (source.count(",") / max(1, lists) + 1) ** lists > 100 * _MAX_PARTS:
        raise ShardError(f"{redacted}: the braces stand for more than {_MAX_PARTS} data sets; check the range")
    try:
        addresses = list(itertools.islice(braceexpand(source, escape=False), _MAX_PARTS + 1))
    except ValueError:  # its text repeats the address
        raise ShardError(
            f"{redacted}: braces are written like part{{0..3}} or {{train,extra}}, each one closed"
        ) from None
    if len(addresses) > _MAX_PARTS:
        raise ShardError(f"{redacted}: the braces stand for more than {_MAX_PARTS} data sets; check the range")
    return addresses


def scheme_of(address: str) -> str | None:
    """Scheme of a remote address in lower case, None for a local path or file://. Raises ShardError if refused."""
    redacted = redact(address)
    if not address or "\0" in address:
        raise ShardError(
            f"{redacted!r} is no address of a data set; name a shard folder or an address like s3://bucket/dir"
        )
    if "::" in _IPV6_HOST.sub("", address) and not _is_existing_path(address):
        raise ShardError(f"{redacted}: chained addresses ('::') are refused; name the folder that holds manifest.json")
    if address.startswith("pipe:"):
        raise ShardError(
            "pipe: addresses run a shell and are refused; name a folder or an http(s), s3 or other address"
        )
    match = SCHEME.match(address)
    if match is None:
        return None
    scheme = match[1].lower()
    if scheme in ("file", "local"):
        return None
    if scheme not in REMOTESCHEMES:
        allowed = ", ".join(sorted(REMOTESCHEMES))
        raise ShardError(f"{redacted}: scheme {scheme!r} is refused; use a local path or one of: file, {allowed}")
    try:
        urlsplit(address)
    except ValueError:  # its text may repeat the address
        raise ShardError(f"{redacted}: the host is not written right; give scheme://host/folder") from None
    return scheme


def _is_existing_path(address: str) -> bool:
    with suppress(OSError):  # a name may be too long for a path
        return SCHEME.match(address) is None and Path(address).exists()
    return False


def local_path(address: str) -> Path:
    """Absolute path of an address without a remote scheme (`scheme_of` is None)."""
    match = SCHEME.match(address)
    if match is None:
        return Path(address).expanduser().absolute()
    rest = address[match.end() :]
    return Path("/" + unquote(rest.partition("/")[2])) if match[1].lower() == "file" else Path(rest).absolute()


def join_address(address: str, name: str) -> str:
    """Address of the file `name` below `address`; an access token in the query of http(s) stays behind the path."""
    if address.lower().startswith(("http://", "https://")):
        parts = urlsplit(address)
        return urlunsplit((parts.scheme, parts.netloc, f"{parts.path.rstrip('/')}/{name}", parts.query, ""))
    return f"{address.rstrip('/')}/{name}"


def shown_address(address: str, name: str) -> str:
    """Address of the file `name` below `address` as it may be shown; another for each name, whatever is redacted."""
    return f"{redact(address).rstrip('/')}/{printable(name)}"
