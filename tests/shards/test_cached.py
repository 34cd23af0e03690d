"""Which shards are fetched whole, when, and what is read by ranges instead: against a store in memory."""

import os
import threading
import time
from contextlib import ExitStack
from types import SimpleNamespace

import pytest

import shards.cached
from shards.ahead import UpcomingShards
from shards.answers import RangesIgnoredError
from shards.cache import CacheFullError, ShardCache
from shards.cached import CachedShards
from shards.format import ShardError, ShardInfo
from shards.local import Extent


class Files:
    """Stands for RemoteFiles. gates: downloads that wait; errors: of downloads."""

    where = "http://h/d"

    def __init__(self, sizes: list[int]) -> None:
        self.data = {str(number): bytes([number + 1]) * size for number, size in enumerate(sizes)}
        self.downloads: list[int] = []
        self.ranges: list[tuple[list, bool]] = []
        self.gates: dict[int, threading.Event] = {}
        self.errors: dict[int, Exception] = {}
        self.has_ranges = True

    def place(self, name: str) -> str:
        return f"{self.where}/{name}"

    def renew(self) -> None:
        pass

    def download(self, name: str, total: int, descriptor: int) -> None:
        self.downloads.append(int(name))
        if int(name) in self.gates:
            assert self.gates[int(name)].wait(20)
        if int(name) in self.errors:
            raise self.errors[int(name)]
        os.pwrite(descriptor, self.data[name], 0)

    def range_requests(self, name: str, ranges: list, total: int) -> list[tuple[str, int, int]]:
        return [(name, start, stop) for start, stop in ranges]

    def submit(self, requests: list, *, first: bool = False) -> SimpleNamespace:
        self.ranges.append(([(int(name), start, stop) for name, start, stop in requests], first))

        def result() -> list[bytes]:
            if not self.has_ranges:
                raise RangesIgnoredError("the whole file")
            return [[self.data[name][start:stop]] for name, start, stop in requests]

        return SimpleNamespace(result=result)

    def hold(self, *numbers: int) -> None:
        self.gates |= {number: threading.Event() for number in numbers}

    def let(self, *numbers: int) -> None:
        for number in numbers:
            self.gates[number].set()


@pytest.fixture
def make(tmp_path):
    """Makes a store of shards of these sizes and its cached reader; waits until downloads end."""
    with ExitStack() as stack:

        def make(sizes: list[int], limit: int) -> tuple[Files, CachedShards]:
            files = Files(sizes)
            manifest = SimpleNamespace(
                shards=[ShardInfo(str(number), size, 1, 1) for number, size in enumerate(sizes)],
                index={"members": {"crc32": 1}},
            )
            source = CachedShards(files, manifest, ShardCache(tmp_path / "shards", limit))
            stack.callback(source.close)
            stack.callback(lambda: files.let(*files.gates))
            return files, source

        yield make


def until(condition) -> None:
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.002)


def settle(source: CachedShards) -> None:
    until(lambda: not source._under_way and not source._threads)


def here(source: CachedShards) -> list[int]:
    return [shard for shard in range(source.num_shards) if source._has(shard)]


def read(files: Files, source: CachedShards, shard: int, start: int = 3, stop: int = 9) -> None:
    fetch = source.start([Extent(shard, [(start, stop)])])
    assert fetch.read(0, lambda _: None) == [files.data[str(shard)][start:stop]]


def plan_of(*batches: list[int]) -> UpcomingShards:
    upcoming = UpcomingShards()
    for batch in batches:
        upcoming.add(batch)
    return upcoming


def test_what_finds_no_room_waits_for_those_under_way(make):
    files, source = make([100] * 4, 250)
    files.hold(0, 1)
    early = source.start([Extent(shard, [(0, 10)]) for shard in (0, 1)])
    until(lambda: len(files.downloads) == 2)
    late = source.start([Extent(shard, [(0, 10)]) for shard in (2, 3)])
    until(lambda: len(source._no_room) == 2)
    assert sorted(files.downloads) == [0, 1] and not source._is_paused
    again = source.start([Extent(2, [(5, 6)])])
    assert len(source._no_room) == 2  # it is on its list already
    files.let(0)
    until(lambda: 2 in files.downloads and 3 in files.downloads)
    files.let(1)
    for number in range(2):
        assert early.read(number, lambda _: None) == [bytes([number + 1]) * 10]
        assert late.read(number, lambda _: None) == [bytes([number + 3]) * 10]
    assert again.read(0, lambda _: None) == [b"\3"] and files.ranges == []
    settle(source)


def test_what_can_never_fit_is_read_by_ranges(make, caplog):
    files, source = make([100, 40], 50)
    read(files, source, 0)
    assert (files.downloads, files.ranges) == ([], [([(0, 3, 9)], False)])
    read(files, source, 1)  # for a while nothing is kept
    assert files.downloads == [] and [record.levelname for record in caplog.records] == ["WARNING"]
    source._paused_until = 0.0
    read(files, source, 1)
    assert files.downloads == [1] and len(files.ranges) == 2


@pytest.mark.parametrize("error", [ShardError("not there"), OSError(28, "No space left on device")])
def test_what_fails_ahead_is_not_tried_over_and_over(make, error):
    files, source = make([100] * 3, 1000)
    files.errors[0] = error
    source.follow(plan_of([0], [1], [2]))
    settle(source)
    source._next_look = 0.0
    source.advanced()
    settle(source)
    assert files.downloads.count(0) == 1
    if isinstance(error, ShardError):
        assert here(source) == [1, 2] and not source._is_paused
        with pytest.raises(ShardError, match="not there"):
            read(files, source, 0)
    else:
        assert source._is_paused
        read(files, source, 0)  # by ranges
        assert len(files.ranges) == 1
        source._paused_until = 0.0
    files.errors.clear()
    read(files, source, 0)
    settle(source)
    assert here(source) == [0, 1, 2]


def test_only_what_is_near_may_displace_what_is_needed_later(make):
    files, source = make([100] * 8, 400)
    for shard in (4, 5, 6, 7):
        read(files, source, shard)
        settle(source)
    source._next_look = 0.0
    source.follow(plan_of(*([shard] for shard in range(8))))
    settle(source)
    assert here(source) == [0, 1, 4, 5]  # two fill half of the cache
    assert sorted(files.downloads[4:]) == [0, 1]


def test_what_is_fetched_ahead_keeps_the_order_and_looks_again_later(make):
    files, source = make([100] * 6, 10_000)
    source.follow(plan_of([5], [3], [3, 0]))
    settle(source)
    assert sorted(files.downloads) == [0, 3, 5] == here(source)
    source.follow(plan_of([1]))
    assert not source._threads  # all was here a moment ago
    source._next_look = 0.0
    source.advanced()
    settle(source)
    assert here(source) == [0, 1, 3, 5] and len(files.downloads) == 4


def test_what_is_being_read_is_needed_before_all_else(make):
    files, source = make([100] * 3, 1000)
    source._upcoming = plan_of([2], [0])
    need = lambda: [source._need(name) for name in [*source._names, "other"]]  # noqa: E731
    inf = float("inf")
    assert need() == [1, inf, 0, inf]
    one, two = (source.start([Extent(shard, [(0, 5)]) for shard in wanted]) for wanted in ([0, 1, 1], [1]))
    assert need() == [-1, -1, 0, inf]
    del one
    assert need() == [1, -1, 0, inf]
    del two
    assert need() == [1, inf, 0, inf]
    settle(source)
    assert sorted(files.downloads) == [0, 1, 2]


def test_a_few_bytes_of_a_shard_on_its_way_come_by_ranges(make, monkeypatch):
    monkeypatch.setattr(shards.cached, "PART_BYTES", 999)
    files, source = make([1000, 999], 10_000)
    files.hold(0, 1)
    wanted = [Extent(0, [(0, 4), (10, 16)]), Extent(0, []), Extent(1, [(0, 5)]), Extent(0, [(20, 31)])]
    fetch = source.start([*wanted, Extent(0, [(40, 50)])])
    assert files.ranges == [([(0, 0, 16), (0, 40, 50)], True)]  # 2 % of the shard, not of a small one
    assert fetch.read(0, lambda _: None) == [b"\1" * 4, b"\1" * 6] and fetch.read(4, lambda _: None) == [b"\1" * 10]
    late = source.start([Extent(0, [(60, 61)])])
    assert len(files.ranges) == 1  # no more of it
    files.let(0, 1)
    for number, extent in ((2, wanted[2]), (3, wanted[3])):
        assert fetch.read(number, lambda _: None) == [
            files.data[str(extent.shard)][start:stop] for start, stop in extent.ranges
        ]
    assert late.read(0, lambda _: None) == [b"\1"]
    settle(source)
    read(files, source, 0, 0, 5)
    assert len(files.ranges) == 1  # it is here
    source._cache.drop(source._names[0])
    read(files, source, 0, 0, 20)
    assert len(files.ranges) == 2  # on its way again, with what it may cost


def test_a_server_without_ranges_gives_the_shard_alone(make, monkeypatch):
    monkeypatch.setattr(shards.cached, "PART_BYTES", 0)
    files, source = make([1000], 10_000)
    files.has_ranges = False
    read(files, source, 0)
    assert files.downloads == [0] and len(files.ranges) == 1


def test_what_others_evict_at_once_is_read_by_ranges(make, monkeypatch):
    files, source = make([100], 1000)
    fetched = []
    monkeypatch.setattr(source._cache, "fetch", lambda *_, **__: fetched.append(1))
    read(files, source, 0)
    assert 2 <= len(fetched) <= 4 and files.ranges == [([(0, 3, 9)], False)] and source._is_paused


def test_a_truncated_copy_is_fetched_again(make):
    files, source = make([100], 1000)
    read(files, source, 0)
    settle(source)
    path = source._cache.folder / f"{source._names[0]}.tar"
    descriptor = os.open(path, os.O_RDONLY)
    os.truncate(path, 50)
    assert source._read_checked(0, descriptor, [(0, 50), (40, 60)], lambda _: None) is None
    assert not path.exists()
    with pytest.raises(OSError, match="Bad file"):
        os.fstat(descriptor)
    read(files, source, 0, 40, 60)
    assert files.downloads == [0, 0]


def test_closing_ends_those_that_wait(make):
    files, source = make([100] * 11, 10_000)
    files.hold(*range(8))
    source.start([Extent(shard, [(0, 5)]) for shard in range(10)])
    until(lambda: len(files.downloads) == 8)  # that many at once
    threads, waiting = list(source._threads), list(source._waiting)
    assert len(threads) == 8 and all(thread.daemon for thread in threads)
    files.errors = dict.fromkeys(range(8), ValueError("the data set was closed while it was being read"))
    closing = threading.Thread(target=source.close)
    closing.start()
    assert [str(download.written.exception(10)) for download in waiting] == [str(files.errors[0])] * 2
    assert closing.is_alive()
    files.let(*range(8))
    closing.join(10)
    assert not closing.is_alive() and not any(thread.is_alive() for thread in threads)
    assert sorted(files.downloads) == list(range(8))
    with pytest.raises(ValueError, match="is closed"):
        source.start([Extent(10, [(0, 5)])])
    source.close()


def test_nobody_waits_for_room_after_the_end(make, monkeypatch):
    _, source = make([100] * 2, 1000)
    full = threading.Event()

    def fetch(*_: object, **__: object) -> None:
        assert full.wait(10)
        raise CacheFullError("full")

    monkeypatch.setattr(source._cache, "fetch", fetch)
    source.start([Extent(shard, [(0, 5)]) for shard in (0, 1)])
    until(lambda: len(source._under_way) == 2)
    downloads = list(source._under_way.values())
    downloads[0].spare = 5.0  # as one that was begun ahead
    closing = threading.Thread(target=source.close)
    closing.start()
    until(lambda: source._closed)
    full.set()
    assert [str(download.written.exception(10)) for download in downloads] == ["full"] * 2
    closing.join(10)


def test_a_reader_does_not_wait_for_room_after_the_last_download_has_found_none_ahead(make, monkeypatch):
    """What fills the cache belongs to another data set or job, and leaves with no word to this one."""
    files, source = make([100] * 2, 1000)
    full = threading.Event()

    def fetch(name: str, *_: object, **__: object) -> None:
        if name == source._names[1]:
            assert full.wait(10)
        raise CacheFullError("full")

    monkeypatch.setattr(source._cache, "fetch", fetch)
    source.follow(plan_of([1]))
    until(lambda: 1 in source._under_way)
    reading = source.start([Extent(0, [(0, 5)])])
    until(lambda: source._no_room)
    full.set()
    settle(source)
    assert not source._no_room
    assert reading.read(0, lambda _: None) == [b"\1" * 5] and len(files.ranges) == 1


def test_a_shard_that_waits_for_room_is_not_fetched_ahead_too(make, monkeypatch):
    """Of two downloads of one shard the end of the first took the place of the second: readers waited for ever."""
    files, source = make([100] * 3, 1000)
    files.hold(1, 2)
    fetch, tries = source._cache.fetch, []

    def full_once(name: str, *arguments: object, **keywords: object) -> None:
        tries.append(name)
        if tries.count(name) == 1 and name == source._names[0]:
            raise CacheFullError("full")
        fetch(name, *arguments, **keywords)

    monkeypatch.setattr(source._cache, "fetch", full_once)
    source.start([Extent(1, [(0, 5)])])
    until(lambda: 1 in source._under_way)
    reading = source.start([Extent(0, [(0, 5)])])
    until(lambda: source._no_room)
    source.follow(plan_of([0], [2]))
    until(lambda: source.advanced() or source._names[2] in tries)
    assert tries.count(source._names[0]) == 1
    files.let(1, 2)
    settle(source)
    assert reading.read(0, lambda _: None) == [b"\1" * 5] and sorted(files.downloads) == [0, 1, 2]


def test_what_finds_no_room_ahead_is_tried_with_more_right_for_a_reader(make, monkeypatch):
    files, source = make([100], 1000)
    fetch, spares, full = source._cache.fetch, [], threading.Event()

    def full_at_first(*arguments: object, spare: float, **options: object) -> None:
        spares.append(spare)
        if len(spares) == 1:
            assert full.wait(10)
            raise CacheFullError("full")
        fetch(*arguments, spare=spare, **options)

    monkeypatch.setattr(source._cache, "fetch", full_at_first)
    source.follow(plan_of([0]))
    until(lambda: spares)
    reading = source.start([Extent(0, [(0, 5)])])
    full.set()
    assert reading.read(0, lambda _: None) == [b"\1" * 5]
    assert spares == [0, -float("inf")] and files.ranges == []
