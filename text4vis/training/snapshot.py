"""What a rank itself has of the engine's state: copied to host memory, written to its place in files of all ranks.

A safetensors file is a header and one tensor behind the other, so names, types and shapes tell every rank the byte at
which each number belongs. Each rank writes what it has: none gathers anything, and readers see whole tensors.
"""

from __future__ import annotations

import hashlib
import math
import os
import socket
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from text4vis.cluster import distributed
from text4vis.model.tensors import Layout, layout
from text4vis.saved.checkpoint import WEIGHTS, CheckpointError, tensor_file
from text4vis.training.engine import EMA, Engine, Shard

Key = tuple[str | None, str]  # one of the optimiser's moments, or None for the value, and the tensor's name
Pieces = list[tuple[int, memoryview]]  # (byte of the file where it begins, bytes), ascending

_ALIGNMENT = 16  # bytes; of each tensor in host memory
_BLOCK_BYTES = 1 << 22  # hashed and written together, while they are in the processor's cache


@dataclass(frozen=True)
class Part:
    """A stretch of a file, from byte `start` up to `stop`, and its SHA-256 in hex."""

    start: int
    stop: int
    sha256: str


@dataclass(frozen=True)
class File:
    """A file of tensors. keys: what it holds, by the name that the tensor has there."""

    layout: Layout
    keys: dict[str, Key]


class Plan:
    """Which files a save writes, and what this rank has of them.

    Tensors that every rank has are shared out by their bytes, so that ranks write about the same.
    """

    def __init__(self, engine: Engine) -> None:
        self._keys = (None, *engine.moment_names)
        self.shards: dict[Key, Shard] = {}
        for key in self._keys:
            self.shards |= {(key, name): shard for name, shard in _shared_out(engine.shards(key)).items()}

    def checkpoint(self) -> dict[str, File]:
        """The files of tensors of a checkpoint, by name."""
        names = {key: [name for of, name in self.shards if of == key] for key in self._keys}
        return {
            WEIGHTS if key is None else tensor_file(key): self._file({name: (key, name) for name in names[key]})
            for key in self._keys
        }

    def best(self) -> dict[str, File]:
        """The file of the best weights: the averages where solver.ema keeps them, else the values."""
        names = [name for key, name in self.shards if key is None]
        return {WEIGHTS: self._file({n: (EMA, n) if (EMA, n) in self.shards else (None, n) for n in names})}

    def _file(self, keys: dict[str, Key]) -> File:
        shards = {name: self.shards[key] for name, key in keys.items()}
        return File(layout({name: (shard.dtype, shard.shape) for name, shard in shards.items()}), keys)

    def pieces(self, file: File, held: Mapping[Key, memoryview]) -> Pieces:
        """What this rank writes of a file; the header is rank 0's. held: the bytes of the shards."""
        found = [(0, memoryview(file.layout.header))] if distributed.ranks().is_main else []
        for name, key in file.keys.items():
            shard = self.shards[key]
            found.append((file.layout.offsets[name] + shard.start * shard.dtype.itemsize, held[key]))
        return sorted((piece for piece in found if len(piece[1])), key=lambda piece: piece[0])


def _shared_out(shards: Iterable[tuple[str, Shard]]) -> dict[str, Shard]:
    """The shards by name. Of what all ranks have, each keeps one stretch, equal in bytes."""
    found, place = dict(shards), distributed.ranks()
    total, at = sum(_bytes(shard) for shard in found.values() if shard.on_all), 0
    first, last = total * place.rank // place.world_size, total * (place.rank + 1) // place.world_size
    for name, shard in found.items():
        if shard.on_all:
            # Rounded up on both sides, so that a number on the border goes to one rank.
            start, stop = (
                min(max(0, -((at - border) // shard.dtype.itemsize)), shard.values.numel()) for border in (first, last)
            )
            found[name] = Shard(shard.dtype, shard.shape, shard.values[start:stop], start)
            at += _bytes(shard)
    return found


def _bytes(shard: Shard) -> int:
    return shard.dtype.itemsize * math.prod(shard.shape)


class HostMemory:
    """Memory of this rank's host that each save uses again; page-locked where there is a GPU."""

    def __init__(self) -> None:
        self._memory = torch.empty(0, dtype=torch.uint8)
        self._copied: torch.cuda.Event | None = None

    @property
    def nbytes(self) -> int:
        """Bytes that it takes: those of the largest save so far."""
        return self._memory.nbytes

    def hold(self, shards: Mapping[Key, Shard]) -> dict[Key, memoryview]:
        """Copies the values, in the types of the files, and gives their bytes.

        Copies from a GPU are only queued, ahead of what changes the values: `wait` before the bytes are read.
        """
        places, end = {}, 0
        for key, shard in shards.items():
            places[key] = end, end + shard.values.numel() * shard.dtype.itemsize
            end = -(-places[key][1] // _ALIGNMENT) * _ALIGNMENT
        if self.nbytes < end:
            self._memory = torch.empty(0, dtype=torch.uint8)  # the old one goes first
            self._memory = torch.empty(end, dtype=torch.uint8, pin_memory=torch.cuda.is_available())
        for key, shard in shards.items():
            begin, stop = places[key]
            self._memory[begin:stop].view(shard.dtype).copy_(shard.values, non_blocking=True)
        if torch.cuda.is_available():
            self._copied = torch.cuda.Event()
            self._copied.record()
        data = self._memory.numpy().data
        return {key: data[begin:stop] for key, (begin, stop) in places.items()}

    def wait(self) -> None:
        """Waits, in any thread, until the copies are made."""
        if self._copied is not None:
            self._copied.synchronize()


def write_pieces(path: Path, pieces: Pieces) -> list[Part]:
    """Writes the pieces into a file that is there, and waits until the disk has them. Returns what was written, in
    stretches without a gap. Raises CheckpointError."""
    parts: list[Part] = []
    digest, start, at = hashlib.sha256(), 0, 0
    try:
        descriptor = os.open(path, os.O_WRONLY)
        try:
            for begin, data in pieces:
                if begin != at and at > start:
                    parts.append(Part(start, at, digest.hexdigest()))
                if begin != at:
                    digest, start, at = hashlib.sha256(), begin, begin
                for block in (data[first : first + _BLOCK_BYTES] for first in range(0, len(data), _BLOCK_BYTES)):
                    digest.update(block)
                    written = 0
                    while written < len(block):
                        written += os.pwrite(descriptor, block[written:], at + written)
                    at += len(block)
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    except FileNotFoundError:
        host = socket.gethostname()
        raise CheckpointError(f"{path}: not seen on {host}; give an --output that all hosts share") from None
    except OSError as error:
        reason = error.strerror or str(error)
        raise CheckpointError(f"{path}: cannot be written ({reason}); free space on the disk") from None
    return [*parts, Part(start, at, digest.hexdigest())] if at > start else parts
