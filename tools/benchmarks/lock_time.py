"""Processor time that a process spends while it holds Python's global lock, and how often the lock is taken.

No thread can run Python while another holds the lock, so its time a video bounds the videos a second of a process,
however many cores it has. A library that is loaded before the interpreter stands between it and the C library, and
reads the thread's clock whenever the interpreter unlocks the mutex that guards the lock: right after a thread has taken
the lock, and after it has given it back. So the figure is counted and not sampled. Threads that wait for a core
meanwhile don't count, so other programs on the machine hardly change it.
"""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

_SOURCE = """
#define _GNU_SOURCE
#include <dlfcn.h>
#include <pthread.h>
#include <time.h>

static pthread_mutex_t *guard;
static int *locked;
static long held_ns, takes;
static __thread long taken_at __attribute__((tls_model("initial-exec")));

static long thread_ns(void) {
    struct timespec now;
    clock_gettime(CLOCK_THREAD_CPUTIME_ID, &now);
    return now.tv_sec * 1000000000L + now.tv_nsec;
}

int pthread_mutex_unlock(pthread_mutex_t *mutex) {
    static int (*unlock)(pthread_mutex_t *);
    if (!unlock)
        unlock = dlsym(RTLD_NEXT, "pthread_mutex_unlock");
    if (mutex != guard)
        return unlock(mutex);
    if (*locked) {  /* nobody else can set it before the mutex is free: this thread holds the lock */
        int result = unlock(mutex);
        taken_at = thread_ns();
        return result;
    }
    if (taken_at) {
        __atomic_fetch_add(&held_ns, thread_ns() - taken_at, __ATOMIC_RELAXED);
        __atomic_fetch_add(&takes, 1, __ATOMIC_RELAXED);
        taken_at = 0;
    }
    return unlock(mutex);
}

void lock_watch(int *state, pthread_mutex_t *mutex) { locked = state; guard = mutex; }
long lock_held_ns(void) {  /* called by a thread that holds the lock: what it has of this turn counts */
    return __atomic_load_n(&held_ns, __ATOMIC_RELAXED) + (taken_at ? thread_ns() - taken_at : 0);
}
long lock_takes(void) { return __atomic_load_n(&takes, __ATOMIC_RELAXED); }
"""
_TRIAL_MICROSECONDS = (4919, 7919)  # switch intervals that hardly stand anywhere else in the interpreter's state
_MAX_STATE_BYTES = 1 << 20
# In CPython's struct: unsigned long interval, pointer last_holder, int locked, unsigned long, pthread_cond_t, mutex.
_LOCKED_OFFSET, _MUTEX_OFFSET = 16, 80


@dataclass
class LockTime:
    """Result of `lock_time`, complete when its context ends. seconds: processor time under the lock. takes: how many
    times a thread took the lock and gave it back."""

    seconds: float = 0.0
    takes: int = 0


def preloaded(folder: Path) -> dict[str, str]:
    """Builds the library in a folder. Returns the environment for a Python process that measures. Raises OSError."""
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        raise OSError("cc: no such command; install a C compiler to measure the time under Python's lock")
    folder.mkdir(parents=True, exist_ok=True)
    source, library = folder / "lock.c", folder.absolute() / "lock.so"
    source.write_text(_SOURCE, encoding="utf-8")
    subprocess.run([compiler, "-O2", "-shared", "-fPIC", "-o", str(library), str(source), "-ldl"], check=True)
    return os.environ | {"LD_PRELOAD": str(library)}


def _lock_address() -> int:
    """Where the state of this process's lock begins. Raises OSError where it isn't found.

    The switch interval stands in it: it is set to two values, and the place that changes along is it.
    """
    start = ctypes.addressof(ctypes.c_char.in_dll(ctypes.pythonapi, "_PyRuntime"))
    size = min(_MAX_STATE_BYTES, _end_of_mapping(start) - start)
    before, places = sys.getswitchinterval(), set(range(0, size - 8, 8))
    try:
        for microseconds in _TRIAL_MICROSECONDS:
            sys.setswitchinterval(microseconds / 1e6)
            stored = round(sys.getswitchinterval() * 1e6).to_bytes(8, sys.byteorder)
            state = ctypes.string_at(start, size)
            places = {place for place in places if state[place : place + 8] == stored}
    finally:
        sys.setswitchinterval(before)
    address = start + places.pop() if len(places) == 1 else 0
    if not address or ctypes.c_int.from_address(address + _LOCKED_OFFSET).value != 1:  # this thread holds it
        raise OSError("Python's lock was not found in the state of this interpreter")
    return address


def _end_of_mapping(address: int) -> int:
    for line in Path("/proc/self/maps").read_text().splitlines():
        start, _, end = line.split()[0].partition("-")
        if int(start, 16) <= address < int(end, 16):
            return int(end, 16)
    raise OSError("the state of this interpreter is not mapped")


@contextmanager
def lock_time() -> Iterator[LockTime]:
    """Measures all threads of this process until the context ends. Raises OSError.

    The process was started with the environment of `preloaded`.
    """
    library, result = ctypes.PyDLL(None), LockTime()  # calls of PyDLL keep the lock
    if not hasattr(library, "lock_watch"):
        raise OSError("the process was not started with the library; see `preloaded`")
    library.lock_held_ns.restype = library.lock_takes.restype = ctypes.c_long
    address = _lock_address()
    library.lock_watch(ctypes.c_void_p(address + _LOCKED_OFFSET), ctypes.c_void_p(address + _MUTEX_OFFSET))
    held, takes = library.lock_held_ns(), library.lock_takes()
    try:
        yield result
    finally:
        result.seconds, result.takes = (library.lock_held_ns() - held) / 1e9, library.lock_takes() - takes
