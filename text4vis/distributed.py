"""Ranks, devices and cores of this process, and the few collectives that the program needs.

Works the same under `deepspeed`, `torchrun` and plain `python`: without a launcher's variables the job is one rank.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist


@dataclass(frozen=True)
class Ranks:
    """Where this process stands in the job."""

    rank: int
    world_size: int
    local_rank: int
    local_world_size: int

    @property
    def is_main(self) -> bool:
        return self.rank == 0


def ranks() -> Ranks:
    """Read from the launcher's environment variables."""
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    return Ranks(
        rank=int(os.environ.get("RANK", "0")),
        world_size=world_size,
        local_rank=int(os.environ.get("LOCAL_RANK", "0")),
        local_world_size=int(os.environ.get("LOCAL_WORLD_SIZE", os.environ.get("LOCAL_SIZE", "0"))) or world_size,
    )


def cores_per_rank() -> int:
    """Cores that this rank may count on: those it is bound to, or its share of the node's."""
    available = len(os.sched_getaffinity(0))
    if available < (os.cpu_count() or 1):  # bound by the launcher or the scheduler
        return available
    return max(1, available // ranks().local_world_size)


def use_cores(num_threads: int) -> None:
    """Sets torch's CPU threads (0: the cores that the rank owns), and the attention that suits a CPU.

    torch's flash attention for CPUs is slow on short sequences: a bf16 step of the demo's model (49 tokens a frame, 16
    videos, one thread) took 0.95 CPU-seconds with it and 0.65 without; in fp32 there was no difference.
    """
    torch.set_num_threads(num_threads or cores_per_rank())
    if not torch.cuda.is_available():
        torch.backends.cuda.enable_flash_sdp(False)  # the flag governs the CPU's kernel too


def device() -> torch.device:
    """The rank's GPU, or the CPU."""
    return torch.device("cuda", ranks().local_rank) if torch.cuda.is_available() else torch.device("cpu")


def start() -> Ranks:
    """Joins the process group (NCCL with GPUs, else gloo) and selects the device. Call once, before any collective."""
    import deepspeed

    place = ranks()
    for name, value in (("RANK", "0"), ("WORLD_SIZE", "1"), ("LOCAL_RANK", "0"), ("MASTER_ADDR", "127.0.0.1")):
        os.environ.setdefault(name, value)
    if place.world_size == 1:
        os.environ.setdefault("MASTER_PORT", "0")
    if torch.cuda.is_available():
        torch.cuda.set_device(place.local_rank)
    else:
        # A shared-memory all-reduce that the engine would compile on the first start (needs g++, takes a minute).
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed("nccl" if torch.cuda.is_available() else "gloo", verbose=False)
    return place


def stop() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()


def barrier() -> None:
    if dist.is_initialized() and dist.get_world_size() > 1:
        dist.barrier()


def sum_over_ranks(values: Sequence[float]) -> list[float]:
    """Element-wise sum in float64, the same list on every rank."""
    total = torch.tensor(list(values), dtype=torch.float64, device=device())
    if dist.is_initialized() and dist.get_world_size() > 1:
        dist.all_reduce(total)
    return total.tolist()


def gather_to_main(value: Any) -> list[Any] | None:
    """Every rank's picklable value, in rank order, on rank 0; None on the others."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return [value]
    gathered: list[Any] | None = [None] * dist.get_world_size() if dist.get_rank() == 0 else None
    dist.gather_object(value, gathered)
    return gathered
