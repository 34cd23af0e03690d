"""Serves the page to try a model on, to browsers of this machine alone.

It listens on 127.0.0.1, and answers only to requests that name this machine and come from its own page: a page of
another site could otherwise send videos to the model, or read answers under a name of its own (DNS rebinding).
Uploads are files without a name, which the system removes with the process at the latest, however that ends.
"""

from __future__ import annotations

import asyncio
import logging
import os
import socket
import warnings
import zlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from aiohttp import BadContentDispositionHeader, BadContentDispositionParam, web
from aiohttp.http import HttpProcessingError
from yarl import URL

from text4vis.serving.footage import PredictionError
from text4vis.serving.index_store import SearchError
from text4vis.serving.page import Page, Upload, size_in_words

logger = logging.getLogger("text4vis")

_ADDRESS = "127.0.0.1"
_OWN_NAMES = (_ADDRESS, "localhost", "::1")  # at any port: it may be forwarded by ssh
_FORM_BYTES = 2**20  # of a form, beside its video
_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; connect-src 'self'; img-src data:; "
    "style-src 'unsafe-inline'; form-action 'self'; base-uri 'none'; frame-ancestors 'none'",
    "Cache-Control": "no-store",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "same-origin",
    "X-Content-Type-Options": "nosniff",
}


def serve_page(page: Page, port: int, announce: Callable[[str], None]) -> None:
    """Serves the page until Ctrl-C or SIGTERM, and returns without waiting for an answer in work.

    port: 0 takes a free one. announce: called with the page's address once it can be opened. Raises OSError for a port
    that cannot be had.
    """
    try:
        listener = socket.create_server((_ADDRESS, port))
    except OSError as error:
        reason = os.strerror(error.errno) if error.errno else str(error)
        raise OSError(f"--port: {port} cannot be had ({reason}); give another one, or 0 for any") from None
    announce(f"http://{_ADDRESS}:{listener.getsockname()[1]}/")
    web.run_app(_application(page), sock=listener, print=None, access_log=None, shutdown_timeout=1.0)


def _application(page: Page) -> web.Application:
    logging.getLogger("aiohttp.server").addFilter(_is_ours)
    for category in (BadContentDispositionHeader, BadContentDispositionParam):  # words of a request, in the terminal
        warnings.simplefilter("ignore", category)
    app = web.Application(middlewares=[_own_requests], client_max_size=page.upload_bytes + _FORM_BYTES)
    script = Path(__file__).with_name("page.js").read_text(encoding="utf-8")
    turns = ThreadPoolExecutor(1)  # one question at a time

    async def blank(_: web.Request) -> web.Response:
        return _html(page.show())

    async def code(_: web.Request) -> web.Response:
        return web.Response(text=script, content_type="text/javascript")

    async def ask(request: web.Request) -> web.Response:
        return await _ask(page, turns, request)

    async def nothing(_: web.Request) -> web.Response:
        raise web.HTTPNotFound

    resolve = app.router.resolve

    async def unless_expecting(request: web.Request) -> Any:
        """Refuses any Expect header, so clients send the request without it: aiohttp fails on one that is not UTF-8."""
        if "Expect" in request.headers:
            raise web.HTTPExpectationFailed
        return await resolve(request)

    routes = [web.get("/", blank), web.post("/", ask), web.get("/page.js", code), web.route("*", "/{path:.*}", nothing)]
    app.add_routes(routes)
    app.router.resolve = unless_expecting  # type: ignore[method-assign]  # routes alone leave out `OPTIONS *`
    return app


def _is_ours(record: logging.LogRecord) -> bool:
    """Whether a traceback that aiohttp logs is of an error in this program, and not of a request that is no HTTP."""
    return not (record.exc_info and isinstance(record.exc_info[1], (HttpProcessingError, web.RequestPayloadError)))


@web.middleware
async def _own_requests(request: web.Request, handler: Callable[..., Any]) -> web.StreamResponse:
    """Refuses requests under other names than this machine's, and those that other sites' pages send."""
    try:
        host = URL(f"http://{request.host}").host
    except ValueError:
        host = None
    origin = request.headers.get("Origin")
    if host not in _OWN_NAMES or origin not in (None, f"http://{request.host}"):
        raise web.HTTPForbidden(text=f"Open the page itself, at http://{_ADDRESS} and its port.")
    response: web.StreamResponse = await handler(request)
    response.headers.update(_HEADERS)
    return response


async def _ask(page: Page, turns: ThreadPoolExecutor, request: web.Request) -> web.Response:
    """The answer to a form, or the page with a sentence on what is wrong."""
    try:
        form = await request.post()
    except web.HTTPRequestEntityTooLarge:
        while not request.content.at_eof():  # browsers read no answer before they have sent everything
            await request.content.readany()
        limit = size_in_words(page.upload_bytes)
        return _html(page.show(error=f"The video is larger than {limit}; choose a smaller one."), 413)
    except (ValueError, LookupError, RuntimeError, zlib.error, HttpProcessingError, web.RequestPayloadError) as error:
        reason = " ".join(str(error).split())
        return _html(page.show(error=f"The form cannot be read ({reason}); send it with this page."), 400)
    except OSError as error:
        reason = f"{error.strerror or error}; TMPDIR names the folder where uploads are kept meanwhile"
        return _html(page.show(error=f"The video cannot be stored ({reason})."), 507)
    fields = {key: value for key, value in form.items() if isinstance(value, str)}
    sent = form.get("video")
    if not isinstance(sent, web.FileField):
        return await _answer(page, turns, fields, None)
    with sent.file as file:
        path = Path(f"/proc/{os.getpid()}/fd/{file.fileno()}")
        file.flush()
        return await _answer(page, turns, fields, Upload(path, sent.filename))


async def _answer(page: Page, turns: ThreadPoolExecutor, fields: dict[str, str], upload: Upload | None) -> web.Response:
    try:
        return _html(await asyncio.get_running_loop().run_in_executor(turns, page.answer, fields, upload))
    except (PredictionError, SearchError) as error:
        return _html(page.show(fields, error=str(error)), 422)
    except Exception:  # a page that goes on is worth more than its reason, which the terminal shows
        logger.exception("page: a question failed")
        message = "The program failed on this question; its terminal shows why. It goes on with the next one."
        return _html(page.show(fields, error=message), 500)


def _html(text: str, status: int = 200) -> web.Response:
    return web.Response(text=text, status=status, content_type="text/html")
