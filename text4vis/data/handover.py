"""Hands batches from the loader's thread to the thread that uses them, on a GPU to which both give work ahead of time.

Loaders make batches on a CUDA stream of their own, the consumer reads them on another. Nothing orders two streams by
itself, so three rules keep memory from being written while it is still read:

- A batch is allocated on the loaders' stream, and the consumer records its own stream on it. When Python frees the
  batch, the allocator lends its memory again only after the work that the consumer's stream had been given by then.
- The consumer's stream waits for the event that follows the making of the batch.
- What the batch is made from (DALI's outputs, pinned memory) is held until that event has happened.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import cache, partial
from typing import Any, NamedTuple, Protocol

import torch


class Event(Protocol):
    """A point in the work of a stream, as `torch.cuda.Event`."""

    def record(self, stream: Any) -> None:
        """Places it behind the work that the stream has been given."""

    def query(self) -> bool:
        """Whether that work is done."""


class Gpu(Protocol):
    """What a hand-over needs of a GPU; a test puts a simulated one in its place. Streams are as `torch.cuda.Stream`.

    loading: the stream on which all loaders of the process make their batches.
    """

    loading: Any

    def new_event(self) -> Event:
        """An event that is nowhere yet."""

    def on(self, stream: Any) -> AbstractContextManager[object]:
        """A context in which memory is of this stream, and work is given to it."""

    def current_stream(self) -> Any:
        """The stream that the calling thread gives its work to."""


class CudaGpu:
    """A GPU of this process, by the functions of `torch.cuda`."""

    def __init__(self, device: torch.device) -> None:
        self.loading = _loading_stream(device)
        self.new_event = torch.cuda.Event
        self.on = torch.cuda.stream
        self.current_stream = partial(torch.cuda.current_stream, device)


@cache
def _loading_stream(device: torch.device) -> torch.cuda.Stream:
    """One for all passes: the allocator keeps the memory of each stream apart."""
    return torch.cuda.Stream(device)


class Sent(NamedTuple):
    """A batch on its way. ready: on a GPU, the event that follows its making; None where it is made already."""

    frames: torch.Tensor
    ready: Event | None


class HandOver:
    """The sender's and the receiver's part of one pass: `send` is for the loader's thread, `receive` the consumer's."""

    def __init__(self, gpu: Gpu) -> None:
        self._gpu = gpu
        self._held: deque[tuple[Event, object]] = deque()

    def send(self, make: Callable[[], torch.Tensor], sources: object) -> Sent:
        """Calls `make`, which allocates a batch and gives the GPU the work to fill it from `sources`; does not wait."""
        while self._held and self._held[0][0].query():
            self._held.popleft()
        with self._gpu.on(self._gpu.loading):
            frames = make()
        ready = self._gpu.new_event()
        ready.record(self._gpu.loading)
        self._held.append((ready, sources))
        return Sent(frames, ready)

    def receive(self, frames: torch.Tensor, ready: Event | None) -> None:
        """Makes a batch safe to use on the calling thread's present stream; does not wait."""
        stream = self._gpu.current_stream()
        stream.wait_event(ready)
        frames.record_stream(stream)


class SameMemory:
    """In place of a HandOver where there is no GPU: what `make` returns is complete."""

    def send(self, make: Callable[[], torch.Tensor], sources: object) -> Sent:
        """Calls `make`."""
        return Sent(make(), None)

    def receive(self, frames: torch.Tensor, ready: Event | None) -> None:
        """Does nothing."""
