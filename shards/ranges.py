"""Several small ranges of a file in one call, by obstore: its threads speak HTTP without Python's lock.

For training a range is some 20 kB, and asking for one costs Python more than anything else does with it. But this
client says little about failures, does not ask how large the file is, and knows fewer ways to reach a store than
fsspec's drivers. So it gives the bytes or nothing, and whoever gets nothing asks the store itself, range by range.
"""

from __future__ import annotations

import asyncio
import os
import re
import time
from collections.abc import Mapping, Sequence
from datetime import datetime, timedelta, timezone
from functools import cache
from typing import Any

import obstore
from obstore.store import HTTPStore, S3Store

from shards.local import Range

# obstore makes this many requests of a call at the same time.
RANGES_A_CALL = 10
# A larger range is asked for by itself: it costs little beside its bytes.
MAX_RANGE_BYTES = 1 << 20
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
    """Ranges of the files of one obstore store; without one it never answers.

    Until it has answered once, a failure may be that of a client that cannot reach this store at all: it is put aside
    for a minute then.
    """

    def __init__(self, store: Any = None) -> None:
        self._store = store
        self._has_answered = False
        self._aside_until = 0.0 if store is not None else float("inf")

    async def get(self, name: str, ranges: Sequence[Range], seconds: float) -> list[bytes] | None:
        """The bytes of at most RANGES_A_CALL ranges of a file, in their order, within a time; None for any reason."""
        if not self._has_answered and time.monotonic() < self._aside_until:
            return None
        starts, stops = zip(*ranges, strict=True)
        sizes = [stop - start for start, stop in ranges]
        if max(sizes) > MAX_RANGE_BYTES or _PLAIN_NAME.fullmatch(name) is None or _first_process() != os.getpid():
            return None
        try:
            call = obstore.get_ranges_async(self._store, name, starts=starts, ends=stops, coalesce=0)
            bodies = [bytes(body) for body in await asyncio.wait_for(call, seconds)]
        except Exception:
            bodies = []
        if [len(body) for body in bodies] != sizes:
            self._aside_until = time.monotonic() + _SECONDS_ASIDE
            return None
        self._has_answered = True
        return bodies


def http_client(address: str, headers: Mapping[str, str], proxy: str | None) -> RangeClient:
    """For the files below an address of HTTP(S)."""
    if _PLAIN_ADDRESS.fullmatch(address) is None:
        return RangeClient()
    return RangeClient(HTTPStore(address, client_options=_options(headers, proxy), retry_config={"max_retries": 0}))


def s3_client(bucket: str, prefix: str, credentials: Any, proxy: str | None, **place: Any) -> RangeClient:
    """For the keys below a prefix of a bucket. credentials: botocore's, None to sign nothing. place: obstore's
    endpoint, region and virtual_hosted_style_request."""
    if _PLAIN_ADDRESS.fullmatch(place["endpoint"]) is None or _PLAIN_NAME.fullmatch(bucket) is None:
        return RangeClient()

    async def current() -> Any:
        frozen = await credentials.get_frozen_credentials()
        return {
            "access_key_id": frozen.access_key,
            "secret_access_key": frozen.secret_key,
            "token": frozen.token,
            "expires_at": datetime.now(timezone.utc) + _CREDENTIALS_LIFETIME,
        }

    store = S3Store(
        bucket,
        prefix=prefix or None,
        skip_signature=credentials is None,
        client_options=_options({}, proxy),
        retry_config={"max_retries": 0},
        credential_provider=None if credentials is None else current,
        **place,
    )
    return RangeClient(store)


def _options(headers: Mapping[str, str], proxy: str | None) -> Any:
    # How long a call may take is limited by who makes it. http: what the address says was decided by who wrote it.
    options = {"allow_http": True, "timeout": timedelta(days=1), "connect_timeout": timedelta(days=1)}
    return {**options, "default_headers": dict(headers), **({"proxy_url": proxy} if proxy else {})}
