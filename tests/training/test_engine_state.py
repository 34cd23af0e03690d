"""The engine of one rank in this process: it computes what plain torch does, and its state comes and goes whole."""

import json
from types import SimpleNamespace

import pytest
import torch
from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler
from engine_states import KINDS, Model, configuration, distance, start, state_of, take_step

from text4vis.config.batches import BatchSizes
from text4vis.config.schema import Config, ConfigError, DataConfig, EngineConfig, SolverConfig
from text4vis.training.engine import Engine, share_of_rank
from text4vis.training.optim import build_optimizer
from text4vis.training.runtime_config import engine_config

pytestmark = pytest.mark.usefixtures("one_rank")

CLIP = 0.5  # solver.clip_gradient of engine_states
PLACES = KINDS[0], KINDS[1], KINDS[3]  # of the state: with torch, cut flat, cut by parameter
PRECISIONS = [*(("fp32", *kind) for kind in KINDS), *(("bf16", *kind) for kind in PLACES),
              ("amp", *KINDS[0]), ("amp", *KINDS[1])]  # fmt: skip


def inputs(number: int) -> torch.Tensor:
    """The micro batch of step `number`, as `take_step` draws it."""
    return torch.randn(4, 5, generator=torch.Generator().manual_seed(100 * number))


class Plain:
    """The same training without an engine. rate: factor of the peak learning rates."""

    def __init__(self, optim: str = "adamw") -> None:
        self.model = Model()
        self.optimizer = build_optimizer(self.model, configuration("fp32", 0, "none", optim).solver)

    def step(self, *batches: torch.Tensor, rate: float = 1.0) -> tuple[float, float]:
        """The mean loss and the norm of all gradients before they are clipped."""
        for group in self.optimizer.param_groups:
            group["lr"] = rate * group["base_lr"]
        self.optimizer.zero_grad()
        loss = torch.stack([self.model(batch).square().mean() for batch in batches]).mean()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), CLIP)
        self.optimizer.step()
        return loss.item(), norm.item()

    def state(self) -> dict[str, dict[str, torch.Tensor]]:
        names = {parameter: name for name, parameter in self.model.named_parameters()}
        state = {"weights": {name: value.detach().clone() for name, value in self.model.state_dict().items()}}
        for parameter, kept in self.optimizer.state.items():
            for key, value in kept.items():
                if key != "step":
                    state.setdefault(key, {})[names[parameter]] = value.clone()
        return state


@pytest.mark.parametrize("optim", ["adamw", "sgd"])
@pytest.mark.parametrize(("stage", "offload"), KINDS)
def test_every_kind_of_engine_trains_as_torch_does(stage, offload, optim):
    engine, plain = start("fp32", stage, offload, optim), Plain(optim)
    first = state_of(engine)
    assert all(first["weights"][name].equal(value) for name, value in plain.state()["weights"].items())
    assert first.keys() - {"weights"} == ({"exp_avg", "exp_avg_sq"} if optim == "adamw" else {"momentum_buffer"})
    assert all(not value.any() for key in engine.moment_names for value in first[key].values())
    for number in (1, 2, 3):
        loss, applied = take_step(engine, number)
        expected_loss, expected_norm = plain.step(inputs(number))
        assert applied is True and loss == pytest.approx(expected_loss, rel=1e-5)
        assert engine.grad_norm() == pytest.approx(expected_norm, rel=1e-5)
    assert distance(state_of(engine), plain.state()) < 1e-6
    assert state_of(engine)["weights"]["frozen.weight"].equal(first["weights"]["frozen.weight"])
    assert not any(
        value.requires_grad for kept in engine.runtime.basic_optimizer.state.values() for value in kept.values()
    )


@pytest.mark.slow
@pytest.mark.parametrize(("precision", "stage", "offload"), PRECISIONS)
def test_a_restored_engine_goes_on_to_the_bit(stage, offload, precision):
    engine = start(precision, stage, offload, "adamw")
    for number in (1, 2):
        take_step(engine, number)
    middle = state_of(engine)
    loss, _ = take_step(engine, 3)
    last = state_of(engine)
    again = start(precision, stage, offload, "adamw", middle)
    assert distance(state_of(again), middle) == 0
    assert take_step(again, 3)[0] == loss and distance(state_of(again), last) == 0


@pytest.mark.slow
@pytest.mark.parametrize(("precision", "stage", "offload"), [each for each in PRECISIONS if each[2] == "none"])
def test_a_step_that_is_not_finite_changes_nothing_and_leaves_no_trace(stage, offload, precision):
    """The steps that follow are those of an engine that never met it."""
    engine, other = (start(precision, stage, offload, "adamw") for _ in range(2))
    take_step(engine, 1)
    take_step(other, 1)
    before = state_of(engine)
    for factor in (float("nan"), float("inf")):
        _, applied = take_step(engine, 2, factor)
        assert applied is False and distance(state_of(engine), before) == 0
    for number in (3, 4):
        assert take_step(engine, number) == take_step(other, number)
    assert distance(state_of(engine), state_of(other)) == 0


@pytest.mark.slow
@pytest.mark.parametrize("wrong", [None, 0, 1])
@pytest.mark.parametrize(("stage", "offload"), PLACES)
def test_a_step_is_the_mean_of_its_micro_batches(stage, offload, wrong):
    """wrong: the micro batch of a step before whose loss is not a number; that step changes nothing."""
    engine, plain = start("fp32", stage, offload, "adamw", grad_accumulation_steps=2), Plain()
    if wrong is not None:
        _, applied = [take_step(engine, 9, float("nan") if wrong == micro else 1.0) for micro in (0, 1)][1]
        assert not applied and distance(state_of(engine), state_of(start("fp32", 0, "none", "adamw"))) == 0
    for number in (1, 3):
        losses = [take_step(engine, number)[0]]
        before = state_of(engine)
        loss, applied = take_step(engine, number + 1)
        losses.append(loss)
        expected, _ = plain.step(inputs(number), inputs(number + 1))
        assert applied is True and sum(losses) / 2 == pytest.approx(expected, rel=1e-5)
        assert distance(state_of(engine), before) > 1e-3, "the weights change with the last micro batch"
    assert distance(state_of(engine), plain.state()) < 1e-6


def test_each_group_has_its_rate():
    engine, plain = start("fp32", 1, "none", "adamw"), Plain()
    assert engine.rates() == {"clip": 5e-3, "head": 1e-2}
    engine.set_rates(lambda peak: 0.3 * peak)
    assert engine.rates() == pytest.approx({"clip": 1.5e-3, "head": 3e-3})
    loss = engine(inputs(1)).square().mean()
    engine.backward(loss)
    assert engine.step()()
    plain.step(inputs(1), rate=0.3)
    assert distance(state_of(engine), plain.state()) < 1e-6


@pytest.mark.slow
@pytest.mark.parametrize(("stage", "offload"), PLACES)
def test_what_is_used_is_the_weight_rounded(stage, offload):
    engine = start("bf16", stage, offload, "adamw")
    take_step(engine, 1)
    weights = state_of(engine)["weights"]
    for name, parameter in engine.model.named_parameters():
        whole = engine.whole(parameter)
        assert not whole.requires_grad and whole.float().equal(weights[name])
        assert engine.used(parameter).dtype == parameter.dtype
        assert engine.used(parameter).equal(weights[name].to(parameter.dtype))


@pytest.mark.slow
@pytest.mark.parametrize(("optim", "moments"), [("adamw", 2), ("sgd", 1)])
@pytest.mark.parametrize("stage", [0, 3])
def test_the_size_of_the_state_is_that_of_its_tensors(stage, optim, moments):
    engine = start("fp32", stage, "none", optim)
    model = Model()
    numels = {
        trains: sum(p.numel() for p in model.parameters() if p.requires_grad is trains) for trains in (False, True)
    }
    assert engine.state_bytes() == (4 * (numels[False] + numels[True]), 4 * moments * numels[True])


@pytest.mark.parametrize("numel", [1, 6, 7, 12])
@pytest.mark.parametrize("ranks", [1, 2, 3, 5])
def test_the_shares_of_all_ranks_are_the_tensor(numel, ranks):
    value = torch.arange(1.0, numel + 1).reshape(-1, 1)
    share = -(-numel // ranks)
    shares = [share_of_rank(value, share, rank) for rank in range(ranks)]
    assert all(own.shape == (share,) for own in shares)
    assert torch.cat(shares)[:numel].equal(value.flatten()) and not torch.cat(shares)[numel:].any()


def test_deepspeeds_dictionary_follows_from_ours():
    solver = SolverConfig(grad_accumulation_steps=2, clip_gradient=1.0)
    config = Config(
        data=DataConfig(batch_size=4), solver=solver,
        engine=EngineConfig(precision="fp16", zero_stage=3, offload="parameters"),
    )  # fmt: skip
    derived = engine_config(config, BatchSizes.of(config, 3), 1000)
    sizes = "train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "train_batch_size"
    assert [derived[key] for key in sizes] == [4, 2, 24] and derived["gradient_clipping"] == 1.0
    assert derived["fp16"]["enabled"] and not derived["bf16"]["enabled"]
    zero = derived["zero_optimization"]
    assert zero["stage"] == 3 and zero["offload_param"]["device"] == zero["offload_optimizer"]["device"] == "cpu"
    assert derived["steps_per_print"] > 10**8, "DeepSpeed prints no lines of its own"


def derived_for(precision: str, stage: int, ranks: int = 2, offload: str = "none", numel: int = 10**10, **given):
    """DeepSpeed's dictionary. given: several_hosts, or of the solver."""
    several_hosts = given.pop("several_hosts", False)
    config = configuration(precision, stage, offload, "adamw", **given)
    return engine_config(config, BatchSizes.of(config, ranks), numel, several_hosts=several_hosts)


def test_a_bucket_is_no_larger_than_the_model_nor_than_deepspeeds_own():
    def bucket(numel: int, **given) -> int:
        return derived_for("bf16", 1, numel=numel, **given)["zero_optimization"]["reduce_bucket_size"]

    assert [bucket(numel) for numel in (0, 1, 1000, 5 * 10**8, 10**10)] == [1, 1, 1000, 5 * 10**8, 5 * 10**8]
    assert [bucket(numel, several_hosts=True) for numel in (1000, 10**8)] == [1000, 5 * 10**7], "several to overlap"


def test_gradients_are_reduced_within_the_backward_pass_between_hosts_and_at_stage_3():
    def overlaps(stage: int, several_hosts: bool) -> bool:
        return derived_for("bf16", stage, several_hosts=several_hosts)["zero_optimization"]["overlap_comm"]

    assert [overlaps(stage, False) for stage in (0, 1, 2, 3)] == [False, False, False, True]
    assert [overlaps(stage, True) for stage in (0, 1, 2, 3)] == [False, True, True, True]


@pytest.mark.parametrize(
    ("precision", "ranks", "offload", "stages"),
    [("fp32", 1, "none", [0, 0, 0, 3]), ("fp32", 2, "none", [0, 1, 2, 3]), ("bf16", 1, "none", [0, 1, 2, 3]),
     ("fp16", 1, "none", [0, 1, 2, 3]), ("fp32", 1, "optimizer", [0, 1, 2, 3]), ("amp", 1, "none", [0, 0, 0, 3])],
)  # fmt: skip
def test_one_rank_that_shares_with_nobody_keeps_one_copy_of_fp32_weights(precision, ranks, offload, stages):
    """Not with bf16 or fp16 weights: ZeRO keeps their fp32 copy best."""
    zeros = [derived_for(precision, stage, ranks, offload)["zero_optimization"] for stage in (0, 1, 2, 3)]
    assert [zero["stage"] for zero in zeros] == stages
    assert [zero["contiguous_gradients"] for zero in zeros] == [ranks > 1] * 4


@pytest.mark.parametrize(
    ("precision", "stage", "accumulation", "offload", "ours"),
    [
        ("fp32", 0, 2, "none", True), ("fp32", 1, 2, "none", True), ("amp", 2, 1, "none", True),
        ("bf16", 1, 1, "none", True), ("bf16", 2, 2, "none", True),
        ("bf16", 1, 2, "none", False), ("bf16", 0, 1, "none", False), ("fp32", 3, 1, "none", False),
        ("fp16", 1, 1, "none", False), ("fp32", 2, 1, "optimizer", False),
    ],
)  # fmt: skip
def test_gradients_are_looked_at_once(precision, stage, accumulation, offload, ours):
    """By us where DeepSpeed can be told not to."""
    derived = derived_for(precision, stage, offload=offload, grad_accumulation_steps=accumulation)
    assert derived["gradient_clipping"] == (0 if ours else CLIP)
    assert derived["bf16"]["check_grad_overflow"] is not ours
    expected = False if ours and stage else None
    assert derived["zero_optimization"].get("compute_grad_norm") is expected


def test_the_type_in_which_gradients_travel():
    config = Config(engine=EngineConfig(communication_data_type="fp32"))
    assert engine_config(config, BatchSizes(1, 1, 2), 10)["communication_data_type"] == "fp32"
    assert derived_for("bf16", 1)["communication_data_type"] is None, "DeepSpeed's own choice"


@pytest.mark.parametrize(
    ("offload", "parts"),
    [("none", set()), ("optimizer", {"offload_optimizer"}), ("parameters", {"offload_optimizer", "offload_param"})],
)
def test_what_is_offloaded(offload, parts):
    derived = engine_config(configuration("bf16", 3, offload, "adamw"), BatchSizes(1, 1, 1), 10)
    assert {key for key in derived["zero_optimization"] if key.startswith("offload")} == parts


@pytest.mark.parametrize(
    ("precision", "stage", "accumulation", "dtype"),
    [("bf16", 1, 2, "fp32"), ("bf16", 3, 2, "fp32"), ("bf16", 1, 1, None), ("bf16", 0, 2, None), ("fp32", 1, 2, None)],
)
def test_gradients_of_several_micro_batches_add_up_in_fp32(precision, stage, accumulation, dtype):
    """In bf16 the last of many would hardly count. DeepSpeed cannot at ZeRO-0."""
    derived = engine_config(configuration(precision, stage, "none", "adamw"), BatchSizes(1, accumulation, 1), 10)
    assert derived["data_types"] == {"grad_accum_dtype": dtype}
    assert [derived[name]["enabled"] for name in ("bf16", "fp16")] == [precision == "bf16", False]


def started(**options: object) -> Engine:
    config = Config(engine=EngineConfig(precision="fp32", zero_stage=0, **options))
    model = Model()
    model.visual.set_grad_checkpointing = lambda on: setattr(model.visual, "recomputes", on)
    return Engine(model, config, BatchSizes(1, 1, 1))


def test_options_reach_the_tower_and_the_runtime():
    plain = started()
    assert not plain.runtime.is_compiled and not hasattr(plain.model.visual, "recomputes")
    assert started(compile=True).runtime.is_compiled
    assert started(activation_checkpointing=True).model.visual.recomputes is True


def with_scaler(attribute: str) -> Engine:
    engine = object.__new__(Engine)
    engine._check = None
    optimizer = SimpleNamespace(**{attribute: DynamicLossScaler(2.0**16, 1000, 1, 2, False)})
    engine.runtime = SimpleNamespace(fp16_enabled=lambda: True, optimizer=optimizer)
    return engine


@pytest.mark.parametrize("attribute", ["loss_scaler", "loss_scale_config"])  # DeepSpeed's names, with ZeRO and without
def test_fp16_keeps_its_loss_scale(attribute):
    used, fresh = with_scaler(attribute), with_scaler(attribute)
    scalers = [getattr(engine.runtime.optimizer, attribute) for engine in (used, fresh)]
    state = {"cur_scale": 2.0**15, "cur_iter": 7, "last_overflow_iter": 3, "cur_hysteresis": 1}
    for key, value in state.items():
        setattr(scalers[0], key, value)
    fresh.restore_loss_scaler(json.loads(json.dumps(used.loss_scaler_state())))
    assert vars(scalers[0]) == vars(scalers[1]) and fresh.loss_scaler_state() == state
    assert used.loss_scale() == 2.0**15


@pytest.mark.parametrize("stage", [0, 1])
def test_amp_keeps_its_loss_scale(stage):
    used, fresh = (start("amp", stage, "none", "adamw") for _ in range(2))
    take_step(used, 1)
    state = {"scale": 2.0**16, "steps_since_growth": 1}
    assert used.loss_scaler_state() == state and used.loss_scale() == 2.0**16
    take_step(used, 2, factor=float("inf"))
    state = {"scale": 2.0**15, "steps_since_growth": 0}
    fresh.restore_loss_scaler(json.loads(json.dumps(used.loss_scaler_state())))
    assert used.loss_scaler_state() == fresh.loss_scaler_state() == state and used.grad_norm() is None


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_other_precisions_have_no_loss_scale(precision):
    engine = start(precision, 1, "none", "adamw")
    assert engine.loss_scaler_state() == {} and engine.loss_scale() is None
    engine.restore_loss_scaler({})


def test_fp16_needs_a_gpu():
    with pytest.raises(ConfigError, match="fp16 on GPUs only"):
        Engine(Model(), Config(engine=EngineConfig(precision="fp16")), BatchSizes(1, 1, 1))
