"""Starts one engine after another and moves their state between them; prints the differences as JSON.

A model of odd sizes with a frozen part and a parameter of one number takes two steps at each ZeRO stage. Its state must
come out whole, go into every other stage unchanged, and give the same third step there. Then comes a step whose loss is
not a number: it must change nothing.
"""

import itertools
import json
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from unittest.mock import patch

import torch
from torch import nn

from text4vis.cluster import distributed
from text4vis.config.batches import BatchSizes
from text4vis.config.schema import Config, DataConfig, EngineConfig, SolverConfig
from text4vis.training import engine, memory, runtime_config
from text4vis.training.engine import Engine

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
    for key in started.moment_names:
        state[key] = {name: value.clone() for name, value in started.named_moments(key)}
    return state


def distance(ours: dict, other: dict) -> float:
    assert ours.keys() == other.keys() and all(ours[key].keys() == other[key].keys() for key in ours)
    return max(float((ours[key][name] - other[key][name]).abs().max()) for key in ours for name in ours[key])


def main() -> None:
    distributed.start()
    precision, optim = sys.argv[1:]
    results = []
    whole = {}
    for kind in KINDS:
        started = start(precision, *kind, optim)
        begun = state_of(started)
        losses = [take_step(started, number)[0] for number in (1, 2)]
        middle = state_of(started)
        loss, applied = take_step(started, 3)
        last = state_of(started)
        _, applied_wrong = take_step(started, 4, factor=float("nan"))
        whole[kind] = (begun, middle, loss, last)
        results.append({
            "kind": kind, "losses": [*losses, loss], "applied": applied, "applied_wrong": applied_wrong,
            "moved": distance(middle, begun), "changed_by_wrong": distance(state_of(started), last),
        })  # fmt: skip
    for source, target in itertools.product(KINDS, KINDS):
        _, middle, loss, last = whole[source]
        started = start(precision, *target, optim, middle)
        kept = distance(state_of(started), middle)
        again, _ = take_step(started, 3)
        results.append({
            "from": source, "to": target, "kept": kept, "loss": again - loss, "last": distance(state_of(started), last),
        })  # fmt: skip
    if distributed.ranks().is_main:
        print(json.dumps(results))
    distributed.stop()


if __name__ == "__main__":
    main()
