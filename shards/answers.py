"""What stores answer: whether it is what was asked for, what else it says, and whether to ask again."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import aiohttp
from yarl import URL

from shards.format import ShardError
from shards.text import printable, redact, redact_text

_WRONG_CLOCK = "RequestTimeTooSkewed"
_FINAL_STATUS = frozenset(range(300, 500)) - {408, 425, 429}
# Names, because botocore is imported only when an s3 address is in use.
_FINAL_ERROR_NAMES = frozenset(
    ["NoCredentialsError", "PartialCredentialsError", "ProfileNotFound", "ParamValidationError", "UnknownProtocolError"]
)


class BadBodyError(Exception):
    """A body that is not what was asked for: too short, too long, or of another range. Transient."""


class RangesIgnoredError(ShardError):
    """The server answers a range request with the whole file."""


class WriteError(Exception):
    """Received bytes could not be written to the local file; trying again does not help."""

    def __init__(self, cause: OSError) -> None:
        super().__init__(str(cause))
        self.cause = cause


_FINAL_ERRORS = (
    ShardError,
    WriteError,
    FileNotFoundError,
    PermissionError,
    IsADirectoryError,
    NotADirectoryError,
    ImportError,
    TypeError,
    ValueError,
    NotImplementedError,
    aiohttp.ClientConnectorCertificateError,
)


def _answer(error: BaseException) -> Mapping[str, Any]:
    """The store's answer that an error of botocore carries; empty without one."""
    for source in (error, error.__cause__):
        response = getattr(source, "response", None)
        if isinstance(response, Mapping):
            return response
    return {}


def _status(error: BaseException) -> int | None:
    """HTTP status that an error of aiohttp or botocore carries."""
    if isinstance(error, aiohttp.ClientResponseError):
        return error.status
    return _answer(error).get("ResponseMetadata", {}).get("HTTPStatusCode")


def is_wrong_clock(error: BaseException) -> bool:
    """Whether S3 refuses a signature because this machine's clock differs from the store's."""
    if isinstance(error, aiohttp.ClientResponseError):
        return error.message == _WRONG_CLOCK
    return _answer(error).get("Error", {}).get("Code") == _WRONG_CLOCK


def is_transient(error: BaseException) -> bool:
    """Whether trying again may help."""
    if isinstance(error, (TimeoutError, asyncio.TimeoutError)):
        return True
    if isinstance(error, aiohttp.ClientResponseError) and error.message == "RequestTimeout":
        return True  # S3's word for a slow connection, with the status 400
    status = _status(error)
    if status is not None:
        return status not in _FINAL_STATUS
    if not isinstance(error, Exception) or isinstance(error, _FINAL_ERRORS):
        return False
    return type(error).__name__ not in _FINAL_ERROR_NAMES


def explain(error: BaseException) -> str:
    """What happened, on one line, with addresses in it redacted."""
    if isinstance(error, aiohttp.ClientResponseError):
        return redact_text(f"HTTP status {error.status} {error.message}".strip())
    text = redact_text(str(error))
    if isinstance(error, aiohttp.ClientProxyConnectionError):
        return f"the proxy that http_proxy or https_proxy names does not answer: {text}"
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


@dataclass(frozen=True)
class Span:
    """Bytes start <= offset < stop of a file of `total` bytes. total None: a whole file of unknown size, of which not
    more than `stop` bytes are read or accepted."""

    start: int
    stop: int
    total: int | None

    @property
    def size(self) -> int | None:
        """Bytes of the span, None where it is not known."""
        return None if self.total is None else self.stop - self.start

    @property
    def is_whole(self) -> bool:
        """Whether the span is the whole file."""
        return self.total is None or (self.start, self.stop) == (0, self.total)

    def check_length(self, received: int) -> None:
        """Raises BadBodyError unless this many bytes are the whole answer."""
        if self.size not in (None, received):
            raise BadBodyError(f"received {received} of the {self.size} bytes at {self.start}")

    def check_range(self, url: URL, status: int, content_range: str) -> None:
        """Raises unless the answer to an HTTP range request holds just this range of a file of just this size."""
        if status == 206 and content_range == f"bytes {self.start}-{self.stop - 1}/{self.total}":
            return
        where = redact(str(url))  # only here: it takes a tenth of a request's time under Python's lock
        if status != 206:
            raise RangesIgnoredError(
                f"{where}: the server answers a request for a range of bytes with status {status} and the whole file; "
                "use a server that supports ranges, or keep whole shards in the cache (cache_bytes)"
            )
        match = re.fullmatch(r"bytes (\d+)-(\d+)/(\d+|\*)", content_range.strip(), re.ASCII)
        if match is None or (int(match[1]), int(match[2])) != (self.start, self.stop - 1):
            raise BadBodyError(
                f"asked for the bytes {self.start}-{self.stop - 1}, the answer is of {printable(content_range[:80])!r}"
            )
        if match[3] != "*" and int(match[3]) != self.total:
            raise ShardError(
                f"{where}: has {match[3]} bytes, the manifest says {self.total}; the data set was changed or is "
                "incomplete: upload it again, and check it with check_shards"
            )
