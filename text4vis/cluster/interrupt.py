"""Ctrl-C for programs that finish something first: the first one is a request, a second one ends the process at once.

Python runs signal handlers only in the main thread, which may wait for minutes in a collective. So a thread reads the
signal numbers from a socket, to which Python's C handler writes them at once.
"""

from __future__ import annotations

import os
import signal
import socket
import sys
import threading
import time

EXIT_CODE = 130  # 128 + SIGINT, as shells have it
SAME_SECONDS = 1.0  # launchers repeat a Ctrl-C that the terminal has already sent to all processes


class Interrupts:
    """From now on, prints `notice` to standard error at the first Ctrl-C and ends the process at a second one.

    Python's handler for SIGINT decides what else the first one does. Create it in the main thread. An empty notice is
    not printed.
    """

    def __init__(self, notice: str) -> None:
        self._notice, self._first = notice, float("-inf")
        self._receiver, self._sender = socket.socketpair()
        self._sender.setblocking(False)
        signal.set_wakeup_fd(self._sender.fileno(), warn_on_full_buffer=False)
        threading.Thread(target=self._listen, name="interrupts", daemon=True).start()

    @property
    def happened(self) -> bool:
        """Whether there was a Ctrl-C."""
        return self._first > float("-inf")

    def _listen(self) -> None:
        while numbers := self._receiver.recv(64):
            if signal.SIGINT not in numbers:
                continue
            now = time.monotonic()
            if not self.happened:
                self._first = now
                if self._notice:
                    print(self._notice, file=sys.stderr, flush=True)
            elif now - self._first > SAME_SECONDS:
                os._exit(EXIT_CODE)
