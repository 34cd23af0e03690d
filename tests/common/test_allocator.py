"""Large blocks go back to the system when they are freed, in a process of its own: glibc's limit moves with use."""

import os
import subprocess
import sys

import pytest

# Without a fixed limit a freed block of 8 MB raises the limit; the next one then comes from the heap, which keeps it.
PROGRAM = """
import ctypes, re, sys
from text4vis.common.allocator import map_large_blocks
libc = ctypes.CDLL(None)
libc.malloc.restype, libc.malloc.argtypes, libc.free.argtypes = ctypes.c_void_p, [ctypes.c_size_t], [ctypes.c_void_p]
map_large_blocks()
libc.free(libc.malloc(8 << 20))
block = libc.malloc(4 << 20)
heap = next(line for line in open("/proc/self/maps") if "[heap]" in line).split()[0]
start, stop = (int(edge, 16) for edge in heap.split("-"))
print(start <= block < stop)
"""


@pytest.mark.parametrize(
    ("setting", "in_heap"),
    [({}, "False"), ({"MALLOC_MMAP_THRESHOLD_": "33554432"}, "True")],
    ids=["ours", "the environment's"],
)
def test_large_blocks_are_mapped_unless_the_environment_says_otherwise(setting, in_heap):
    environment = {name: value for name, value in os.environ.items() if not name.startswith("MALLOC")} | setting
    done = subprocess.run([sys.executable, "-c", PROGRAM], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.split() == [in_heap]
