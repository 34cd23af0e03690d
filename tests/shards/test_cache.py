"""The node-wide cache of shards: one download each, the limit, least recently used first, crashes and damage."""

import logging
import math
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from pathlib import Path

import numpy as np
import pytest
from shard_data import FlakyServer, make_dataset, read_everything, read_in_process, serve, slow_fault, status_fault

import shards.cache
import shards.cached
import shards.remote
from shards.cache import CacheFullError, GivenUpError, ShardCache, entry_name, fetch_once
from shards.files import try_lock
from shards.format import ShardError
from shards.plan import Stream
from shards.reader import open_dataset


@pytest.fixture(autouse=True)
def _quick(monkeypatch):
    monkeypatch.setattr(shards.remote, "_BACKOFF_SECONDS", 0.01)
    monkeypatch.setattr(shards.cache, "_POLL_SECONDS", 0.002)


@pytest.fixture
def stored(tmp_path):
    return make_dataset(tmp_path / "served" / "data")


@pytest.fixture
def server(tmp_path, stored):
    with serve(tmp_path / "served") as server:
        yield server


def open_cached(server: FlakyServer, tmp_path: Path, name: str = "data", **options):
    options = {"cache_bytes": 10**6, "cache_dir": tmp_path / "cache", "timeout_seconds": 5, **options}
    return open_dataset(f"{server.address}/{name}", **options)


def kept(tmp_path: Path) -> list[Path]:
    return sorted((tmp_path / "cache" / "shards").glob("*.tar"))


def settle(dataset) -> None:
    """Waits until what was downloaded is in the cache: readers do not."""
    deadline = time.monotonic() + 20
    while dataset._parts[0].source._under_way:
        assert time.monotonic() < deadline
        time.sleep(0.005)


def tar_requests(server: FlakyServer) -> dict[str, int]:
    return {path: count for path, count in server.requests.items() if path.endswith(".tar")}


def fetched(cache: ShardCache, name: str, size: int, download: Callable[[int], None]) -> int:
    """Descriptor of an entry, downloaded if it is not there; others may evict it in between."""
    while (descriptor := cache.find(name, size)) is None:
        cache.fetch(name, size, download)
    return descriptor


def test_each_shard_is_downloaded_once(server, stored, tmp_path):
    for _ in range(2):
        with open_cached(server, tmp_path) as dataset:
            for _ in range(3):
                assert read_everything(dataset) == stored
    assert tar_requests(server) == {f"data/00000{number}.tar": 1 for number in range(3)}
    assert len(kept(tmp_path)) == 3
    assert not list((tmp_path / "cache" / "shards").glob("*.part"))


def test_equal_shard_names_do_not_collide(server, stored, tmp_path):
    other = make_dataset(tmp_path / "served" / "other", seed=1)
    sizes = {path.name: path.stat().st_size for path in (tmp_path / "served" / "data").glob("*.tar")}
    # Also of equal sizes: the shards of `twin` differ from those of `data` in nothing but their bytes.
    twin = make_dataset(tmp_path / "served" / "twin", seed=0)
    assert {path.name: path.stat().st_size for path in (tmp_path / "served" / "twin").glob("*.tar")} == sizes
    for name, expected in [("data", stored), ("other", other), ("twin", twin), ("data", stored)]:
        with open_cached(server, tmp_path, name) as dataset:
            assert read_everything(dataset) == expected
    assert len(kept(tmp_path)) == 9


def test_three_processes_download_once(tmp_path):
    stored = make_dataset(tmp_path / "served" / "data", [6] * 24, videos_per_shard=2)
    context = multiprocessing.get_context("spawn")
    with serve(tmp_path / "served") as server:
        barrier, results = context.Barrier(3), context.Queue()
        arguments = (f"{server.address}/data", tmp_path / "cache", barrier, results)
        processes = [context.Process(target=read_in_process, args=arguments) for _ in range(3)]
        for process in processes:
            process.start()
        assert all(results.get(timeout=60) == stored for _ in processes)
        for process in processes:
            process.join(10)
        assert tar_requests(server) == {f"data/{number:06d}.tar": 1 for number in range(12)}
        # The index too.
        assert all(count == 1 for path, count in server.requests.items() if path.startswith("data/index"))


def test_killed_download_leaves_nothing_behind(server, stored, tmp_path):
    stop = threading.Event()

    def stall(handler, body):
        """Sends half of the shard, then nothing: the moment for a kill."""
        handler.send_response(206 if handler.headers.get("Range") else 200)
        handler.send_header("Content-Length", str(len(body)))
        handler.end_headers()
        handler.wfile.write(body[: len(body) // 2])
        handler.wfile.flush()
        stop.wait(30)
        return True

    server.fault = lambda path, count: stall if path.endswith(".tar") else None
    program = (
        "import sys, numpy as np\nfrom shards.reader import open_dataset\n"
        "dataset = open_dataset(sys.argv[1], cache_dir=sys.argv[2], cache_bytes=10**6)\n"
        "dataset.read_many([(0, np.array([0])), (3, np.array([0]))])\n"
    )
    process = subprocess.Popen([sys.executable, "-c", program, f"{server.address}/data", str(tmp_path / "cache")])
    try:
        deadline = time.monotonic() + 30
        while len(tar_requests(server)) < 2:
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
        process.wait(10)
    finally:
        process.kill()
        stop.set()
    folder = tmp_path / "cache" / "shards"
    assert len(list(folder.glob("*.part"))) == 2 and not kept(tmp_path)
    server.fault = lambda path, count: None
    with open_cached(server, tmp_path) as dataset:
        # Only the first shard is asked for; the other one's leftover is cleaned away with it.
        assert dataset.read(0, np.array([0])) == stored[0][:1]
    assert not list(folder.glob("*.part")) and len(kept(tmp_path)) == 1
    with open_cached(server, tmp_path) as dataset:
        assert read_everything(dataset) == stored


def test_least_recently_used_goes_first_and_the_limit_holds(tmp_path):
    cache = ShardCache(tmp_path / "shards", 1000)
    downloads: list[str] = []

    def use(name: str, size: int) -> None:
        def download(descriptor: int) -> None:
            downloads.append(name)
            assert sum(path.stat().st_size for path in cache.folder.iterdir()) <= 1000
            os.pwrite(descriptor, name[0].encode() * size, 0)

        descriptor = fetched(cache, name, size, download)
        assert os.pread(descriptor, 2000, 0) == name[0].encode() * size
        os.close(descriptor)
        time.sleep(0.002)

    for name in "abc":
        use(name, 300)
    use("a", 300)
    use("d", 300)  # b is the one that was not used for longest
    assert sorted(path.stem for path in cache.folder.glob("*.tar")) == ["a", "c", "d"]
    use("e", 700)
    assert sorted(path.stem for path in cache.folder.glob("*.tar")) == ["d", "e"]
    use("a", 300)
    assert downloads == ["a", "b", "c", "d", "e", "a"]
    with pytest.raises(CacheFullError, match="1001 bytes do not fit"):
        use("f", 1001)
    assert not list(cache.folder.glob("*.part"))


def _churn(folder, seed, results):
    """Uses 12 files of 100 bytes at random in a cache for 450, watching the total all the time."""
    rng = np.random.default_rng(seed)
    cache = ShardCache(Path(folder), 450)
    worst = wrong = 0
    for _ in range(60):
        name = str(rng.integers(12))
        data = f"{name:>100}".encode()

        def download(descriptor, data=data):
            os.pwrite(descriptor, data[:50], 0)
            time.sleep(0.001)
            os.pwrite(descriptor, data[50:], 50)

        try:
            descriptor = fetched(cache, name, 100, download)
        except CacheFullError:
            continue
        wrong += os.pread(descriptor, 200, 0) != data
        os.close(descriptor)
        total = 0
        for path in cache.folder.iterdir():
            with suppress(FileNotFoundError):
                total += path.stat().st_size
        worst = max(worst, total)
    results.put((worst, wrong))


def test_limit_holds_with_concurrent_ranks(tmp_path):
    context = multiprocessing.get_context("fork")
    results = context.Queue()
    processes = [context.Process(target=_churn, args=(tmp_path / "shards", seed, results)) for seed in range(3)]
    for process in processes:
        process.start()
    outcomes = [results.get(timeout=60) for _ in processes]
    for process in processes:
        process.join(10)
    assert [wrong for _, wrong in outcomes] == [0, 0, 0]
    # A listing is no snapshot: while it is taken, one file may go and another come under each of the other ranks.
    assert max(worst for worst, _ in outcomes) <= 450 + 2 * 100
    assert sum(path.stat().st_size for path in (tmp_path / "shards").iterdir()) <= 450


@pytest.mark.parametrize("moment", ["listed", "opened", "locked"])
def test_a_download_that_ends_while_room_is_made_counts(tmp_path, monkeypatch, moment):
    """It has another name then than in the listing, and a moment later its lock is free."""
    cache = ShardCache(tmp_path, 250)
    part, entry = tmp_path / "first.tar.part", tmp_path / "first.tar"
    part.write_bytes(bytes(200))
    descriptor = os.open(part, os.O_RDWR)
    assert try_lock(descriptor)

    def end() -> None:
        nonlocal descriptor
        if part.exists() and descriptor >= 0:
            part.rename(entry)
            os.close(descriptor)
            descriptor = -1

    iterdir, tries = Path.iterdir, []

    def listed(folder: Path) -> list[Path]:
        found = list(iterdir(folder))
        if moment == "listed":
            end()
        return found

    def locked(other: int) -> bool:
        if os.fstat(other).st_size == 200 and moment != "listed":
            tries.append(other)
            if moment == "opened":
                end()
            taken = try_lock(other)
            end()
            return taken
        return try_lock(other)

    monkeypatch.setattr(Path, "iterdir", listed)
    monkeypatch.setattr(shards.cache, "try_lock", locked)
    cache.fetch("second", 200, lambda part: os.pwrite(part, bytes(200), 0))
    monkeypatch.undo()
    assert [path.name for path in tmp_path.glob("*.tar")] == ["second.tar"] and descriptor == -1
    assert (moment == "listed") != bool(tries)


def test_small_limit_still_reads_right(server, stored, tmp_path):
    limit = max(path.stat().st_size for path in (tmp_path / "served" / "data").glob("*.tar"))
    with open_cached(server, tmp_path, cache_bytes=limit) as dataset:
        for _ in range(3):
            assert read_everything(dataset) == stored
            assert sum(path.stat().st_size for path in kept(tmp_path)) <= limit


def test_shard_larger_than_the_limit_is_read_by_ranges(server, stored, tmp_path, caplog):
    with caplog.at_level(logging.WARNING), open_cached(server, tmp_path, cache_bytes=5000) as dataset:
        for _ in range(2):
            assert read_everything(dataset) == stored
    warnings = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert len(warnings) == 1 and "do not fit" in warnings[0] and "raise cache_bytes" in warnings[0]


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), PermissionError(13, "Permission denied")])
def test_full_or_read_only_disk_falls_back_to_ranges(server, stored, tmp_path, monkeypatch, caplog, error):
    with open_cached(server, tmp_path) as dataset:
        assert dataset.read(6, np.array([0])) == stored[6][:1]

        writes = []

        def pwrite(*arguments):
            writes.append(arguments)
            raise error

        monkeypatch.setattr(os, "pwrite", pwrite)
        with caplog.at_level(logging.WARNING):
            assert read_everything(dataset) == stored
            settle(dataset)
            writes.clear()
            assert read_everything(dataset) == stored
            assert not writes  # for a while nothing is downloaded
        warnings = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
        assert len(warnings) == 1 and error.strerror in warnings[0] and "reading ranges" in warnings[0]
        # What is in the cache is used still; the rest is not downloaded over and over again.
        before = dict(server.requests)
        assert dataset.read(6, np.array([1])) == stored[6][1:2]
        assert server.requests == before
        monkeypatch.undo()
        monkeypatch.setattr(shards.cached, "_PAUSE_SECONDS", 0)
        dataset._parts[0].source._paused_until = 0
        assert read_everything(dataset) == stored
        settle(dataset)
        assert len(kept(tmp_path)) == 3


def test_index_on_a_full_disk_is_a_clear_error(server, tmp_path, monkeypatch):
    def pwrite(*arguments):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "pwrite", pwrite)
    with pytest.raises(ShardError, match=r"cache/index: the index of .* No space left on device; free .*cache_dir"):
        open_cached(server, tmp_path)


def overwrite_all(tmp_path: Path) -> None:
    for path in kept(tmp_path):
        path.write_bytes(bytes(path.stat().st_size))


def test_damaged_entry_is_fetched_again(server, stored, tmp_path):
    with open_cached(server, tmp_path) as dataset:
        assert read_everything(dataset) == stored
        settle(dataset)
        overwrite_all(tmp_path)
        with ThreadPoolExecutor(8) as pool:
            assert all(result == stored for result in pool.map(lambda _: read_everything(dataset), range(8)))
        assert tar_requests(server) == {f"data/00000{number}.tar": 2 for number in range(3)}
        settle(dataset)
        # Truncated and deleted by hand.
        paths = kept(tmp_path)
        os.truncate(paths[0], 100)
        paths[1].unlink()
        assert read_everything(dataset) == stored


def test_damage_in_the_store_is_an_error_and_not_fetched_for_ever(server, stored, tmp_path):
    shard = tmp_path / "served" / "data" / "000001.tar"
    good = shard.read_bytes()
    start = good.index(stored[3][2])
    shard.write_bytes(good[:start] + b"????" + good[start + 4 :])
    with open_cached(server, tmp_path) as dataset:
        for _ in range(4):
            with pytest.raises(ShardError, match=r"sample 3, 000001.tar of .*frame 2 has the CRC-32"):
                dataset.read(3, np.array([1, 2]))
            assert dataset.read(3, np.array([0, 1])) == stored[3][:2]
        assert tar_requests(server) == {"data/000001.tar": 2}


def test_failed_download_is_named_and_leaves_nothing(server, tmp_path):
    with open_cached(server, tmp_path, retries=1) as dataset:
        server.fault = lambda path, count: status_fault(500)
        with pytest.raises(ShardError, match=r"/data/000000.tar: HTTP status 500 .*after 2 attempts"):
            dataset.read(0, np.array([0]))
        server.fault = lambda path, count: status_fault(404)
        with pytest.raises(ShardError, match=r"/data/000000.tar: HTTP status 404"):
            dataset.read(0, np.array([0]))
    assert [path.name for path in (tmp_path / "cache" / "shards").iterdir()] == ["lock"]


def test_stopped_holder_of_a_lock_is_not_waited_for_for_ever(server, stored, tmp_path, monkeypatch, caplog):
    with open_cached(server, tmp_path) as dataset:
        monkeypatch.setattr(shards.cache, "_LOCK_SECONDS", 0.05)
        entered, leave = threading.Event(), threading.Event()

        def hold(descriptor):
            entered.set()
            leave.wait(20)
            raise CacheFullError("given up")

        name = dataset._parts[0].source._names[0]
        size = (tmp_path / "served" / "data" / "000000.tar").stat().st_size

        def holder():
            with pytest.raises(CacheFullError):
                fetch_once(tmp_path / "cache" / "shards" / f"{name}.tar", size, hold)

        thread = threading.Thread(target=holder)
        thread.start()
        assert entered.wait(10)
        assert dataset.read(0, np.array([0])) == stored[0][:1]
        leave.set()
        thread.join(10)
    assert "another process has held a lock" in caplog.text


def filled(byte: bytes, size: int) -> Callable[[int], None]:
    """A download of `size` equal bytes, which finds nothing of an earlier one that is longer than the file."""

    def download(descriptor: int) -> None:
        assert os.fstat(descriptor).st_size in (0, size)
        os.pwrite(descriptor, byte * size, 0)

    return download


@pytest.fixture
def held(tmp_path):
    """A download of 600 bytes that another process has under way, and what ends it."""
    part = tmp_path / "shards" / "other.tar.part"
    part.parent.mkdir()
    part.write_bytes(bytes(600))
    descriptor = os.open(part, os.O_RDWR)
    assert try_lock(descriptor)
    with ExitStack() as stack:
        stack.callback(os.close, descriptor)
        yield part, stack.close


def test_leftover_of_a_longer_download_leaves_no_trace(tmp_path):
    for size in (100, 0):
        (tmp_path / f"{size}.part").write_bytes(b"x" * 500)
        fetch_once(tmp_path / str(size), size, filled(b"a", size))
        assert (tmp_path / str(size)).read_bytes() == b"a" * size
    assert len(list(tmp_path.iterdir())) == 2


def test_a_download_that_another_has_finished_meanwhile_is_used(tmp_path, held):
    part, end = held
    entry = part.with_suffix("")

    def finish() -> bool:
        entry.write_bytes(b"a" * 600)
        end()
        return False

    fetch_once(entry, 600, pytest.fail, is_given_up=finish)
    assert [path.name for path in entry.parent.iterdir()] == [entry.name]
    assert entry.read_bytes() == b"a" * 600


def test_waiting_for_another_download_ends_when_given_up(held):
    part, _ = held
    with pytest.raises(GivenUpError):
        fetch_once(part.with_suffix(""), 600, pytest.fail, is_given_up=lambda: True)
    assert part.exists()


def test_downloads_under_way_count_and_leftovers_do_not(held):
    part, end = held
    cache = ShardCache(part.parent, 1000)
    with pytest.raises(CacheFullError, match="401 bytes do not fit beside 600 bytes"):
        cache.fetch("own", 401, pytest.fail)
    cache.fetch("own", 400, filled(b"a", 400))
    assert part.exists()
    end()
    cache.fetch("more", 600, filled(b"b", 600))
    assert sorted(path.name for path in part.parent.iterdir()) == ["lock", "more.tar", "own.tar"]


def test_all_users_that_the_umask_allows_may_add_to_a_cache(tmp_path):
    before = os.umask(0)
    try:
        ShardCache(tmp_path, 1000).fetch("a", 100, filled(b"a", 100))
    finally:
        os.umask(before)
    assert {path.name: path.stat().st_mode & 0o777 for path in tmp_path.iterdir()} == {"a.tar": 0o666, "lock": 0o666}


def test_an_entry_of_another_size_is_not_used_and_gone_ones_are_dropped_silently(tmp_path):
    cache = ShardCache(tmp_path, 1000)
    cache.fetch("a", 100, filled(b"a", 100))
    assert cache.find("a", 101) is None and cache.find("b", 100) is None and not cache.has("a", 101)
    assert not [file for file in Path("/proc/self/fd").iterdir() if os.path.realpath(file).startswith(str(tmp_path))]
    cache.drop("a")
    cache.drop("a")
    assert not cache.has("a", 100)
    descriptor = fetched(cache, "c", 10, filled(b"c", 10))
    assert cache.is_current("c", descriptor)
    cache.drop("c")
    assert not cache.is_current("c", descriptor)
    os.close(descriptor)


def test_names():
    assert len({entry_name("a", 1), entry_name("a", 2), entry_name("b", 1), entry_name("a\n1")}) == 3


# Ahead of the plan


def test_what_is_needed_latest_leaves_first_and_what_is_needed_sooner_stays(tmp_path):
    cache = ShardCache(tmp_path / "shards", 300)
    need = {"a": 5.0, "b": 9.0, "c": 1.0, "other": math.inf}
    for name in ("other", "a", "b"):
        cache.fetch(name, 100, lambda _: None)
    names = lambda: sorted(path.stem for path in cache.folder.glob("*.tar"))  # noqa: E731
    cache.fetch("c", 100, lambda _: None, need=need.__getitem__)
    assert names() == ["a", "b", "c"]
    with pytest.raises(CacheFullError):
        cache.fetch("d", 100, lambda _: None, need=need.__getitem__, spare=9.0)
    assert names() == ["a", "b", "c"]
    cache.fetch("d", 100, lambda _: None, need=need.__getitem__, spare=8.0)
    assert names() == ["a", "c", "d"]


@pytest.fixture
def many(tmp_path, monkeypatch):
    """24 shards of two videos on a server 20 ms away."""
    monkeypatch.setattr(shards.cached, "_LOOK_SECONDS", 0.005)
    frames = make_dataset(tmp_path / "served" / "data", [4] * 48, videos_per_shard=2)
    with serve(tmp_path / "served") as server:
        server.fault = lambda path, count: slow_fault(0.02)
        yield server, frames


def read_epochs(dataset, frames, num_epochs: int, before_later: Callable[[np.ndarray], None] = lambda ids: None):
    """Goes over the data in windows of two shards, the order of which each epoch draws anew.

    before_later: called with the samples of each batch but the first before it is read.
    """
    stream = Stream(48, 3, "shards:2", dataset.shard_of)
    batches = (stream.take(first, first + 4) for first in range(0, 48 * num_epochs, 4))
    for number, (ids, _) in enumerate(dataset.ahead(batches, lambda batch: batch[0])):
        if number:
            before_later(ids)
        for sample, got in zip(ids, dataset.read_many([(sample, np.array([0, 2])) for sample in ids]), strict=True):
            assert got == [frames[sample][0], frames[sample][2]]


def test_shards_come_before_they_are_needed(many, tmp_path, monkeypatch):
    """A reader that takes its time finds every shard but the first ones there, also at the borders of windows."""
    server, frames = many
    with open_cached(server, tmp_path) as dataset:
        source = dataset._parts[0].source
        waited = []
        want = source._want
        monkeypatch.setattr(source, "_want", lambda shard: waited.append(shard) or want(shard))

        def wait(ids: np.ndarray) -> None:
            names, deadline = {source._names[shard] for shard in dataset.shard_of[ids]}, time.monotonic() + 20
            while not names <= {path.stem for path in kept(tmp_path)}:
                assert time.monotonic() < deadline, "nobody fetches what is needed next"
                time.sleep(0.005)

        read_epochs(dataset, frames, 2, wait)
        assert len(set(waited)) == 2  # of 24: the first window's
        assert all(count == 1 for count in tar_requests(server).values())


def test_an_abandoned_pass_fetches_no_more_than_fits(many, tmp_path):
    server, frames = many
    limit = 5 * max(path.stat().st_size for path in (tmp_path / "served" / "data").glob("*.tar"))
    with open_cached(server, tmp_path, cache_bytes=limit) as dataset:
        batches = [(np.arange(first, first + 4),) for first in range(0, 48, 4)]
        next(dataset.ahead(iter(batches), lambda batch: batch[0]))
        settle(dataset)
        time.sleep(0.1)
        settle(dataset)
        assert {int(path[-10:-4]) for path in tar_requests(server)} <= set(range(6))  # in the plan's order
        assert sum(path.stat().st_size for path in kept(tmp_path)) <= limit
        assert dataset.read(47, np.array([1])) == frames[47][1:2]
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("shards-")]


def test_a_second_epoch_gains_although_the_cache_is_smaller_than_the_data(many, tmp_path):
    """Half of the shards fit. In the order of least recent use a new order of the shards would find fewer of them."""
    server, frames = many
    sizes = [path.stat().st_size for path in (tmp_path / "served" / "data").glob("*.tar")]
    with open_cached(server, tmp_path, cache_bytes=12 * max(sizes)) as dataset:
        read_epochs(dataset, frames, 5, lambda ids: settle(dataset))
        settle(dataset)
    downloads = sum(tar_requests(server).values())
    assert downloads <= 24 + 4 * 13  # 24 + 4 * 12 at best; in the order of least recent use 24 + 4 * 19


def test_a_store_that_fails_ahead_fails_the_reader_alone(many, tmp_path):
    """What cannot be fetched ahead is an error only when it is needed."""
    server, _ = many
    server.fault = lambda path, count: status_fault(404) if path.endswith("000020.tar") else None
    with open_cached(server, tmp_path) as dataset:
        batches = [(np.arange(first, first + 4),) for first in range(0, 48, 4)]
        read = []
        with pytest.raises(ShardError, match=r"000020.tar: HTTP status 404"):
            for (ids,) in dataset.ahead(iter(batches), lambda batch: batch[0]):
                dataset.read_many([(sample, np.array([0])) for sample in ids])
                read.append(ids[0])
        assert read == list(range(0, 40, 4))


def test_frames_come_before_their_whole_shard(tmp_path, monkeypatch):
    """The first batches need not wait until the first shards are here. That costs 2 % of a shard at most."""
    monkeypatch.setattr(shards.cached, "PART_BYTES", 0)
    stored = make_dataset(tmp_path / "served" / "data", [100] * 4, videos_per_shard=2, frame_bytes=3000)
    shard_bytes = (tmp_path / "served" / "data" / "000000.tar").stat().st_size
    released = threading.Event()

    def hold_whole_shards(handler, body):
        if len(body) > shard_bytes // 2 and body[257:262] == b"ustar":
            released.wait(20)
        return False

    with serve(tmp_path / "served") as server, open_cached(server, tmp_path, cache_bytes=10**7) as dataset:
        server.fault = lambda path, count: hold_whole_shards
        batch = [(sample, np.array([11, 77])) for sample in (0, 3)]
        before = server.bytes_sent
        assert dataset.read_many(batch) == [[stored[sample][11], stored[sample][77]] for sample in (0, 3)]
        assert server.bytes_sent - before <= 0.02 * 2 * shard_bytes and not released.is_set()
        reading = dataset.start([(0, np.array([5, 50])), (1, np.arange(100))])  # more than that waits for the shard
        released.set()
        assert reading.result() == [[stored[0][5], stored[0][50]], stored[1]]
        settle(dataset)
        assert server.bytes_sent - before <= 1.02 * 2 * shard_bytes


def test_a_shard_larger_than_the_bound_is_fetched_in_many_parts_at_once(tmp_path, monkeypatch):
    """What is on the disk no longer counts as bytes in flight."""
    monkeypatch.setattr(shards.remote, "PART_BYTES", 5000)
    stored = make_dataset(tmp_path / "served" / "data", [50], frame_bytes=3000)
    under_way, most, changed = [0], [0], threading.Condition()

    def count(handler, body):
        with changed:
            under_way[0] += 1
            most.append(under_way[0])
            changed.notify_all()
            changed.wait_for(lambda: under_way[0] >= 2, timeout=0.5)  # no answer to one alone, unless it is the last
            under_way[0] -= 1
        return False

    with serve(tmp_path / "served") as server, open_cached(server, tmp_path, bytes_in_flight=20_000) as dataset:
        server.fault = lambda path, _: count if path.endswith("tar") else None
        assert dataset.read(0, np.array([49])) == [stored[0][49]]
        settle(dataset)
    parts = most[1:]
    assert len(parts) == -(-(tmp_path / "served" / "data" / "000000.tar").stat().st_size // 5000)
    assert max(parts) <= 4 and sum(number >= 2 for number in parts) > len(parts) // 2
