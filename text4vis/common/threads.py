"""How the threads of a program share a machine's cores."""

from __future__ import annotations

import os


def sleep_while_waiting() -> None:
    """Lets OpenMP's threads sleep while they wait; by default they spin, and take the cores from threads that decode.

    To be called before torch is imported. Where OMP_WAIT_POLICY is set it stays as it is.
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
