"""How one request to a store is made: HTTP(S) and S3 by aiohttp, other stores by fsspec; all within one event loop.

What a `RangeClient` brings need not be asked for here: it costs less, and tells less.

Every body is checked for its length, and for HTTP and S3 the answered range and file size too, so a truncated body or
a server that ignores ranges is never taken for the bytes asked for. Trying again is up to the caller.
"""

from __future__ import annotations

import asyncio
import re
import ssl
import time
from collections.abc import Callable, Mapping
from contextvars import ContextVar
from typing import Any, Protocol
from urllib.request import getproxies, proxy_bypass

import aiohttp
import fsspec
from obstore.store import HTTPStore, S3Store
from yarl import URL

from shards.address import join_address, scheme_of
from shards.answers import BadBodyError, Span
from shards.ranges import RangeClient, http_store, s3_store

# Takes the pieces of a body in order, as they come.
Write = Callable[[bytes], None]

# A transfer slower than this is given up and tried again, even if single bytes keep dripping in.
_MIN_BYTES_PER_SECOND = 64 << 10
# Below this size only the whole request has a time limit: one on each wait for data would cost a timer per piece.
_SMALL_BODY_BYTES = 1 << 20
_SIGNATURE_SECONDS = 120.0  # S3 takes a signature for 15 minutes, and clocks differ
_MAX_EXPLANATION_BYTES = 4096
# Of a request to S3 that asks for an object and nothing special.
_SIGNATURE = "AWS4-HMAC-SHA256 "
_PLAIN_S3_HEADERS = frozenset(
    ["authorization", "x-amz-date", "x-amz-content-sha256", "x-amz-security-token", "x-amz-checksum-mode"]
) | {"accept-encoding", "user-agent", "amz-sdk-invocation-id", "amz-sdk-request"}


class Store(Protocol):
    """The files below one address. Used and closed in one event loop."""

    async def get(self, name: str, span: Span, write: Write | None = None) -> bytes:
        """One attempt to get some bytes of a file. With `write` each piece goes there as it comes, and the answer is
        empty. Raises what `answers.is_transient` tells apart."""

    async def range_client(self, name: str) -> RangeClient:
        """A client for ranges of the file and its neighbours, always the same; it may be one that never answers."""

    async def close(self) -> None:
        """Closes its connections."""


def open_store(address: str, *, timeout_seconds: float, storage_options: Mapping[str, Any]) -> Store:
    """timeout_seconds: limit on connecting, on each wait for data, and, with time for the bytes at 64 KiB a second
    added, on a whole request. storage_options: of fsspec's file system. Raises ImportError if its driver is missing."""
    scheme = scheme_of(address)
    kind = _S3Store if scheme in ("s3", "s3a") else _HttpStore if scheme in ("http", "https") else _OtherStore
    return kind(address, timeout_seconds, dict(storage_options))


def _proxy(url: URL, proxies: Mapping[str, str] | None = None) -> str | None:
    """The proxy for a store: of `proxies` by scheme, or else of the environment (http_proxy, https_proxy, no_proxy).

    aiohttp's own look at the environment costs a thread's work for each request, and reads ~/.netrc.
    """
    if proxies is None:
        proxies = {} if proxy_bypass(url.host or "") else getproxies()
    return proxies.get(url.scheme)


class _HttpStore:
    def __init__(self, address: str, timeout_seconds: float, options: dict[str, Any]) -> None:
        self._address, self._timeout_seconds = address, timeout_seconds
        self._session: aiohttp.ClientSession | None = None
        self._ranges: RangeClient | None = None
        self._urls: dict[str, URL] = {}
        self._filesystem = _asynchronous(scheme_of(address), options)
        # How many connections there are is decided by who asks, so that nothing waits within aiohttp.
        self._client_options = {"connector": None, **getattr(self._filesystem, "client_kwargs", {})}
        self._options = dict(getattr(self._filesystem, "kwargs", {}))
        self._headers = {**self._options.pop("headers", {}), "Accept-Encoding": "identity"}
        if "proxy" not in self._options and (proxy := _proxy(URL(address))):
            self._options["proxy"] = proxy

    async def _target(self, name: str) -> tuple[URL, dict[str, str]]:
        """Where a file is, and the headers to ask for it with."""
        url = self._urls.get(name)
        if url is None:
            url = self._urls[name] = self._filesystem.encode_url(join_address(self._address, name))
        return url, self._headers

    async def get(self, name: str, span: Span, write: Write | None = None) -> bytes:
        url, headers = await self._target(name)
        if not span.is_whole:
            headers = {**headers, "Range": f"bytes={span.start}-{span.stop - 1}"}
        async with self._connected().get(url, headers=headers, timeout=self._limits(span), **self._options) as response:
            if response.status >= 300:
                await self._refuse(response)
            if span.total is None and response.status == 206:
                raise BadBodyError("a part of the file came where the whole file was asked for")
            if not span.is_whole:
                span.check_range(url, response.status, response.headers.get("Content-Range", ""))
            if write is None and span.size is not None and response.content_length == span.size:
                body = await response.read()  # not longer than announced
                span.check_length(len(body))
                return body
            return await _collect(response, span, write)

    async def range_client(self, name: str) -> RangeClient:
        if self._ranges is None:
            try:
                store = await self._range_store(name)
            except Exception:  # of signing; whoever asks the store itself is told
                return RangeClient(None, self._timeout_seconds, _MIN_BYTES_PER_SECOND)
            if self._ranges is None:  # else another request was faster
                self._ranges = RangeClient(store, self._timeout_seconds, _MIN_BYTES_PER_SECOND)
        return self._ranges

    async def _range_store(self, name: str) -> HTTPStore | S3Store | None:
        """obstore's store for the files beside `name`; None where only aiohttp can ask as it was told to."""
        told = {**self._client_options, **self._options}
        if not told.keys() <= {"connector", "headers", "proxy"} or told["connector"] is not None:
            return None
        return http_store(self._address, {**told.get("headers", {}), **self._headers}, told.get("proxy"))

    def _connected(self) -> aiohttp.ClientSession:
        if self._session is None:
            options = dict(self._client_options)
            options["connector"] = options["connector"] or aiohttp.TCPConnector(limit=0)
            self._session = aiohttp.ClientSession(**options)
        return self._session

    def _limits(self, span: Span) -> aiohttp.ClientTimeout:
        seconds, size = self._timeout_seconds, span.size or 0
        return aiohttp.ClientTimeout(
            seconds + size / _MIN_BYTES_PER_SECOND,
            sock_connect=seconds,
            sock_read=None if 0 < size <= _SMALL_BODY_BYTES else seconds,
        )

    async def _refuse(self, response: aiohttp.ClientResponse) -> None:
        raise aiohttp.ClientResponseError(
            response.request_info, (), status=response.status, message=response.reason or ""
        )

    async def close(self) -> None:
        if self._ranges is not None:
            self._ranges.close()
        if self._session is not None:
            await self._session.close()


async def _collect(response: aiohttp.ClientResponse, span: Span, write: Write | None) -> bytes:
    """The body piece by piece: its length is unknown, or it goes elsewhere."""
    pieces: list[bytes] = []
    received = 0
    async for piece in response.content.iter_any():
        received += len(piece)
        if received > span.stop - span.start:
            raise BadBodyError(f"received more than the {span.stop - span.start} bytes at {span.start}")
        if write is None:
            pieces.append(piece)
        else:
            write(piece)
    span.check_length(received)
    return b"".join(pieces)


# Set while botocore prepares a request that is not to be sent by it; receives the request.
_prepared: ContextVar[list[Any] | None] = ContextVar("_prepared", default=None)


class _NotSent:
    """The answer that botocore gets in place of a response."""

    status_code = 200
    headers: Mapping[str, str] = {}
    raw = None


def _keep_from_sending(request: Any, **_: Any) -> _NotSent | None:
    requests = _prepared.get()
    if requests is None:
        return None
    requests.append(request)
    return _NotSent()


class _S3Store(_HttpStore):
    """Objects of a bucket. botocore finds credentials, region and address and signs; aiohttp fetches.

    A signature is valid for a quarter of an hour and doesn't cover the range, so one serves all requests for an object
    within two minutes: a request costs as much as one by HTTP.
    """

    def __init__(self, address: str, timeout_seconds: float, options: dict[str, Any]) -> None:
        # Retries are the caller's alone: layers of them would multiply.
        limits = {"connect_timeout": timeout_seconds, "read_timeout": timeout_seconds, "retries": {"max_attempts": 0}}
        options["config_kwargs"] = {**limits, **options.get("config_kwargs", {})}
        super().__init__(address, timeout_seconds, options)
        self._filesystem.retries = 1
        self._client_options = {"connector": None}
        self._options = {"allow_redirects": False}
        self._proxies = options["config_kwargs"].get("proxies")
        self._client: Any = None
        self._has_met_bucket = False
        self._signed: dict[str, tuple[float, asyncio.Future[tuple[URL, dict[str, str]]]]] = {}

    async def _target(self, name: str) -> tuple[URL, dict[str, str]]:
        expires, signed = self._signed.get(name, (0.0, None))
        if signed is None or time.monotonic() > expires or (signed.done() and signed.exception() is not None):
            # One signs, the others wait for it.
            signed = asyncio.ensure_future(self._sign(name))
            self._signed[name] = time.monotonic() + _SIGNATURE_SECONDS, signed
        return await asyncio.shield(signed)

    async def _sign(self, name: str) -> tuple[URL, dict[str, str]]:
        if not self._has_met_bucket:
            await self._read_by_botocore(name, 0, 1)
        bucket, key, version = self._filesystem.split_path(self._path(name))
        wanted = {"Bucket": bucket, "Key": key, **({"VersionId": version} if version else {})}
        wanted |= self._filesystem.req_kw  # requester_pays; s3fs adds it itself only since 2026.9
        requests: list[Any] = []
        token = _prepared.set(requests)
        try:
            await self._client.get_object(**self._filesystem._get_s3_method_kwargs(self._client.get_object, wanted))
        finally:
            _prepared.reset(token)
        headers = {key: _text(value) for key, value in requests[-1].headers.items()}
        return URL(requests[-1].url, encoded=True), {**headers, "Accept-Encoding": "identity"}

    def _path(self, name: str) -> str:
        return self._filesystem._strip_protocol(join_address(self._address, name))

    async def _connect(self) -> None:
        client = await self._filesystem.set_session()
        if self._client is not None:
            return
        client.meta.events.register("before-send.s3.GetObject", _keep_from_sending)
        endpoint = URL(client.meta.endpoint_url)
        if proxy := _proxy(endpoint, self._proxies):
            self._options["proxy"] = proxy
        verify = self._filesystem.client_kwargs.get("verify")
        if verify is None:
            verify = self._filesystem.session.get_config_variable("ca_bundle")
        if endpoint.scheme == "https" and verify is not None:
            self._options["ssl"] = verify if isinstance(verify, bool) else ssl.create_default_context(cafile=verify)
        self._client = client

    async def _range_store(self, name: str) -> S3Store | None:
        url, headers = await self._target(name)
        bucket, key, _ = self._filesystem.split_path(self._path(name))
        is_plain = (
            not url.query_string
            and {header.lower() for header in headers} <= _PLAIN_S3_HEADERS
            and headers.get("Authorization", _SIGNATURE).startswith(_SIGNATURE)
            and "ssl" not in self._options
        )
        if not is_plain:
            return None
        return s3_store(
            bucket,
            key.removesuffix(name).strip("/"),
            self._client._request_signer._credentials if "Authorization" in headers else None,
            self._options.get("proxy"),
            endpoint=str(url.origin()),
            region=self._client.meta.region_name,
            virtual_hosted_style_request=url.path != f"/{bucket}/{key}",
        )

    async def get(self, name: str, span: Span, write: Write | None = None) -> bytes:
        if span.total is None:
            return await self._read_by_botocore(name, span.start, span.stop)
        return await super().get(name, span, write)

    async def _read_by_botocore(self, name: str, start: int, stop: int) -> bytes:
        """The first request of all: botocore follows a bucket to its region and remembers that."""
        await self._connect()
        path = self._path(name)
        body = await asyncio.wait_for(self._filesystem._cat_file(path, start=start, end=stop), self._timeout_seconds)
        self._has_met_bucket = True
        return body

    async def _refuse(self, response: aiohttp.ClientResponse) -> None:
        text = await response.content.read(_MAX_EXPLANATION_BYTES)
        code = re.search(rb"<Code>(\w{1,64})</Code>", text)
        message = code[1].decode() if code else response.reason or ""
        raise aiohttp.ClientResponseError(response.request_info, (), status=response.status, message=message)

    async def close(self) -> None:
        await super().close()
        if self._client is not None:
            await self._client.__aexit__(None, None, None)


def _text(value: str | bytes) -> str:
    return value.decode("latin-1") if isinstance(value, bytes) else value


class _OtherStore:
    """Any other store that fsspec reaches.

    Drivers that are not asynchronous are called in a thread, one call at a time: they may share one connection among
    all their callers (ftp does).
    """

    def __init__(self, address: str, timeout_seconds: float, options: dict[str, Any]) -> None:
        self._address, self._timeout_seconds = address, timeout_seconds
        scheme = scheme_of(address)
        # Host, port and user of an address of ftp, sftp, smb, hdfs ... are options of the driver.
        named = fsspec.get_filesystem_class(scheme)._get_kwargs_from_urls(address)
        self._filesystem = _asynchronous(scheme, {**named, **options})
        self._one_at_a_time = asyncio.Lock()

    async def get(self, name: str, span: Span, write: Write | None = None) -> bytes:
        path = self._filesystem._strip_protocol(join_address(self._address, name))
        if self._filesystem.async_impl:
            seconds = self._timeout_seconds + (span.size or 0) / _MIN_BYTES_PER_SECOND
            body = await asyncio.wait_for(
                self._filesystem._cat_file(path, start=span.start, end=span.stop), timeout=seconds
            )
        else:
            async with self._one_at_a_time:
                body = await asyncio.to_thread(self._filesystem.cat_file, path, start=span.start, end=span.stop)
        span.check_length(len(body))
        if write is None:
            return body
        write(body)
        return b""

    async def range_client(self, name: str) -> RangeClient:
        return RangeClient(None, self._timeout_seconds, _MIN_BYTES_PER_SECOND)

    async def close(self) -> None:
        session = getattr(self._filesystem, "_session", None)  # of gcsfs and what is built like it
        if session is not None:
            await session.close()


def _asynchronous(scheme: str | None, options: dict[str, Any]) -> Any:
    """fsspec's file system, made for the running loop if it can."""
    kind = fsspec.get_filesystem_class(scheme)
    if kind.async_impl:
        options = {**options, "asynchronous": True, "loop": asyncio.get_running_loop()}
    return kind(skip_instance_cache=True, **options)
