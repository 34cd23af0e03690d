"""Small data sets for the reader's tests, written straight from the format, and a web server that misbehaves."""

from __future__ import annotations

import json
import re
import socket
import tarfile
import threading
import time
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np

from shards.format import (
    INDEX_ROLES,
    MEMBER_DTYPE,
    VIDEO_DTYPE,
    Manifest,
    ShardInfo,
    fingerprint,
    frame_suffix,
    index_file,
    padding,
    shard_name,
    tar_header,
    video_crc32,
    video_key,
)
from shards.reader import ShardDataset, open_dataset

CLASSES = ["climbing", "diving", "fencing"]


def read_everything(dataset: ShardDataset) -> list[list[bytes]]:
    """The bytes of all frames, video by video."""
    return dataset.read_many([(sample, np.arange(dataset.num_frames[sample])) for sample in range(len(dataset))])


def send_everything(dataset: ShardDataset, connection) -> None:
    """For a process of its own, which finds functions of this module by name."""
    connection.send(read_everything(dataset))


def read_in_process(address: str, folder: Path, barrier, results) -> None:
    """Reads everything through a cache as soon as all processes are there."""
    with open_dataset(address, cache_bytes=10**7, cache_dir=folder, io_threads=8) as dataset:
        barrier.wait(30)
        results.put(read_everything(dataset))


def write_index(
    folder: Path,
    tables: dict[str, np.ndarray],
    shards: list[ShardInfo],
    content: str = "frames",
    classes: Sequence[str] = CLASSES,
    identity: str | None = None,
) -> None:
    """Writes index and manifest; the manifest fits the tables even where these are wrong on purpose."""
    videos, members, names = (tables[role] for role in INDEX_ROLES)
    identity = identity or fingerprint(videos, names, list(classes), content)
    (folder / "index").mkdir(parents=True, exist_ok=True)
    index = {}
    for role in INDEX_ROLES:
        file = index_file(role, identity)
        np.save(folder / file, tables[role])
        data = (folder / file).read_bytes() if role != "members" or len(members) < 1e6 else b""
        index[role] = {"file": file, "bytes": (folder / file).stat().st_size, "crc32": zlib.crc32(data)}
    manifest = Manifest(content, list(classes), len(videos), len(members), identity, shards, index)
    (folder / "manifest.json").write_text(manifest.to_json(), encoding="utf-8")


def make_dataset(
    folder: Path,
    frame_counts: Sequence[int] = (3, 5, 1, 8, 2, 6, 4),
    *,
    seed: int = 0,
    videos_per_shard: int = 3,
    content: str = "frames",
    frame_bytes: int = 900,
    classes: Sequence[str] = CLASSES,
) -> list[list[bytes]]:
    """Writes a data set of random frames of about `frame_bytes` each; returns the members of each video."""
    rng = np.random.default_rng(seed)
    folder.mkdir(parents=True, exist_ok=True)
    videos, rows, names, shards, stored = [], [], b"", [], []
    for first in range(0, len(frame_counts), videos_per_shard):
        tar = bytearray()
        count = 0
        for number in range(first, min(first + videos_per_shard, len(frame_counts))):
            name = f"some dir/vidéo {seed} {number}.x".encode()
            header = json.dumps({"name": name.decode()}).encode()
            key = video_key(number)
            json_block = len(tar) // 512 + 1
            tar += tar_header(f"{key}.json", len(header)) + header + bytes(padding(len(header)))
            suffixes = [frame_suffix(frame, "jpg") for frame in range(frame_counts[number])]
            frames = []
            first_row = len(rows)
            for suffix in suffixes if content == "frames" else ["mp4"]:
                data = rng.bytes(frame_bytes + int(rng.integers(0, 300)))
                tar += tar_header(f"{key}.{suffix}", len(data))
                rows.append((len(tar) // 512, len(data), zlib.crc32(data), 40 + number, 30))
                tar += data + bytes(padding(len(data)))
                frames.append(data)
            stored.append(frames)
            count += len(frames)
            crc = video_crc32(np.array(rows[first_row:], MEMBER_DTYPE))
            row = [first_row, len(names), len(name), len(frames), frame_counts[number], len(shards)]
            row += [json_block, len(header), crc, number % len(classes)]
            videos.append(tuple(row))
            names += name
        tar += bytes(1024)
        (folder / shard_name(len(shards))).write_bytes(tar)
        in_shard = min(videos_per_shard, len(frame_counts) - first)
        shards.append(ShardInfo(shard_name(len(shards)), len(tar), in_shard, count))
    tables = {
        "videos": np.array(videos, VIDEO_DTYPE),
        "members": np.array(rows, MEMBER_DTYPE),
        "names": np.frombuffer(names, np.uint8),
    }
    write_index(folder, tables, shards, content, classes)
    return stored


def tar_members(folder: Path) -> dict[str, bytes]:
    """All members of all tars as Python's tarfile reads them."""
    found = {}
    for path in sorted(folder.glob("*.tar")):
        with tarfile.open(path) as tar:
            for info in tar:
                file = tar.extractfile(info)
                assert file is not None
                found[info.name] = file.read()
    return found


# Given the handler and the body it would send, sends something else; returns False to let it answer as usual.
Fault = Callable[[BaseHTTPRequestHandler, bytes], bool]


class FlakyServer(ThreadingHTTPServer):
    """Serves a folder with range support on 127.0.0.1. `fault(path, count)` may name a fault for a request."""

    daemon_threads = True
    request_queue_size = 128

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.ranges = True
        self.fault: Callable[[str, int], Fault | None] = lambda path, count: None
        self.requests: Counter[str] = Counter()
        self.bytes_sent = 0
        self.connections: list[socket.socket] = []
        self.bytes_lock = threading.Lock()
        super().__init__(("127.0.0.1", 0), _Handler)

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def get_request(self) -> tuple[socket.socket, object]:
        connection, address = super().get_request()
        self.connections.append(connection)
        return connection, address

    def die(self) -> None:
        """Goes away like a machine that loses its power: no new connections, and the open ones end."""
        self.shutdown()
        self.server_close()
        for connection in self.connections:
            with suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)

    def handle_error(self, request: object, client_address: object) -> None:
        pass  # broken pipes are what the tests provoke


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: FlakyServer

    def log_message(self, *_: object) -> None:
        pass

    def do_GET(self) -> None:
        path = self.path.partition("?")[0].lstrip("/")
        with self.server.bytes_lock:
            self.server.requests[path] += 1
            count = self.server.requests[path]
        file = self.server.folder / path
        if not file.is_file():
            self.answer(404, b"not here")
            return
        data = file.read_bytes()
        status, headers, body = 200, {}, data
        match = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
        if match and self.server.ranges:
            start, stop = int(match[1]), min(int(match[2]) + 1, len(data))
            if start >= len(data):
                self.answer(416, b"")
                return
            status, body = 206, data[start:stop]
            headers["Content-Range"] = f"bytes {start}-{stop - 1}/{len(data)}"
        fault = self.server.fault(path, count)
        if fault is None or not fault(self, body):
            self.answer(status, body, headers)

    def answer(self, status: int, body: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for key, value in (headers or {}).items():
            self.send_header(key, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        with self.server.bytes_lock:  # before they travel: who has received them may look at once
            self.server.bytes_sent += len(body)
        self.wfile.write(body)


def status_fault(status: int) -> Fault:
    def fault(handler: BaseHTTPRequestHandler, body: bytes) -> bool:
        handler.answer(status, b"no")  # type: ignore[attr-defined]
        return True

    return fault


def truncated_fault(handler: BaseHTTPRequestHandler, body: bytes) -> bool:
    """Announces the whole body, sends half of it and hangs up."""
    handler.send_response(206 if handler.headers.get("Range") else 200)
    handler.send_header("Content-Length", str(len(body)))
    handler.end_headers()
    handler.wfile.write(body[: len(body) // 2])
    handler.wfile.flush()
    handler.close_connection = True
    return True


def hang_up_fault(handler: BaseHTTPRequestHandler, body: bytes) -> bool:
    handler.close_connection = True
    return True


def slow_fault(seconds: float) -> Fault:
    def fault(handler: BaseHTTPRequestHandler, body: bytes) -> bool:
        time.sleep(seconds)
        return False

    return fault


@contextmanager
def serve(folder: Path) -> Iterator[FlakyServer]:
    server = FlakyServer(folder)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.die()
        thread.join()
