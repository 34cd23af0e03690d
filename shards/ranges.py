"""Ranges of files by obstore: several in one call, or a large one in pieces; its threads do HTTP without Python's lock.

For training a range is some 20 kB, and asking for one costs Python more than anything else does with it. But this
client says little about failures and knows fewer ways to reach a store than fsspec's drivers. So it gives what comes
as it should and no reason for the rest, and whoever lacks bytes asks the store itself for them.
"""

from __future__ import annotations

import asyncio
import os
import re
import time
from collections.abc import AsyncGenerator, Mapping, Sequence
from datetime import datetime, timedelta, timezone
from functools import cache
from typing import Any

import obstore
from obstore.store import HTTPStore, S3Store

from shards.local import Range

# obstore makes this many requests of a call at the same time.
RANGES_A_CALL = 10
# A larger one of several ranges is asked for by itself: it costs little beside its bytes.
MAX_RANGE_BYTES = 1 << 20
_PIECE_BYTES = 1 << 20
# What means the same to every client, whatever it escapes.
_PLAIN_NAME = re.compile(r"(?!.*(^|/)\.{0,2}(/|$))[\w./-]+", re.ASCII)
_PLAIN_ADDRESS = re.compile(r"https?://[\w.-]+(:\d+)?(/[\w./-]*)?", re.ASCII)
_SECONDS_ASIDE = 60.0
_CREDENTIALS_LIFETIME = timedelta(minutes=5)


@cache
def _first_process() -> int:
    """The process that used obstore first: only it has obstore's threads, a forked child of it has none."""
    return os.getpid()


class RangeClient:
    """Ranges of the files of one obstore store; with None in its place it never answers.

    timeout_seconds, min_bytes_per_second: how long a call waits, and what it must bring in further time. Until a call
    has been answered, a failure may be that of a client that cannot reach this store at all: it is put aside for a
    minute then.
    """

    def __init__(self, store: Any, timeout_seconds: float, min_bytes_per_second: float) -> None:
        self._store = store
        self._timeout_seconds = timeout_seconds
        self._min_bytes_per_second = min_bytes_per_second
        self._has_answered = False
        self._aside_until = 0.0

    def close(self) -> None:
        """Answers nothing any more; its connections end with the calls that are under way."""
        self._store = None

    async def get(self, name: str, ranges: Sequence[Range]) -> list[bytes] | None:
        """The bytes of at most RANGES_A_CALL ranges of a file, in their order, or None. Whether the file has the size
        that it should have is not seen."""
        starts, stops = zip(*ranges, strict=True)
        sizes = [stop - start for start, stop in ranges]
        if max(sizes) > MAX_RANGE_BYTES or not self._may_ask(name):
            return None
        try:
            call = obstore.get_ranges_async(self._store, name, starts=starts, ends=stops, coalesce=0)
            bodies = [bytes(body) for body in await self._in_time(call, sum(sizes))]
        except Exception:
            bodies = []
        return bodies if self._note([len(body) for body in bodies] == sizes) else None

    async def pieces(self, name: str, start: int, stop: int, total: int) -> AsyncGenerator[Any, None]:
        """The bytes start <= offset < stop of a file of `total` bytes, buffer by buffer, until one does not come as it
        should."""
        position = start
        try:
            if not self._may_ask(name):
                return
            answer = await self._in_time(obstore.get_async(self._store, name, options={"range": (start, stop)}), 0)
            if (answer.meta["size"], answer.range) != (total, (start, stop)):
                return
            stream = answer.stream(min_chunk_size=_PIECE_BYTES).__aiter__()
        except Exception:
            self._note(False)
            return
        while position < stop:
            try:
                piece = await self._in_time(stream.__anext__(), _PIECE_BYTES)
            except Exception:
                break
            position += len(piece)
            if position > stop:
                break
            yield piece
        self._note(position == stop)

    def _may_ask(self, name: str) -> bool:
        return (
            self._store is not None
            and (self._has_answered or time.monotonic() >= self._aside_until)
            and _PLAIN_NAME.fullmatch(name) is not None
            and _first_process() == os.getpid()
        )

    async def _in_time(self, call: Any, size: int) -> Any:
        return await asyncio.wait_for(call, self._timeout_seconds + size / self._min_bytes_per_second)

    def _note(self, is_answered: bool) -> bool:
        self._has_answered |= is_answered
        if not is_answered:
            self._aside_until = time.monotonic() + _SECONDS_ASIDE
        return is_answered


def http_store(address: str, headers: Mapping[str, str], proxy: str | None) -> HTTPStore | None:
    """obstore's, for the files below an address of HTTP(S); None where the address says more than a place."""
    if _PLAIN_ADDRESS.fullmatch(address) is None:
        return None
    return HTTPStore(address, client_options=_options(headers, proxy), retry_config={"max_retries": 0})


def s3_store(bucket: str, prefix: str, credentials: Any, proxy: str | None, **place: Any) -> S3Store | None:
    """obstore's, for the keys below a prefix of a bucket. credentials: botocore's, None to sign nothing. place:
    endpoint, region and virtual_hosted_style_request."""
    if _PLAIN_ADDRESS.fullmatch(place["endpoint"]) is None or _PLAIN_NAME.fullmatch(bucket) is None:
        return None

    async def current() -> Any:
        frozen = await credentials.get_frozen_credentials()
        return {
            "access_key_id": frozen.access_key,
            "secret_access_key": frozen.secret_key,
            "token": frozen.token,
            "expires_at": datetime.now(timezone.utc) + _CREDENTIALS_LIFETIME,
        }

    return S3Store(
        bucket,
        prefix=prefix or None,
        skip_signature=credentials is None,
        client_options=_options({}, proxy),
        retry_config={"max_retries": 0},
        credential_provider=None if credentials is None else current,
        **place,
    )


def _options(headers: Mapping[str, str], proxy: str | None) -> Any:
    # How long a call may take is limited by who makes it. http: what the address says was decided by who wrote it.
    options = {"allow_http": True, "timeout": timedelta(days=1), "connect_timeout": timedelta(days=1)}
    return {**options, "default_headers": dict(headers), **({"proxy_url": proxy} if proxy else {})}
