"""Reading over HTTP and S3 from real servers: faults are tried again, then named; never a wrong byte."""

import asyncio
import contextlib
import gzip
import io
import itertools
import json
import os
import random
import shutil
import signal
import socket
import tarfile
import threading
import time
import traceback
from itertools import pairwise
from pathlib import Path

import fsspec
import numpy as np
import pytest
from frame_folders import jpeg
from fsspec.implementations.http import HTTPFileSystem
from hypothesis import given
from hypothesis import strategies as st
from shard_data import (
    FlakyServer,
    hang_up_fault,
    make_dataset,
    serve,
    slow_fault,
    status_fault,
    truncated_fault,
)

import shards.answers
import shards.reader
import shards.remote
import shards.stores
from shards.foreign import index_tars
from shards.format import ShardError
from shards.local import join_ranges
from shards.ranges import RangeClient
from shards.remote import RemoteFiles
from shards.transfer import Transfers


@pytest.fixture(autouse=True)
def _quick_and_private(tmp_path, monkeypatch):
    monkeypatch.setattr(shards.remote, "_BACKOFF_SECONDS", 0.01)
    monkeypatch.setenv("OWN_CACHE", str(tmp_path / "cache"))


def open_dataset(sources, **options):
    return shards.reader.open_dataset(sources, **{"cache_dir": os.environ["OWN_CACHE"], **options})


@pytest.fixture
def stored(tmp_path):
    return make_dataset(tmp_path / "served" / "data")


@pytest.fixture
def server(tmp_path, stored):
    with serve(tmp_path / "served") as server:
        yield server


def open_served(server: FlakyServer, **options):
    return open_dataset(f"{server.address}/data", **{"timeout_seconds": 5, **options})


def read_everything(dataset) -> list[list[bytes]]:
    return dataset.read_many([(sample, np.arange(dataset.num_frames[sample])) for sample in range(len(dataset))])


@given(
    ranges=st.lists(st.tuples(st.integers(0, 1000), st.integers(1, 50)).map(lambda r: (r[0], r[0] + r[1])), min_size=1),
    max_gap=st.integers(0, 100),
)
def test_joined_ranges_cover_all_and_little_more(ranges, max_gap):
    joined = join_ranges(ranges, max_gap)
    assert all(any(a <= start and stop <= b for a, b in joined) for start, stop in ranges)
    assert all(right[0] - left[1] > max_gap for left, right in pairwise(joined))
    covered = {byte for start, stop in ranges for byte in range(start, stop)}
    gaps = sum(stop - start for start, stop in joined) - len(covered)
    assert gaps <= max_gap * (len(ranges) - len(joined))


def test_http_equals_local(server, stored):
    with open_served(server) as dataset:
        assert read_everything(dataset) == stored
        assert dataset.describe(0).endswith(f"000000.tar of {server.address}/data)")
        rng = random.Random(0)
        for _ in range(30):
            sample = rng.randrange(len(dataset))
            frames = np.array([rng.randrange(dataset.num_frames[sample]) for _ in range(4)])
            assert dataset.read(sample, frames) == [stored[sample][frame] for frame in frames]


def test_only_the_ranges_travel(tmp_path):
    stored = make_dataset(tmp_path / "served" / "data", [300], frame_bytes=20_000)
    with serve(tmp_path / "served") as server, open_served(server) as dataset:
        before = server.bytes_sent, server.requests["data/000000.tar"]
        frames = np.arange(8) * 37
        got = dataset.read(0, frames)
        assert got == [stored[0][frame] for frame in frames]
        assert server.bytes_sent - before[0] == sum(map(len, got))
        assert server.requests["data/000000.tar"] - before[1] == 8
        # Neighbours come as one, for the price of the tar headers between them.
        before = server.bytes_sent, server.requests["data/000000.tar"]
        got = dataset.read(0, np.arange(100, 108))
        assert got == stored[0][100:108]
        assert server.bytes_sent - before[0] <= sum(map(len, got)) + 7 * 1024
        assert server.requests["data/000000.tar"] - before[1] == 1


def test_index_is_kept(server, stored, tmp_path):
    for _ in range(2):
        with open_served(server) as dataset:
            assert read_everything(dataset)[0] == stored[0]
    assert {path: n for path, n in server.requests.items() if path.startswith("data/index")} == dict.fromkeys(
        [path for path in server.requests if path.startswith("data/index")], 1
    )
    kept = list((tmp_path / "cache" / "index").iterdir())
    assert len(kept) == 3
    for file in kept:
        file.write_bytes(b"x" * 10)  # damaged: fetched again
    with open_served(server) as dataset:
        assert read_everything(dataset) == stored
    for file in kept:
        file.write_bytes(file.read_bytes()[::-1])  # damaged, but of the right size
    with open_served(server) as dataset:
        assert read_everything(dataset) == stored


def other_range_fault(handler, body):
    """Answers a range request with the file's first bytes."""
    if not handler.headers.get("Range"):
        return False
    handler.answer(206, body, {"Content-Range": f"bytes 0-{len(body) - 1}/*"})
    return True


@pytest.mark.slow
@pytest.mark.parametrize(
    "fault",
    [
        status_fault(500),
        status_fault(503),
        status_fault(429),
        status_fault(408),
        truncated_fault,
        hang_up_fault,
        slow_fault(1.0),
        other_range_fault,
    ],
    ids=["500", "503", "429", "408", "truncated", "hang-up", "slow", "other-range"],
)
def test_transient_faults_are_tried_again(server, stored, fault):
    """Two of three requests for each file fail."""
    server.fault = lambda path, count: None if count % 3 == 0 else fault
    # One at a time: the third attempt of every request is the one that works.
    with open_served(server, timeout_seconds=0.4, retries=8, requests_in_flight=1) as dataset:
        assert read_everything(dataset)[:2] == stored[:2]


@pytest.mark.parametrize("status", [500, 503])
def test_lasting_fault_is_named(server, status):
    with open_served(server, retries=2) as dataset:
        server.fault = lambda path, count: status_fault(status)
        before = server.requests["data/000000.tar"]
        with pytest.raises(
            ShardError, match=rf"{server.address}/data/000000.tar: HTTP status {status} .*after 3 attempts"
        ):
            dataset.read(0, np.array([0]))
        assert server.requests["data/000000.tar"] - before == 3


@pytest.mark.parametrize("status", [300, 400, 401, 403, 404, 410])
def test_refusals_fail_at_once(server, status):
    with open_served(server) as dataset:
        server.fault = lambda path, count: status_fault(status)
        with pytest.raises(ShardError, match=rf"/data/000000.tar: HTTP status {status} .*check the address"):
            dataset.read(0, np.array([0]))
        assert server.requests["data/000000.tar"] == 1


def test_no_data_set_there(server):
    with pytest.raises(ShardError, match=rf"{server.address}/nothing/manifest.json: HTTP status 404"):
        open_dataset(f"{server.address}/nothing")
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("shards-")]


def test_a_body_that_was_compressed_against_our_wish_is_not_taken_for_the_bytes(server, stored):
    """It is as long as announced, and what it unpacks to is not."""

    def compress(handler, body):
        packed = gzip.compress(bytes(len(body) - 23), 0)
        assert len(packed) == len(body)
        range_ = handler.headers["Range"].replace("bytes=", "bytes ")
        handler.answer(206, packed, {"Content-Encoding": "gzip", "Content-Range": f"{range_}/*"})
        return True

    with open_served(server, retries=1) as dataset:
        server.fault = lambda path, count: compress if count == 1 else None
        assert dataset.read(0, np.array([0])) == stored[0][:1]
        server.fault = lambda path, count: compress
        with pytest.raises(ShardError, match=r"BadBodyError: received \d+ of the \d+ bytes at .* after 2 attempts"):
            dataset.read(3, np.array([0]))


def test_short_writes_are_completed(server, stored, monkeypatch):
    pwrite = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda file, data, offset: pwrite(file, bytes(data[:100]), offset))
    with open_served(server, cache_bytes=10**6) as dataset:
        assert read_everything(dataset) == stored


class OneClientStore:
    """Of a kind that has no client for ranges."""

    async def range_client(self, name: str) -> RangeClient:
        return RangeClient(None, 1, 1)


def test_nothing_is_written_after_a_download_has_failed(tmp_path, monkeypatch):
    """The descriptor may be that of another file by then."""
    monkeypatch.setattr(shards.remote, "PART_BYTES", 5)
    ended = []

    class HalfStore(OneClientStore):
        async def get(self, name, span, write):
            if span.start == 0:
                raise FileNotFoundError("no such part")
            await asyncio.sleep(0.1)
            write(b"12345")
            ended.append(span.start)

    transfers = Transfers()
    files = RemoteFiles("http://h", transfers, retries=0, timeout_seconds=1, storage_options=None)
    monkeypatch.setattr(files, "_opened", HalfStore)
    try:
        with (tmp_path / "x").open("wb") as file, pytest.raises(ShardError, match="no such part"):
            files.download("x", 10, file.fileno())
        assert ended == [5]
    finally:
        transfers.close()


def test_tars_in_another_place_than_the_index(server, stored, tmp_path):
    """As data sets have them that other programs wrote."""
    local, served = tmp_path / "index alone", tmp_path / "served" / "data"
    shutil.copytree(served / "index", local / "index")
    manifest = json.loads((served / "manifest.json").read_text())
    for place in (str(served), f"file://{served}", f"{server.address}/data"):
        (local / "manifest.json").write_text(json.dumps({**manifest, "tars": place}))
        for cache_bytes in (None, 10**6):
            with open_dataset(str(local), cache_bytes=cache_bytes) as dataset:
                assert read_everything(dataset) == stored
                assert dataset.is_remote == place.startswith("http")
    (served / "manifest.json").write_text(json.dumps({**manifest, "tars": "."}))
    for address in (str(served), f"{server.address}/data"):
        with open_dataset(address) as dataset:
            assert read_everything(dataset) == stored
    (served / "manifest.json").write_text(json.dumps({**manifest, "tars": "/elsewhere"}))
    with pytest.raises(ShardError, match=r"manifest.json: names tars in another place, .* copy the index"):
        open_dataset(f"{server.address}/data")


def _part_fault(handler, body):
    """Half of a file that was asked for as a whole, said to be a part or to be all."""
    handler.answer(206, body[: len(body) // 2])
    return True


def _short_fault(handler, body):
    handler.answer(200, body[: len(body) // 2])
    return True


def _flipped_fault(handler, body):
    handler.answer(206 if handler.headers.get("Range") else 200, bytes([*body[:-1], body[-1] ^ 1]))
    return True


@pytest.mark.parametrize("fault", [_part_fault, _short_fault])
def test_a_manifest_that_comes_in_part_is_fetched_again(server, stored, fault):
    server.fault = lambda path, count: fault if path == "data/manifest.json" and count == 1 else None
    with open_served(server) as dataset:
        assert read_everything(dataset) == stored
    assert server.requests["data/manifest.json"] == 2


def test_an_index_file_that_is_damaged_on_the_way_is_fetched_again(server, stored):
    server.fault = lambda path, count: _flipped_fault if "/index/names" in path and count == 1 else None
    with open_served(server) as dataset:
        assert read_everything(dataset) == stored
        assert [count for path, count in server.requests.items() if "/index/names" in path] == [2]


@pytest.mark.parametrize("is_announced", [True, False])
def test_an_endless_manifest_is_not_read(server, tmp_path, is_announced):
    (tmp_path / "served" / "data" / "manifest.json").write_bytes(b"1" * 5000)

    def in_pieces(handler, body):
        handler.send_response(200)
        handler.end_headers()
        handler.wfile.write(body)
        handler.close_connection = True
        return True

    server.fault = lambda path, count: None if is_announced else in_pieces
    transfers = Transfers()
    files = RemoteFiles(f"{server.address}/data", transfers, retries=0, timeout_seconds=5, storage_options=None)
    try:
        assert files.read_whole("manifest.json", 5000) == b"1" * 5000
        with pytest.raises(ShardError, match="received more than the 4999 bytes"):
            files.read_whole("manifest.json", 4999)
    finally:
        transfers.close()


@pytest.mark.parametrize("has_ranges", [True, False])
@pytest.mark.parametrize("size", [0, 1, 999, 1000, 1001, 7000, 7500])
def test_a_stream_is_the_file(server, tmp_path, monkeypatch, size, has_ranges):
    monkeypatch.setattr(shards.remote, "PART_BYTES", 1000)
    content = random.Random(size).randbytes(size)
    (tmp_path / "served" / "data" / "x.bin").write_bytes(content)
    server.ranges = has_ranges
    with contextlib.closing(Transfers(bytes_in_flight=2500)) as transfers:
        files = RemoteFiles(f"{server.address}/data", transfers, retries=0, timeout_seconds=5, storage_options=None)
        with files.stream("x.bin", size) as left, files.stream("x.bin", size) as stream:
            left.read(1)  # one that is not read to its end holds nobody up
            pieces = list(iter(lambda: stream.read(700), b""))
    assert b"".join(pieces) == content and {len(piece) for piece in pieces[:-1]} <= {700}


def test_a_stream_whose_server_no_longer_knows_ranges_does_not_begin_again(server, tmp_path, monkeypatch):
    monkeypatch.setattr(shards.remote, "PART_BYTES", 1000)
    (tmp_path / "served" / "data" / "x.bin").write_bytes(bytes(9000))
    with contextlib.closing(Transfers()) as transfers:
        files = RemoteFiles(f"{server.address}/data", transfers, retries=0, timeout_seconds=5, storage_options=None)
        with files.stream("x.bin", 9000) as stream:
            assert stream.read(1000) == bytes(1000)
            server.ranges = False
            with pytest.raises(ShardError, match="the whole file"):
                stream.read()


class BusyStore:
    """Fails `failures` times, then answers."""

    def __init__(self, failures: int) -> None:
        self.failures = failures

    async def get(self, name, span, write=None):
        self.failures -= 1
        if self.failures >= 0:
            raise ConnectionResetError("busy")
        return b"x"


@pytest.mark.timeout(20)
@pytest.mark.parametrize("failures", [0, 3, 8, 9])
def test_pauses_grow_up_to_a_bound(monkeypatch, failures):
    """Half a second after the first failure, twice that after the second, and so on; a part of it is left to chance."""
    monkeypatch.setattr(shards.remote, "_BACKOFF_SECONDS", 0.5)
    pauses = []

    async def sleep(seconds: float) -> None:
        pauses.append(seconds)

    files = RemoteFiles("http://h", Transfers(), retries=8, timeout_seconds=1, storage_options=None)
    store = BusyStore(failures)
    monkeypatch.setattr(files, "_opened", lambda: store)
    monkeypatch.setattr(asyncio, "sleep", sleep)
    monkeypatch.setattr(random, "uniform", lambda low, high: low * 1000 + high)
    if failures <= 8:
        assert asyncio.run(files._fetch("x", shards.answers.Span(0, 1, 5))) == b"x"
    else:
        with pytest.raises(ShardError, match="busy; gave up after 9 attempts"):
            asyncio.run(files._fetch("x", shards.answers.Span(0, 1, 5)))
    assert pauses == [pause + 0.5 for pause in (0.5, 1, 2, 4, 8, 10, 10, 10)][: min(8, failures)]


def test_local_and_remote_data_sets_joined(server, stored, tmp_path):
    for cache_bytes in (None, 10**6):
        sources = [str(tmp_path / "served" / "data"), f"{server.address}/data"]
        with open_dataset(sources, cache_bytes=cache_bytes) as dataset:
            assert dataset.is_remote
            batches = [np.array([number, number + 7]) for number in range(7)]
            for batch in dataset.ahead(iter(batches), lambda batch: batch):
                frames = dataset.read_many([(int(sample), np.array([0])) for sample in batch])
                assert frames == [stored[batch[0]][:1]] * 2


def test_server_that_ignores_ranges(server, stored):
    server.ranges = False
    with open_served(server) as dataset:
        with pytest.raises(ShardError, match=r"status 200 and the whole file; use a server .*cache_bytes"):
            dataset.read(0, np.array([0]))
        assert server.requests["data/000000.tar"] == 1
    with open_served(server, cache_bytes=10**6) as dataset:
        assert read_everything(dataset) == stored


def test_large_files_from_a_server_that_ignores_ranges(server, stored, monkeypatch):
    monkeypatch.setattr(shards.remote, "PART_BYTES", 1000)
    for ranges in (True, False):
        server.ranges = ranges
        for file in Path(os.environ["XDG_CACHE_HOME"]).rglob("*.*"):
            file.unlink()
        with open_served(server, cache_bytes=10**6) as dataset:
            assert read_everything(dataset) == stored


def test_wrong_content_is_fetched_once_more_then_named(server, stored):
    def scramble(handler, body):
        headers = {"Content-Range": handler.headers["Range"].replace("bytes=", "bytes ") + "/*"}
        handler.answer(206, bytes(len(body)), headers)
        return True

    with open_served(server) as dataset:
        server.fault = lambda path, count: scramble if count == 1 else None
        assert dataset.read(0, np.array([0])) == stored[0][:1]
        server.fault = lambda path, count: scramble
        with pytest.raises(ShardError, match=r"vidéo 0 0.x \(sample 0, 000000.tar of http.*frame 1 has the CRC-32"):
            dataset.read(0, np.array([1]))


def test_shard_of_another_size(server, tmp_path):
    with open_served(server) as dataset:
        shard = tmp_path / "served" / "data" / "000000.tar"
        shard.write_bytes(shard.read_bytes() + bytes(512))
        with pytest.raises(ShardError, match=r"000000.tar: has \d+ bytes, the manifest says \d+; .*upload"):
            dataset.read(0, np.array([0]))
        shard.write_bytes(shard.read_bytes()[:600])
        with pytest.raises(ShardError, match=r"000000.tar: .*(416|manifest says)"):
            dataset.read(0, np.array([0]))


def test_index_that_the_manifest_does_not_describe(server, tmp_path):
    for file in (tmp_path / "served" / "data" / "index").glob("videos*"):
        file.write_bytes(file.read_bytes()[:-1] + b"\x07")
    with pytest.raises(ShardError, match=r"/data/index/videos-.*is not the file that manifest.json describes"):
        open_served(server)


def test_server_that_dies(server, stored):
    with open_served(server, retries=2) as dataset:
        assert dataset.read(0, np.array([0])) == stored[0][:1]
        server.die()
        with pytest.raises(ShardError, match=rf"{server.address}/data/000001.tar: .*after 3 attempts"):
            dataset.read(3, np.array([0]))


def test_address_where_nobody_listens():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    start = time.monotonic()
    with pytest.raises(ShardError, match=rf"http://127.0.0.1:{port}/x/manifest.json: .*after 2 attempts"):
        open_dataset(f"http://127.0.0.1:{port}/x", retries=1)
    assert time.monotonic() - start < 5


def test_without_a_folder_for_the_index_nothing_is_opened(server):
    with pytest.raises(ShardError, match=rf"{server.address}/data: a remote data set needs .*; give cache_dir"):
        open_served(server, cache_dir=None)


def test_secrets_stay_out_of_errors(server):
    address = server.address.replace("://", "://user:pass@") + "/data?token=s3cr3t"
    with open_dataset(address) as dataset:
        assert "s3cr3t" not in dataset.describe(0) + "".join(dataset.places)
        server.fault = lambda path, count: status_fault(403)
        with pytest.raises(ShardError) as info:
            dataset.read(0, np.array([0]))
    text = "".join(traceback.format_exception(info.value))
    assert "s3cr3t" not in text and "pass" not in str(info.value) and "user" not in str(info.value)


def test_in_a_forked_child(server, stored):
    with open_served(server) as dataset:
        assert read_everything(dataset) == stored
        child = os.fork()
        if child == 0:
            os._exit(0 if read_everything(dataset) == stored else 1)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        assert read_everything(dataset) == stored


def test_synchronous_file_system(stored, tmp_path):
    memory = fsspec.filesystem("memory")
    memory.put(str(tmp_path / "served" / "data"), "/bucket/data", recursive=True)
    try:
        with open_dataset("memory://bucket/data") as dataset:
            assert read_everything(dataset) == stored
        memory.rm("/bucket/data/000001.tar")
        with (
            open_dataset("memory://bucket/data") as dataset,
            pytest.raises(ShardError, match=r"memory://bucket/data/000001.tar: FileNotFoundError.*check the address"),
        ):
            read_everything(dataset)
    finally:
        memory.rm("/bucket", recursive=True)


def test_many_random_faults(tmp_path):
    """A store that fails a third of the time, at random, in all ways at once."""
    stored = make_dataset(tmp_path / "served" / "data", [12] * 30, frame_bytes=3000)
    rng = random.Random(1)
    faults = [status_fault(500), status_fault(503), truncated_fault, hang_up_fault, slow_fault(0.6)]
    with serve(tmp_path / "served") as server:
        server.fault = lambda path, count: rng.choice(faults) if rng.random() < 1 / 3 else None
        with open_served(server, timeout_seconds=0.5, retries=15) as dataset:
            requests = [(n, np.sort(np.random.default_rng(n).integers(0, 12, 4))) for n in range(30)]
            for (sample, frames), got in zip(requests, dataset.read_many(requests), strict=True):
                assert got == [stored[sample][frame] for frame in frames]


# S3


@pytest.fixture(scope="module")
def s3_endpoint():
    from moto.server import ThreadedMotoServer

    moto = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    moto.start()
    host, port = moto.get_host_and_port()
    yield f"http://{host}:{port}"
    moto.stop()


def s3_options(endpoint: str) -> dict:
    return {
        "key": "key",
        "secret": "very-secret",
        "endpoint_url": endpoint,
        "client_kwargs": {"region_name": "us-east-1"},
    }


@pytest.fixture
def bucket(s3_endpoint, tmp_path, stored):
    files = fsspec.filesystem("s3", **s3_options(s3_endpoint))
    name = tmp_path.name.replace("_", "-").lower()
    files.call_s3("create_bucket", Bucket=name)
    make_dataset(tmp_path / "more", [2, 3], seed=4)
    files.put(str(tmp_path / "served" / "data"), f"{name}/part0", recursive=True)
    files.put(str(tmp_path / "more"), f"{name}/part1", recursive=True)
    return name


def test_s3_equals_local(bucket, s3_endpoint, stored, tmp_path):
    options = s3_options(s3_endpoint)
    with open_dataset(f"s3://{bucket}/part{{0..1}}", storage_options=options) as dataset:
        assert len(dataset) == 9
        with open_dataset(str(tmp_path / "more")) as more:
            assert read_everything(dataset) == stored + read_everything(more)
    with open_dataset(f"s3://{bucket}/part0", storage_options=options, cache_bytes=10**6) as dataset:
        assert read_everything(dataset) == stored


def test_a_folder_of_a_bucket_may_have_any_name(bucket, s3_endpoint, tmp_path):
    """What follows # or ? is not shown, but keys hold it: shards of equal sizes must not take each other's place."""
    stored = make_dataset(tmp_path / "equal", [1, 1], videos_per_shard=1, frame_bytes=200, seed=3)
    options = s3_options(s3_endpoint)
    files = fsspec.filesystem("s3", **options)
    files.put(str(tmp_path / "equal"), f"{bucket}/c#1+é x%20", recursive=True)
    sizes = {shard.stat().st_size for shard in (tmp_path / "equal").glob("*.tar")}
    address = f"S3://{bucket}/c#1+é x%20"
    for cache_bytes in (None, 10**6):
        with open_dataset(
            address, storage_options=options, cache_bytes=cache_bytes, cache_dir=tmp_path / "c"
        ) as dataset:
            assert read_everything(dataset) == stored
    assert len(sizes) == 1 and len(list((tmp_path / "c" / "shards").glob("*.tar"))) == 2


def test_s3_is_configured_by_the_environment(bucket, s3_endpoint, stored, monkeypatch):
    """What a run relies on: its configuration holds no credentials."""
    options = s3_options(s3_endpoint)
    monkeypatch.setenv("AWS_ENDPOINT_URL", s3_endpoint)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", options["key"])
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", options["secret"])
    with open_dataset(f"s3://{bucket}/part0") as dataset:
        assert dataset.read(0, np.zeros(1, np.int64)) == [stored[0][0]]


def test_tars_that_others_wrote_into_a_bucket(bucket, s3_endpoint, tmp_path, monkeypatch):
    options = s3_options(s3_endpoint)
    monkeypatch.setenv("AWS_ENDPOINT_URL", s3_endpoint)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", options["key"])
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", options["secret"])
    monkeypatch.setattr(shards.remote, "PART_BYTES", 1500)
    files = {
        f"{number}.{suffix}": data for number in range(3) for suffix, data in [("jpg", jpeg(number)), ("cls", b"0")]
    }
    with tarfile.open(tmp_path / "x.tar", "w") as archive:
        for name, data in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    fsspec.filesystem("s3", **options).put(str(tmp_path / "x.tar"), f"{bucket}/theirs/x.tar")
    index_tars(f"s3://{bucket}/theirs", output=tmp_path / "index", labels=["a"])
    with open_dataset(str(tmp_path / "index")) as dataset:
        assert read_everything(dataset) == [[jpeg(number)] for number in range(3)]


def test_s3_faults_are_named(bucket, s3_endpoint, stored):
    options = s3_options(s3_endpoint)
    with pytest.raises(ShardError, match=rf"s3://{bucket}/nothing/manifest.json: FileNotFoundError"):
        open_dataset(f"s3://{bucket}/nothing", storage_options=options)
    files = fsspec.filesystem("s3", **options)
    with open_dataset(f"s3://{bucket}/part0", storage_options=options, retries=1) as dataset:
        files.pipe(f"{bucket}/part0/000000.tar", bytes(700))
        with pytest.raises(ShardError, match=rf"s3://{bucket}/part0/000000.tar: "):
            dataset.read(1, np.array([4]))
        files.rm(f"{bucket}/part0/000001.tar")
        with pytest.raises(ShardError, match=rf"s3://{bucket}/part0/000001.tar: HTTP status 404 NoSuchKey"):
            dataset.read(3, np.array([0]))


def test_s3_that_cannot_be_reached_or_refuses(tmp_path):
    (tmp_path / "empty").mkdir()
    with serve(tmp_path / "empty") as server:
        for status, expected in [(403, "PermissionError|Forbidden"), (503, "after 3 attempts")]:
            server.requests.clear()
            server.fault = lambda path, count, status=status: status_fault(status)
            (tmp_path / "empty" / "b" / "d").mkdir(parents=True, exist_ok=True)
            (tmp_path / "empty" / "b" / "d" / "manifest.json").write_text("{}")
            with pytest.raises(ShardError, match=rf"s3://b/d/manifest.json: .*({expected})") as info:
                open_dataset("s3://b/d", storage_options=s3_options(server.address), retries=2)
            assert sum(server.requests.values()) == (1 if status == 403 else 3)
            assert "very-secret" not in "".join(traceback.format_exception(info.value))
        closed = server.address
    with pytest.raises(ShardError, match=r"s3://b/d/manifest.json: .*after 2 attempts"):
        open_dataset("s3://b/d", storage_options=s3_options(closed), retries=1, timeout_seconds=2)


@pytest.mark.parametrize("refused", ["manifest.json", "000000.tar"])
def test_s3_that_finds_the_clock_wrong(tmp_path, stored, refused):
    """The first request is botocore's, the others are ours."""

    def fault(handler, body):
        message = "The difference between the request time and the current time is too large."
        handler.answer(403, f"<Error><Code>RequestTimeTooSkewed</Code><Message>{message}</Message></Error>".encode())
        return True

    with serve(tmp_path) as server:
        server.fault = lambda path, count: fault if path.endswith(refused) else None
        with (
            pytest.raises(ShardError, match=rf"{refused}: .*: set this machine's clock"),
            open_dataset("s3://served/data", storage_options=s3_options(server.address)) as dataset,
        ):
            dataset.read(0, np.array([0]))
        assert server.requests[f"served/data/{refused}"] == 1


def test_missing_driver_is_named():
    files = RemoteFiles("oci://b/x", Transfers(), retries=0, timeout_seconds=1, storage_options=None)
    with pytest.raises(ShardError, match=r"oci://b/x/manifest.json: ImportError: .*nstall"):
        files.read_whole("manifest.json", 10)


# Several batches in flight


LATENCY_SECONDS = 0.03
NUM_VIDEOS = 48


def drip_fault(handler, body):
    """Announces the body, then sends a byte now and then."""
    handler.send_response(206)
    handler.send_header("Content-Length", str(len(body)))
    handler.send_header("Content-Range", handler.headers["Range"].replace("bytes=", "bytes ") + "/*")
    handler.end_headers()
    for byte in body[:40]:
        handler.wfile.write(bytes([byte]))
        handler.wfile.flush()
        time.sleep(0.05)
    handler.close_connection = True
    return True


def late(fault):
    """The fault, or the answer as usual, after the time that a far store takes."""

    def answer(handler, body):
        time.sleep(LATENCY_SECONDS)
        return fault(handler, body) if fault is not None else False

    return answer


@pytest.fixture
def far(tmp_path, monkeypatch):
    """A server 30 ms away. Frames are small and near each other; each is a request all the same."""
    monkeypatch.setattr(shards.remote, "join_ranges", lambda ranges, _: join_ranges(ranges, 0))
    frames = make_dataset(tmp_path / "served" / "data", [20] * NUM_VIDEOS, frame_bytes=3000, videos_per_shard=6)
    with serve(tmp_path / "served") as server:
        server.fault = lambda path, count: late(None)
        yield server, frames


def epoch_requests(seed: int) -> list[list[tuple[int, np.ndarray]]]:
    """Batches of four videos and four frames of each."""
    rng = np.random.default_rng(seed)
    order = rng.permutation(NUM_VIDEOS)
    return [
        [(int(sample), np.sort(rng.choice(20, 4, replace=False))) for sample in order[first : first + 4]]
        for first in range(0, NUM_VIDEOS, 4)
    ]


def read_overlapping(dataset, frames, batches, depth: int = 6) -> None:
    """Reads with `depth` batches in flight and compares every byte."""
    pending = []

    def finish():
        requests, reading = pending.pop(0)
        for (sample, numbers), got in zip(requests, reading.result(), strict=True):
            assert got == [frames[sample][number] for number in numbers]

    for requests in batches:
        pending.append((requests, dataset.start(requests)))
        if len(pending) > depth:
            finish()
    while pending:
        finish()


def num_sockets() -> int:
    count = 0
    for descriptor in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(OSError):
            count += str(descriptor.readlink()).startswith("socket:")
    return count


def num_tasks(dataset) -> int:
    return len(asyncio.all_tasks(dataset._transfers._running.loop))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("fault", "timeout_seconds"),
    [
        (status_fault(503), 5),
        (hang_up_fault, 5),
        (truncated_fault, 5),
        (other_range_fault, 5),
        (drip_fault, 0.3),
        (slow_fault(0.8), 0.5),
    ],
    ids=["503-burst", "cut", "truncated", "wrong-range", "drip", "silence"],
)
def test_faults_with_several_batches_in_flight(far, monkeypatch, fault, timeout_seconds):
    """Bursts of a fault, at the latency of a far store: no wrong byte, no lost sample, nothing left behind."""
    monkeypatch.setattr(shards.stores, "_MIN_BYTES_PER_SECOND", 20_000)
    server, frames = far
    counter = itertools.count()

    def bursts(path, count):
        return late(fault if path.endswith(".tar") and next(counter) % 60 < 10 else None)

    server.fault = bursts
    sockets = num_sockets()
    with open_served(server, timeout_seconds=timeout_seconds, retries=12) as dataset:
        for seed in range(2):
            read_overlapping(dataset, frames, epoch_requests(seed))
        wait_until(lambda: num_tasks(dataset) == 0 and dataset._transfers._running.held_bytes == 0)
    assert next(counter) > 300  # the fault was met
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("shards-")]
    server.die()
    wait_until(lambda: num_sockets() <= sockets)


def wait_until(condition, seconds: float = 10) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_a_shard_that_changes_its_size_with_several_batches_in_flight(far, tmp_path):
    server, frames = far
    with open_served(server) as dataset:
        batches = epoch_requests(0)
        read_overlapping(dataset, frames, batches[:3])
        for shard in (tmp_path / "served" / "data").glob("*.tar"):
            shard.write_bytes(bytes(512) + shard.read_bytes())
        readings = [dataset.start(requests) for requests in batches[3:]]
        for reading in readings:
            with pytest.raises(ShardError, match=r"has \d+ bytes, the manifest says \d+"):
                reading.result()
        wait_until(lambda: num_tasks(dataset) == 0)


def test_without_checksums_a_shard_of_another_size_is_named_at_each_use(far, tmp_path):
    server, _ = far
    with open_served(server, verify=False) as dataset:
        batches = epoch_requests(0)
        for requests in batches:
            dataset.start(requests).result()
        for shard in (tmp_path / "served" / "data").glob("*.tar"):
            shard.write_bytes(bytes(512) + shard.read_bytes())
        with pytest.raises(ShardError, match=r"has \d+ bytes, the manifest says \d+"):
            dataset.start(batches[0]).result()


def test_latency_costs_memory_and_not_time(far):
    """A store may answer nothing before all twelve batches of 16 ranges have been asked for."""
    server, frames = far
    asked, all_asked, lock = itertools.count(1), threading.Event(), threading.Lock()
    in_vain = []

    def hold(handler, body):
        with lock:
            if next(asked) == 12 * 16:
                all_asked.set()
        if not all_asked.wait(10):
            in_vain.append(True)
            all_asked.set()
        return False

    with open_served(server, timeout_seconds=30) as dataset:
        server.fault = lambda path, count: hold
        read_overlapping(dataset, frames, epoch_requests(0), depth=12)
    assert all_asked.is_set() and not in_vain


@pytest.mark.slow
def test_the_bounds_hold(far):
    """Never more requests or bytes in flight than allowed, and all comes although a batch is larger than the bound."""
    server, frames = far
    lock = threading.Lock()
    for options, enough, limit in [
        ({"requests_in_flight": 5}, 2, 5),
        ({"bytes_in_flight": 10_000}, 2, 3),
        ({}, 21, 192),  # without narrow bounds much more is in flight
    ]:
        counts, reached = {"busy": 0, "most": 0}, threading.Event()

        def watch(handler, body, counts=counts, enough=enough, reached=reached):
            with lock:
                counts["busy"] += 1
                counts["most"] = max(counts["most"], counts["busy"])
            if counts["most"] >= enough:
                reached.set()
            reached.wait(1)  # no answer before enough are in flight, however slow the machine
            time.sleep(0.02)
            with lock:
                counts["busy"] -= 1
            return False

        with open_served(server, **options) as dataset:
            server.fault = lambda path, count, watch=watch: watch
            read_overlapping(dataset, frames, epoch_requests(1))
        server.fault = lambda path, count: None
        assert enough <= counts["most"] <= limit, options


@pytest.mark.slow
def test_readings_that_nobody_takes_block_nobody(far):
    server, frames = far
    batches = epoch_requests(0)
    with open_served(server, bytes_in_flight=30_000) as dataset:
        for requests in batches[:4]:
            dataset.start(requests)
        kept = dataset.start(batches[4])  # nor does one that is taken late
        read_overlapping(dataset, frames, batches[5:], depth=1)
        assert kept.result()


@pytest.mark.slow
def test_closing_ends_what_is_in_flight(far):
    server, _ = far
    sockets = num_sockets()
    server.fault = lambda path, count: slow_fault(3) if path.endswith(".tar") else None
    dataset = open_served(server)
    readings = [dataset.start(requests) for requests in epoch_requests(0)]
    wait_until(lambda: sum(server.requests.values()) > 20)
    started = time.monotonic()
    dataset.close()
    assert time.monotonic() - started < 5
    for reading in readings:
        with pytest.raises(ValueError, match="closed"):
            reading.result()
    with pytest.raises(ValueError, match="closed"):
        dataset.read(0, np.array([0]))
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("shards-")]
    server.die()
    wait_until(lambda: num_sockets() <= sockets)


def test_a_fork_in_mid_flight(far):
    server, frames = far
    with open_served(server) as dataset:
        batches = epoch_requests(0)
        readings = [dataset.start(requests) for requests in batches]
        child = os.fork()
        if child == 0:
            signal.alarm(30)
            read_overlapping(dataset, frames, batches)
            os._exit(0)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        for requests, reading in zip(batches, readings, strict=True):
            assert reading.result() == [[frames[sample][frame] for frame in numbers] for sample, numbers in requests]


def test_an_asynchronous_driver_of_fsspec_is_used_in_the_loop(far):
    """As gcsfs and adlfs are: here fsspec's own for HTTP, under another name."""
    server, frames = far

    class Renamed(HTTPFileSystem):
        protocol = "oss"

        @classmethod
        def _strip_protocol(cls, path):
            return path.replace("oss://", "http://")

    fsspec.register_implementation("oss", Renamed, clobber=True)
    try:
        with open_dataset(server.address.replace("http://", "oss://") + "/data", timeout_seconds=5) as dataset:
            read_overlapping(dataset, frames, epoch_requests(0))
    finally:
        fsspec.register_implementation("oss", "ossfs.OSSFileSystem", clobber=True)


def test_an_s3_object_is_signed_once_for_many_ranges(bucket, s3_endpoint, stored, monkeypatch):
    signed = []
    sign = shards.stores._S3Store._sign

    async def counted(self, name):
        signed.append(name)
        return await sign(self, name)

    by_botocore = []
    read = shards.stores._S3Store._read_by_botocore

    async def noted(self, name, *span):
        by_botocore.append(name)
        return await read(self, name, *span)

    monkeypatch.setattr(shards.stores._S3Store, "_sign", counted)
    monkeypatch.setattr(shards.stores._S3Store, "_read_by_botocore", noted)
    with open_dataset(f"s3://{bucket}/part0", storage_options=s3_options(s3_endpoint)) as dataset:
        for _ in range(3):
            assert read_everything(dataset) == stored
        assert by_botocore == ["manifest.json"]  # by then the bucket's region is known
        tars = [name for name in signed if name.endswith(".tar")]
        assert sorted(tars) == [f"{number:06d}.tar" for number in range(3)]
        monkeypatch.setattr(shards.stores, "_SIGNATURE_SECONDS", -1)
        dataset._parts[0].source.files._store._signed.clear()
        assert read_everything(dataset) == stored and len(signed) > len(tars) + 3


@pytest.mark.parametrize(("start", "asked_again_from"), [(10, 14), (0, 0)])
def test_a_part_that_breaks_off_is_asked_for_from_there_and_a_whole_file_again(tmp_path, start, asked_again_from):
    """A server without ranges can only send a whole file from its beginning."""
    asked, total = [], 20

    class Breaking(OneClientStore):
        async def get(self, name, span, write):
            asked.append(span.start)
            breaks_off = len(asked) == 1
            write(bytes(range(span.start, span.start + 4 if breaks_off else span.stop)))
            if breaks_off:
                raise ConnectionResetError

    files = RemoteFiles("http://h", Transfers(), retries=1, timeout_seconds=1, storage_options=None)
    files._store = Breaking()
    with (tmp_path / "part").open("w+b") as file:
        asyncio.run(files._store_part("x.tar", start, total, total, file.fileno()))
        assert os.pread(file.fileno(), total, 0)[start:] == bytes(range(start, total))
    assert asked == [start, asked_again_from]


@pytest.mark.parametrize(("come", "asked"), [(0, [10]), (4, [14]), (10, [])])
def test_what_the_range_client_brought_is_not_asked_for_again(tmp_path, come, asked):
    spans = []

    class Store:
        async def range_client(self, name):
            return self

        async def pieces(self, name, start, stop, total):
            for first in range(start, start + come, 2):
                yield bytes([first, first + 1])

        async def get(self, name, span, write):
            spans.append(span.start)
            write(bytes(range(span.start, span.stop)))

    files = RemoteFiles("http://h", Transfers(), retries=0, timeout_seconds=1, storage_options=None)
    files._store = Store()
    with (tmp_path / "part").open("w+b") as file:
        asyncio.run(files._store_part("x.tar", 10, 20, 30, file.fileno()))
        assert os.pread(file.fileno(), 30, 0)[10:] == bytes(range(10, 20))
    assert spans == asked
