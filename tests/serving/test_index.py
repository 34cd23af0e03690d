"""An index holds every window of every video once, whoever builds it and whatever is killed; it is safe to open."""

import errno
import json
import os
import random
import re
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from launch import Rank, finish, start_rank
from stub_index import StubEmbed, build, settings, vectors, write_stub

from text4vis.serving import index_store
from text4vis.serving.index_store import SearchError, adding, read_catalogue, tidy
from text4vis.serving.search import SearchIndex


@pytest.fixture
def files(tmp_path) -> Path:
    """Five stubs of 1 to 5 windows."""
    folder = tmp_path / "files"
    folder.mkdir()
    for number in range(5):
        write_stub(folder / f"{number}.mp4", number, number + 1)
    return folder


def check_vectors(folder: Path, expected: dict[str, tuple[int, int]], dims: int = 8) -> None:
    """Every file's windows, by its name: those of its seed, in order; nothing else."""
    catalogue = read_catalogue(folder)
    assert sorted(Path(path).name for path in catalogue.videos) == sorted(expected)
    for path, video in catalogue.videos.items():
        wanted = vectors(*expected[Path(path).name], dims).astype(np.float16)
        np.testing.assert_array_equal(catalogue.vectors(video), wanted)


ALL = {f"{number}.mp4": (number, number + 1) for number in range(5)}


def test_the_next_call_embeds_what_is_new_or_changed(files, tmp_path):
    embed = StubEmbed()
    report = build(tmp_path / "index", files, embed)
    assert (report.new, report.videos, report.windows, report.broken, report.gone) == (5, 5, 15, {}, [])
    check_vectors(tmp_path / "index", ALL)
    assert build(tmp_path / "index", files, embed).new == 0 and len(embed.asked) == 5
    write_stub(files / "5.mp4", 5, 2)
    write_stub(files / "0.mp4", 10, 1)  # as long as before
    os.utime(files / "0.mp4", ns=(1, 1))
    os.utime(files / "1.mp4", ns=(1, 1))  # the same content
    (files / "2.mp4").rename(files / "moved.mp4")
    report = build(tmp_path / "index", files, embed)
    assert sorted(embed.asked[5:]) == ["0.mp4", "5.mp4"]
    assert (report.new, report.videos, report.gone) == (2, 7, [str(files / "2.mp4")])
    check_vectors(tmp_path / "index", {**ALL, "5.mp4": (5, 2), "0.mp4": (10, 1), "moved.mp4": (2, 3)})


def test_a_file_that_becomes_what_it_was_is_found_as_it_is(files, tmp_path):
    for seed in (7, 0, 7, 0):
        write_stub(files / "0.mp4", seed, 1)
        os.utime(files / "0.mp4", ns=(seed, seed))
        build(tmp_path / "index", files)
        check_vectors(tmp_path / "index", {**ALL, "0.mp4": (seed, 1)})


def test_broken_and_missing_files_are_named_each_time_and_read_once(files, tmp_path):
    (files / "3.mp4").write_text("none")
    embed = StubEmbed()
    listed = [*map(str, files.iterdir()), str(tmp_path / "nothing.mp4")]
    for _ in range(2):
        report = build(tmp_path / "index", listed, embed)
        assert report.broken == {
            str(tmp_path / "nothing.mp4"): f"{tmp_path / 'nothing.mp4'}: no such file",
            str(files / "3.mp4"): f"{files / '3.mp4'}: no stub",
        }
        assert len(embed.asked) == 5 and report.videos == 4
    write_stub(files / "3.mp4", 3, 4)
    assert build(tmp_path / "index", files, embed).broken == {}
    check_vectors(tmp_path / "index", ALL)


def test_files_that_are_gone_stay_until_they_are_to_be_removed(files, tmp_path):
    build(tmp_path / "index", files)
    (files / "1.mp4").unlink()
    (files / "4.mp4").unlink()
    gone = [str(files / "1.mp4"), str(files / "4.mp4")]
    for _ in range(2):
        report = build(tmp_path / "index", files)
        assert (report.gone, report.removed, report.videos) == (gone, False, 5)
    report = build(tmp_path / "index", files, remove_gone=True)
    assert (report.gone, report.removed, report.videos, report.windows) == (gone, True, 3, 8)
    assert read_catalogue(tmp_path / "index").num_dead == 0
    write_stub(files / "4.mp4", 4, 5)  # it comes back
    assert build(tmp_path / "index", files).new == 1
    check_vectors(tmp_path / "index", {name: ALL[name] for name in ALL if name != "1.mp4"})


def test_vectors_that_the_disk_lost_are_embedded_again(files, tmp_path, monkeypatch):
    """The synchronisation of the vectors fails once, and what was written is gone."""
    synchronise, failed = os.fsync, list[Path]()

    def lose_once(descriptor: int) -> None:
        path = Path(f"/proc/self/fd/{descriptor}").readlink()
        if path.suffix == ".f16" and not failed:
            failed.append(path)
            os.truncate(path, 0)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        synchronise(descriptor)

    monkeypatch.setattr(os, "fsync", lose_once)
    with pytest.raises(SearchError, match=r"\.f16: No space left on device; .* give the same command again"):
        build(tmp_path / "index", files)
    assert failed
    build(tmp_path / "index", files)
    check_vectors(tmp_path / "index", ALL)


def test_files_are_known_by_whatever_name_they_have(tmp_path):
    folder = tmp_path / "files"
    folder.mkdir()
    names = [b"a\nb.mp4", b"\x1b[31mred.mp4", b"\xff\xfe.mp4", "ü|#1.mp4".encode(), b" .mp4", b'"{}.mp4']
    for number, name in enumerate(names):
        write_stub(folder / os.fsdecode(name), number, 2)
    expected = {os.fsdecode(name): (number, 2) for number, name in enumerate(names)}
    for new in (len(names), 0):
        assert build(tmp_path / "index", folder).new == new
        check_vectors(tmp_path / "index", expected)


def test_another_model_or_other_windows_are_refused(files, tmp_path):
    build(tmp_path / "index", files)
    for changed, message in (
        (settings(model={"weights": "b"}), r"another model \(other weights\).*another --output"),
        (settings(window=5.0), "windows of 4 s every 2 s, not of 5 s every 2 s; leave --window"),
    ):
        with pytest.raises(SearchError, match=message):
            build(tmp_path / "index", files, settings=changed)
    check_vectors(tmp_path / "index", ALL)


def test_an_index_of_many_parts_or_dead_rows_is_tidied_when_nobody_adds_to_it(files, tmp_path, monkeypatch):
    monkeypatch.setattr(index_store, "_MOST_PARTS", 3)
    index = tmp_path / "index"
    numbers = []
    for number in range(7):
        write_stub(files / f"more{number}.mp4", 100 + number, 2)
        build(index, files)
        numbers.append(len(read_catalogue(index).parts))
    assert numbers == [1, 2, 3, 1, 2, 3, 1]
    with adding(index):
        assert not tidy(index)
    before = read_catalogue(index)  # a reader that opened the index earlier
    (index / "vectors" / f"{'0' * 32}.f16").write_bytes(b"left by a killed process")
    assert tidy(index, [str(files / "0.mp4")])
    assert len(list((index / "vectors").iterdir())) == 1
    expected = ALL | {f"more{number}.mp4": (100 + number, 2) for number in range(7)}
    assert before.vectors(before.videos[str(files / "0.mp4")]).shape == (1, 8)
    check_vectors(index, {name: one for name, one in expected.items() if name != "0.mp4"})


def start_builder(index: Path, files: Path, rank: int, pause: float, dims: int) -> Rank:
    options = ["--files", files, "--output", index, "--pause", pause, "--dims", dims]
    return start_rank("tests/support/stub_index.py", *options, variables={"RANK": rank, "WORLD_SIZE": 2})


def build_with_kills(index: Path, files: Path, kills: int, pause: float, wait: float, dims: int = 8) -> None:
    """Builds an index by two processes, of which one is killed at a random time and begun anew, `kills` times."""
    draw = random.Random(0)
    running = [start_builder(index, files, rank, pause, dims) for rank in range(2)]
    for _ in range(kills):
        time.sleep(draw.uniform(0, wait))
        victim = draw.randrange(2)
        running[victim].kill()
        running[victim].wait()
        running[victim] = start_builder(index, files, victim, pause, dims)
    results = finish(running)
    assert [code for code, _ in results] == [0, 0], results


def check_each_once(index: Path, count: int) -> None:
    lines = [json.loads(line) for line in (index / "videos.jsonl").read_text().splitlines()[1:]]
    assert set(Counter(line["path"] for line in lines).values()) == {1} and len(lines) == count
    rows = {(line["part"], line["row"] + window) for line in lines for window in range(line["windows"])}
    assert len(rows) == sum(line["windows"] for line in lines)


LINE = 2  # of videos.jsonl: the first video


@pytest.mark.parametrize(("values", "message"), [
    ({"part": "../../secret"}, "names no vectors"), ({"part": "f" * 32 + ".f16"}, "not found; copy the whole index"),
    ({"row": 1000}, "its vectors end at row 1001"), ({"row": -1}, "is damaged"), ({"row": True}, "is damaged"),
    ({"windows": 2}, "2 windows, but 4 s have 1"), ({"windows": 1 << 60}, "is damaged"),
    ({"seconds": float("inf")}, "is damaged"), ({"seconds": 1e9}, "1 windows, but 1e"), ({"path": 3}, "names no file"),
    ({"digest": None}, "is damaged"), ("[" * 100_000, "no JSON object"), ("{}", "names no file"),
    ("\x00" * (1 << 21), "no JSON object"),
])  # fmt: skip
def test_a_damaged_or_hostile_line_is_named(files, tmp_path, values, message):
    build(tmp_path / "index", files)
    path = tmp_path / "index" / "videos.jsonl"
    lines = path.read_text().splitlines()
    lines[LINE - 1] = values if isinstance(values, str) else json.dumps(json.loads(lines[LINE - 1]) | values)
    path.write_text("\n".join(lines) + "\n")
    with pytest.raises(SearchError, match=message) as caught:
        read_catalogue(tmp_path / "index")
    assert "videos.jsonl:2" in str(caught.value) or "not found" in message


@pytest.mark.parametrize("settings", [
    {"format": 2}, {"dims": 0}, {"dims": 10**9}, {"window": 0}, {"stride": 1e-300}, {"stride": "x"}, {"model": 1},
])  # fmt: skip
def test_damaged_settings_are_refused(files, tmp_path, settings):
    build(tmp_path / "index", files)
    path = tmp_path / "index" / "videos.jsonl"
    header, *lines = path.read_text().splitlines()
    path.write_text("\n".join([json.dumps({"settings": json.loads(header)["settings"] | settings}), *lines]) + "\n")
    with pytest.raises(SearchError, match=r"videos.jsonl: (no search index|its settings are damaged)"):
        read_catalogue(tmp_path / "index")


def test_vectors_of_two_videos_are_not_the_same(files, tmp_path):
    build(tmp_path / "index", files)
    path = tmp_path / "index" / "videos.jsonl"
    path.write_text(re.sub(r'"row": 1,', '"row": 0,', path.read_text()))
    with pytest.raises(SearchError, match="two videos have the same vectors"):
        SearchIndex.open(tmp_path / "index")


@pytest.mark.slow
def test_two_processes_of_which_some_are_killed_lose_nothing_and_do_nothing_twice(tmp_path, monkeypatch):
    files = tmp_path / "files"
    files.mkdir()
    expected = {f"{number}.mp4": (number, 1 + number % 4) for number in range(400)}
    for name, (seed, windows) in expected.items():
        write_stub(files / name, seed, windows)
    build_with_kills(tmp_path / "index", files, kills=2, pause=0.01, wait=1.0)
    check_each_once(tmp_path / "index", len(expected))
    check_vectors(tmp_path / "index", expected)


@pytest.mark.long
def test_a_hundred_thousand_windows_by_two_processes_with_kills(tmp_path):
    files = tmp_path / "files"
    files.mkdir()
    expected = {f"{number}.mp4": (number, 1 + number % 20) for number in range(9600)}
    for name, (seed, windows) in expected.items():
        write_stub(files / name, seed, windows)
    assert sum(windows for _, windows in expected.values()) > 100_000
    build_with_kills(tmp_path / "index", files, kills=12, pause=0.001, wait=8.0, dims=512)
    check_each_once(tmp_path / "index", len(expected))
    check_vectors(tmp_path / "index", expected, dims=512)
