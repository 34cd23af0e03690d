"""The watch over a job's ranks, with sockets in the place of ranks."""

import json
import socket
import time

import pytest

from text4vis.cluster.watch import CONSEQUENCE_SECONDS, _Chair


@pytest.fixture
def chair():
    with socket.create_server(("127.0.0.1", 0)) as listener:
        chair = _Chair(listener, "secret", 60)
        chair.port = listener.getsockname()[1]
        yield chair


def join(chair, rank: int, secret: str = "secret") -> socket.socket:
    link = socket.create_connection(("127.0.0.1", chair.port))
    say(link, {"hello": secret, "rank": rank, "host": f"n{rank}", "pid": 7})
    return link


def say(link: socket.socket, message: dict) -> None:
    link.sendall(json.dumps(message).encode() + b"\n")


def verdict(chair, later: float = 0) -> str | None:
    for _ in range(8):  # one newcomer at a time
        chair.hear()
    return chair.judge(time.monotonic() + later)


def test_a_rank_that_leaves_is_missed_unless_it_said_goodbye(chair):
    first, second = join(chair, 1), join(chair, 2)
    assert verdict(chair) is None
    say(first, {"bye": 1})
    first.close()
    assert verdict(chair) is None
    second.close()
    assert verdict(chair) == "rank 2 on host n2 (process 7) ended without a word: killed, or out of memory"


def test_silence_ends_the_job_and_a_beat_prevents_it(chair):
    link = join(chair, 1)
    assert verdict(chair) is None
    say(link, {"beat": 1})
    assert verdict(chair, later=50) is None
    silent = "rank 1 on host n1 (process 7) has been silent for 60 s: host or network lost, or the process stopped"
    assert verdict(chair, later=61) == silent


def test_a_failed_collective_waits_for_its_cause(chair):
    first, second = join(chair, 1), join(chair, 2)
    say(first, {"fail": "rank 1: Connection closed by peer", "sure": False})
    assert verdict(chair) is None
    second.close()
    assert "rank 2 on host n2" in (verdict(chair) or "")


def test_a_failed_collective_is_the_cause_when_no_other_shows(chair):
    link = join(chair, 1)
    say(link, {"fail": "rank 1: Timed out", "sure": False})
    assert verdict(chair) is None
    assert verdict(chair, later=CONSEQUENCE_SECONDS + 1) == "rank 1: Timed out"


def test_the_first_cause_stays(chair):
    first, second = join(chair, 1), join(chair, 2)
    say(first, {"fail": "rank 1: no space", "sure": True})
    assert verdict(chair) == "rank 1: no space"
    second.close()
    assert verdict(chair) == "rank 1: no space"


def test_strangers_are_shown_the_door(chair):
    member, stranger = join(chair, 1), join(chair, 2, secret="guess")
    other = socket.create_connection(("127.0.0.1", chair.port))
    other.sendall(b"GET / HTTP/1.1\r\n\r\n")
    third = socket.create_connection(("127.0.0.1", chair.port))
    say(third, {"fail": "ha", "sure": True})
    assert verdict(chair) is None
    for link in (stranger, other, third):
        link.settimeout(5)
        assert link.recv(100) == b""
    chair.tell({"beat": 1})
    assert json.loads(member.recv(100)) == {"beat": 1}
