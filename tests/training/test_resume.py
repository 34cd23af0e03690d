"""A run goes on exactly: after kills, on other numbers of ranks, at other ZeRO stages, from damaged checkpoints."""

import re
import shutil

import pytest
import torch
from kill_many import kill_and_go_on
from launch import finish, run, start
from project import NUM_VIDEOS, STEPS_PER_EPOCH, TRAIN, ledger, losses, records, weights
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from shards.plan import Stream

WIDE = ("solver.global_batch=12", "solver.epochs=8", "data.batch_size=4", "solver.lr=5e-4")  # for 1 to 4 ranks
NUM_WIDE_STEPS = 18
JOBS = [
    (1, 1, 4),
    (2, 3, 8),
    (4, 2, 12),
    (3, 0, 15),
    (1, 1, None),
]  # ranks, ZeRO stage, step that asks to stop


def equal(ours: dict, expected: dict) -> bool:
    return ours.keys() == expected.keys() and all(ours[name].equal(expected[name]) for name in expected)


@pytest.mark.slow
@pytest.mark.parametrize("stage", [1, *(pytest.param(stage, marks=pytest.mark.long) for stage in (0, 2, 3))])
def test_a_killed_run_goes_on_as_if_nothing_had_happened(project, tmp_path, stage):
    """Each kill comes while a checkpoint is written in the background."""
    settings = (f"engine.zero_stage={stage}", "logging.save_steps=2")
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    results = project.train_with(whole, f"--ledger {tmp_path}/book-whole", *settings)
    assert [code for code, _ in results] == [0, 0], results
    book = tmp_path / "book-killed"
    kills = kill_and_go_on(project, killed, book, settings, ranks=2, kills=2, seed=stage, in_saves=True)
    assert kills == 2
    assert losses(killed) == losses(whole)
    assert ledger(book) == ledger(tmp_path / "book-whole")
    assert equal(weights(killed), weights(whole))


@pytest.fixture(scope="module", params=["fp32", pytest.param("bf16", marks=pytest.mark.long)])
def fixed_and_moved(request, project, tmp_path_factory):
    """One run on two ranks throughout, and one that moves between numbers of ranks and ZeRO stages."""
    base, precision = tmp_path_factory.mktemp("moved"), f"engine.precision={request.param}"
    results = project.train_with(base / "fixed", f"--ledger {base}/book-fixed", precision, *WIDE)
    assert [code for code, _ in results] == [0, 0], results
    for ranks, stage, last_step in JOBS:
        options = f"--ledger {base}/book-moved" + (f" --signal {last_step}:SIGTERM" if last_step else "")
        results = project.train_with(
            base / "moved", options, precision, f"engine.zero_stage={stage}", *WIDE, ranks=ranks
        )
        assert [code for code, _ in results] == [75 if last_step else 0] * ranks, results
    return request.param, base


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_other_ranks_and_stages_go_on_with_the_same_samples_and_losses(project, fixed_and_moved):
    precision, base = fixed_and_moved
    assert losses(base / "moved") == pytest.approx(losses(base / "fixed"), rel={"fp32": 1e-5, "bf16": 1e-3}[precision])
    stream = Stream(NUM_VIDEOS, 3)
    expected = {step: stream.take(12 * (step - 1), 12 * step)[0].tolist() for step in range(1, NUM_WIDE_STEPS + 1)}
    assert ledger(base / "book-moved") == ledger(base / "book-fixed") == expected


@pytest.mark.slow
def test_an_evaluation_may_come_before_a_jobs_first_step(project, tmp_path):
    """The job before stopped after the last step of an epoch; at ZeRO-3 parameters are gathered by use alone."""
    settings = ("engine.precision=fp32", "solver.epochs=1", "solver.global_batch=4")
    output = tmp_path / "run"
    results = project.train_with(output, f"--signal {STEPS_PER_EPOCH - 1}:SIGTERM", *settings)
    assert [code for code, _ in results] == [75, 75], results
    assert [record["kind"] for record in records(output)] == ["train"] * STEPS_PER_EPOCH
    assert "top-1" in project.train(output, "engine.zero_stage=3", *settings)
    project.train(tmp_path / "whole", *settings)
    assert records(output)[-1]["top1"] == records(tmp_path / "whole")[-1]["top1"]


@pytest.mark.slow
def test_the_logs_of_a_run_in_pieces_have_no_gap_and_no_overlap(fixed_and_moved):
    _, base = fixed_and_moved
    for kind in ("train", "val"):
        steps = [record["step"] for record in records(base / "moved") if record["kind"] == kind]
        assert steps == [record["step"] for record in records(base / "fixed") if record["kind"] == kind]
    board = EventAccumulator(str(base / "moved" / "tensorboard"))
    board.Reload()
    assert [event.step for event in board.Scalars("train/loss")] == list(range(1, NUM_WIDE_STEPS + 1))
    log = (base / "moved" / "log.txt").read_text()
    assert re.findall(r"stopped by (\w+) after step (\d+)", log) == [
        ("SIGTERM", str(last_step + 1)) for _, _, last_step in JOBS if last_step
    ]


@pytest.mark.slow
def test_frozen_parameters_and_each_groups_rate_survive_other_stages(project, tmp_path):
    """With the tower frozen the head and the logit scale train, at two rates; every kind of save keeps all three."""
    output = tmp_path / "run"
    settings = ("network.fix_video=true", "solver.weight_decay=0.5", "engine.precision=fp32", *WIDE)
    project.train_with(tmp_path / "whole", "", *settings)
    for stage, last_step in ((1, 4), (3, 8), (0, None)):
        options = f"--signal {last_step}:SIGTERM" if last_step else ""
        project.train_with(output, options, f"engine.zero_stage={stage}", *settings)
    assert losses(output) == pytest.approx(losses(tmp_path / "whole"), rel=1e-5)
    ours, expected = weights(output), weights(tmp_path / "whole")
    tower = load_file(project.base / "clip" / "tiny.safetensors")
    for name, value in ours.items():
        if name.startswith("visual."):
            assert value.equal(expected[name]) and (name not in tower or value.equal(tower[name]))
        else:
            pair = [value, expected[name]]
            if name.endswith("in_proj_bias"):  # softmax ignores the keys' bias: Adam scales up mere rounding there
                pair = [torch.cat([bias.chunk(3)[0], bias.chunk(3)[2]]) for bias in pair]
            assert pair[0].allclose(pair[1], rtol=1e-4, atol=1e-6), name
    for record, other in zip(records(output), records(tmp_path / "whole"), strict=True):
        assert [record.get(f"lr_{group}") for group in ("clip", "head")] == [
            other.get(f"lr_{group}") for group in ("clip", "head")
        ]


@pytest.mark.slow
def test_a_flipped_bit_is_found_and_the_checkpoint_before_it_taken(project, tmp_path):
    output = tmp_path / "run"
    project.train(output, ranks=1)
    final, rates = weights(output), losses(output)
    last = sorted(output.glob("checkpoints/step-*"))[-1]
    for name in ("exp_avg.safetensors", "state.json"):
        damaged = tmp_path / f"damaged {name}"
        shutil.copytree(output, damaged)
        path = damaged / "checkpoints" / last.name / name
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 1
        path.write_bytes(content)
        code, text = finish(start(TRAIN, *project.arguments(tmp_path / "other"), "--resume", path.parent))[0]
        assert code == 1 and f"{path}: " in text.splitlines()[-1] and "delete" in text.splitlines()[-1]
        text = run(TRAIN, *project.arguments(damaged))
        assert f"{path}: " in text and "going back" in text and "resumed from" in text
        assert equal(weights(damaged), final) and losses(damaged) == rates


@pytest.mark.slow
def test_a_number_of_ranks_that_cannot_share_the_batch_is_told_which_can(project, tmp_path):
    output = tmp_path / "run"
    project.train_with(output, f"--signal {STEPS_PER_EPOCH}:SIGTERM", ranks=1)
    code, text = finish(start(TRAIN, *project.arguments(output), ranks=3))[0]
    assert code == 1
    assert "2 videos cannot be shared equally by 3 ranks; 3 can, or start 2 ranks" in text.splitlines()[-1]
