"""A training step does not stop the host: who asks the device for values, and how many operations are launched."""

import pytest
import torch
from operations import DEEPSPEED, OURS, Operations
from tiny import random_frames, tiny_network

from text4vis.config.batches import BatchSizes
from text4vis.config.loading import load_config
from text4vis.config.schema import Config, DataConfig, EngineConfig, SolverConfig
from text4vis.model.video_clip import build_model
from text4vis.training import engine, runtime_config
from text4vis.training.engine import Engine
from text4vis.training.logs import Meter
from text4vis.training.trainer import Trainer

pytestmark = pytest.mark.usefixtures("one_rank")

SETTINGS = ("data.batch_size=2", "engine.num_threads=1", "logging.pictures=0", "solver.lr_warmup_step=1")
ACCUMULATION = "solver.grad_accumulation_steps=2"


class NoStop:
    """Nobody asks to stop."""

    code = 0

    def limit(self, wall_minutes) -> None:
        """Takes the limit."""


def trained(project, output, *settings: str) -> Trainer:
    output.mkdir()
    return Trainer(load_config(project.config, [*SETTINGS, *settings]), output, NoStop())


@pytest.mark.parametrize(
    ("settings", "theirs"),
    [
        (("engine.precision=fp32", "engine.zero_stage=0"), 0),
        (("engine.precision=fp32", "engine.zero_stage=1", "solver.clip_gradient=1", "solver.ema=0.9"), 0),
        (("engine.precision=amp", "engine.zero_stage=2", "solver.loss_type=NCE"), 0),
        (("engine.precision=bf16", "engine.zero_stage=1", "solver.mixup=0.2", "solver.cutmix=1"), 0),
        (("engine.precision=bf16", "engine.zero_stage=2", "solver.loss_type=ASL", ACCUMULATION), 0),
        (("engine.precision=bf16", "engine.zero_stage=1", ACCUMULATION), 2),
        (("engine.precision=fp32", "engine.zero_stage=3"), 1),
    ],
    ids=lambda value: " ".join(value).replace("engine.", "") if isinstance(value, tuple) else "",
)
def test_no_line_of_ours_waits_for_the_device_in_a_step(project, tmp_path, settings, theirs):
    """theirs: the waits of DeepSpeed itself, which docs/performance.md lists."""
    with trained(project, tmp_path / "run", *settings) as trainer:
        batches, meter = iter(trainer.train_loader), Meter.new(trainer.device)
        for _ in range(4):  # the first chooses a bias; ZeRO-3 compares the order of its modules over ranks for three
            trainer.train_step(batches, meter)
        with Operations() as step:
            trainer.train_step(batches, meter)
        assert step.all > 500 and step.waits_of(OURS) == {}
        assert sum(step.waits_of(DEEPSPEED).values()) == theirs == step.waits.total()
        with Operations() as line:
            trainer.log_step(meter)
        assert line.waits_of(OURS), "the counter sees them: here they are allowed"


class Counted:
    """A tiny recogniser at a ZeRO stage; `tensors` of it train."""

    def __init__(self, folder, precision: str, stage: int, accumulation: int = 1) -> None:
        config = Config(
            data=DataConfig(batch_size=2, num_segments=2),
            network=tiny_network(folder, init=False),
            engine=EngineConfig(precision=precision, zero_stage=stage),
            solver=SolverConfig(grad_accumulation_steps=accumulation),
        )
        model = build_model(config.network, 2)
        first = {name: value.detach().clone() for name, value in model.named_parameters()}
        self.tensors, self.accumulation = len(first), accumulation
        self.engine = Engine(model, config, BatchSizes.of(config, 1))
        self.engine.restore(first.__getitem__, None, 0)
        self.classes_CD = torch.randn(3, model.embed_dim)

    def launches(self) -> int:
        """Of the optimiser's step, after the backward pass."""
        for _ in range(2):
            for _ in range(self.accumulation):
                self.engine.backward(self.engine(random_frames(2, 2), self.classes_CD).square().mean())
                with Operations() as step:
                    self.engine.step()
        return step.launches


@pytest.mark.parametrize(("precision", "stage"), [("fp32", 0), ("fp32", 1), ("bf16", 1), ("bf16", 2), ("amp", 1)])
def test_the_optimisers_step_does_not_launch_operations_for_each_tensor(tmp_path, precision, stage):
    counted = Counted(tmp_path, precision, stage)
    assert counted.tensors > 80 and counted.launches() < 50


def test_deepspeeds_own_look_at_the_gradients_launches_many_for_each_tensor(tmp_path, monkeypatch):
    """What the check of ours replaces."""
    for module in (engine, runtime_config):
        monkeypatch.setattr(module, "checks_gradients", lambda config, sizes: False)
    counted = Counted(tmp_path, "bf16", 1)
    assert counted.launches() > 15 * counted.tensors


def test_where_micro_batches_add_up_in_fp32_the_step_launches_about_one_for_each_tensor(tmp_path):
    """ZeRO-1: the norm is DeepSpeed's. ZeRO-2: ours."""
    first, second = (Counted(tmp_path / str(stage), "bf16", stage, accumulation=2) for stage in (1, 2))
    assert first.launches() < first.tensors + 60 and second.launches() < 50


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["bf16", "amp", "fp32"])
def test_a_step_on_a_gpu_does_not_wait(project, tmp_path, precision):
    with trained(project, tmp_path / "run", f"engine.precision={precision}") as trainer:
        batches, meter = iter(trainer.train_loader), Meter.new(trainer.device)
        trainer.train_step(batches, meter)
        torch.cuda.set_sync_debug_mode("error")
        try:
            trainer.train_step(batches, meter)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        trainer.log_step(meter)
        assert meter.updates + (trainer.state.step - trainer.state.updates) == 2
