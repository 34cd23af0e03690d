"""Ranks, devices and cores of this process, and the few collectives that the program needs.

Works the same under `deepspeed`, `torchrun`, `mpirun`, `srun` and plain `python`: without a launcher's variables the
job is one rank.
"""

from __future__ import annotations

import os
import re
import zlib
from collections.abc import Callable, Iterator, MutableMapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist

T = TypeVar("T")
_PIECE_BYTES = 1 << 26  # of a message

# The gloo group for exchanges that must not wait for GPU queues. Empty where the default group is gloo already.
_control: list[Any] = []


@dataclass(frozen=True)
class Ranks:
    """Where this process stands in the job."""

    rank: int
    world_size: int
    local_rank: int
    local_world_size: int

    @property
    def is_main(self) -> bool:
        """Whether this is rank 0, the one that writes files and prints."""
        return self.rank == 0


def ranks() -> Ranks:
    """Read from the environment variables of `deepspeed` or `torchrun`, else of `mpirun` (OpenMPI), else of `srun`."""
    get = os.environ.get
    if "RANK" not in os.environ and "OMPI_COMM_WORLD_RANK" in os.environ:
        names = [f"OMPI_COMM_WORLD_{name}" for name in ("RANK", "SIZE", "LOCAL_RANK", "LOCAL_SIZE")]
        return Ranks(*(int(os.environ[name]) for name in names))
    if "RANK" not in os.environ and "SLURM_STEP_NUM_TASKS" in os.environ:  # not set in a batch script outside srun
        tasks = _slurm_tasks_per_node(os.environ["SLURM_STEP_TASKS_PER_NODE"])
        return Ranks(
            rank=int(os.environ["SLURM_PROCID"]),
            world_size=int(os.environ["SLURM_STEP_NUM_TASKS"]),
            local_rank=int(os.environ["SLURM_LOCALID"]),
            local_world_size=tasks[int(os.environ["SLURM_NODEID"])],
        )
    world_size = int(get("WORLD_SIZE", "1"))
    return Ranks(
        rank=int(get("RANK", "0")),
        world_size=world_size,
        local_rank=int(get("LOCAL_RANK", "0")),
        local_world_size=int(get("LOCAL_WORLD_SIZE", get("LOCAL_SIZE", "0"))) or world_size,
    )


def _slurm_tasks_per_node(text: str) -> list[int]:
    """Slurm's "4(x2),3" is [4, 4, 3]."""
    counts: list[int] = []
    for count, times in re.findall(r"(\d{1,6})(?:\(x(\d{1,6})\))?", text):
        counts += [int(count)] * int(times or 1)
    return counts


def _slurm_first_node(text: str) -> str:
    """The first name of Slurm's list of nodes: "gpu[07-09,12],cpu1" begins with gpu07."""
    prefix, bracket, rest = text.partition("[")
    if not bracket or "," in prefix:
        return prefix.split(",")[0]
    number, _, after = rest.partition("]")
    return prefix + re.split("[-,]", number)[0] + after.split(",")[0]


def _master(place: Ranks) -> tuple[str, str]:
    """Rank 0's host and a port derived from the job's id, for launchers that don't set MASTER_ADDR and MASTER_PORT.

    Only `deepspeed` and `torchrun` set them. Raises OSError if the launcher does not name rank 0's host.
    """
    get = os.environ.get
    if place.world_size == place.local_world_size:
        address = "127.0.0.1"
    elif "SLURM_STEP_NODELIST" in os.environ:
        address = _slurm_first_node(os.environ["SLURM_STEP_NODELIST"])
    else:
        address = get("MASTER_ADDR", "")
        if not address:
            raise OSError("MASTER_ADDR is not set; pass it: mpirun -x MASTER_ADDR=<host of rank 0> …")
    if place.world_size == 1:
        return address, "0"
    job = get("SLURM_STEP_ID", "") + get("SLURM_JOB_ID", "") + get("PMIX_NAMESPACE", get("OMPI_MCA_ess_base_jobid", ""))
    return address, str(20000 + zlib.crc32(job.encode()) % 20000)


def cores_per_rank() -> int:
    """Number of cores for this rank: those that it is bound to, or its share of the node's cores."""
    available = len(os.sched_getaffinity(0))
    if available < (os.cpu_count() or 1):  # bound by the launcher or the scheduler
        return available
    return max(1, available // ranks().local_world_size)


def use_cores(num_threads: int) -> None:
    """Sets torch's number of CPU threads (0: `cores_per_rank`), and disables flash attention where there is no GPU.

    torch's flash attention for CPUs is slow on short sequences: a bf16 step of the demo's model (49 tokens a frame, 16
    videos, one thread) took 0.95 CPU-seconds with it and 0.65 without; in fp32 there was no difference.
    """
    torch.set_num_threads(num_threads or cores_per_rank())
    if not torch.cuda.is_available():
        torch.backends.cuda.enable_flash_sdp(False)  # the flag governs the CPU's kernel too


def use_tf32(enabled: bool) -> None:
    """Whether GPUs may round the factors of fp32 products, in matrices and convolutions alike, to TF32's 10 bits.

    cuDNN's search for the fastest convolution stays off: it may choose another one in each run, and then a resumed run
    would not be the same to the bit; the only convolution of a ViT is a matrix product.
    """
    torch.backends.cuda.matmul.allow_tf32 = enabled
    torch.backends.cudnn.allow_tf32 = enabled


def set_allocator(variables: MutableMapping[str, str]) -> None:
    """Lets torch's GPU allocator grow its segments, so that batches of changing sizes leave no gaps that none fits.

    variables: of the environment. Settings of the user's own stay as they are.
    """
    if "PYTORCH_CUDA_ALLOC_CONF" not in variables:
        variables.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")


def device() -> torch.device:
    """The rank's GPU, or the CPU. Raises OSError where the host has GPUs, but not one for each of its ranks."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", _gpu_of(ranks(), torch.cuda.device_count()))


def _gpu_of(place: Ranks, visible: int) -> int:
    """Number of the rank's own GPU among the `visible` ones.

    A scheduler may show each task only its own GPU, which is then number 0 in every task.
    """
    if visible == 1:
        return 0
    if place.local_rank >= visible:
        raise OSError(
            f"rank {place.rank} has local rank {place.local_rank}, but sees {visible} GPUs; start at most one rank per "
            "GPU, or check CUDA_VISIBLE_DEVICES"
        )
    return place.local_rank


def job_device() -> torch.device | None:
    """`device` in a job that has begun; None elsewhere, where a program may have chosen another."""
    return device() if dist.is_initialized() else None


def use_device() -> None:
    """Selects the rank's device for the calling thread: a new one would use the first GPU."""
    if torch.cuda.is_available():
        torch.cuda.set_device(device())


def start() -> Ranks:
    """Joins the process group (NCCL with GPUs, else gloo) and selects the device. Call once, before any collective.

    Raises OSError if the ranks cannot connect or a rank has no GPU of its own.
    """
    set_allocator(os.environ)  # before anything is allocated
    import deepspeed

    place = ranks()
    gpu = device()
    if "MASTER_ADDR" not in os.environ or "MASTER_PORT" not in os.environ:
        address, port = _master(place)
        os.environ.setdefault("MASTER_ADDR", address)
        os.environ.setdefault("MASTER_PORT", port)
    # DeepSpeed takes LOCAL_RANK for the number of the rank's GPU.
    local_rank = place.local_rank if gpu.index is None else gpu.index
    os.environ.update(RANK=str(place.rank), WORLD_SIZE=str(place.world_size), LOCAL_RANK=str(local_rank))
    os.environ["LOCAL_WORLD_SIZE"] = str(place.local_world_size)
    use_device()
    if not torch.cuda.is_available():
        # A shared-memory all-reduce that the engine would compile on the first start (needs g++, takes a minute).
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    try:
        deepspeed.init_distributed("nccl" if torch.cuda.is_available() else "gloo", verbose=False)
    except dist.DistNetworkError as error:
        if "EADDRINUSE" not in str(error):
            raise
        port = os.environ["MASTER_PORT"]
        raise OSError(
            f"port {port} is in use, perhaps by another training: deepspeed --master_port <another> …"
        ) from None
    if dist.get_backend() == "nccl":
        _control[:] = [dist.new_group(backend="gloo")]
    return place


def is_consequence(error: Exception) -> bool:
    """Whether the error comes from a failed collective, most often because another rank has ended."""
    return isinstance(error, dist.DistError) or any(word in str(error).lower() for word in ("gloo", "nccl"))


def stop() -> None:
    """Leaves the process group, if there is one."""
    _control.clear()
    if dist.is_initialized():
        dist.destroy_process_group()


def barrier() -> None:
    """Waits until every rank has called this."""
    if dist.is_initialized() and dist.get_world_size() > 1:
        dist.barrier()


def sum_over_ranks(values: Sequence[float]) -> list[float]:
    """Element-wise sum in float64, the same list on every rank."""
    total = torch.tensor(list(values), dtype=torch.float64, device=device())
    if dist.is_initialized() and dist.get_world_size() > 1:
        dist.all_reduce(total)
    return total.tolist()


def add_over_ranks(values: torch.Tensor) -> None:
    """Sums a tensor over ranks in place, on its device; a GPU's host does not wait."""
    if dist.is_initialized() and dist.get_world_size() > 1:
        dist.all_reduce(values)


def rows_of_all(rows_BX: torch.Tensor) -> torch.Tensor:
    """The rows (N, X) of all ranks in rank order, without gradient. They lie on the CPU, as do the results.

    Every rank calls it with as many rows. The exchange goes through host memory, so it does not wait for a GPU's queue.
    """
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return rows_BX
    gathered = [torch.empty_like(rows_BX) for _ in range(dist.get_world_size())]
    dist.all_gather(gathered, rows_BX.contiguous(), group=_control[0] if _control else None)
    return torch.cat(gathered)


def start_max(values: Sequence[int]) -> Callable[[], list[int]]:
    """Starts an element-wise maximum over ranks in the background; call the result to wait for it.

    The exchange goes through host memory (gloo), so neither call waits for work that is queued on a GPU.
    """
    maxima = torch.tensor(list(values))
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return maxima.tolist
    work = dist.all_reduce(maxima, dist.ReduceOp.MAX, group=_control[0] if _control else None, async_op=True)

    def finish() -> list[int]:
        work.wait()
        return maxima.tolist()

    return finish


def new_store(limit: timedelta) -> dist.Store | None:
    """Words that ranks leave for each other by key, for threads that must not take part in collectives.

    It has a connection of its own, on which a thread may wait. limit: how long it waits for a key before it raises
    `torch.distributed.DistStoreError`. None in a job of one rank. Collective.
    """
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return None
    address, store = os.environ["MASTER_ADDR"], None
    if dist.get_rank() == 0:
        store = dist.TCPStore(address, 0, is_master=True, timeout=limit, wait_for_workers=False)
    port = from_main(lambda: store.port)  # type: ignore[union-attr]
    return store or dist.TCPStore(address, port, timeout=limit, wait_for_workers=False)


def gather_to_main(value: Any) -> list[Any] | None:
    """Every rank's picklable value, in rank order, on rank 0; None on the others."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return [value]
    gathered: list[Any] | None = [None] * dist.get_world_size() if dist.get_rank() == 0 else None
    dist.gather_object(value, gathered)
    return gathered


def gather_rows(rows: torch.Tensor) -> Iterator[torch.Tensor]:
    """The rows (n, …) of all ranks on rank 0, in rank order and in pieces of at most 64 MiB; nothing on the others.

    rows: on the CPU; ranks may have different numbers of them, or none. Collective: every rank exhausts the iterator.
    """
    found = gather_to_main((tuple(rows.shape), rows.dtype))
    group = _control[0] if _control else None
    if found is None:
        for piece in _pieces(rows):
            dist.send(piece.contiguous(), 0, group)
        return
    yield from _pieces(rows)
    for rank, (shape, dtype) in enumerate(found[1:], start=1):
        for like in _pieces(torch.empty(shape, dtype=dtype, device="meta")):
            piece = torch.empty(like.shape, dtype=dtype)
            dist.recv(piece, rank, group)
            yield piece


def _pieces(rows: torch.Tensor) -> tuple[torch.Tensor, ...]:
    return rows.split(max(1, _PIECE_BYTES // max(1, rows[0].nbytes))) if len(rows) else ()


def compute_together(
    compute: Callable[[torch.Tensor], torch.Tensor], rows: torch.Tensor, batch_size: int
) -> torch.Tensor:
    """compute(rows) of rows (N, …), of which each rank computes some batches; every rank gets all N.

    compute: gives a batch's rows (n, …) on the CPU. Batches do not depend on the number of ranks, so neither do their
    values. All ranks make the same number of calls, as ZeRO-3 needs it: some compute the last batch again. Collective.
    """
    batches = rows.split(batch_size)
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return torch.cat([compute(batch) for batch in batches])
    size, rank = dist.get_world_size(), dist.get_rank()
    own = [compute(batches[min(first + rank, len(batches) - 1)]) for first in range(0, len(batches), size)]
    part = own[0].new_zeros(len(own), batch_size, *own[0].shape[1:])
    for padded, batch in zip(part, own, strict=True):
        padded[: len(batch)] = batch
    parts = [torch.empty_like(part) for _ in range(size)]
    dist.all_gather(parts, part, _control[0] if _control else None)
    return torch.stack(parts, dim=1).flatten(0, 2)[: len(rows)]


def from_main(make: Callable[[], T]) -> T:
    """Calls `make` on rank 0, and returns its value or raises its error on every rank. Collective.

    The value or the error must be picklable.
    """
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return make()
    value: Any = None
    error: Exception | None = None
    if dist.get_rank() == 0:
        try:
            value = make()
        except Exception as raised:  # the other ranks must not wait for a value that never comes
            error = raised
    shared = [value, error]
    dist.broadcast_object_list(shared, src=0)
    if shared[1] is not None:
        raise shared[1]
    return shared[0]
