"""Ends a job on every rank soon after one rank fails, and reports the first cause on all of them.

Rank 0 listens; every other rank holds one connection to it. The kernel closes a dead process's connection at once, so a
killed rank is noticed in about a second; a host that is cut off sends nothing any more and is noticed after
`silence_seconds`. A rank whose program fails reports the cause. Rank 0 sends the first cause to all others. Each rank
then ends its process from the watch's thread, because the main thread may wait for minutes in a collective.

Messages are lines of JSON. From a rank: {"hello": secret, "rank": 2, "host": "n1", "pid": 7}, {"beat": 1},
{"fail": cause, "sure": true}, {"bye": 1}. From rank 0: {"beat": 1}, {"end": cause}, {"bye": 1}.
"""

from __future__ import annotations

import json
import os
import secrets
import selectors
import socket
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

from text4vis.cluster import distributed

BEAT_SECONDS = 1.0
CONSEQUENCE_SECONDS = 3.0  # a failed collective becomes the cause if no other failure shows within this time
_JOIN_SECONDS = 10.0
SILENCE = "host or network lost, or the process stopped"


@dataclass(eq=False)
class _Peer:
    """A connection to another rank.

    name: "rank 2 on host n1 (process 7)". last_heard: monotonic time of the last data. unread: start of a message.
    """

    link: socket.socket
    name: str = ""
    last_heard: float = 0.0
    unread: bytes = b""

    def send(self, message: dict[str, object]) -> None:
        try:
            self.link.sendall(json.dumps(message).encode() + b"\n")
        except OSError:
            return  # `receive` notices that the connection has ended

    def receive(self) -> list[dict] | None:
        """New messages; None if the connection has ended or has sent anything but messages."""
        try:
            data = self.link.recv(1 << 16)
        except TimeoutError:
            return []
        except OSError:
            return None
        if not data:
            return None
        self.last_heard = time.monotonic()
        *lines, self.unread = (self.unread + data).split(b"\n")
        try:
            messages = [json.loads(line) for line in lines]
        except ValueError:
            return None
        return messages if all(isinstance(message, dict) for message in messages) else None


class Watch:
    """Watches the job from a thread of its own. on_end(cause) must end this process; it is called once.

    Create it on every rank after `distributed.start`. In a job of one rank there is nothing to watch and no thread.
    """

    def __init__(self, silence_seconds: float, on_end: Callable[[str], None]) -> None:
        self._silence, self._on_end = silence_seconds, on_end
        place = distributed.ranks()
        self._name = f"rank {place.rank} on host {socket.gethostname()}"
        self._failure: tuple[str, bool, float] | None = None
        self._closing = threading.Event()
        self._thread: threading.Thread | None = None
        if place.world_size == 1:
            return
        listener = socket.create_server(("", 0), backlog=place.world_size) if place.is_main else None
        secret, port = distributed.from_main(lambda: (secrets.token_hex(16), listener.getsockname()[1]))  # type: ignore[union-attr]
        if listener is not None:
            target, arguments = self._listen, (listener, secret)
        else:
            link = socket.create_connection((os.environ["MASTER_ADDR"], port), timeout=silence_seconds)
            main = _Peer(link, "rank 0", time.monotonic())
            main.send({"hello": secret, "rank": place.rank, "host": socket.gethostname(), "pid": os.getpid()})
            target, arguments = self._follow, (main,)  # type: ignore[assignment]
        self._thread = threading.Thread(target=target, args=arguments, name="watch", daemon=True)
        self._thread.start()

    def fail(self, cause: str, *, sure: bool = True) -> None:
        """Reports this rank's failure and does not return. sure: False if another rank's end may have caused it."""
        if self._thread is None or not self._thread.is_alive():
            self._on_end(cause)
        self._failure = (f"{self._name}: {cause}", sure, time.monotonic())
        while True:  # the thread ends the process
            time.sleep(1)

    def close(self) -> None:
        """Leaves the watch, because this rank has finished. When rank 0 leaves, the watch ends on all ranks."""
        self._closing.set()
        if self._thread is not None:
            self._thread.join(_JOIN_SECONDS)

    def _listen(self, listener: socket.socket, secret: str) -> None:
        """Rank 0: receives from all others until `close`, or until there is a cause to end the job, which it sends."""
        coordinator = _Coordinator(listener, secret, self._silence)
        next_beat = 0.0
        while not self._closing.is_set():
            coordinator.receive()
            if self._failure:
                coordinator.note_failure(*self._failure)
            now = time.monotonic()
            cause = coordinator.first_cause(now)
            if cause is not None:
                coordinator.broadcast({"end": cause})
                self._on_end(cause)
                return
            if now >= next_beat:
                next_beat = now + BEAT_SECONDS
                coordinator.broadcast({"beat": 1})
        coordinator.broadcast({"bye": 1})

    def _follow(self, main: _Peer) -> None:
        """The other ranks: send beats to rank 0, and end when it says so or is gone."""
        main.link.settimeout(BEAT_SECONDS / 4)
        next_beat, is_reported = 0.0, False
        while True:
            messages = main.receive()
            if messages is None:
                if not self._closing.is_set():
                    self._on_end("rank 0 ended without a word: killed, or out of memory")
                return
            for message in messages:
                if "end" in message:
                    self._on_end(message["end"])
                if "end" in message or "bye" in message:
                    return
            now = time.monotonic()
            if now - main.last_heard > self._silence:
                self._on_end(f"rank 0 has been silent for {self._silence:.0f} s: {SILENCE}")
                return
            if self._failure and not is_reported:
                is_reported = True
                main.send({"fail": self._failure[0], "sure": self._failure[1]})
            if now >= next_beat:
                next_beat = now + BEAT_SECONDS
                main.send({"beat": 1})
            if self._closing.is_set():
                main.send({"bye": 1})
                main.link.close()
                return


class _Coordinator:
    """Rank 0's record of the other ranks: which are connected, when each was last heard, and what failed first."""

    def __init__(self, listener: socket.socket, secret: str, silence_seconds: float) -> None:
        self._secret, self._silence = secret, silence_seconds
        self._members: list[_Peer] = []
        self._cause: str | None = None
        self._possible_cause: tuple[str, float] | None = None
        self._selector = selectors.DefaultSelector()
        self._selector.register(listener, selectors.EVENT_READ)

    def receive(self) -> None:
        """Waits a moment for connections and messages and takes them in."""
        for key, _ in self._selector.select(BEAT_SECONDS / 4):
            if key.data is None:
                link, _address = key.fileobj.accept()  # type: ignore[union-attr]
                link.settimeout(BEAT_SECONDS)
                self._selector.register(link, selectors.EVENT_READ, _Peer(link, last_heard=time.monotonic()))
            else:
                self._receive_from(key.data)

    def _receive_from(self, peer: _Peer) -> None:
        messages = peer.receive()
        for message in messages or ():
            if message.get("hello") == self._secret:
                peer.name = "rank {rank} on host {host} (process {pid})".format(**message)
                self._members.append(peer)
            elif peer not in self._members:  # not a rank of this job
                messages = None
                break
            elif "bye" in message:
                self._members.remove(peer)
            elif "fail" in message:
                self.note_failure(message["fail"], message["sure"], time.monotonic())
        if messages is None:
            self._selector.unregister(peer.link)
            peer.link.close()
            if peer in self._members:
                self._members.remove(peer)
                self._cause = self._cause or f"{peer.name} ended without a word: killed, or out of memory"

    def note_failure(self, cause: str, sure: bool, when: float) -> None:
        if sure:
            self._cause = self._cause or cause
        else:
            self._possible_cause = self._possible_cause or (cause, when)

    def first_cause(self, now: float) -> str | None:
        """The first cause of a failure, once it is known."""
        if self._cause is None:
            silent = next((peer for peer in self._members if now - peer.last_heard > self._silence), None)
            if silent is not None:
                self._cause = f"{silent.name} has been silent for {self._silence:.0f} s: {SILENCE}"
            elif self._possible_cause is not None and now - self._possible_cause[1] > CONSEQUENCE_SECONDS:
                self._cause = self._possible_cause[0]
        return self._cause

    def broadcast(self, message: dict[str, object]) -> None:
        for peer in self._members:
            peer.send(message)
