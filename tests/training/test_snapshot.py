"""What each rank writes of a checkpoint: together the whole files, whichever ranks have which numbers."""

import hashlib
import os
import socket
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

from text4vis.saved import checkpoint
from text4vis.saved.checkpoint import CheckpointError
from text4vis.training import checkpointing
from text4vis.training.engine import Shard
from text4vis.training.snapshot import HostMemory, Plan, write_pieces

SHAPES = {"a": (5, 3), "b": (1,), "c": (2, 4, 7), "d": ()}
BUFFERS = {"n": (torch.int64, ()), "r": (torch.bfloat16, (3,)), "t": (torch.bool, (5,))}


class StandIn:
    """The state of one rank. cut: "none": all have all; "flat": one stretch of all tensors; "each": of each one."""

    moment_names = ("exp_avg",)

    def __init__(self, cut: str, rank: int, ranks: int) -> None:
        self.cut, self.rank, self.ranks = cut, rank, ranks

    def shards(self, key=None):
        at, total = 0, sum(value.numel() for value in tensors(key).values())
        for name, value in tensors(key).items():
            flat = value.flatten()
            if self.cut == "none":
                yield name, Shard(torch.float32, value.shape, flat, on_all=True)
            else:
                share, offset = (
                    (-(-len(flat) // self.ranks), 0) if self.cut == "each" else (-(-total // self.ranks), at)
                )
                start = min(max(0, self.rank * share - offset), len(flat))
                stop = min(max(0, (self.rank + 1) * share - offset), len(flat))
                yield name, Shard(torch.float32, value.shape, flat[start:stop], start)
            at += len(flat)
        for name, value in buffers().items() if key is None else ():
            yield name, Shard(value.dtype, tuple(value.shape), value.flatten(), on_all=True)


def tensors(key: str | None) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0 if key is None else 1)
    return {name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}


def buffers() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(2)
    return {name: torch.randint(0, 9, shape, generator=generator).to(dtype) for name, (dtype, shape) in BUFFERS.items()}


@pytest.mark.parametrize("ranks", [1, 2, 3, 8])
@pytest.mark.parametrize("cut", ["none", "flat", "each"])
def test_all_ranks_together_write_whole_files(tmp_path, monkeypatch, cut, ranks):
    monkeypatch.setenv("WORLD_SIZE", str(ranks))
    reports, written = [], []
    for rank in range(ranks):
        monkeypatch.setenv("RANK", str(rank))
        plan = Plan(StandIn(cut, rank, ranks))
        held = HostMemory().hold(plan.shards)
        parts = {}
        for name, file in plan.checkpoint().items():
            if rank == 0:
                (tmp_path / name).write_bytes(bytes(file.layout.size))
            pieces = plan.pieces(file, held)
            parts[str(tmp_path / name)] = [vars(part) for part in write_pieces(tmp_path / name, pieces)]
        written.append(sum(len(data) for data in held.values()))
        reports.append({"parts": parts})
    for name, expected in (("model", tensors(None) | buffers()), ("exp_avg", tensors("exp_avg"))):
        path = tmp_path / f"{name}.safetensors"
        found = load_file(path)
        assert found.keys() == expected.keys() and all(found[key].equal(expected[key]) for key in expected)
        digests = checkpointing._joined(path, plan.checkpoint()[path.name], reports)
        assert checkpoint._is_sound(path, digests)
        assert len(digests) <= ranks * (len(expected) if cut == "each" else 3), "neighbours are one part"
    if cut == "none":
        assert max(written) - min(written) <= 16


def test_a_part_that_nobody_wrote_is_no_checkpoint(tmp_path):
    plan = Plan(StandIn("each", 1, 3))
    (name, file), *_ = plan.checkpoint().items()
    (tmp_path / name).write_bytes(bytes(file.layout.size))
    parts = write_pieces(tmp_path / name, plan.pieces(file, HostMemory().hold(plan.shards)))
    with pytest.raises(RuntimeError, match=r"parts of model\.safetensors are not the whole file"):
        checkpointing._joined(
            tmp_path / name, file, [{"parts": {str(tmp_path / name): [vars(part) for part in parts]}}]
        )


def test_a_host_that_does_not_share_the_output_is_named(tmp_path):
    with pytest.raises(
        CheckpointError, match=rf"{tmp_path}/none: not seen on {socket.gethostname()}; give an --output"
    ):
        write_pieces(tmp_path / "none", [(0, memoryview(b"x"))])


def test_each_save_uses_the_memory_again_and_a_gpus_copies_are_waited_for(monkeypatch):
    memory, done = HostMemory(), []
    assert memory.nbytes == 0
    first, second = (
        memory.hold({(None, "a"): Shard(torch.uint8, (2,), torch.tensor(values))})[None, "a"]
        for values in ([1, 2], [3, 4])
    )
    memory.wait()
    assert bytes(first) == bytes(second) == bytes([3, 4])
    event = SimpleNamespace(record=lambda: done.append("queued"), synchronize=lambda: done.append("copied"))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "Event", lambda: event)
    memory.hold({})
    assert done == ["queued"]
    memory.wait()
    assert done == ["queued", "copied"]


def test_what_was_written_is_on_the_disk_and_the_file_closed(tmp_path, monkeypatch):
    path, flushed = tmp_path / "file", []
    path.write_bytes(bytes(4))
    monkeypatch.setattr(os, "fsync", lambda _: flushed.append(path.read_bytes()))
    assert write_pieces(path, []) == [], "a rank may have nothing of a file"
    (part,) = write_pieces(path, [(0, memoryview(b"abcd"))])
    assert flushed == [bytes(4), b"abcd"] and (part.start, part.stop) == (0, 4)
    assert path not in {opened.resolve() for opened in Path("/proc/self/fd").iterdir()}


def test_a_disk_that_takes_few_bytes_at_a_time_gets_them_all(tmp_path, monkeypatch):
    path, data, write = tmp_path / "file", os.urandom(100), os.pwrite
    path.write_bytes(bytes(300))
    monkeypatch.setattr(os, "pwrite", lambda descriptor, block, at: write(descriptor, block[:7], at))
    parts = write_pieces(path, [(10, memoryview(data)), (110, memoryview(data)), (250, memoryview(data[:20]))])
    assert path.read_bytes() == bytes(10) + data + data + bytes(40) + data[:20] + bytes(30)
    assert [(part.start, part.stop) for part in parts] == [(10, 210), (250, 270)]
    assert parts[0].sha256 == hashlib.sha256(data + data).hexdigest()
