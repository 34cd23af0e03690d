"""Benchmarks of the training engine: a step against a bare loop, memory at each ZeRO stage, saving and resuming.

The model has random weights and the frames are synthetic, so nothing is decoded. B videos, V views, T frames.
"""

from __future__ import annotations

import functools
import gc
import os
import shutil
import socket
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.multiprocessing as mp
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint as checkpointed

from benchmarks.figures import Figure, against, compared, forks, interleaved, run_fresh
from shards.files import sync
from text4vis.cluster import distributed
from text4vis.cluster.stop import StopRequest
from text4vis.config.batches import BatchSizes
from text4vis.config.loading import config_from_dict
from text4vis.config.schema import Config, ConfigError
from text4vis.data.loader import Batch
from text4vis.model.tensors import write_tensors
from text4vis.model.video_clip import VideoClip, build_model
from text4vis.saved import checkpoint
from text4vis.training import checkpointing
from text4vis.training.engine import Engine
from text4vis.training.logs import Meter
from text4vis.training.losses import cross_entropy
from text4vis.training.optim import build_optimizer
from text4vis.training.trainer import Trainer

STAGES = (0, 1, 2, 3)
TURNS_A_ROUND = 2  # a turn is a single step, so that all contenders meet the same load
MANY_VIDEOS = 16  # in a step of fewer, what is done once a step counts for more
_WARM_UP_STEPS = 2
_CLASSES = 400


@dataclass(frozen=True)
class EngineSetup:
    """What is trained.

    shards: videos to plan with; their frames are never read. arch: a ViT, as in network.arch. videos: number in a step,
    of 8 frames each. precision: as in engine.precision.
    """

    shards: Path
    arch: str
    videos: int
    precision: str

    def config(self, zero_stage: int) -> Config:
        folder = str(self.shards)
        data = {"train": folder, "val": folder, "synthetic": True, "batch_size": self.videos}
        network = {"arch": self.arch, "init": False, "classifier": "random"}
        engine = {"precision": self.precision, "zero_stage": zero_stage}
        values = {"data": data, "network": network, "engine": engine, "solver": {"epochs": 10**6}}
        return config_from_dict(values, "benchmark")


class BareLoop:
    """The step in plain PyTorch: forward, backward, optimiser. For a bf16 model the optimiser keeps fp32 weights.

    twice: checkpoint activations as the original always does: each block of the visual tower, and again the attention
    and the MLP inside it. Each of these then runs forward three times for one backward pass.
    """

    def __init__(self, config: Config, batch: Batch, classes_CD: Tensor, *, twice: bool = False) -> None:
        torch.manual_seed(config.seed)
        model = build_model(config.network, config.data.num_segments, image_size=config.data.input_size)
        self.model = model.to(distributed.device())
        self.batch, self.classes_CD = batch, classes_CD
        self.optimizer = build_optimizer(self.model, config.solver)
        self.pairs: list[tuple[nn.Parameter, nn.Parameter]] = []  # low precision and fp32
        if config.engine.precision == "bf16":
            for group in self.optimizer.param_groups:
                masters = [nn.Parameter(parameter.detach().clone()) for parameter in group["params"]]
                self.pairs += zip(group["params"], masters, strict=True)
                group["params"] = masters
            self.model.bfloat16()
        if twice:
            _checkpoint_twice(self.model, config.network.arch)

    def __call__(self) -> Tensor:
        """Takes a step; returns its loss."""
        frames_BTCHW = self.batch.frames.to(self.classes_CD.device, non_blocking=True)[:, 0]
        labels_B = self.batch.labels.to(self.classes_CD.device, non_blocking=True)
        loss = cross_entropy(self.model(frames_BTCHW, self.classes_CD), labels_B)
        loss.backward()
        for low, master in self.pairs:
            assert low.grad is not None
            master.grad, low.grad = low.grad.float(), None
        self.optimizer.step()
        self.optimizer.zero_grad()
        for low, master in self.pairs:
            low.data.copy_(master.data)
        return loss.detach()


def _checkpoint_twice(model: VideoClip, arch: str) -> None:
    blocks = getattr(getattr(model.visual, "transformer", None), "resblocks", None)
    if blocks is None:
        raise ConfigError(f"--model: {arch} has no transformer as its visual tower; give a ViT")

    def forward(block: Any, x: Tensor) -> Tensor:
        x = x + checkpointed(block.attention, block.ln_1(x), use_reentrant=True)
        return x + checkpointed(block.mlp, block.ln_2(x), use_reentrant=True)

    for block in blocks:
        inner = functools.partial(forward, block)
        block.forward = lambda x, *_, inner=inner, **__: checkpointed(inner, x, use_reentrant=True)


@dataclass(frozen=True)
class StepTime:
    """Seconds of a step: on the clock, and of the processor, which other programs disturb less."""

    wall: float
    processor: float


def step_times(setup: EngineSetup, rounds: int) -> dict[str, list[StepTime]]:
    """The times of single steps by contender, ours first. Call it in a fresh process."""
    distributed.start()
    trainers = [Trainer(setup.config(stage), Path("unused"), StopRequest(), "never") for stage in (1, 0)]

    def ours(trainer: Trainer) -> Callable[[], object]:
        return functools.partial(trainer.train_step, iter(trainer.train_loader), Meter.new(trainer.device))

    config, classes_CD = trainers[0].config, trainers[0].class_embeddings()
    batch = next(iter(trainers[0].train_loader))
    contenders: dict[str, Callable[[], object]] = {
        "ours": ours(trainers[0]),
        "ours, ZeRO 0": ours(trainers[1]),
        "bare PyTorch loop": BareLoop(config, batch, classes_CD),
        "bare loop, activations checkpointed twice": BareLoop(config, batch, classes_CD, twice=True),
    }
    timed = {name: functools.partial(_step_time, contender) for name, contender in contenders.items()}
    for contender in timed.values():
        for _ in range(_WARM_UP_STEPS):
            contender()
    times = interleaved("step", timed, rounds)
    for trainer in trainers:
        trainer.close()
    distributed.stop()
    return times


def _step_time(take: Callable[[], object]) -> StepTime:
    processor = time.process_time()
    return StepTime(_seconds(take), time.process_time() - processor)


def step(setup: EngineSetup, rounds: int) -> list[Figure]:
    """Our training step against the same step in a bare loop, without and with activations checkpointed twice."""
    times = run_fresh(step_times, setup, rounds * TURNS_A_ROUND)
    overhead = "at most 1.03" if setup.videos >= MANY_VIDEOS else "at most 1.15"
    targets = {"bare PyTorch loop": overhead, "bare loop, activations checkpointed twice": "at most 0.50"}
    wall = {name: [each.wall for each in series] for name, series in times.items()}
    processor = {f"{name}: processor time": [each.processor for each in series] for name, series in times.items()}
    return compared("step", "s", wall, targets) + compared("step", "s", processor)


def _seconds(function: Callable[[], object]) -> float:
    started = time.perf_counter()
    function()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - started


@dataclass(frozen=True)
class MemoryUse:
    """Bytes on a rank between the backward pass and the optimiser's step, for a model of `num_parameters`.

    optimiser: fp32 weights and two moments. rest: other allocations of the engine, such as its buckets.
    """

    num_parameters: int
    parameters: int
    gradients: int
    optimiser: int
    rest: int


def formula(num_parameters: int, stage: int, world_size: int) -> dict[str, float]:
    """Expected bytes on a rank in mixed precision with Adam, by kind.

    A parameter takes 2 bytes, its gradient 2 and its optimiser state 12 (fp32 weight and two moments). The ranks share
    the optimiser state from ZeRO stage 1 on, gradients from stage 2 on and parameters at stage 3. Source: Rajbhandari
    et al., ZeRO (arXiv:1910.02054), sections 3.1 and 5.
    """

    def shared_from(first_stage: int) -> float:
        return num_parameters / (world_size if stage >= first_stage else 1)

    return {"parameters": 2 * shared_from(3), "gradients": 2 * shared_from(2), "optimiser": 12 * shared_from(1)}


def memory_by_stage(arch: str, world_size: int) -> list[MemoryUse]:
    """This rank's memory at each ZeRO stage in bf16, counted in the storages of its tensors. Collective."""
    return [_memory_use(arch, stage, world_size) for stage in STAGES]


def _memory_use(arch: str, stage: int, world_size: int) -> MemoryUse:
    values = {
        "data": {"batch_size": 1, "num_segments": 1},
        "network": {"arch": arch, "init": False},
        "engine": {"zero_stage": stage},
    }
    config = config_from_dict(values, "benchmark")
    before = _storages(_live_tensors())
    model = build_model(config.network, 1, image_size=config.data.input_size)
    num_parameters = sum(parameter.numel() for parameter in model.parameters())
    first = {name: value.detach().clone() for name, value in model.named_parameters()}
    engine = Engine(model, config, BatchSizes.of(config, world_size))
    engine.restore(first.pop, None, 0)
    side = config.data.input_size
    logits_BC = engine(torch.zeros(1, 1, 3, side, side, dtype=torch.uint8), torch.randn(_CLASSES, model.embed_dim))
    engine.backward(logits_BC.square().sum())
    del logits_BC
    gc.collect()

    own = [getattr(parameter, "ds_tensor", parameter) for parameter in model.parameters()]
    averaged = getattr(engine.runtime.optimizer, "averaged_gradients", {})  # ZeRO-1 to 3
    gradients = [tensor for group in averaged.values() for tensor in group or ()]
    gradients += [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    states = engine.runtime.basic_optimizer.state
    moments = [value for state in states.values() for value in state.values() if isinstance(value, Tensor)]
    kinds = [_storages(own), _storages(gradients), _storages([*states, *moments])]
    named = functools.reduce(lambda known, kind: known | kind, kinds)
    foreign = before | _storages(model.text.module.state_dict().values()) | named
    rest = {place: size for place, size in _storages(_live_tensors()).items() if place not in foreign}
    engine.step()
    return MemoryUse(num_parameters, *(sum(kind.values()) for kind in (*kinds, rest)))


def _live_tensors() -> list[Tensor]:
    gc.collect()
    return [thing for thing in gc.get_objects() if issubclass(type(thing), Tensor)]


def _storages(tensors: Iterable[Tensor]) -> dict[int, int]:
    """Bytes of the tensors' storages by address: a storage that several tensors share counts once."""
    storages = [tensor.untyped_storage() for tensor in tensors]
    return {storage.data_ptr(): storage.nbytes() for storage in storages}


def memory(arch: str, ranks: Iterable[int]) -> list[Figure]:
    """Bytes on the rank that uses most at each ZeRO stage, against `formula`."""
    figures = []
    for world_size in ranks:
        by_rank = run_ranks(world_size, memory_by_stage, arch, world_size)
        for stage, uses in zip(STAGES, zip(*by_rank, strict=True), strict=True):
            expected = formula(uses[0].num_parameters, stage, world_size)
            for kind in ("parameters", "gradients", "optimiser", "rest"):
                megabytes = [max(getattr(use, kind) for use in uses) / 1e6]
                ratios = against(megabytes, [expected[kind] / 1e6]) if kind in expected else None
                what = f"{world_size} ranks, ZeRO {stage}: {kind}" + (" / formula" if ratios else "")
                figures.append(Figure("memory", what, "MB", megabytes, ratios))
    return figures


def run_ranks(world_size: int, function: Callable[..., Any], *arguments: Any) -> list[Any]:
    """Calls function(*arguments) in `world_size` new processes, the ranks of a job; returns results in rank order."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    everywhere = {"WORLD_SIZE": world_size, "LOCAL_WORLD_SIZE": world_size, "MASTER_PORT": port}
    results = forks().SimpleQueue()
    mp.start_processes(
        _run_rank, (everywhere, results, function, arguments), nprocs=world_size, start_method="forkserver"
    )
    return [value for _, value in sorted((results.get() for _ in range(world_size)), key=lambda pair: pair[0])]


def _run_rank(
    rank: int, everywhere: dict[str, int], results: Any, function: Callable[..., Any], arguments: tuple[Any, ...]
) -> None:
    place = everywhere | {"RANK": rank, "LOCAL_RANK": rank}
    os.environ.update({name: str(value) for name, value in place.items()}, MASTER_ADDR="127.0.0.1")
    distributed.start()
    distributed.use_cores(0)
    results.put((rank, function(*arguments)))
    distributed.stop()


@dataclass(frozen=True)
class SaveTimes:
    """Seconds of one round on a rank: of a step; that a save holds the training; of the step beside its writing; of a
    save until it is on disk, without a step; of one in which rank 0 gathers and writes all while the others wait."""

    step: float
    held: float
    beside: float
    on_disk: float
    gathered: float


def save_times(setup: EngineSetup, output: Path, rounds: int) -> list[SaveTimes]:
    """Trains and saves at ZeRO-1, two steps and three saves a round. Collective."""
    with Trainer(setup.config(1), output, StopRequest(), "never") as trainer:
        step = functools.partial(trainer.train_step, iter(trainer.train_loader), Meter.new(trainer.device))

        def save_and_wait() -> None:
            trainer.save()
            trainer.saves.finish()

        def timed_round() -> SaveTimes:
            plain = _seconds(step)
            distributed.barrier()
            held, beside = _seconds(trainer.save), _seconds(step)
            trainer.saves.finish()
            gathered = _seconds(lambda: _save_gathered(trainer.engine, output / "gathered"))
            return SaveTimes(plain, held, beside, _seconds(save_and_wait), gathered)

        timed_round()  # its pages of memory are new
        return [timed_round() for _ in range(rounds)]


def _save_gathered(engine: Engine, folder: Path) -> None:
    """Gathers whole tensors, file by file, on rank 0, which writes them and reads them again for their hash."""
    main = distributed.ranks().is_main
    folder.mkdir(parents=True, exist_ok=True)
    trainable = [pair for pair in engine.model.named_parameters() if pair[1].requires_grad]
    for key in (None, *engine.moment_names):
        moments = ((name, engine.whole(parameter, str(key))) for name, parameter in trainable)
        own = {n: whole.cpu().clone() for n, whole in (engine.named_weights() if key is None else moments) if main}
        if main:
            write_tensors(folder / f"{key}.safetensors", own)
            checkpoint.sha256_of(folder / f"{key}.safetensors")
            sync(folder / f"{key}.safetensors")
    distributed.barrier()


@dataclass(frozen=True)
class ResumeTimes:
    """Seconds from the start of the process to the end of its first step, and to verify and load.

    size: bytes of the checkpoint.
    """

    first_step: float
    load: float
    size: int


def resume_times(setup: EngineSetup, output: Path, started: float) -> ResumeTimes:
    """Trains one step of the run in `output`, resumed if it exists, and saves it. Call it in a fresh process.

    started: monotonic time at which that process was started.
    """
    distributed.start()
    with Trainer(setup.config(1), output, StopRequest(), "auto") as trainer:
        _seconds(functools.partial(trainer.train_step, iter(trainer.train_loader), Meter.new(trainer.device)))
        first_step = time.monotonic() - started
        trainer.save()
        trainer.saves.finish()
        folder = checkpoint.latest(output)
        assert folder is not None
        load = _seconds(lambda: checkpointing.load(trainer.engine, folder, checkpoint.verify(folder)))
    distributed.stop()
    return ResumeTimes(first_step, load, sum(file.stat().st_size for file in folder.iterdir()))


def resume(setup: EngineSetup, work: Path, rounds: int) -> list[Figure]:
    """Saving beside training on two ranks; loading, and starting again after a stop, on one. Files are read from the
    page cache."""
    output = work / "resume"
    shutil.rmtree(output, ignore_errors=True)
    by_rank = run_ranks(2, save_times, setup, output, rounds)
    shutil.rmtree(output)
    slowest = {key: [max(times) for times in zip(*([getattr(t, key) for t in rank] for rank in by_rank), strict=True)]
               for key in SaveTimes.__dataclass_fields__}  # fmt: skip

    def run() -> ResumeTimes:
        return run_fresh(resume_times, setup, output, time.monotonic(), imported=False)

    run()  # starts the run that the next calls resume
    taken = interleaved("resume", {"resume": run}, rounds)["resume"]
    shutil.rmtree(output)
    size, step, held = f"{taken[0].size / 1e6:,.0f} MB", slowest["step"], slowest["held"]
    old, beside = slowest["gathered"], slowest["beside"]
    return [
        Figure("resume", "2 ranks, ZeRO 1: a step", "s", step),
        Figure("resume", f"a save of {size} holds the training / a step", "s", held, against(held, step)),
        Figure("resume", "the same / a save that gathers on rank 0", "s", held, against(held, old), "at most 0.10"),
        Figure("resume", "a step beside the writing / a step", "s", beside, against(beside, step)),
        Figure("resume", "a save until it is on disk", "s", slowest["on_disk"], against(slowest["on_disk"], old)),
        Figure("resume", f"check and load {size}", "s", [value.load for value in taken]),
        Figure("resume", "from a new process to its first step done", "s", [value.first_step for value in taken]),
    ]
