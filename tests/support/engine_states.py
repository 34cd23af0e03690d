"""Starts one engine after another and moves their state between them; prints the differences as JSON.

A model of odd sizes with a frozen part and a parameter of one number takes two steps at each ZeRO stage. Its state must
come out whole, be in the files of a save, go into every other stage unchanged, and give the same third step there. Then
comes a step whose loss is not a number: it must change nothing. With sgd a larger state shows what a rank reads when it
goes on. At last one rank cannot write a checkpoint.
"""

import itertools
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from unittest.mock import patch

import torch
from safetensors.torch import load_file
from torch import nn

from text4vis.cluster import distributed
from text4vis.config.batches import BatchSizes
from text4vis.config.schema import Config, DataConfig, EngineConfig, SolverConfig
from text4vis.saved.checkpoint import CheckpointError, State, latest, verify
from text4vis.training import engine, memory, runtime_config
from text4vis.training.checkpointing import Saves, load
from text4vis.training.engine import EMA, Engine

KINDS = [(0, "none"), (1, "none"), (2, "none"), (3, "none"), (2, "optimizer"), (3, "parameters")]


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.visual = nn.Linear(5, 7)
        self.frozen = nn.Linear(7, 7).requires_grad_(False)
        self.head = nn.Linear(7, 3)
        self.logit_scale = nn.Parameter(torch.ones(1))
        self.register_buffer("offset", torch.full((3,), 0.25))

    def forward(self, inputs):
        hidden = torch.tanh(self.frozen(self.visual(inputs.to(self.visual.weight.dtype))))
        return self.logit_scale.float() * self.head(hidden).float() + self.offset


def configuration(precision: str, stage: int, offload: str, optim: str, **solver: object) -> Config:
    return Config(
        data=DataConfig(batch_size=4),
        solver=SolverConfig(lr=1e-2, clip_ratio=0.5, clip_gradient=0.5, optim=optim, weight_decay=0.1, **solver),
        engine=EngineConfig(precision=precision, zero_stage=stage, offload=offload),
    )


@contextmanager
def as_told() -> Iterator[None]:
    """Within it one rank, too, uses the ZeRO stage that it is told, so that tests of one process meet every kind."""
    with ExitStack() as patches:
        for module in (engine, memory, runtime_config):
            patches.enter_context(patch.object(module, "used_stage", lambda config, sizes: config.engine.zero_stage))
        yield


def start(precision: str, stage: int, offload: str, optim: str, state: dict | None = None, **solver: object) -> Engine:
    config = configuration(precision, stage, offload, optim, **solver)
    model = Model()
    if state is not None:
        model.load_state_dict(state["weights"])
    first = {name: value.detach().clone() for name, value in model.named_parameters() if value.requires_grad}
    with as_told():
        started = Engine(model, config, BatchSizes.of(config, distributed.ranks().world_size))
    moments = None if state is None else lambda key, name: state[key][name]
    started.restore(first.__getitem__, moments, 0 if state is None else 2)
    return started


def take_step(started, number: int, factor: float = 1.0) -> tuple[float, bool]:
    """The mean loss over ranks, and whether the weights changed."""
    started.set_rates(lambda peak: peak)
    noise = torch.Generator().manual_seed(100 * number + distributed.ranks().rank)
    loss = started(torch.randn(4, 5, generator=noise)).square().mean() * factor
    started.backward(loss)
    applied = started.step()()
    return distributed.sum_over_ranks([loss.item()])[0], applied


def state_of(started) -> dict[str, dict[str, torch.Tensor]]:
    state = {"weights": {name: value.clone() for name, value in started.named_weights()}}
    trainable = [(name, parameter) for name, parameter in started.model.named_parameters() if parameter.requires_grad]
    for key in started.moment_names:
        state[key] = {name: started.whole(parameter, key).float().clone() for name, parameter in trainable}
    return state


def distance(ours: dict, other: dict) -> float:
    assert ours.keys() == other.keys() and all(ours[key].keys() == other[key].keys() for key in ours)
    return max(float((ours[key][name] - other[key][name]).abs().max()) for key in ours for name in ours[key])


def saved_by(started, output: Path) -> tuple[dict[str, dict[str, torch.Tensor]], dict[str, torch.Tensor]]:
    """What the files of a save hold that all ranks have written: the state, and the best weights."""
    saves = Saves(started, output, 1)
    saves.start(State(2, 8, 4, "f", {}, ["a"]), best=True)
    saves.finish()
    saves.close()
    folder = latest(output)
    verify(folder)
    verify(folder.parent / "best")
    state = {name: load_file(folder / f"{name}.safetensors") for name in ("model", *started.moment_names)}
    return {"weights": state.pop("model"), **state}, load_file(folder.parent / "best" / "model.safetensors")


def failure_of_the_last_rank(started, output: Path) -> list[str]:
    """What each rank is told of a save whose last part the disk does not take."""
    saves = Saves(started, output, 1)
    write = os.pwrite
    if distributed.ranks().rank == distributed.ranks().world_size - 1:
        os.pwrite = lambda *_: os.fstat(999)
    saves.start(State(3, 12, 4, "f", {}, ["a"]))
    told = ""
    try:
        saves.wait()
    except CheckpointError as error:
        told = str(error)
    os.pwrite = write
    saves.close()
    return distributed.gather_to_main(told) or []


def share_read(stage: int, output: Path) -> float:
    """The share of a moment's file whose bytes this rank reads when it goes on at that stage; rounded up to pages."""
    torch.manual_seed(0)
    model = Model()
    model.head = nn.Linear(7, 1 << 20)
    config = configuration("fp32", stage, "none", "sgd")
    first = {name: value.detach().clone() for name, value in model.named_parameters()}
    started = Engine(model, config, BatchSizes.of(config, distributed.ranks().world_size))
    started.restore(first.__getitem__, None, 0)
    saves = Saves(started, output, 1)
    saves.start(State(2, 8, 4, "f", {}, ["a"]))
    saves.finish()
    saves.close()
    path, resident = latest(output) / "momentum_buffer.safetensors", []
    started.restore_loss_scaler = lambda _: resident.append(_resident_bytes(path))  # when all else is loaded
    load(started, path.parent, verify(path.parent))
    return resident[0] / path.stat().st_size


def _resident_bytes(path: Path) -> int:
    """How much of a file that this process has mapped it has read."""
    _, mapping = Path("/proc/self/smaps").read_text().split(f"{path}\n")
    return 1024 * int(mapping.split("Rss:")[1].split()[0])


def main() -> None:
    distributed.start()
    precision, optim = sys.argv[1:]
    output = Path(distributed.from_main(tempfile.mkdtemp))
    results = []
    whole = {}
    for kind in KINDS:
        started = start(precision, *kind, optim, ema=0.3)
        begun = state_of(started)
        losses = [take_step(started, number)[0] for number in (1, 2)]
        middle = state_of(started)
        written, best = saved_by(started, output / f"{kind}")
        loss, applied = take_step(started, 3)
        last = state_of(started)
        _, applied_wrong = take_step(started, 4, factor=float("nan"))
        whole[kind] = (begun, middle, loss, last)
        results.append({
            "kind": kind, "losses": [*losses, loss], "applied": applied, "applied_wrong": applied_wrong,
            "written": distance(written, middle),
            "best": distance({EMA: best}, {EMA: middle["weights"] | middle[EMA]}),
            "moved": distance(middle, begun), "changed_by_wrong": distance(state_of(started), last),
        })  # fmt: skip
    for source, target in itertools.product(KINDS, KINDS):
        _, middle, loss, last = whole[source]
        started = start(precision, *target, optim, middle, ema=0.3)
        kept = distance(state_of(started), middle)
        again, _ = take_step(started, 3)
        results.append({
            "from": source, "to": target, "kept": kept, "loss": again - loss, "last": distance(state_of(started), last),
        })  # fmt: skip
    if optim == "sgd":
        reads = {stage: share_read(stage, output / f"read {stage}") for stage in (1, 3)}
        results.append({"reads": distributed.gather_to_main(reads)})
    results.append({"failure": failure_of_the_last_rank(started, output / "full")})
    if distributed.ranks().is_main:
        shutil.rmtree(output)
        print(json.dumps(results))
    distributed.stop()


if __name__ == "__main__":
    main()
