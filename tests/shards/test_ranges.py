"""Several ranges in one call: the bytes or nothing, asked for as the store was told to be asked."""

from __future__ import annotations

import asyncio
import os
import random
import re
import threading
from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest
from shard_data import hang_up_fault, make_dataset, read_everything, serve, status_fault, truncated_fault

import shards.ranges
import shards.remote
from shards.answers import Span
from shards.local import join_ranges
from shards.ranges import MAX_RANGE_BYTES, RangeClient, http_store, s3_store
from shards.reader import open_dataset
from shards.stores import open_store

CONTENT = bytes(range(251)) * 40
RANGES = [(30, 100), (700, 1900), (3, 20), (9000, 9001)]


@pytest.fixture
def server(tmp_path):
    (tmp_path / "served" / "data").mkdir(parents=True)
    (tmp_path / "served" / "data" / "a.tar").write_bytes(CONTENT)
    with serve(tmp_path / "served") as server:
        yield server


def ask(client: RangeClient, name: str = "a.tar", ranges=RANGES, times: int = 1) -> list:
    async def main():
        return [await client.get(name, ranges) for _ in range(times)]

    return asyncio.run(main())


def client_of(server) -> RangeClient:
    return RangeClient(http_store(f"{server.address}/data", {}, None), 10, 64 << 10)


def expected(ranges=RANGES) -> list[bytes]:
    return [CONTENT[start:stop] for start, stop in ranges]


def test_ranges_come_in_their_order_and_no_byte_between_them(server):
    """Overlapping, equal, adjacent and unsorted ones too."""
    draw, client = random.Random(0), client_of(server)
    for _ in range(100):
        starts = [draw.randrange(9000) for _ in range(draw.randint(1, 9))]
        ranges = [(start, start + draw.randint(1, 1000)) for start in [*starts, starts[0]]]
        sent = server.bytes_sent
        assert ask(client, ranges=ranges) == [expected(ranges)]
        assert server.bytes_sent - sent <= sum(stop - start for start, stop in ranges)


def other_range(handler, body):
    handler.answer(206, body, {"Content-Range": f"bytes 1-{len(body)}/*"})
    return True


def too_short(handler, body):
    handler.answer(206, body[:-1], {"Content-Range": handler.headers["Range"].replace("=", " ") + "/10040"})
    return True


@pytest.mark.parametrize(
    "fault", [status_fault(503), status_fault(403), hang_up_fault, truncated_fault, other_range, too_short]
)
def test_one_bad_answer_among_them_and_there_is_none(server, fault):
    client = client_of(server)
    server.fault = lambda path, count: fault if count % 4 == 3 else None
    assert ask(client) == [None]
    server.fault = lambda path, count: None
    assert ask(client) == [None], "put aside: it has never answered"
    client._aside_until = 0
    assert ask(client) == [expected()]
    server.fault = lambda path, count: fault if count % 4 == 3 else None
    assert ask(client) == [None]
    server.fault = lambda path, count: None
    assert ask(client) == [expected()], "what has answered once is asked again"


def test_a_server_without_ranges_or_without_an_answer(server):
    server.ranges = False
    assert ask(client_of(server)) == [None]
    server.ranges, released = True, threading.Event()
    server.fault = lambda path, count: lambda handler, body: released.wait(10) and False
    client = client_of(server)
    client._timeout_seconds = 0.2
    assert ask(client) == [None]
    released.set()
    server.die()
    assert ask(client_of(server)) == [None]


@pytest.mark.parametrize("name", ["a b.tar", "é.tar", "a%20b.tar", "a#b", "a?b", "../a.tar", "a//b", "./a", "/a", ""])
def test_what_clients_write_in_several_ways_is_not_asked_for(server, name):
    assert ask(client_of(server), name) == [None] and not server.requests


@pytest.mark.parametrize(
    "address", ["http://u:p@h/x", "http://h/x?token=1", "http://h/x y", "http://[::1]/x", "http://h/%41", "ftp://h/x"]
)
def test_addresses_that_say_more_are_left_to_others(address):
    assert http_store(address, {}, None) is None


def test_large_ranges_are_left_to_others(server):
    assert ask(client_of(server), ranges=[(0, 1), (0, MAX_RANGE_BYTES + 1)]) == [None] and not server.requests


def test_a_forked_child_leaves_it_to_others(server):
    client = client_of(server)
    assert ask(client) == [expected()]
    child = os.fork()
    if child == 0:
        os._exit(ask(client, times=2) != [None, None])
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert ask(client) == [expected()]


def pieces_of(client: RangeClient, start: int, stop: int, total: int = len(CONTENT), name: str = "a.tar") -> bytes:
    async def main():
        return b"".join([bytes(piece) async for piece in client.pieces(name, start, stop, total)])

    return asyncio.run(main())


def test_a_large_range_comes_in_pieces(server, monkeypatch):
    monkeypatch.setattr(shards.ranges, "_PIECE_BYTES", 1000)
    client = client_of(server)
    for start, stop in [(0, len(CONTENT)), (0, 1), (17, 9001), (len(CONTENT) - 1, len(CONTENT))]:
        assert pieces_of(client, start, stop) == CONTENT[start:stop]
    requests = server.requests.total()
    assert pieces_of(client, 0, 10, name="a b.tar") == b"" and server.requests.total() == requests


@pytest.mark.parametrize("fault", [status_fault(503), hang_up_fault, other_range, too_short, truncated_fault])
def test_pieces_end_where_the_first_is_not_as_it_should_be(server, fault):
    client = client_of(server)
    server.fault = lambda path, count: fault
    assert CONTENT[5:9005].startswith(pieces_of(client, 5, 9005))
    server.fault = lambda path, count: None
    assert pieces_of(client, 5, 9005) == b"", "put aside: it has never answered"
    client._aside_until = 0
    assert pieces_of(client, 5, 9005) == CONTENT[5:9005]


def test_nothing_comes_of_a_file_of_another_size_or_a_server_without_ranges(server):
    assert pieces_of(client_of(server), 0, 10, total=len(CONTENT) + 1) == b""
    server.ranges = False
    assert pieces_of(client_of(server), 0, 10) == b""


def store_answers(address: str, options: dict, name: str = "a.tar") -> list[bytes] | None:
    async def main():
        store = open_store(address, timeout_seconds=5, storage_options=options)
        try:
            assert await store.get(name, Span(*RANGES[0], len(CONTENT))) == expected()[0]
            return await (await store.range_client(name)).get(name, RANGES)
        finally:
            await store.close()

    return asyncio.run(main())


def seen_headers(server) -> list[dict[str, str]]:
    seen = []

    def look(handler, body):
        seen.append({**{key.lower(): value for key, value in handler.headers.items()}, "path": handler.path})
        return False

    server.fault = lambda path, count: look
    return seen


@pytest.mark.parametrize("options", [{"headers": {"X-Key": "1"}}, {"client_kwargs": {"headers": {"X-Key": "1"}}}])
def test_headers_that_the_store_was_given_are_sent(server, options):
    seen = seen_headers(server)
    assert store_answers(f"{server.address}/data", options) == expected()
    assert Counter(headers["x-key"] for headers in seen) == {"1": 5}


@pytest.mark.parametrize(
    "options", [{"client_kwargs": {"trust_env": True}}, {"cookies": {"a": "b"}}, {"allow_redirects": False}]
)
def test_options_that_only_aiohttp_understands_leave_all_to_it(server, options):
    assert store_answers(f"{server.address}/data", options) is None


S3 = {"key": "name", "secret": "very-secret", "client_kwargs": {"region_name": "eu-north-1"}}


@pytest.mark.parametrize("token", [None, "for-a-while"])
def test_s3_is_asked_with_the_credentials_of_botocore(server, token):
    seen = seen_headers(server)
    options = {**S3, "endpoint_url": server.address, **({"token": token} if token else {})}
    assert store_answers("s3://data", options) == expected()
    ours = [headers for headers in seen if "object_store" in headers["user-agent"]]
    assert len(ours) == len(RANGES)
    for headers in ours:
        assert re.match(r"AWS4-HMAC-SHA256 Credential=name/\d+/eu-north-1/s3/", headers["authorization"])
        assert headers.get("x-amz-security-token") == token and headers["path"] == "/data/a.tar"


def test_s3_without_credentials_is_asked_without_a_signature(server):
    seen = seen_headers(server)
    assert store_answers("s3://data", {"anon": True, "endpoint_url": server.address}) == expected()
    assert not any("authorization" in headers for headers in seen) and len(seen) > len(RANGES)


@pytest.mark.parametrize(
    "options",
    [
        {"config_kwargs": {"signature_version": "s3"}},
        {"requester_pays": True},
        {"s3_additional_kwargs": {"ExpectedBucketOwner": "123456789012"}},
    ],
)
def test_s3_options_that_change_a_request_leave_all_to_aiohttp(server, options):
    assert store_answers("s3://data", {**S3, "endpoint_url": server.address, **options}) is None


def test_a_bucket_may_be_named_by_the_host(server):
    seen = seen_headers(server)
    credentials = SimpleNamespace(access_key="name", secret_key="very-secret", token=None)

    async def frozen():
        return credentials

    store = s3_store(
        "bucket",
        "data",
        SimpleNamespace(get_frozen_credentials=frozen),
        None,
        endpoint=server.address,
        region="eu-north-1",
        virtual_hosted_style_request=True,
    )
    assert ask(RangeClient(store, 10, 64 << 10)) == [expected()]
    assert {headers["path"] for headers in seen} == {"/data/a.tar"}


def test_a_data_set_is_read_by_it_and_sizes_are_compared_first(tmp_path, monkeypatch):
    """The first ranges of each shard are asked for one by one, all later ones of a video together."""
    monkeypatch.setattr(shards.remote, "join_ranges", lambda ranges, _: join_ranges(ranges, 0))
    calls = []
    by_obstore = shards.ranges.obstore.get_ranges_async

    def counted(store, name, **arguments):
        calls.append((name, len(arguments["starts"])))
        return by_obstore(store, name, **arguments)

    monkeypatch.setattr(shards.ranges.obstore, "get_ranges_async", counted)
    frames = make_dataset(tmp_path / "served" / "more", [12] * 6, frame_bytes=2000, videos_per_shard=3)
    with (
        serve(tmp_path / "served") as server,
        open_dataset(f"{server.address}/more", cache_dir=tmp_path / "cache") as dataset,
    ):
        for sample in range(6):
            assert dataset.read(sample, np.arange(0, 12, 2)) == frames[sample][::2]
        assert calls == [("000000.tar", 6)] * 2 + [("000001.tar", 6)] * 2
        calls.clear()
        assert read_everything(dataset) == frames
        assert [name for name, _ in calls] == sorted(["000000.tar", "000001.tar"] * 6)  # ten ranges, and two
        assert sorted(count for _, count in calls) == [2] * 6 + [10] * 6
