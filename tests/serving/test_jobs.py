"""Work that processes share: each item once, whole records, whatever is killed and however many go on."""

import errno
import fcntl
import json
import os
import random
import subprocess
import sys
import time
from pathlib import Path

import pytest

from text4vis.serving.jobs import WorkList, WorkListError

SETTINGS = {"model": "a", "top": 5}


def open_list(path: Path, items, settings=SETTINGS) -> WorkList:
    return WorkList(path, items, settings, key="video")


def records_of(path: Path) -> list[dict]:
    """All records; the first line holds the settings."""
    text = path.read_text()
    assert text.endswith("\n")
    header, *records = [json.loads(line) for line in text.splitlines()]
    assert header == {"settings": SETTINGS}
    return records


def test_each_item_once_in_one_process(tmp_path):
    with open_list(tmp_path / "a.jsonl", ["x", "y", "x", "z"]) as work:
        for video in work.claim():
            work.append([{"video": video, "note": "ü\n"}])
        assert work.num_done == 3 and list(work.claim()) == []
    assert records_of(tmp_path / "a.jsonl") == [{"video": video, "note": "ü\n"} for video in "xyz"]
    with open_list(tmp_path / "a.jsonl", ["w", "z"]) as work:  # another list: only what is new
        assert work.num_done == 1 and list(work.claim()) == ["w"]


def test_who_is_done_waits_for_the_others_and_takes_over_from_the_killed(tmp_path, monkeypatch):
    path, done = tmp_path / "a.jsonl", []
    with open_list(path, "xyz") as one:
        other = open_list(path, "xyz")
        claims = other.claim()
        assert [next(claims), next(claims)] == ["x", "y"]
        events = [lambda: other.append([{"video": "x"}]), other.close]  # an end of the process closes the file, too
        monkeypatch.setattr(time, "sleep", lambda _: events.pop(0)())
        while one.is_unfinished():
            for video in one.claim():
                done.append(video)
                one.append([{"video": video}])
    assert done == ["z", "y"] and not events
    assert [record["video"] for record in records_of(path)] == ["z", "x", "y"]


def test_failed_items_are_done_and_counted(tmp_path):
    with open_list(tmp_path / "a.jsonl", "xy") as work:
        work.append([{"video": "x", "error": "gone"}, {"video": "y"}])
        assert (work.num_done, work.num_failed) == (2, 1)
    with open_list(tmp_path / "a.jsonl", "xyz") as work:
        assert (work.num_done, work.num_failed, list(work.claim())) == (2, 1, ["z"])
    with open_list(tmp_path / "a.jsonl", "yz") as work:
        assert (work.num_done, work.num_failed) == (1, 0)


def test_what_one_claims_no_other_gets_until_it_is_done_or_given_up(tmp_path):
    path, items = tmp_path / "a.jsonl", [f"v{number}" for number in range(8)]
    with open_list(path, items) as one, open_list(path, items) as other:
        mine, theirs = one.claim(0, 2), other.claim(1, 2)
        assert [next(mine), next(theirs)] == ["v0", "v4"], "each begins with its own part"
        taken = [next(mine), *theirs]
        assert taken == ["v1", "v5", "v6", "v7", "v2", "v3"], "who is done with its part helps the others"
        assert list(mine) == []
        other.append([{"video": "v4"}])
        other.close()
        with open_list(path, items) as third:
            assert list(third.claim()) == ["v2", "v3", "v5", "v6", "v7"]
        one.append([{"video": "v0"}, {"video": "v4"}])
    assert sorted(record["video"] for record in records_of(path)) == ["v0", "v4"], "v4 has its record already"


WORKER = """
import sys, time
from text4vis.serving.jobs import WorkList
path, rank, world_size = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
items = [f"video {number}" for number in range(300)]
with WorkList(path, items, {"model": "a", "top": 5}, key="video") as work:
    held = []
    print("started", flush=True)
    sys.stdin.readline()
    for item in work.claim(rank, world_size):
        print(item, flush=True)
        held.append({"video": item, "pad": "x" * 3000})
        time.sleep(0.001)
        if len(held) == 3:
            work.append(held)
            held = []
    work.append(held)
"""


def start_workers(path: Path, count: int) -> list[subprocess.Popen]:
    """They begin to work at the same time, when all have started."""
    command = [sys.executable, "-c", WORKER, str(path)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    workers = [subprocess.Popen([*command, str(rank), str(count)], **pipes) for rank in range(count)]
    for worker in workers:
        assert worker.stdout.readline() == "started\n"
    for worker in workers:
        worker.stdin.write("\n")
        worker.stdin.flush()
    return workers


def test_kills_at_any_moment_and_other_numbers_of_processes(tmp_path):
    path, rng = tmp_path / "a.jsonl", random.Random(0)
    for count in (2, 3, 1):
        for worker in start_workers(path, count):
            for _ in range(rng.randint(5, 30)):
                worker.stdout.readline()
            worker.kill()
            worker.communicate()
    with path.open("ab") as file:
        file.write(b'{"video": "video 7", "pad": "xx')  # a kill within a write
    before = {record["video"] for record in map(json.loads, path.read_text().splitlines()[1:-1])}
    worked_on = [worker.communicate(timeout=60)[0].splitlines() for worker in start_workers(path, 2)]
    assert 0 < len(before) < 300
    assert len(before) + sum(map(len, worked_on)) == len(before.union(*worked_on)) == 300, "work was done twice"
    records = records_of(path)
    assert sorted(record["video"] for record in records) == sorted(f"video {number}" for number in range(300))
    assert {len(record["pad"]) for record in records} == {3000}


@pytest.mark.parametrize("left", [b"", b'{"sett', b'{"settings": {"model": "a", "top": 5}}'])
def test_a_kill_before_the_settings_are_written(tmp_path, left):
    path = tmp_path / "a.jsonl"
    path.write_bytes(left)
    with open_list(path, ["x"]) as work:
        work.append([{"video": "x"}])
    assert records_of(path) == [{"video": "x"}]


def test_other_settings_are_refused_and_named(tmp_path):
    path = tmp_path / "a.jsonl"
    open_list(path, ["x"]).close()
    before = path.read_bytes()
    with pytest.raises(
        WorkListError, match=r'a\.jsonl: holds records of other settings \(labels: null, now \["c"\]\); '
    ):
        open_list(path, ["x"], {"model": "a", "top": 5, "labels": ("c",)})
    with pytest.raises(WorkListError, match=r"top: 5, now 3\); name another file"):
        open_list(path, ["x"], SETTINGS | {"top": 3})
    assert path.read_bytes() == before


@pytest.mark.parametrize(("content", "message"), [
    ("hello", r"a\.jsonl: no work list; name another file"),
    ("hello\n", r"a\.jsonl:1: not a JSON object"),
    ('{"video": "x"}\n', r"a\.jsonl:1: no settings, so this is no work list; name another file"),
    ('{"settings": {"model": "a", "top": 5}}\n[1]\n', r"a\.jsonl:2: not a JSON object; delete the line"),
    ('{"settings": {"model": "a", "top": 5}}\n{"image": "x"}\n', r"a\.jsonl:2: no field 'video'"),
    ('{"settings": {"model": "a", "top": 5}}\n{"video": "x"}\n\0\0\n', r"a\.jsonl:3: not a JSON object"),
])  # fmt: skip
def test_files_that_hold_something_else_stay_as_they_are(tmp_path, content, message):
    path = tmp_path / "a.jsonl"
    path.write_text(content)
    with pytest.raises(WorkListError, match=message):
        open_list(path, ["x"])
    assert path.read_text() == content


def test_a_file_system_without_locks_is_named(tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "fcntl", refuse)
    with pytest.raises(WorkListError, match=r"a\.jsonl: cannot be locked \(No locks available\)"):
        open_list(tmp_path / "a.jsonl", ["x"])
