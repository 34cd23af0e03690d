"""How the C library gives memory back to the system."""

from __future__ import annotations

import ctypes
import os

MAPPED_BYTES = 1 << 20
_M_MMAP_THRESHOLD = -3  # of glibc's mallopt


def map_large_blocks() -> None:
    """From now on blocks of a megabyte or more are given back to the system when they are freed. Idempotent.

    glibc moves this limit up to 32 MB when it sees large blocks freed, and then keeps their memory in the heaps of all
    threads: a loader of batches took 80 MB more. The environment's own setting counts more than this one.
    """
    if "MALLOC_MMAP_THRESHOLD_" in os.environ or "mmap_threshold" in os.environ.get("GLIBC_TUNABLES", ""):
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # other C libraries have none
    if mallopt is not None:
        mallopt(_M_MMAP_THRESHOLD, MAPPED_BYTES)
