"""Rows of a far member table: only those in use travel, each once for all processes of a node, and damage heals."""

import errno
import os
from pathlib import Path

import numpy as np
import pytest
from shard_data import hang_up_fault, make_dataset, read_everything, serve, slow_fault

import shards.opening
import shards.reader
import shards.remote
from shards.format import MEMBER_DTYPE, PACKET_DTYPE, SampleError, ShardError
from shards.index import LargeTable
from shards.rows import prepare_rows

COUNTS = [40, 300, 25, 130, 60, 90]


@pytest.fixture(autouse=True)
def _large_table(monkeypatch):
    """What holds for tables above the limit holds here for all; rows of single videos are not joined."""
    monkeypatch.setattr(shards.opening, "WHOLE_TABLE_BYTES", 0)
    monkeypatch.setattr("shards.rows._MAX_GAP_ROWS", 0)
    monkeypatch.setattr(shards.remote, "_BACKOFF_SECONDS", 0.01)


@pytest.fixture
def stored(tmp_path):
    return make_dataset(tmp_path / "served" / "data", COUNTS, frame_bytes=100)


@pytest.fixture
def server(tmp_path, stored):
    with serve(tmp_path / "served") as server:
        yield server


def open_served(server, folder: Path, **options):
    options = {"cache_dir": folder / "cache", "timeout_seconds": 5, **options}
    return shards.reader.open_dataset(f"{server.address}/data", **options)


def row_requests(server) -> int:
    return sum(count for path, count in server.requests.items() if "index/members" in path)


def members_file(folder: Path) -> Path:
    return next((folder / "served" / "data" / "index").glob("members-*.npy"))


def test_only_rows_in_use_travel_and_once(server, stored, tmp_path):
    with open_served(server, tmp_path) as dataset, open_served(server, tmp_path) as neighbour:
        assert row_requests(server) == 0
        before = server.bytes_sent
        assert dataset.frame_sizes(1, np.array([7, 299])) == [(30, 41)] * 2
        assert (row_requests(server), server.bytes_sent - before) == (1, 300 * 16)
        assert dataset.read(1, np.array([250])) == [stored[1][250]]
        assert neighbour.read(1, np.array([3])) == [stored[1][3]]
        assert row_requests(server) == 1
        assert dataset.read_many([(3, np.array([5])), (0, np.array([2]))]) == [[stored[3][5]], [stored[0][2]]]
        assert row_requests(server) == 3
    with open_served(server, tmp_path) as dataset:
        assert read_everything(dataset) == stored
    assert row_requests(server) == 5  # of the three videos that were not in use before; two of them lie together
    local = next((tmp_path / "cache" / "index").glob("*.rows"))
    assert local.read_bytes() == members_file(tmp_path).read_bytes()


def test_a_reader_of_whole_shards_fetches_their_rows_whole(server, stored, tmp_path):
    with open_served(server, tmp_path, cache_bytes=10**7) as dataset:
        assert [dataset.read(sample, np.array([9]))[0] for sample in range(6)] == [video[9] for video in stored]
    assert row_requests(server) == 2


def test_rows_of_coming_batches_are_fetched_at_once(server, stored, tmp_path):
    server.fault = lambda path, count: slow_fault(0.2) if "members" in path else None
    with open_served(server, tmp_path) as dataset:
        batches = [np.array([sample]) for sample in (4, 0, 3, 1)]
        coming = dataset.ahead(iter(batches), lambda batch: batch)
        assert next(coming).tolist() == [4]
        assert dataset.frame_sizes(4, np.array([0])) == [(30, 44)]  # by then the other rows are on their way
        assert row_requests(server) == 4
        assert [batch.tolist() for batch in coming] == [[0], [3], [1]]
        assert [dataset.read(int(batch[0]), np.array([1]))[0] for batch in batches] == [
            stored[n][1] for n in (4, 0, 3, 1)
        ]
        assert row_requests(server) == 4


def test_rows_pass_frames_that_wait_for_room(server, stored, tmp_path):
    """Else the one thread of a loader, which begins a batch before it takes the one before, would wait for itself."""
    with open_served(server, tmp_path, bytes_in_flight=1, requests_in_flight=1) as dataset:
        readings = [dataset.start([(sample, np.arange(3) * 8)]) for sample in range(len(COUNTS))]
        for sample, reading in enumerate(readings):
            assert reading.result() == [[stored[sample][frame] for frame in (0, 8, 16)]]


def test_faults_on_the_way_are_tried_again(server, stored, tmp_path):
    server.fault = lambda path, count: hang_up_fault if "members" in path and count % 2 else None
    with open_served(server, tmp_path) as dataset:
        assert read_everything(dataset) == stored


def test_what_is_missing_or_damaged_locally_is_fetched_again(server, stored, tmp_path):
    with open_served(server, tmp_path) as dataset:
        assert read_everything(dataset) == stored
    local = next((tmp_path / "cache" / "index").glob("*.rows"))
    sound = local.read_bytes()
    middle = len(sound) - (sum(COUNTS[1:]) - 100) * 16  # of the rows of video 1
    for damage in (bytes(160), b"\x07" * 160):
        local.write_bytes(sound[:middle] + damage + sound[middle + 160 :])
        before = row_requests(server)
        with open_served(server, tmp_path) as dataset:
            assert read_everything(dataset) == stored
        assert local.read_bytes() == sound
        assert row_requests(server) == before + 1
    local.write_bytes(bytes(len(sound)))
    with open_served(server, tmp_path) as dataset:
        assert read_everything(dataset) == stored


def test_what_is_cut_off_locally_in_use_is_fetched_again(server, stored, tmp_path):
    with open_served(server, tmp_path) as dataset:
        assert read_everything(dataset) == stored
        local = next((tmp_path / "cache" / "index").glob("*.rows"))
        sound = local.read_bytes()
        os.truncate(local, len(sound) // 2)
        assert read_everything(dataset) == stored
    assert local.read_bytes() == sound


def test_damage_in_the_store_is_that_of_one_video(server, stored, tmp_path):
    far = members_file(tmp_path)
    sound = far.read_bytes()
    place = len(sound) - (sum(COUNTS[1:]) - 5) * 16 + 8  # the checksum of frame 5 of video 1
    far.write_bytes(sound[:place] + b"\0\1\2\3" + sound[place + 4 :])
    with open_served(server, tmp_path) as dataset:
        with pytest.raises(SampleError, match=r"/data/index/members-.*: the rows 40 to 339 are damaged; upload"):
            dataset.read(1, np.array([0]))
        assert dataset.read(2, np.array([24])) == [stored[2][24]]
        far.write_bytes(sound)
        assert read_everything(dataset) == stored
    far.write_bytes(sound[:-16])
    with (
        open_served(server, tmp_path, cache_dir=tmp_path / "other") as dataset,
        pytest.raises(ShardError, match=r"members-.*: has \d+ bytes, the manifest says \d+"),
    ):
        dataset.read(0, np.array([0]))


def test_a_server_without_ranges_sends_the_whole_table(server, stored, tmp_path):
    server.ranges = False
    with open_served(server, tmp_path, cache_bytes=10**7) as dataset:
        assert read_everything(dataset) == stored


def test_a_full_disk_is_named(server, tmp_path, monkeypatch):
    with open_served(server, tmp_path) as dataset:

        def full(*_: object) -> int:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        monkeypatch.setattr(shards.remote.os, "pwrite", full)
        with pytest.raises(ShardError, match=r"cache/index: the index of http.* cannot be kept here: No space left"):
            dataset.read(0, np.array([0]))


def test_an_index_that_is_here_whole_is_used(server, stored, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(shards.opening, "WHOLE_TABLE_BYTES", 1 << 20)
        open_served(server, tmp_path).close()
    before = row_requests(server)
    with open_served(server, tmp_path) as dataset:
        assert read_everything(dataset) == stored
    assert row_requests(server) == before


def test_rows_pass_ranges_of_shards_on_their_way(server, stored, tmp_path, monkeypatch):
    """With whole shards too no reader waits for itself, however small the bound."""
    monkeypatch.setattr("shards.cached.PART_BYTES", 0)
    monkeypatch.setattr("shards.cached._MEANWHILE_SHARE", 1.0)
    options = {"cache_bytes": 10**7, "bytes_in_flight": 1, "requests_in_flight": 1}
    with open_served(server, tmp_path, **options) as dataset:
        readings = [dataset.start([(sample, np.arange(3) * 8)]) for sample in (0, 3, 1, 4, 2, 5)]
        for sample, reading in zip((0, 3, 1, 4, 2, 5), readings, strict=True):
            assert reading.result() == [[stored[sample][frame] for frame in (0, 8, 16)]]


@pytest.mark.parametrize("dtype", [MEMBER_DTYPE, PACKET_DTYPE], ids=["members", "packets"])
def test_the_local_file_is_open_to_all_and_has_the_size_of_the_far_one(tmp_path, dtype):
    path = tmp_path / "new" / "folder" / "members.rows"
    np.save(tmp_path / "far.npy", np.zeros(1000, dtype))
    far = (tmp_path / "far.npy").read_bytes()
    before = os.umask(0)
    try:
        for _ in range(2):
            prepare_rows("far", len(far), dtype, path)
    finally:
        os.umask(before)
    assert path.read_bytes() == far and path.stat().st_mode & 0o777 == 0o666
    for size in (10, len(far) - 1, len(far) + 8):
        with pytest.raises(ShardError, match=f"far: no index table has {size} bytes"):
            prepare_rows("far", size, dtype, path)
    assert not open_below(tmp_path)


def open_below(folder: Path) -> list[str]:
    """Files in a folder that this process has open."""
    return [
        name for file in Path("/proc/self/fd").iterdir() if (name := os.path.realpath(file)).startswith(str(folder))
    ]


def test_rows_are_checked_once_and_their_file_is_closed(server, stored, tmp_path, monkeypatch):
    checked = []
    is_sound = LargeTable.is_sound
    monkeypatch.setattr(LargeTable, "is_sound", lambda table, video: (checked.append(video), is_sound(table, video))[1])
    with open_served(server, tmp_path) as dataset:
        for _ in range(3):
            assert dataset.read(1, np.array([3])) == [stored[1][3]]
        (rows,) = dataset._parts[0].index.far
        num_open = len(open_below(tmp_path / "cache"))
    assert checked == [1] and len(open_below(tmp_path / "cache")) == num_open - 1
    rows.close()
    os.fstat(1)  # closing it twice closes nothing else
