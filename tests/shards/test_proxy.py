"""Far shards behind a proxy: it is used as the environment says, passed by where told, and named when it fails."""

from __future__ import annotations

import http.client
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from launch import free_port
from shard_data import make_dataset, read_everything, serve

from shards.format import ShardError
from shards.reader import open_dataset

FAST = {"retries": 1, "timeout_seconds": 5.0}


class Proxy(ThreadingHTTPServer):
    """Passes GET requests on to one server, whatever host they name: it alone knows where `data.invalid` is."""

    daemon_threads = True

    def __init__(self, target: tuple[str, int], status: int | None) -> None:
        self.target, self.status, self.asked = target, status, list[str]()
        super().__init__(("127.0.0.1", 0), _Handler)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Proxy

    def log_message(self, *_: object) -> None:
        pass

    def do_GET(self) -> None:
        self.server.asked.append(self.path)
        if self.server.status:
            self.send_error(self.server.status)
            return
        connection = http.client.HTTPConnection(*self.server.target, timeout=10)
        ranges = {"Range": self.headers["Range"]} if "Range" in self.headers else {}
        connection.request("GET", "/" + self.path.split("/", 3)[3], headers=ranges)
        answer = connection.getresponse()
        body = answer.read()
        self.send_response(answer.status)
        for name, value in answer.getheaders():
            if name in ("Content-Length", "Content-Range"):
                self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)
        connection.close()


@contextmanager
def proxy_to(target: tuple[str, int], status: int | None = None) -> Iterator[Proxy]:
    proxy = Proxy(target, status)
    thread = threading.Thread(target=proxy.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    try:
        yield proxy
    finally:
        proxy.shutdown()
        proxy.server_close()
        thread.join()


@pytest.fixture
def store(tmp_path, monkeypatch):
    """(the data set's frames, the store that serves it), without the proxies of this machine."""
    for name in ("http_proxy", "HTTP_PROXY", "https_proxy", "HTTPS_PROXY", "no_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
    stored = make_dataset(tmp_path / "data")
    with serve(tmp_path / "data") as server:
        yield stored, server


@pytest.mark.parametrize("variable", ["http_proxy", "HTTP_PROXY"])
def test_a_store_that_only_the_proxy_reaches(store, monkeypatch, tmp_path, variable):
    stored, server = store
    with proxy_to(server.server_address) as proxy:
        monkeypatch.setenv(variable, f"http://127.0.0.1:{proxy.server_address[1]}")
        if variable == "HTTP_PROXY":
            monkeypatch.delenv("REQUEST_METHOD", raising=False)  # of CGI programs, whose clients could set HTTP_PROXY
        with open_dataset("http://data.invalid/", cache_dir=tmp_path / "cache", **FAST) as dataset:
            assert read_everything(dataset) == stored
        assert len(proxy.asked) > 3 and all(path.startswith("http://data.invalid/") for path in proxy.asked)


@pytest.mark.parametrize("passed_by", ["127.0.0.1", "*"])
def test_hosts_of_no_proxy_are_asked_directly(store, monkeypatch, tmp_path, passed_by):
    stored, server = store
    monkeypatch.setenv("http_proxy", f"http://127.0.0.1:{free_port()}")
    monkeypatch.setenv("no_proxy", passed_by)
    with open_dataset(server.address, cache_dir=tmp_path / "cache", **FAST) as dataset:
        assert read_everything(dataset) == stored


def test_a_proxy_that_fails_is_named_and_its_password_is_not(store, monkeypatch, tmp_path):
    _, server = store
    port = free_port()
    monkeypatch.setenv("http_proxy", f"http://me:secret@127.0.0.1:{port}")
    with pytest.raises(ShardError, match=f"the proxy that http_proxy .* names does not answer.*{port}") as error:
        open_dataset("http://data.invalid/", cache_dir=tmp_path / "cache", **FAST)
    assert "secret" not in str(error.value) and "\n" not in str(error.value)
    with proxy_to(server.server_address, status=407) as proxy:
        monkeypatch.setenv("http_proxy", f"http://127.0.0.1:{proxy.server_address[1]}")
        with pytest.raises(ShardError, match="407 Proxy Authentication Required"):
            open_dataset("http://data.invalid/", cache_dir=tmp_path / "cache", **FAST)
        assert len(proxy.asked) == 1  # a refusal is final
