"""What one request asks for, which answers it takes for the bytes, and which failures may be gone next time."""

import asyncio
import ssl
from types import SimpleNamespace

import aiohttp
import fsspec
import pytest
from multidict import CIMultiDict, CIMultiDictProxy
from shard_data import serve
from yarl import URL

import shards.stores
from shards.answers import BadBodyError, RangesIgnoredError, Span, WriteError, explain, is_transient
from shards.format import ShardError


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
        Span(3, 10, 20).check_range(URL("http://x/y"), status, content_range)
        return
    with pytest.raises(error) as info:
        Span(3, 10, 20).check_range(URL("http://x/y"), status, content_range)
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


def test_headers_of_the_user_go_with_each_request(tmp_path):
    (tmp_path / "x").write_bytes(b"0123456789")
    seen = []

    def note(handler, body):
        seen.append((handler.headers["Authorization"], handler.headers["Accept-Encoding"]))
        return False

    async def read(address: str) -> list[bytes]:
        store = shards.stores.open_store(
            address, timeout_seconds=5, storage_options={"headers": {"Authorization": "Bearer x"}}
        )
        bodies = [await store.get("x", span) for span in (Span(2, 5, 10), Span(0, 10, 10), Span(0, 99, None))]
        await store.close()
        return bodies

    with serve(tmp_path) as server:
        server.fault = lambda path, count: note
        assert asyncio.run(read(server.address)) == [b"234", b"0123456789", b"0123456789"]
    assert seen == [("Bearer x", "identity")] * 3


# S3 without a bucket


@pytest.mark.parametrize(
    ("endpoint", "environment", "given", "expected"),
    [
        ("http://h", {}, {}, {}),
        ("http://h", {"http_proxy": "http://p:1", "https_proxy": "http://p:2"}, {}, {"proxy": "http://p:1"}),
        ("https://h", {"http_proxy": "http://p:1", "https_proxy": "http://p:2"}, {}, {"proxy": "http://p:2"}),
        ("http://h", {"http_proxy": "http://p:1", "no_proxy": "h"}, {}, {}),
        ("http://h", {"http_proxy": "http://p:1"}, {"proxies": {"http": "http://own:3"}}, {"proxy": "http://own:3"}),
        ("http://h", {"no_proxy": "h"}, {"proxies": {"http": "http://own:3"}}, {"proxy": "http://own:3"}),
        ("https://h", {}, {"verify": False}, {"ssl": False}),
        ("http://h", {}, {"verify": False}, {}),
        ("https://h", {}, {"verify": True, "bundle": "/nothing"}, {"ssl": True}),
        ("https://h", {}, {"bundle": "/bundle"}, {"ssl": "trusts /bundle"}),
    ],
)
def test_s3_goes_the_way_that_botocore_would_go(monkeypatch, endpoint, environment, given, expected):
    """Through the same proxy, trusting the same certificates."""
    for name in ("http_proxy", "https_proxy", "all_proxy", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(ssl, "create_default_context", lambda *, cafile=None, **_: f"trusts {cafile}")
    registered = []
    meta = SimpleNamespace(
        events=SimpleNamespace(register=lambda *event: registered.append(event)), endpoint_url=endpoint
    )

    async def set_session() -> SimpleNamespace:
        return SimpleNamespace(meta=meta)

    async def connected() -> dict:
        store = shards.stores._S3Store("s3://b/d", 5.0, {"config_kwargs": {"proxies": given.get("proxies")}})
        session = SimpleNamespace(get_config_variable=lambda name: given.get("bundle"))
        kwargs = {"verify": given["verify"]} if "verify" in given else {}
        store._filesystem = SimpleNamespace(set_session=set_session, client_kwargs=kwargs, session=session)
        await asyncio.gather(store._connect(), store._connect())
        return store._options

    options = asyncio.run(connected())
    assert options == {"allow_redirects": False, **expected}
    assert registered == [("before-send.s3.GetObject", shards.stores._keep_from_sending)]


def test_s3_signs_once_for_two_minutes_and_again_after_a_failure(monkeypatch):
    now, signed = [1000.0], []
    monkeypatch.setattr(shards.stores, "time", SimpleNamespace(monotonic=lambda: now[0]))

    async def sign(name: str) -> tuple[URL, dict[str, str]]:
        signed.append(name)
        number = len(signed)
        await asyncio.sleep(0)
        if number == 1:
            raise ConnectionResetError("busy")
        return URL(f"http://h/{name}"), {"number": str(number)}

    async def ask() -> None:
        store = shards.stores._S3Store("s3://b/d", 5.0, {})
        store._sign = sign
        twice = lambda: asyncio.gather(*(store._target("a") for _ in range(2)), return_exceptions=True)  # noqa: E731
        assert list(map(repr, await twice())) == ["ConnectionResetError('busy')"] * 2 and signed == ["a"]
        assert await twice() == [(URL("http://h/a"), {"number": "2"})] * 2 and signed == ["a"] * 2
        assert (await store._target("b"))[1] == {"number": "3"}
        now[0] += 119
        assert (await store._target("a"))[1] == {"number": "2"}
        now[0] += 2
        assert (await store._target("a"))[1] == {"number": "4"}

    asyncio.run(ask())


def test_an_s3_store_closes_botocores_client_if_it_has_one():
    closed = []

    async def leave(*_: object) -> None:
        closed.append(True)

    async def close(client: object) -> None:
        store = shards.stores._S3Store("s3://b/d", 5.0, {})
        store._client = client
        await store.close()

    asyncio.run(close(None))
    assert closed == []
    asyncio.run(close(type("Client", (), {"__aexit__": leave})()))
    assert closed == [True]


# Other stores


def test_each_store_has_a_driver_of_its_own():
    """fsspec would give the same one to all, with the connections of a loop that has ended."""
    first, second = (shards.stores._asynchronous("memory", {}) for _ in range(2))
    assert first is not second


def test_an_asynchronous_driver_has_time_for_the_bytes(monkeypatch):
    limits, closed = [], []
    wait_for = asyncio.wait_for

    async def noted(coroutine, timeout):
        limits.append(timeout)
        return await wait_for(coroutine, timeout)

    async def cat(path: str, *, start: int, end: int) -> bytes:
        return path.encode()[start:end]

    async def close() -> None:
        closed.append(True)

    async def read() -> list[bytes]:
        store = shards.stores._OtherStore("memory://b", 5.0, {})
        store._filesystem = SimpleNamespace(
            async_impl=True, _strip_protocol=str, _cat_file=cat, _session=SimpleNamespace(close=close)
        )
        whole, part, written = Span(0, 99, None), Span(0, 6, 13), []
        bodies = [await store.get("x", whole), await store.get("x", part), await store.get("x", part, written.append)]
        with pytest.raises(BadBodyError, match="received 12 of the 65536"):
            await store.get("x", Span(0, 1 << 16, 1 << 20))
        await store.close()
        return bodies + written

    monkeypatch.setattr(asyncio, "wait_for", noted)
    assert asyncio.run(read()) == [b"memory://b/x", b"memory", b"", b"memory"]
    small = 5 + 6 / (64 << 10)
    assert limits == [5, small, small, 6] and closed == [True]


def test_the_address_names_the_host_of_other_stores(monkeypatch):
    opened = []

    def connect(self) -> None:
        opened.append((self.host, self.port, *self.cred[:2]))

    monkeypatch.setattr(fsspec.get_filesystem_class("ftp"), "_connect", connect)
    monkeypatch.setattr(fsspec.get_filesystem_class("ftp"), "__del__", lambda self: None)

    async def open_one() -> None:
        shards.stores.open_store("ftp://u:p@h:2121/a", timeout_seconds=1, storage_options={"tls": False})

    asyncio.run(open_one())
    assert opened == [("h", 2121, "u", "p")]
