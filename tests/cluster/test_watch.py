"""The watch over a job's ranks; sockets take the place of ranks."""

import json
import socket
import time

import pytest

from text4vis.cluster.watch import CONSEQUENCE_SECONDS, _Coordinator


@pytest.fixture
def coordinator():
    with socket.create_server(("127.0.0.1", 0)) as listener:
        coordinator = _Coordinator(listener, "secret", 60)
        coordinator.port = listener.getsockname()[1]
        yield coordinator


def join(coordinator, rank: int, secret: str = "secret") -> socket.socket:
    link = socket.create_connection(("127.0.0.1", coordinator.port))
    say(link, {"hello": secret, "rank": rank, "host": f"n{rank}", "pid": 7})
    return link


def say(link: socket.socket, message: dict) -> None:
    link.sendall(json.dumps(message).encode() + b"\n")


def verdict(coordinator, later: float = 0) -> str | None:
    for _ in range(8):  # one newcomer at a time
        coordinator.receive()
    return coordinator.first_cause(time.monotonic() + later)


@pytest.mark.slow
def test_a_rank_that_leaves_is_missed_unless_it_said_goodbye(coordinator):
    first, second = join(coordinator, 1), join(coordinator, 2)
    assert verdict(coordinator) is None
    say(first, {"bye": 1})
    first.close()
    assert verdict(coordinator) is None
    second.close()
    assert verdict(coordinator) == "rank 2 on host n2 (process 7) ended without a word: killed, or out of memory"


@pytest.mark.slow
def test_silence_ends_the_job_and_a_beat_prevents_it(coordinator):
    link = join(coordinator, 1)
    assert verdict(coordinator) is None
    say(link, {"beat": 1})
    assert verdict(coordinator, later=50) is None
    silent = "rank 1 on host n1 (process 7) has been silent for 60 s: host or network lost, or the process stopped"
    assert verdict(coordinator, later=61) == silent


@pytest.mark.slow
def test_a_failed_collective_waits_for_its_cause(coordinator):
    first, second = join(coordinator, 1), join(coordinator, 2)
    say(first, {"fail": "rank 1: Connection closed by peer", "sure": False})
    assert verdict(coordinator) is None
    second.close()
    assert "rank 2 on host n2" in (verdict(coordinator) or "")


@pytest.mark.slow
def test_a_failed_collective_is_the_cause_when_no_other_shows(coordinator):
    link = join(coordinator, 1)
    say(link, {"fail": "rank 1: Timed out", "sure": False})
    assert verdict(coordinator) is None
    assert verdict(coordinator, later=CONSEQUENCE_SECONDS + 1) == "rank 1: Timed out"


@pytest.mark.slow
def test_the_first_cause_stays(coordinator):
    first, second = join(coordinator, 1), join(coordinator, 2)
    say(first, {"fail": "rank 1: no space", "sure": True})
    assert verdict(coordinator) == "rank 1: no space"
    second.close()
    assert verdict(coordinator) == "rank 1: no space"


def test_connections_without_the_secret_are_closed(coordinator):
    member, stranger = join(coordinator, 1), join(coordinator, 2, secret="guess")
    other = socket.create_connection(("127.0.0.1", coordinator.port))
    other.sendall(b"GET / HTTP/1.1\r\n\r\n")
    third = socket.create_connection(("127.0.0.1", coordinator.port))
    say(third, {"fail": "ha", "sure": True})
    assert verdict(coordinator) is None
    for link in (stranger, other, third):
        link.settimeout(5)
        assert link.recv(100) == b""
    coordinator.broadcast({"beat": 1})
    assert json.loads(member.recv(100)) == {"beat": 1}
