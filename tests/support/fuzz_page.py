"""What tests/support/fuzz.py feeds the page in the browser: forms, and all that comes over a connection."""

from __future__ import annotations

import asyncio
import logging
import re
import tempfile
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
from aiohttp import web
from fuzz_changes import Target

from text4vis.config.schema import Config
from text4vis.serving import page_server
from text4vis.serving.answers import Prediction
from text4vis.serving.footage import PredictionError
from text4vis.serving.index_store import SearchError
from text4vis.serving.page import Page

_UPLOAD_BYTES = _FORM_BYTES = 2048  # small limits, which damaged forms pass
_HOST = "127.0.0.1:8000"
_BOUNDARY = "----Boundary7MA4YWxk"


class RefusedError(Exception):
    """The page answered with a sentence on what is wrong, or not at all."""


class _Recogniser:
    """Answers without a model. What it was given comes back in texts."""

    class_names, config, calibration, decision = ("archery", "surfing"), Config(), None, None

    def predict(self, path: Path, labels: list[str] | None, *, accuracy: float | None) -> Prediction:
        if not path.read_bytes():
            raise PredictionError(f"{path}: it does not decode")
        names = labels or self.class_names
        return Prediction([(name, 0.5) for name in names], np.array([0]), np.zeros((1, 8, 8, 3), np.uint8))

    def scan(self, path: Path, labels: list[str] | None, *, window_seconds: float) -> None:
        raise PredictionError(f"{path}: no windows of {window_seconds} s for {labels}")


class _AtOnce(ThreadPoolExecutor):
    """Runs what it is given in the caller's thread: no case waits for another thread."""

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        future: Future[Any] = Future()
        try:
            future.set_result(fn(*args, **kwargs))
        except BaseException as error:
            future.set_exception(error)
        return future


class _Connection(asyncio.Transport):
    """A connection without a socket: keeps what the server sends."""

    def __init__(self) -> None:
        super().__init__()
        self.sent = bytearray()
        self.is_closed = False

    def write(self, data: Any) -> None:
        self.sent += data

    def close(self) -> None:
        self.is_closed = True

    abort = close

    def is_closing(self) -> bool:
        return self.is_closed

    def is_reading(self) -> bool:
        return True

    def pause_reading(self) -> None: ...

    def resume_reading(self) -> None: ...


class _Server:
    """The page's own application in a loop of this thread. messages: what it logs."""

    def __init__(self) -> None:
        def find(text: str, count: int) -> None:
            raise SearchError(f"question: {text!r} is none, and {count} too many")

        page_server.ThreadPoolExecutor, page_server._FORM_BYTES = _AtOnce, _FORM_BYTES
        index = SimpleNamespace(videos=[], find=find)
        self._app = page_server._application(
            Page(_Recogniser(), "model", index=index, upload_bytes=_UPLOAD_BYTES)  # type: ignore[arg-type]
        )
        self._loop = asyncio.new_event_loop()
        self._loop.set_default_executor(_AtOnce(1))
        self._runner = web.AppRunner(self._app, access_log=None, lingering_time=0)  # else 10 s for what is not read
        self._loop.run_until_complete(self._runner.setup())
        self.messages: list[str] = []
        handler = logging.Handler(logging.WARNING)
        handler.emit = lambda record: self.messages.append(logging.Formatter().format(record))  # type: ignore[method-assign]
        logging.getLogger().addHandler(handler)

    def answer(self, pieces: list[bytes]) -> bytes:
        """What the server sends to a browser that sends these pieces and then leaves."""
        return self._loop.run_until_complete(self._answer(pieces))

    async def _answer(self, pieces: list[bytes]) -> bytes:
        assert self._runner.server is not None
        connection, protocol = _Connection(), self._runner.server()
        protocol.connection_made(connection)
        for piece in pieces:
            if not connection.is_closed:
                protocol.data_received(piece)
                await self._rest()
        if not connection.is_closed:
            protocol.eof_received()
            await self._rest()
        protocol.connection_lost(None)
        await self._rest()
        assert len(asyncio.all_tasks()) == 1, "a task of a connection that is gone goes on"
        return bytes(connection.sent)

    async def _rest(self) -> None:
        """Until nothing is left to do but to wait for the browser."""
        idle = 0
        while idle < 3:
            await asyncio.sleep(0)
            idle = 0 if self._loop._ready else idle + 1  # type: ignore[attr-defined]


@cache
def _server() -> _Server:
    return _Server()


def _send(request: bytes, folder: Path) -> None:
    """Sends it in two pieces. Never is there an error of the server, a word in its log or a file on the disk."""
    server, uploads = _server(), folder / "uploads"
    uploads.mkdir(exist_ok=True)
    files = len(list(Path("/proc/self/fd").iterdir()))
    before, tempfile.tempdir = tempfile.tempdir, str(uploads)
    try:
        cut = len(request) // 2
        sent = server.answer([request[:cut], request[cut:]])
    finally:
        tempfile.tempdir = before
    messages, server.messages = server.messages, []
    assert not messages, messages[0]
    assert not list(uploads.iterdir()), "an upload stayed on the disk"
    assert len(list(Path("/proc/self/fd").iterdir())) <= files, "an upload stayed open"
    codes = [int(code) for code in re.findall(rb"HTTP/1\.[01] (\d{3}) ", sent)]
    assert all(code < 500 for code in codes), sent
    if not codes or max(codes) >= 400:
        raise RefusedError


def _head(method: str, path: str, **fields: object) -> bytes:
    lines = [f"{method} {path} HTTP/1.1", f"Host: {_HOST}"]
    lines += [f"{name.replace('_', '-')}: {value}" for name, value in fields.items()]
    return "\r\n".join([*lines, "", ""]).encode()


def _form(fields: Mapping[str, str], video: bytes | None = b"video", kind: str = "video/mp4") -> bytes:
    parts = [f'Content-Disposition: form-data; name="{name}"\r\n\r\n{text}'.encode() for name, text in fields.items()]
    if video is not None:
        name = 'Content-Disposition: form-data; name="video"; filename="clip.mp4"\r\n'
        parts.append(f"{name}Content-Type: {kind}\r\n\r\n".encode() + video)
    return b"".join(b"--%s\r\n%s\r\n" % (_BOUNDARY.encode(), part) for part in parts) + f"--{_BOUNDARY}--\r\n".encode()


def _form_seeds(folder: Path) -> list[bytes]:
    asked = {"ask": "recognise", "labels": "a cat\na dog", "accuracy": "", "window": "4"}
    return [
        _form(asked),
        _form({"ask": "timeline", "labels": "", "window": "2.5"}, bytes(1500)),
        _form({"ask": "search", "text": "a cat", "count": "10"}, None),
        _form(asked, b"dmlkZW8=", "video/mp4\r\nContent-Transfer-Encoding: base64"),
        _form(asked, bytes(3 * _UPLOAD_BYTES)),
    ]


def _parse_form(data: bytes, folder: Path) -> None:
    kind = f"multipart/form-data; boundary={_BOUNDARY}"
    _send(_head("POST", "/", Content_Type=kind, Content_Length=len(data)) + data, folder)


def _request_seeds(folder: Path) -> list[bytes]:
    body = _form({"ask": "recognise", "labels": "a, b"})
    kind = f"multipart/form-data; boundary={_BOUNDARY}"
    chunked = b"%x\r\n%s\r\n0\r\n\r\n" % (len(body), body)
    text = b"ask=search&text=a%20cat&count=3"
    return [
        _head("GET", "/", Accept="text/html", Origin=f"http://{_HOST}") + _head("GET", "/page.js"),
        _head("POST", "/", Content_Type=kind, Content_Length=len(body)) + body + _head("HEAD", "/"),
        _head("POST", "/?a=b", Content_Type=kind, Transfer_Encoding="chunked") + chunked,
        _head("POST", "/", Content_Type="application/x-www-form-urlencoded", Content_Length=len(text)) + text,
        _head("POST", "/", Content_Type=kind, Content_Length=len(body), Expect="100-continue") + body,
    ]


_FORM_TOKENS = (
    f"--{_BOUNDARY}\r\n".encode(), f"--{_BOUNDARY}--\r\n".encode(), b"\r\n", b"\r\n\r\n", b"; filename=", b'name="ask"',
    b"; filename*=UTF-8''%e2%80%ae%ff", b"; charset=utf-7\r\n\r\n+2AA-", b"Content-Type: text/plain; charset=utf-7\r\n",
    b"Content-Encoding: gzip\r\n", b"Content-Encoding: deflate\r\n", b"Content-Transfer-Encoding: base64\r\n",
    b"Content-Transfer-Encoding: quoted-printable\r\n", b"Content-Length: 3\r\n", b"Content-Type: multipart/mixed\r\n",
    b'"', b"_charset_", b"<script>", b"=%ff", b"a\r\n" * 90,
)  # fmt: skip
_TOKENS = (
    *_FORM_TOKENS, b"GET / HTTP/1.1\r\n", b"Host: x\r\n", b"Host: [::\r\n", b"Content-Length: 0\r\n",
    b"Content-Length: -1\r\n", b"Transfer-Encoding: chunked\r\n", b"Connection: Upgrade\r\nUpgrade: websocket\r\n",
    b"Expect: 100-continue\r\n", b"Expect: x\r\n", b"multipart/form-data", b"application/x-www-form-urlencoded",
    b"boundary=", b"charset=utf-7", b"charset=rot13", b"HTTP/1.0", b"OPTIONS * ", b"CONNECT x:1 ", b"/%00", b"//x/",
    b"ffffffffffffffff\r\n", b"Range: bytes=0-0\r\n", b"Origin: null\r\n", b"Cookie: a=\r\n", b"If-None-Match: *\r\n",
)  # fmt: skip

TARGETS = {
    "page-form": Target(_form_seeds, _parse_form, (RefusedError,), _FORM_TOKENS),
    "page-http": Target(_request_seeds, _send, (RefusedError,), _TOKENS),
}
