"""What each rank takes for its device, and which messages between ranks keep away from it."""

from types import SimpleNamespace

import deepspeed
import pytest
import torch
import torch.distributed as dist

from text4vis.cluster import distributed


@pytest.fixture
def gpus(monkeypatch):
    """Pretends that this process sees so many GPUs and is the rank with this local number, of eight on its host."""

    def pretend(visible: int, local_rank: int) -> None:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: visible > 0)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: visible)
        for name, value in {"RANK": 8 + local_rank, "LOCAL_RANK": local_rank, "WORLD_SIZE": 16,
                            "LOCAL_WORLD_SIZE": 8}.items():  # fmt: skip
            monkeypatch.setenv(name, str(value))

    return pretend


@pytest.mark.parametrize(
    ("visible", "local_rank", "name"), [(8, 3, "cuda:3"), (1, 3, "cuda:0"), (1, 0, "cuda:0"), (0, 3, "cpu")]
)
def test_a_task_that_sees_one_gpu_takes_that_one(gpus, visible, local_rank, name):
    gpus(visible, local_rank)
    assert str(distributed.device()) == name


def test_too_few_gpus_are_an_error_that_says_so(gpus):
    gpus(2, 3)
    with pytest.raises(OSError, match="rank 11 has local rank 3, but sees 2 GPUs"):
        distributed.device()


@pytest.fixture
def two_ranks(monkeypatch):
    """Pretends to be one of two ranks under NCCL; gives what was reduced, and in which group."""
    reduced = []

    def all_reduce(values, operation=None, group=None, async_op=False):
        reduced.append((values.device.type, group))
        values.mul_(2)
        return SimpleNamespace(wait=lambda: None)

    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "get_world_size", lambda: 2)
    monkeypatch.setattr(dist, "get_backend", lambda: "nccl")
    monkeypatch.setattr(dist, "all_reduce", all_reduce)
    monkeypatch.setattr(dist, "new_group", lambda backend: f"a group of {backend}")
    monkeypatch.setattr(dist, "all_gather", lambda into, rows, group=None: [each.copy_(rows) for each in into])
    monkeypatch.setattr(deepspeed, "init_distributed", lambda *_, **__: None)
    monkeypatch.setattr(distributed, "_control", [])
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", "1")
    return reduced


def test_requests_travel_over_gloo_and_host_memory_under_nccl(two_ranks):
    distributed.start()
    finish = distributed.start_max([3, 0])
    assert two_ranks == [("cpu", "a group of gloo")] and finish() == [6, 0]
    assert distributed.rows_of_all(torch.tensor([5, 7])).tolist() == [5, 7, 5, 7]


def test_the_allocators_setting_is_the_users_where_there_is_one():
    for given in ({}, {"PYTORCH_ALLOC_CONF": "max_split_size_mb:64"}, {"PYTORCH_CUDA_ALLOC_CONF": "backend:native"}):
        variables = dict(given)
        distributed.set_allocator(variables)
        assert variables == (given or {"PYTORCH_ALLOC_CONF": "expandable_segments:True"})


@pytest.mark.parametrize("enabled", [True, False])
def test_tf32_is_one_switch_for_products_and_convolutions(enabled):
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    distributed.use_tf32(enabled)
    assert torch.backends.cuda.matmul.allow_tf32 is torch.backends.cudnn.allow_tf32 is enabled
    torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before
