"""Ends a job on every rank soon after one of its ranks fails, and says everywhere what failed first.

Rank 0 listens; every other rank holds one connection to it. The kernel closes a dead process's connection at once, so a
killed rank is noticed in about a second; a host that is cut off sends nothing any more and is noticed after
`silence_seconds`. A rank that fails by itself says why before it ends. Rank 0 tells all others the first cause, and
each ends its process, whatever its main thread waits for: a collective with a dead rank may wait for minutes.

Messages are lines of JSON. From a rank: {"hello": secret, "rank": 2, "host": "n1", "pid": 7}, {"beat": 1},
{"fail": cause, "sure": true}, {"bye": 1}. From rank 0: {"beat": 1}, {"end": cause}, {"bye": 1}.
Imports distributed only.
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
CONSEQUENCE_SECONDS = 3.0  # how long a failed collective waits for its cause to show
_JOIN_SECONDS = 10.0
SILENCE = "host or network lost, or the process stopped"


@dataclass(eq=False)
class _Peer:
    """A connection, and who is at its other end. who: "rank 2 on host n1 (process 7)"."""

    link: socket.socket
    who: str = ""
    heard: float = 0.0
    unread: bytes = b""

    def send(self, message: dict[str, object]) -> None:
        try:
            self.link.sendall(json.dumps(message).encode() + b"\n")
        except OSError:
            return  # its end shows when it is read

    def receive(self) -> list[dict] | None:
        """New messages; None when the connection has ended, or says what no rank would say."""
        try:
            data = self.link.recv(1 << 16)
        except TimeoutError:
            return []
        except OSError:
            return None
        if not data:
            return None
        self.heard = time.monotonic()
        *lines, self.unread = (self.unread + data).split(b"\n")
        try:
            messages = [json.loads(line) for line in lines]
        except ValueError:
            return None
        return messages if all(isinstance(message, dict) for message in messages) else None


class Watch:
    """Watches over the job from its own thread. on_end(cause) must end this process; it is called once.

    Make it on every rank after `distributed.start`; it is silent for a job of one rank.
    """

    def __init__(self, silence_seconds: float, on_end: Callable[[str], None]) -> None:
        self._silence, self._on_end = silence_seconds, on_end
        place = distributed.ranks()
        self._who = f"rank {place.rank} on host {socket.gethostname()}"
        self._reported: tuple[str, bool, float] | None = None
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
        """Reports this rank's failure and does not return. sure: False where another rank's end may be the cause."""
        if self._thread is None or not self._thread.is_alive():
            self._on_end(cause)
        self._reported = (f"{self._who}: {cause}", sure, time.monotonic())
        while True:  # the thread ends the process
            time.sleep(1)

    def close(self) -> None:
        """Leaves the watch: this rank has done its part. With rank 0 the watch ends."""
        self._closing.set()
        if self._thread is not None:
            self._thread.join(_JOIN_SECONDS)

    def _listen(self, listener: socket.socket, secret: str) -> None:
        """Rank 0: hears all others until it leaves, or until a failure is known, which it tells everyone."""
        coordinator = _Coordinator(listener, secret, self._silence)
        next_beat = 0.0
        while not self._closing.is_set():
            coordinator.receive()
            if self._reported:
                coordinator.note_failure(*self._reported)
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
        """The other ranks: beat, and end when rank 0 says so or is gone."""
        main.link.settimeout(BEAT_SECONDS / 4)
        next_beat, told = 0.0, False
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
            if now - main.heard > self._silence:
                self._on_end(f"rank 0 has been silent for {self._silence:.0f} s: {SILENCE}")
                return
            if self._reported and not told:
                told = True
                main.send({"fail": self._reported[0], "sure": self._reported[1]})
            if now >= next_beat:
                next_beat = now + BEAT_SECONDS
                main.send({"beat": 1})
            if self._closing.is_set():
                main.send({"bye": 1})
                main.link.close()
                return


class _Coordinator:
    """Rank 0's record of the other ranks: who is connected, who was heard when, and what failed first."""

    def __init__(self, listener: socket.socket, secret: str, silence_seconds: float) -> None:
        self._secret, self._silence = secret, silence_seconds
        self._present: list[_Peer] = []
        self._cause: str | None = None
        self._doubtful: tuple[str, float] | None = None
        self._selector = selectors.DefaultSelector()
        self._selector.register(listener, selectors.EVENT_READ)

    def receive(self) -> None:
        """Takes what has arrived, after waiting a moment for it."""
        for key, _ in self._selector.select(BEAT_SECONDS / 4):
            if key.data is None:
                link, _address = key.fileobj.accept()  # type: ignore[union-attr]
                link.settimeout(BEAT_SECONDS)
                self._selector.register(link, selectors.EVENT_READ, _Peer(link, heard=time.monotonic()))
            else:
                self._receive_from(key.data)

    def _receive_from(self, peer: _Peer) -> None:
        messages = peer.receive()
        for message in messages or ():
            if message.get("hello") == self._secret:
                peer.who = "rank {rank} on host {host} (process {pid})".format(**message)
                self._present.append(peer)
            elif peer not in self._present:  # not one of us
                messages = None
                break
            elif "bye" in message:
                self._present.remove(peer)
            elif "fail" in message:
                self.note_failure(message["fail"], message["sure"], time.monotonic())
        if messages is None:
            self._selector.unregister(peer.link)
            peer.link.close()
            if peer in self._present:
                self._present.remove(peer)
                self._cause = self._cause or f"{peer.who} ended without a word: killed, or out of memory"

    def note_failure(self, cause: str, sure: bool, when: float) -> None:
        if sure:
            self._cause = self._cause or cause
        else:
            self._doubtful = self._doubtful or (cause, when)

    def first_cause(self, now: float) -> str | None:
        """The first cause of a failure, once it is known."""
        if self._cause is None:
            silent = next((peer for peer in self._present if now - peer.heard > self._silence), None)
            if silent is not None:
                self._cause = f"{silent.who} has been silent for {self._silence:.0f} s: {SILENCE}"
            elif self._doubtful is not None and now - self._doubtful[1] > CONSEQUENCE_SECONDS:
                self._cause = self._doubtful[0]
        return self._cause

    def broadcast(self, message: dict[str, object]) -> None:
        for peer in self._present:
            peer.send(message)
