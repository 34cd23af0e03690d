"""Files behind an address (HTTP(S), S3 and what else fsspec reaches): byte ranges and whole files, with retries.

Every body is checked for its length, and for HTTP the answered range and file size too, so a truncated body or a
server that ignores ranges is never taken for the bytes asked for. Transient faults (connections, timeouts, 429, 5xx,
short bodies) are tried again with exponential backoff; refusals (401, 403, 404 ...) fail at once. Errors name the
address without user names, passwords and query, and never carry the original exception, whose text may hold them.
"""

from __future__ import annotations

import logging
import os
import re
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures import wait as wait_for_all
from dataclasses import dataclass
from typing import Any, TypeVar

import aiohttp
import fsspec
from fsspec.asyn import sync
from tenacity import RetryCallState, Retrying, retry_if_exception, stop_after_attempt, wait_exponential_jitter

from shards.address import join_address, scheme_of
from shards.format import SampleError, ShardError, ShardInfo
from shards.local import Check, Range
from shards.text import printable, redact, redact_text

T = TypeVar("T")
Consume = Callable[[bytes], Any]
_log = logging.getLogger(__name__)

_CONNECTIONS = 32
_BACKOFF_SECONDS = 0.25
_MAX_BACKOFF_SECONDS = 10.0
_PART_BYTES = 8 << 20
# Two ranges closer than this are fetched as one: on a store with 10 ms to the first byte and 100 MB/s a connection,
# a request costs as much as a megabyte; this stays well below and so never fetches much that nobody asked for.
_MAX_GAP_BYTES = 64 << 10
# A transfer slower than this is given up and tried again, even if single bytes keep dripping in.
_MIN_BYTES_PER_SECOND = 64 << 10
_FINAL_STATUS = frozenset(range(300, 500)) - {408, 425, 429}
# Names, because botocore is imported only when an s3 address is in use.
_FINAL_ERROR_NAMES = frozenset(
    ["NoCredentialsError", "PartialCredentialsError", "ProfileNotFound", "ParamValidationError", "UnknownProtocolError"]
)


class BadBodyError(Exception):
    """A body that is not what was asked for: too short, too long, or of another range. Transient."""


class RangesIgnoredError(ShardError):
    """The server answers a range request with the whole file."""


class _StoreError(Exception):
    """What came could not be written to the local file: not the server's fault, and trying again does not help."""

    def __init__(self, cause: OSError) -> None:
        super().__init__(str(cause))
        self.cause = cause


_FINAL_ERRORS = (
    ShardError,
    _StoreError,
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


def join_ranges(ranges: Sequence[Range], max_gap: int = _MAX_GAP_BYTES) -> list[Range]:
    """The ranges sorted, those that overlap or lie within `max_gap` bytes of each other joined into one."""
    joined: list[Range] = []
    for start, stop in sorted(ranges):
        if joined and start - joined[-1][1] <= max_gap:
            joined[-1] = (joined[-1][0], max(stop, joined[-1][1]))
        else:
            joined.append((start, stop))
    return joined


def _status(error: BaseException) -> int | None:
    """HTTP status that an error of aiohttp or botocore carries."""
    if isinstance(error, aiohttp.ClientResponseError):
        return error.status
    for source in (error, error.__cause__):
        response = getattr(source, "response", None)
        if isinstance(response, Mapping):
            return response.get("ResponseMetadata", {}).get("HTTPStatusCode")
    return None


def is_transient(error: BaseException) -> bool:
    """Whether trying again may help."""
    if isinstance(error, TimeoutError):
        return True
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
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


@dataclass(frozen=True)
class _Span:
    """Bytes start <= offset < stop of a file of `total` bytes. total None: a whole file of unknown size."""

    start: int
    stop: int
    total: int | None

    @property
    def size(self) -> int | None:
        return None if self.total is None else self.stop - self.start

    @property
    def is_whole(self) -> bool:
        return self.total is None or (self.start, self.stop) == (0, self.total)

    def check_length(self, received: int) -> None:
        """Raises BadBodyError unless so many bytes are the whole answer."""
        if self.size not in (None, received):
            raise BadBodyError(f"{received} bytes came of the {self.size} at {self.start}")

    def check_range(self, where: str, status: int, content_range: str) -> None:
        """Raises unless the answer to an HTTP range request holds just this range of a file of just this size."""
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


class RemoteFiles:
    """The files below one address.

    retries: attempts after the first. timeout_seconds: limit on connecting, on each wait for data, and, with time
    for the bytes at 64 KiB a second added, on a whole request. storage_options: passed to fsspec's file system.
    """

    def __init__(
        self, address: str, *, retries: int, timeout_seconds: float, storage_options: Mapping[str, Any] | None
    ) -> None:
        self._address = address
        self._retries = retries
        self._timeout_seconds = timeout_seconds
        self._storage_options = dict(storage_options or {})
        self.where = redact(address)
        self.renew()

    def renew(self) -> None:
        """Forgets connections and threads; new ones are made when needed. For the child after a fork."""
        self._lock = threading.Lock()
        # File systems that are not asynchronous may share one connection among all their callers (ftp does).
        self._one_at_a_time = threading.Lock()
        self._filesystem: Any = None
        self._pool: ThreadPoolExecutor | None = None

    def close(self) -> None:
        with self._lock:
            pool, self._pool = self._pool, None
        if pool is not None:
            pool.shutdown(cancel_futures=True)

    def _submit(self, function: Callable[..., T], *arguments: Any) -> Future[T]:
        with self._lock:
            if self._pool is None:
                self._pool = ThreadPoolExecutor(_CONNECTIONS, thread_name_prefix="shards-remote")
            return self._pool.submit(function, *arguments)

    def place(self, name: str) -> str:
        """Address of a file as it may be shown."""
        return redact(join_address(self._address, name))

    def _connect(self) -> Any:
        with self._lock:
            if self._filesystem is None:
                scheme = scheme_of(self._address)
                options = dict(self._storage_options)
                if scheme in ("s3", "s3a"):
                    # Retries are ours alone: three layers of them would multiply.
                    limits = {"connect_timeout": self._timeout_seconds, "read_timeout": self._timeout_seconds}
                    config = {**limits, "retries": {"max_attempts": 0}, "max_pool_connections": _CONNECTIONS}
                    options["config_kwargs"] = {**config, **options.get("config_kwargs", {})}
                self._filesystem = fsspec.filesystem(scheme, skip_instance_cache=True, **options)
                if scheme in ("s3", "s3a"):
                    self._filesystem.retries = 1
            return self._filesystem

    def _retried(self, name: str, attempt: Callable[[], T]) -> T:
        def note(state: RetryCallState) -> None:
            error = state.outcome.exception() if state.outcome else None
            if error is not None:
                _log.info(
                    "%s: %s; attempt %d failed, trying again", self.place(name), explain(error), state.attempt_number
                )

        retrying = Retrying(
            stop=stop_after_attempt(self._retries + 1),
            wait=wait_exponential_jitter(initial=_BACKOFF_SECONDS, max=_MAX_BACKOFF_SECONDS, jitter=_BACKOFF_SECONDS),
            retry=retry_if_exception(is_transient),
            before_sleep=note,
            reraise=True,
        )
        try:
            return retrying(attempt)
        except (ShardError, _StoreError):
            raise
        except Exception as error:
            attempts = retrying.statistics.get("attempt_number", 1)
            if is_transient(error):
                fix = f"gave up after {attempts} attempts; check that the server is up and reachable, then start again"
            else:
                fix = "check the address, the credentials and the storage options"
            message = f"{self.place(name)}: {explain(error)}; {fix}"
        # Outside the handler, so that the original exception, whose text may hold secrets, is not chained.
        raise ShardError(message)

    def _get(self, name: str, span: _Span, consume: Consume) -> None:
        """One attempt to get some bytes of a file; `consume` is called with each piece in order."""
        filesystem = self._connect()
        address = join_address(self._address, name)
        seconds = self._timeout_seconds + (span.size or 0) / _MIN_BYTES_PER_SECOND
        if scheme_of(self._address) in ("http", "https"):
            limits = aiohttp.ClientTimeout(seconds, sock_connect=self._timeout_seconds, sock_read=self._timeout_seconds)
            # The outer limit is only for a connection that ignores its own.
            sync(filesystem.loop, _get_http, filesystem, address, span, consume, limits, timeout=seconds + 5)
            return
        path = filesystem._strip_protocol(address)
        if filesystem.async_impl:
            data = sync(filesystem.loop, filesystem._cat_file, path, start=span.start, end=span.stop, timeout=seconds)
        else:
            with self._one_at_a_time:
                data = filesystem.cat_file(path, start=span.start, end=span.stop)
        span.check_length(len(data))
        consume(data)

    def _read(self, name: str, span: _Span) -> bytes:
        def attempt() -> bytes:
            body = bytearray()
            self._get(name, span, body.extend)
            return bytes(body)

        return self._retried(name, attempt)

    def read(self, name: str, start: int, stop: int, total: int) -> bytes:
        """The bytes start <= offset < stop of a file of `total` bytes. Raises ShardError."""
        return self._read(name, _Span(start, stop, total))

    def read_whole(self, name: str, limit: int) -> bytes:
        """A file of unknown size, of which more than `limit` bytes are an error or left out. Raises ShardError."""
        return self._read(name, _Span(0, limit, None))

    def read_ranges(self, name: str, ranges: Sequence[Range], total: int) -> list[bytes]:
        """Bytes of each range; neighbours are fetched as one, the rest at the same time. Raises ShardError."""
        joined = join_ranges(ranges)
        if len(joined) == 1:
            bodies = [self.read(name, *joined[0], total)]
        else:
            bodies = _results([self._submit(self.read, name, start, stop, total) for start, stop in joined])
        chunks: dict[Range, bytes] = {}
        for (start, stop), body in zip(joined, bodies, strict=True):
            for first, last in ranges:
                if start <= first and last <= stop:
                    chunks[first, last] = body[first - start : last - start]
        return [chunks[wanted] for wanted in ranges]

    def download(self, name: str, total: int, descriptor: int) -> None:
        """Writes the whole file of `total` bytes to an open local file. Raises ShardError, OSError if writing fails."""
        parts = [(start, min(total, start + _PART_BYTES)) for start in range(0, total, _PART_BYTES)]
        if not parts:
            return
        try:
            self._download_part(name, *parts[0], total, descriptor)
        except RangesIgnoredError:
            self._download_stream(name, total, descriptor)
            return
        _results([self._submit(self._download_part, name, *part, total, descriptor) for part in parts[1:]])

    def _download_part(self, name: str, start: int, stop: int, total: int, descriptor: int) -> None:
        _pwrite_all(descriptor, self.read(name, start, stop, total), start)

    def _download_stream(self, name: str, total: int, descriptor: int) -> None:
        """The whole file in one request, for servers without ranges."""

        def attempt() -> None:
            offset = 0

            def consume(chunk: bytes) -> None:
                nonlocal offset
                try:
                    _pwrite_all(descriptor, chunk, offset)
                except OSError as error:
                    raise _StoreError(error) from error
                offset += len(chunk)

            self._get(name, _Span(0, total, total), consume)

        try:
            self._retried(name, attempt)
        except _StoreError as error:
            raise error.cause from None


def _pwrite_all(descriptor: int, data: bytes, offset: int) -> None:
    view = memoryview(data)
    while view:
        written = os.pwrite(descriptor, view, offset)
        offset += written
        view = view[written:]


async def _get_http(filesystem: Any, url: str, span: _Span, consume: Consume, limits: aiohttp.ClientTimeout) -> None:
    # fsspec's own cat_file looks neither at the status nor at the range and length of the answer.
    options = {**filesystem.kwargs, "timeout": limits}
    headers = {**options.pop("headers", {}), "Accept-Encoding": "identity"}
    if not span.is_whole:
        headers["Range"] = f"bytes={span.start}-{span.stop - 1}"
    session = await filesystem.set_session()
    async with session.get(filesystem.encode_url(url), headers=headers, **options) as response:
        response.raise_for_status()
        if not span.is_whole:
            span.check_range(redact(url), response.status, response.headers.get("Content-Range", ""))
        received = 0
        async for chunk in response.content.iter_chunked(1 << 20):
            received += len(chunk)
            if received > span.stop - span.start:
                raise BadBodyError(f"more than the {span.stop - span.start} bytes at {span.start} came")
            consume(chunk)
    span.check_length(received)


def _results(futures: Sequence[Future[T]]) -> list[T]:
    """Results in order. After a failure the rest is cancelled and waited for: nothing goes on unseen."""
    try:
        return [future.result() for future in futures]
    except BaseException:
        for future in futures:
            future.cancel()
        wait_for_all(futures)
        raise


class RemoteShards:
    """Tars behind an address, read by ranges. Implements ShardSource."""

    def __init__(self, files: RemoteFiles, shards: Sequence[ShardInfo]) -> None:
        self._files = files
        self._shards = shards

    def renew(self) -> None:
        self._files.renew()

    def close(self) -> None:
        self._files.close()

    def expect(self, shard: int, ranges: Sequence[Range]) -> None:
        """Nothing to prepare: `io_threads` requests are on their way at the same time."""

    def read(self, shard: int, ranges: Sequence[Range], check: Check) -> list[bytes]:
        info = self._shards[shard]
        chunks = self._files.read_ranges(info.name, ranges, info.bytes)
        complaint = check(chunks)
        if complaint is not None:
            # Damage on the way is gone at the second attempt; damage in the store is not.
            chunks = self._files.read_ranges(info.name, ranges, info.bytes)
            complaint = check(chunks)
        if complaint is not None:
            raise SampleError(complaint)
        return chunks
