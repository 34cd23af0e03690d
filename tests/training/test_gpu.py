"""What only a GPU can show of training: NCCL, precisions, offloading, stops, compiled models. `pytest -m gpu`."""

from __future__ import annotations

import itertools
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from launch import ROOT
from project import TRAIN, records

from text4vis.cluster.stop import StopRequest
from text4vis.config.loading import load_config
from text4vis.data.loader import build_loader
from text4vis.model.video_clip import build_model
from text4vis.training.logs import Meter
from text4vis.training.trainer import Trainer

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("one_rank")]

NUM_STEPS = 4
RESUME_ME = 75
# How far a loss of about 3 may be from that of fp32 at ZeRO-0.
TOLERANCES = {"fp32": 1e-3, "bf16": 0.05, "fp16": 0.05, "amp": 0.05}
KINDS = [(0, "none"), (1, "none"), (2, "none"), (3, "none"), (1, "optimizer"), (2, "optimizer"), (3, "optimizer"),
         (3, "parameters")]  # fmt: skip


def losses(project, *settings: str) -> list[float]:
    """The losses of the first steps of a run in this process."""
    config = load_config(project.config, overrides=[*settings, "data.decode=cpu"])
    with Trainer(config, Path("unused"), StopRequest(), "never") as trainer:
        batches, found = iter(trainer.train_loader), []
        for _ in range(NUM_STEPS):
            meter = Meter.new(trainer.device)
            trainer.train_step(batches, meter)
            trainer.settle()
            found.append(float(meter.loss))
        return found


@pytest.fixture(scope="module")
def plain(project, one_rank) -> list[float]:
    return losses(project, "engine.precision=fp32", "engine.zero_stage=0")


@pytest.mark.parametrize(
    ("precision", "stage", "offload"),
    [(each, *kind) for each in TOLERANCES for kind in (KINDS[:3] if each == "amp" else KINDS)],
)
def test_every_kind_of_engine_trains_alike(project, plain, stage, offload, precision):
    settings = (f"engine.zero_stage={stage}", f"engine.offload={offload}", f"engine.precision={precision}")
    found = losses(project, *settings)
    if precision in ("fp16", "amp"):  # their first steps look for a loss scale and change nothing
        assert found[0] == 0.0 or found[0] == pytest.approx(plain[0], abs=TOLERANCES[precision])
        return
    assert found == pytest.approx(plain, abs=TOLERANCES[precision])


@pytest.mark.parametrize("setting", ["engine.compile=true", "engine.activation_checkpointing=true"])
def test_a_compiled_or_checkpointed_model_trains_alike(project, plain, setting):
    found = losses(project, "engine.precision=fp32", "engine.zero_stage=0", setting)
    assert found == pytest.approx(plain, abs=5e-3)


@pytest.mark.parametrize(("dtype", "error"), [(torch.float32, 1e-3), (torch.bfloat16, 2e-2)])
def test_embeddings_are_those_of_the_cpu(project, dtype, error):
    """Lengths of the differences of unit embeddings."""
    config = load_config(project.config)
    torch.manual_seed(0)
    model = build_model(config.network, config.data.num_segments, image_size=config.data.input_size)
    side = config.data.input_size
    frames_BTCHW = torch.randint(256, (4, config.data.num_segments, 3, side, side), dtype=torch.uint8)
    with torch.no_grad():
        ours_BD = model.encode_video(frames_BTCHW)
        theirs_BD = model.cuda().to(dtype).encode_video(frames_BTCHW.cuda()).float().cpu()
    normalised = [torch.nn.functional.normalize(value, dim=-1) for value in (ours_BD, theirs_BD)]
    assert float((normalised[0] - normalised[1]).norm(dim=-1).max()) < error


def test_features_are_those_of_decoding_on_the_cpu(project):
    """The embeddings that an evaluation takes hardly depend on where frames are decoded."""
    torch.manual_seed(0)
    found = []
    for decode in ("cpu", "gpu"):
        config = load_config(
            project.config, overrides=[f"data.decode={decode}", "data.resize=shortest", "data.interpolation=bicubic"]
        )
        model = build_model(config.network, config.data.num_segments, image_size=config.data.input_size).cuda()
        model.load_state_dict(found[0][1]) if found else None
        with build_loader(config, "val") as loader, torch.no_grad():
            embedded = [model.encode_video(batch.frames.cuda()[:, 0]).float().cpu() for batch in loader]
        found.append((torch.nn.functional.normalize(torch.cat(embedded), dim=-1), model.state_dict()))
    cosines = (found[0][0] * found[1][0]).sum(-1).numpy()
    assert np.percentile(cosines, 10) > 0.99


def test_ten_requests_to_stop_end_with_75(project, tmp_path):
    output = tmp_path / "run"
    command = [sys.executable, str(ROOT / TRAIN), *map(str, project.arguments(output, "solver.epochs=1000"))]
    for _ in range(10):
        before = len(records(output)) if (output / "metrics.jsonl").exists() else 0
        process = subprocess.Popen(command, cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)})
        deadline = time.monotonic() + 120
        while not (output / "metrics.jsonl").exists() or len(records(output)) <= before:
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.05)
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == RESUME_ME
    steps = [record["step"] for record in records(output) if record["kind"] == "train"]
    assert steps == list(range(1, len(steps) + 1))


def test_memory_is_level(project):
    """What the GPU's allocator holds after 300 batches of loading and training is what it held after 100."""
    config = load_config(project.config, overrides=["data.decode=gpu", "solver.epochs=1000"])
    with Trainer(config, Path("unused"), StopRequest(), "never") as trainer:
        batches, held = iter(trainer.train_loader), []
        for step in itertools.count(1):
            trainer.train_step(batches, Meter.new(trainer.device))
            if step in {100, 300}:
                held.append(torch.cuda.memory_reserved())
            if step == 300:
                break
    assert held[1] <= 1.05 * held[0]
