"""Progress as a terminal and a log see it."""

import io
import re

import pytest

from text4vis.common import progress
from text4vis.common.progress import Progress, track


class Screen(io.StringIO):
    def __init__(self, is_terminal: bool) -> None:
        super().__init__()
        self.is_terminal = is_terminal

    def isatty(self) -> bool:
        return self.is_terminal


class Clock:
    """A clock that moves when it is told to."""

    def __init__(self) -> None:
        self.now = 100.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(progress, "time", clock)
    return clock


def screen(monkeypatch, *, is_terminal: bool) -> Screen:
    made = Screen(is_terminal)
    monkeypatch.setattr("sys.stderr", made)
    return made


def test_a_terminal_sees_a_bar_with_rate_and_remaining_time(monkeypatch):
    shown = screen(monkeypatch, is_terminal=True)
    assert list(track(range(3), "reading", unit="file")) == [0, 1, 2]
    last = shown.getvalue().split("\r")[-1]
    assert last.startswith("reading: 100%|") and re.search(r"3/3 \[\d\d:\d\d<\d\d:\d\d, .*file/s\]\n$", last)


def test_a_log_sees_nothing_of_short_work_and_a_line_a_minute_of_long(monkeypatch, clock):
    shown = screen(monkeypatch, is_terminal=False)
    with Progress("reading", 200) as bar:
        for _ in range(150):
            clock.now += 1
            bar.update(note="5 MB")
    lines = shown.getvalue().splitlines()
    assert [line.split("[")[0] for line in lines] == ["reading:  30% 60/200 ", "reading:  60% 120/200 "]
    assert "01:00<02:20" in lines[0] and "video/s" in lines[0] and "5 MB" in lines[0]
    assert not re.search(r"[\r\x1b]", shown.getvalue())


@pytest.mark.parametrize("is_terminal", [True, False])
def test_quiet_is_quiet(monkeypatch, clock, is_terminal):
    shown = screen(monkeypatch, is_terminal=is_terminal)
    for _ in track(range(3), quiet=True):
        clock.now += 100
    assert shown.getvalue() == ""
