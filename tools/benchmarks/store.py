"""A local store that is as slow as a far one: a pause before the first byte, and a limited rate for each connection.

It is nginx with its Lua module if both are installed (Debian: nginx, libnginx-mod-http-lua), else a small server of
ours, in a process of its own. It answers GET requests with ranges, which is all that reading by HTTP or S3 needs, and
does not check the signatures of S3 requests.
"""

from __future__ import annotations

import asyncio
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from urllib.request import urlopen

BYTES_PER_SECOND = 50_000_000  # of one connection, about what object stores give
_LUA_MODULES = ("ndk_http_module.so", "ngx_http_lua_module.so")
_MODULES = Path("/usr/lib/nginx/modules")

_NGINX = """
{modules}
{user}daemon off; worker_processes 1; pid {work}/pid; error_log {work}/error.log;
events {{ worker_connections 4096; }}
http {{
  access_log off; sendfile on; keepalive_requests 1000000; lua_shared_dict counts 1m;
  client_body_temp_path {work}/body; proxy_temp_path {work}/proxy; fastcgi_temp_path {work}/fastcgi;
  uwsgi_temp_path {work}/uwsgi; scgi_temp_path {work}/scgi;
  log_by_lua_block {{
    if ngx.var.uri ~= "/counts" then
      ngx.shared.counts:incr("requests", 1, 0); ngx.shared.counts:incr("bytes", tonumber(ngx.var.body_bytes_sent), 0)
    end
  }}
  {servers}
}}
"""
_NGINX_SERVER = """
  server {{
    listen 127.0.0.1:{port}; root {folder}; limit_rate {rate};
    location / {{ access_by_lua_block {{ if {seconds} > 0 then ngx.sleep({seconds}) end }} }}
    location = /counts {{ content_by_lua_block {{
      ngx.print(ngx.shared.counts:get("requests") or 0, " ", ngx.shared.counts:get("bytes") or 0) }} }}
  }}
"""


@dataclass(frozen=True)
class FarStore:
    """kind: name of the server. addresses: address of the served folder, by pause in milliseconds."""

    kind: str
    addresses: dict[int, str]

    def counts(self) -> tuple[int, int]:
        """Requests and bytes of bodies served so far."""
        with urlopen(f"{next(iter(self.addresses.values()))}/counts") as answer:  # noqa: S310 - our own address
            requests, sent = answer.read().split()
        return int(requests), int(sent)


@contextmanager
def far_store(folder: Path, work: Path, pauses_ms: Sequence[int]) -> Iterator[FarStore]:
    """Serves `folder` inside the context. work: folder for the server's files. Raises OSError if it cannot start."""
    work.mkdir(parents=True, exist_ok=True)
    ports = {pause: _free_port() for pause in pauses_ms}
    nginx = shutil.which("nginx", path=f"{os.environ.get('PATH', '')}:/usr/sbin")
    if nginx and all((_MODULES / module).exists() for module in _LUA_MODULES):
        kind, command = "nginx", [nginx, "-p", str(work), "-c", str(_write_nginx(folder, work, ports))]
    else:
        kind = "our own server (nginx with Lua is not installed)"
        command = [sys.executable, __file__, str(folder), *(f"{pause}:{port}" for pause, port in ports.items())]
    process = subprocess.Popen(command, stderr=(work / "messages.log").open("wb"))
    try:
        for port in ports.values():
            _wait_for(port, process, work)
        yield FarStore(kind, {pause: f"http://127.0.0.1:{port}" for pause, port in ports.items()})
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait()


def _write_nginx(folder: Path, work: Path, ports: dict[int, int]) -> Path:
    servers = [
        _NGINX_SERVER.format(port=port, folder=folder.resolve(), rate=BYTES_PER_SECOND, seconds=pause / 1000)
        for pause, port in ports.items()
    ]
    modules = "\n".join(f"load_module {_MODULES / module};" for module in _LUA_MODULES)
    config = work.resolve() / "nginx.conf"
    user = "user root; " if os.getuid() == 0 else ""  # else a server started by root reads as `nobody`
    text = _NGINX.format(user=user, modules=modules, work=work.resolve(), servers="".join(servers))
    config.write_text(text, encoding="utf-8")
    return config


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def _wait_for(port: int, process: subprocess.Popen[bytes], work: Path) -> None:
    deadline = time.monotonic() + 10
    while True:
        try:
            socket.create_connection(("127.0.0.1", port)).close()
            return
        except ConnectionRefusedError:
            if process.poll() is not None or time.monotonic() > deadline:
                raise OSError(f"the store did not start; {work / 'messages.log'} says why") from None
            time.sleep(0.02)


class _OwnServer:
    """Used where nginx is not installed: slower, but enough to tell whether latency costs throughput."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder.resolve()
        self.requests = self.sent = 0

    async def serve(self, ports: dict[int, int]) -> None:
        for pause, port in ports.items():

            async def answer_requests(
                reader: asyncio.StreamReader, writer: asyncio.StreamWriter, seconds: float = pause / 1000
            ) -> None:
                try:
                    while request := await reader.readuntil(b"\r\n\r\n"):
                        await self._answer(request.decode("latin-1"), writer, seconds)
                except (asyncio.IncompleteReadError, ConnectionError):
                    pass
                finally:
                    writer.close()

            await asyncio.start_server(answer_requests, "127.0.0.1", port)
        await asyncio.Event().wait()

    async def _answer(self, request: str, writer: asyncio.StreamWriter, seconds: float) -> None:
        path = request.split(" ")[1].partition("?")[0]
        if path == "/counts":
            body = f"{self.requests} {self.sent}".encode()
            writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % len(body) + body)
            return
        await asyncio.sleep(seconds)
        file = self.folder / path.lstrip("/")
        if ".." in file.parts or not file.is_file():
            writer.write(b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\n\r\n")
            return
        size = file.stat().st_size
        match = re.search(r"range: *bytes=(\d+)-(\d+)", request, re.IGNORECASE)
        start, stop = (int(match[1]), min(size, int(match[2]) + 1)) if match else (0, size)
        head = f"HTTP/1.1 {'206 Partial Content' if match else '200 OK'}\r\nContent-Length: {stop - start}\r\n"
        writer.write(f"{head}Content-Range: bytes {start}-{stop - 1}/{size}\r\n\r\n".encode())
        self.requests += 1
        self.sent += stop - start
        with file.open("rb") as stream:
            stream.seek(start)
            for offset in range(start, stop, 1 << 18):
                piece = stream.read(min(1 << 18, stop - offset))
                writer.write(piece)
                await writer.drain()
                if stop - start > 1 << 18:
                    await asyncio.sleep(len(piece) / BYTES_PER_SECOND)


if __name__ == "__main__":
    pairs = (word.split(":") for word in sys.argv[2:])
    given = {int(first): int(second) for first, second in pairs}
    asyncio.run(_OwnServer(Path(sys.argv[1])).serve(given))
