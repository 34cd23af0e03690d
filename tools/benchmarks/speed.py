"""How fast a loader is, and what it takes: videos a second, processor time a video, memory of all its processes."""

from __future__ import annotations

import itertools
import os
import time
from dataclasses import dataclass

import psutil

from benchmarks.figures import pss_of_tree
from benchmarks.recipe import Contender, Setup
from text4vis.data.prefetch import settled

_WARM_UP_TURNS = 8  # after these the loaders have allocated all their memory


@dataclass(frozen=True)
class Speed:
    """rate: videos a second. cpu_milliseconds: processor time a video, of the process and its workers."""

    rate: float
    cpu_milliseconds: float


def cpu_seconds() -> float:
    """Processor time so far of this process and all that it has started, whether they have ended or not."""
    times = os.times()
    total = times.user + times.system + times.children_user + times.children_system
    for child in psutil.Process().children(recursive=True):
        try:
            used = child.cpu_times()
        except psutil.NoSuchProcess:
            continue
        total += used.user + used.system + used.children_user + used.children_system
    return total


def speed(contender: Contender, setup: Setup, seconds: float, producers: int) -> Speed:
    """Starts a loader and measures it after a warm-up.

    Counts whole turns, in which each of its `producers` gives one batch. Batches are taken without a pause, so the
    loader's queues are as empty at the start of the measurement as at its end.
    """
    with contender(setup) as batches, settled():  # as training does
        for _ in range(_WARM_UP_TURNS * producers):
            next(batches)
        videos, cpu, started = 0, cpu_seconds(), time.perf_counter()
        while True:
            videos += sum(len(batch) for batch in itertools.islice(batches, producers))
            if (elapsed := time.perf_counter() - started) >= seconds:
                return Speed(videos / elapsed, 1e3 * (cpu_seconds() - cpu) / videos)


def throughput(contender: Contender, setup: Setup, seconds: float, producers: int) -> float:
    """Videos a second, see `speed`."""
    return speed(contender, setup, seconds, producers).rate


def memory(contender: Contender, setup: Setup, producers: int) -> int:
    """Bytes of a running loader, libraries included. Call it in a fresh process that shares no memory with others."""
    with contender(setup) as batches, settled():
        for _ in range(_WARM_UP_TURNS * producers):
            next(batches)
        return pss_of_tree(os.getpid())
