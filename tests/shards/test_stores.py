"""What one request asks for, which answers it takes for the bytes, and which failures may be gone next time."""

import asyncio
from types import SimpleNamespace

import aiohttp
import pytest
from multidict import CIMultiDict, CIMultiDictProxy
from yarl import URL

import shards.stores
from shards.format import ShardError
from shards.stores import BadBodyError, RangesIgnoredError, Span, WriteError, explain, is_transient


def response_error(status: int, message: str = "") -> aiohttp.ClientResponseError:
    info = aiohttp.RequestInfo(URL("http://u:p@h/x?t=1"), "GET", CIMultiDictProxy(CIMultiDict()))
    return aiohttp.ClientResponseError(info, (), status=status, message=message)


class BotocoreError(Exception):
    """Carries a response as those of botocore do."""

    def __init__(self, status: int) -> None:
        super().__init__("the bucket says no")
        self.response = {"ResponseMetadata": {"HTTPStatusCode": status}}


def caused(status: int) -> Exception:
    error = PermissionError("no") if status < 500 else OSError("busy")
    error.__cause__ = BotocoreError(status)
    return error


@pytest.mark.parametrize(
    "error",
    [
        TimeoutError(),
        *map(response_error, (408, 425, 429, 500, 501, 503, 599)),
        response_error(400, "RequestTimeout"),
        BotocoreError(503),
        BotocoreError(429),
        caused(500),
        ConnectionResetError("reset"),
        OSError("odd"),
        BadBodyError("short"),
        aiohttp.ClientPayloadError("cut"),
    ],
    ids=repr,
)
def test_what_may_be_gone_next_time(error):
    assert is_transient(error) is True


@pytest.mark.parametrize(
    "error",
    [
        *map(response_error, (300, 301, 400, 401, 403, 404, 410, 416, 424, 430, 499)),
        BotocoreError(403),
        caused(404),
        ShardError("x"),
        RangesIgnoredError("x"),
        WriteError(OSError("full")),
        FileNotFoundError("x"),
        PermissionError("x"),
        ImportError("x"),
        ValueError("x"),
        type("NoCredentialsError", (Exception,), {})("x"),
        KeyboardInterrupt(),
        asyncio.CancelledError(),
    ],
    ids=repr,
)
def test_what_stays(error):
    assert is_transient(error) is False


def test_failures_are_explained_on_one_line_without_secrets():
    assert explain(response_error(404, "Not\nFound")) == "HTTP status 404 Not\\nFound"
    assert explain(response_error(503)) == "HTTP status 503"
    assert explain(OSError("cannot reach http://u:p@h/x?token=1")) == "OSError: cannot reach http://h/x"
    assert explain(TimeoutError()) == "TimeoutError"
    cause = OSError(28, "No space left on device")
    assert str(WriteError(cause)) == str(cause) and WriteError(cause).cause is cause


def test_spans():
    assert (Span(3, 10, 20).size, Span(0, 10, None).size) == (7, None)
    wholes = [Span(0, 10, None), Span(0, 20, 20), Span(0, 19, 20), Span(1, 20, 20)]
    assert [span.is_whole for span in wholes] == [True, True, False, False]
    Span(3, 10, 20).check_length(7)
    Span(0, 10, None).check_length(4)
    for received in (6, 8):
        with pytest.raises(BadBodyError, match=f"received {received} of the 7 bytes at 3"):
            Span(3, 10, 20).check_length(received)


@pytest.mark.parametrize(
    ("status", "content_range", "error"),
    [
        (206, "bytes 3-9/20", None),
        (206, "bytes 3-9/*", None),
        (206, " bytes 3-9/20 ", None),
        (200, "bytes 3-9/20", RangesIgnoredError),
        (207, "bytes 3-9/20", RangesIgnoredError),
        (200, "", RangesIgnoredError),
        (206, "", BadBodyError),
        (206, "bytes 3-9", BadBodyError),
        (206, "bytes 3-10/20", BadBodyError),
        (206, "bytes 2-9/20", BadBodyError),
        (206, "bytes */20", BadBodyError),
        (206, "bytes 3-9/21", ShardError),
    ],
)
def test_only_the_range_that_was_asked_for_is_taken(status, content_range, error):
    if error is None:
        Span(3, 10, 20).check_range("x", status, content_range)
        return
    with pytest.raises(error) as info:
        Span(3, 10, 20).check_range("x", status, content_range)
    assert type(info.value) is error


class Content:
    """A body that comes in pieces."""

    def __init__(self, *pieces: bytes) -> None:
        self.pieces = pieces

    async def iter_any(self):
        for piece in self.pieces:
            yield piece


@pytest.mark.parametrize("span", [Span(3, 8, 20), Span(0, 9, None)])
def test_a_body_in_pieces(span):
    response, written = SimpleNamespace(content=Content(b"ab", b"", b"cde")), []
    collect = lambda response, write: asyncio.run(shards.stores._collect(response, span, write))  # noqa: E731
    assert collect(response, None) == b"abcde"
    assert collect(response, written.append) == b"" and b"".join(written) == b"abcde"
    with pytest.raises(BadBodyError, match="more than the"):
        collect(SimpleNamespace(content=Content(b"abcde", b"fghij")), None)
    if span.total:
        with pytest.raises(BadBodyError, match="received 4 of the 5"):
            collect(SimpleNamespace(content=Content(b"abcd")), None)


def test_time_limits_grow_with_the_size():
    async def limits(*sizes: int | None) -> list[aiohttp.ClientTimeout]:
        store = shards.stores._HttpStore("http://h/x", 5.0, {})
        return [store._limits(Span(7, 7 + (size or 0), 1 << 40 if size else None)) for size in sizes]

    unknown, small, large, one_more = asyncio.run(limits(None, 1 << 16, 1 << 20, (1 << 20) + 1))
    assert (unknown.total, small.total, large.total) == (5, 6, 21)
    # One for each wait would cost a timer for each piece of a small body.
    assert [limit.sock_read for limit in (unknown, small, large, one_more)] == [5, None, None, 5]
    assert {limit.sock_connect for limit in (unknown, small, large)} == {5}
