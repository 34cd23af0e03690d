"""The formula of a rank's memory against the tensors that the engine has."""

import pytest
import torch
from engine_states import Model, as_told, configuration, start, take_step
from tiny import tiny_network

from text4vis.config.batches import BatchSizes
from text4vis.config.schema import Config, EngineConfig, SolverConfig
from text4vis.model.adapters import add_adapters
from text4vis.model.video_clip import build_model
from text4vis.training.memory import StateMemory

pytestmark = pytest.mark.usefixtures("one_rank")


@pytest.mark.parametrize(("precision", "stage"), [("fp32", 0), ("fp32", 1), ("bf16", 1), ("bf16", 3)])
@pytest.mark.parametrize("ema", [0.0, 0.9])
def test_the_optimisers_state_has_the_size_that_the_formula_says(precision, stage, ema):
    engine = start(precision, stage, "none", "adamw", ema=ema)
    take_step(engine, 1)
    masters = engine._masters()
    own = set(engine.model.parameters())
    found = sum(4 * master.numel() for master in masters if master not in own)
    states = engine.runtime.basic_optimizer.state
    found += sum(4 * value.numel() for master in masters for value in states[master].values() if value.ndim)
    config = configuration(precision, stage, "none", "adamw", ema=ema)
    with as_told():
        memory = StateMemory.of(Model(), config, BatchSizes.of(config, 1), 1)
    assert memory.optimizer <= found <= memory.optimizer + 100  # partitions are rounded up
    assert (memory.total, memory.trainable) == (5 * 7 + 7 + 49 + 7 + 7 * 3 + 3 + 1, 5 * 7 + 7 + 7 * 3 + 3 + 1)


@pytest.mark.parametrize(("stage", "weights", "gradients", "optimizer"), [
    (0, 2, 2, 16), (1, 2, 2, 4), (2, 2, 0.5, 4), (3, 0.5, 0.5, 4),
])  # fmt: skip
def test_ranks_share_what_the_stage_cuts(stage, weights, gradients, optimizer):
    config = Config(solver=SolverConfig(ema=0.9), engine=EngineConfig(zero_stage=stage))
    memory = StateMemory.of(torch.nn.Linear(9, 10), config, BatchSizes.of(config, 4), 4)
    assert (memory.weights, memory.gradients, memory.optimizer) == (100 * weights, 100 * gradients, 100 * optimizer)


@pytest.mark.slow
def test_an_adapter_needs_the_state_of_its_own_numbers_alone(tmp_path):
    network = tiny_network(tmp_path, adapter="lora", adapter_rank=2, sim_header="None")
    model = build_model(network, 4)
    config = Config(network=network)
    whole = StateMemory.of(model, config, BatchSizes.of(config, 1), 1)
    add_adapters(model, network)
    adapted = StateMemory.of(model, config, BatchSizes.of(config, 1), 1)
    per_block = 2 * ((64 + 192) + (64 + 64) + (64 + 256) + (256 + 64))  # rank x (in + out) of the four layers
    assert adapted.trainable == 2 * per_block + 1 and adapted.total == whole.total + 2 * per_block
    assert adapted.optimizer == 12 * adapted.trainable and whole.optimizer == 12 * whole.total
    assert f"{adapted.trainable:,} of {adapted.total:,}" in adapted.in_words()["trainable parameters"]
