"""A short run of tests/support/soak_store.py: every kind of fault, no wrong batch, nothing left open."""

import gc
import threading
import time

import pytest
from shard_data import serve
from soak_store import FAULTS, Soak, Weather, make_data, open_files, small_limits

import shards.remote


def held() -> tuple[list[str], int]:
    gc.collect()
    return open_files(), threading.active_count()


@pytest.mark.slow
def test_a_failing_store_gives_right_batches_and_leaves_nothing_open(tmp_path, monkeypatch):
    monkeypatch.setattr(shards.remote, "_BACKOFF_SECONDS", 0.01)
    make_data(tmp_path, num_frame_videos=24, num_videos=4)
    weather = Weather(share=0.1, burst_requests=20, calm_requests=80, most_in_a_row=2, pause_seconds=0.0)

    def run(name: str, rounds: int) -> tuple[int, list[str], float]:
        with serve(tmp_path / "served") as server, small_limits():
            server.fault = lambda path, count: weather.answer
            soak = Soak(tmp_path / "served", server.address, tmp_path / name)
            for _ in range(rounds):
                soak.round()
            soak.look(0)
            soak.close()
        return soak.batches, soak.wrong, soak.looks[-1][1]["tasks"]

    run("first", 1)  # what libraries keep open from their first use on
    before = held()
    assert run("second", 12) == (48, [], 0)
    deadline = time.monotonic() + 20
    while held() != before and time.monotonic() < deadline:  # the server's threads end when they notice
        time.sleep(0.05)
    assert held() == before
    assert all(weather.counts[name] for name in FAULTS)
