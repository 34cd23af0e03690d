"""The moving average of the weights: its formula at every stage, what computes with it, and that training goes on."""

import pytest
import torch
from engine_states import KINDS, Model, distance, start, state_of, take_step

from text4vis.training.engine import EMA

pytestmark = pytest.mark.usefixtures("one_rank")

DECAY = 0.3  # beyond the second update the warm-up's (1 + n) / (10 + n) is smaller no more
CASES = [*(("fp32", *kind) for kind in KINDS), *(("bf16", *kind) for kind in (KINDS[0], KINDS[1], KINDS[3]))]
# Kept with torch, as a copy, cut flat, cut by parameter.
QUICK = ("fp32", *KINDS[0]), ("bf16", *KINDS[0]), ("bf16", *KINDS[1]), ("fp32", *KINDS[3])
EACH = pytest.mark.parametrize(
    ("precision", "stage", "offload"),
    [pytest.param(*case, marks=[] if case in QUICK else [pytest.mark.long]) for case in CASES],
)


def launched(precision, stage, offload, state=None):
    return start(precision, stage, offload, "adamw", state, ema=DECAY)


@EACH
def test_the_average_follows_the_updates_by_its_formula(precision, stage, offload):
    engine = launched(precision, stage, offload)
    averages = {name: value for name, value in state_of(engine)["weights"].items() if name in state_of(engine)[EMA]}
    assert distance({EMA: state_of(engine)[EMA]}, {EMA: averages}) == 0, "it begins as the weights"
    for update in range(1, 5):
        take_step(engine, update)
        take_step(engine, 9, float("nan"))  # a step that is skipped does not count
        decay = min(DECAY, (1 + update) / (10 + update))
        weights = state_of(engine)["weights"]
        averages = {name: value.lerp(weights[name], 1 - decay) for name, value in averages.items()}
        assert distance({EMA: state_of(engine)[EMA]}, {EMA: averages}) < 1e-7
    results = dict(engine.named_results())
    assert all(results[name].equal(value) for name, value in state_of(engine)[EMA].items())
    assert results.keys() == weights.keys() and results["frozen.weight"].equal(weights["frozen.weight"])
    assert engine.result(engine.model.frozen.weight).equal(weights["frozen.weight"])


@EACH
def test_a_look_at_the_average_computes_with_it_and_leaves_no_trace(precision, stage, offload):
    engine, other = launched(precision, stage, offload), launched(precision, stage, offload)
    for number in (1, 2):
        take_step(engine, number)
        take_step(other, number)
    before = state_of(engine)
    inputs = torch.randn(4, 5, generator=torch.Generator().manual_seed(5))
    with engine.averaged(), torch.no_grad():
        found = engine.model(inputs)
        assert distance(state_of(engine), before) == 0, "a checkpoint may be saved within"
    plain = Model()
    plain.load_state_dict(dict(engine.named_results()))
    expected = plain.to(engine.model.head.weight.dtype)(inputs)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)
    with torch.no_grad():
        assert not torch.allclose(engine.model(inputs), found, atol=1e-4)
    assert distance(state_of(engine), before) == 0
    for number in (3, 4):
        assert take_step(engine, number) == take_step(other, number)
    assert distance(state_of(engine), state_of(other)) == 0


@EACH
def test_a_restored_average_goes_on_to_the_bit(precision, stage, offload):
    engine = launched(precision, stage, offload)
    for number in (1, 2):
        take_step(engine, number)
    middle = state_of(engine)
    take_step(engine, 3)
    again = launched(precision, stage, offload, middle)
    assert distance(state_of(again), middle) == 0
    take_step(again, 3)
    assert distance(state_of(again), state_of(engine)) == 0


def test_without_it_nothing_is_kept():
    engine = start("fp32", 1, "none", "adamw")
    take_step(engine, 1)
    assert engine.moment_names == ("exp_avg", "exp_avg_sq")
    with engine.averaged():
        weight = state_of(engine)["weights"]["head.weight"]
        assert dict(engine.named_results())["head.weight"].equal(weight)
        assert engine.result(engine.model.head.weight).equal(weight)
