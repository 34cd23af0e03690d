"""A run that is asked to stop saves and says "resume me"; one that fails ends on every rank and says why."""

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from launch import ROOT, finish, free_port, run, start, wait_for
from project import TRAIN, last_line, losses, records, weights
from safetensors.torch import load_file

from text4vis.saved.runs import claim

RESUME_ME = 75


def codes(results) -> list[int]:
    return [code for code, _ in results]


@pytest.fixture(scope="module")
def whole(project, tmp_path_factory) -> Path:
    """An uninterrupted run of two ranks."""
    output = tmp_path_factory.mktemp("whole") / "run"
    project.train(output)
    return output


def goes_on_as(project, output: Path, whole: Path) -> None:
    project.train(output)
    assert losses(output) == losses(whole)
    assert all(value.equal(weights(whole)[name]) for name, value in weights(output).items())


@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "reason", "steps"),
    [
        ("--signal 9:SIGTERM", "SIGTERM", {10}),
        pytest.param("--signal 9:SIGUSR1", "SIGUSR1", {10}, marks=pytest.mark.long),
        pytest.param("--signal-in evaluate:SIGTERM", "SIGTERM", {7}, marks=pytest.mark.long),
        ("--slow-save 0.3 --signal-in save:SIGTERM", "SIGTERM", {9, 10}),  # written beside the steps that follow
    ],
)
def test_a_signal_to_one_rank_saves_on_all_and_says_resume_me(project, tmp_path, whole, options, reason, steps):
    """The ranks stop after the next step or before the next batch of an evaluation, which the next job repeats."""
    output = tmp_path / "run"
    assert codes(project.train_with(output, options)) == [RESUME_ME, RESUME_ME]
    words = re.search(rf"stopped by {reason} after step (\d+); run the command again to go on$", last_line(output))
    assert words, last_line(output)
    step = int(words[1])
    assert step in steps
    assert (output / "checkpoints" / f"step-{step:08d}").is_dir()
    goes_on_as(project, output, whole)
    assert [record["step"] for record in records(output) if record["kind"] == "val"] == [7, 13, 20]


@pytest.mark.slow
def test_a_limit_of_time_does_the_same(project, tmp_path):
    output = tmp_path / "run"
    assert codes(project.train_with(output, "", "engine.wall_minutes=0.01")) == [RESUME_ME, RESUME_ME]
    assert "stopped by engine.wall_minutes after step 2;" in last_line(output)


@pytest.mark.slow
@pytest.mark.parametrize("victim", ["command", pytest.param("launcher", marks=pytest.mark.long)])
def test_a_signal_to_deepspeed_alone_reaches_the_ranks(project, tmp_path, whole, victim):
    """SIGTERM to the command kills it and nothing else; SIGTERM to its launcher is passed on."""
    import psutil

    output = tmp_path / "run"
    options = [ROOT / "tests/support/train_with.py", "--slow", "1", "--", *project.arguments(output)]
    deepspeed = Path(sys.executable).parent / "deepspeed"
    command = [deepspeed, "--num_gpus", 2, "--master_port", free_port(), *options]
    with (tmp_path / "printed").open("w") as printed:
        process = subprocess.Popen([*map(str, command)], cwd=ROOT, stdout=printed, stderr=printed)
        wait_for(lambda: len(records(output)) > 2 if (output / "metrics.jsonl").exists() else False, [process])
        launcher = psutil.Process(process.pid).children()[0]
        ranks = launcher.children()
        os.kill(process.pid if victim == "command" else launcher.pid, signal.SIGTERM)
        _, alive = psutil.wait_procs(ranks, timeout=60)
        assert len(ranks) == 2 and not alive
        process.wait(timeout=60)
    assert "after step" in last_line(output) and "run the command again to go on" in last_line(output)
    goes_on_as(project, output, whole)


@pytest.mark.slow
def test_one_ranks_error_ends_the_job_and_is_the_last_line_everywhere(project, tmp_path):
    output = tmp_path / "run"
    results = project.train_with(output, "--raise-at 3", ranks=3)
    assert codes(results) == [1, 1, 1]
    cause = "KeyError: 'broken on purpose'"
    assert "rank 2 on host" in last_line(output) and last_line(output).endswith(cause)
    assert all(text.splitlines()[-1].endswith(cause) for _, text in results)
    assert "Traceback" in results[2][1]


def test_an_output_that_cannot_be_is_named_with_the_fix(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match=r"--output: the folder .*file/run cannot be written \(Not a directory\); name"):
        claim(tmp_path / "file" / "run")


@pytest.mark.slow
def test_two_jobs_never_write_one_run(project, tmp_path):
    """A job that is started again too early, or ranks without a launcher's variables: the later one ends at once."""
    output = tmp_path / "run"
    processes = project.start_with(output, "--slow 1", "solver.epochs=1")
    wait_for((output / "metrics.jsonl").exists, processes)
    before = (output / "log.txt").read_text()
    for code, text in finish(start(TRAIN, *project.arguments(output, "solver.epochs=1"), ranks=2)):
        assert code == 1 and f"{output}: another job is writing this run (process " in text.splitlines()[-1]
    assert (output / "log.txt").read_text().startswith(before)
    assert codes(finish(processes)) == [0, 0]
    assert list(losses(output)) == [*range(1, 8)] and "failed" not in (output / "log.txt").read_text()


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1])
def test_a_killed_rank_ends_the_others_within_seconds(project, tmp_path, victim):
    output = tmp_path / "run"
    processes = project.start_with(output, "--slow 0.2")
    wait_for(lambda: (output / "metrics.jsonl").exists() and len(records(output)) > 2, processes)
    processes[victim].kill()
    other = processes[1 - victim]
    other.wait(timeout=30)
    assert other.returncode == 1
    text = finish(processes)[1 - victim][1].splitlines()[-1]
    assert f"rank {victim}" in text and "ended without a word: killed, or out of memory" in text
    assert last_line(output).endswith(text.removeprefix("train: error: "))


@pytest.mark.slow
@pytest.mark.parametrize(("stage", "precision"), [(0, "fp32"), (1, "bf16")])
def test_a_loss_that_is_not_finite_stops_with_names_or_is_skipped_on_all_ranks(project, tmp_path, stage, precision):
    settings = (
        f"engine.zero_stage={stage}",
        f"engine.precision={precision}",
        "logging.save_steps=1",
        "solver.epochs=1",
    )
    output, poison = tmp_path / "run", "--not-finite 3"
    results = project.train_with(output, poison, *settings)
    assert codes(results) == [1, 1] and "Traceback" not in results[0][1]
    assert "the loss is not finite; videos: " in last_line(output) and "class/video_0003" in last_line(output)
    before = len(losses(output))
    last = sorted(output.glob("checkpoints/step-*"))[-1]
    assert last.name == f"step-{before:08d}"

    results = project.train_with(output, poison, *settings, "solver.on_nonfinite=skip")
    assert codes(results) == [0, 0]
    log = (output / "log.txt").read_text()
    assert f"step {before + 1}: the loss is not finite" in log and "skipped, 1 so far" in log
    rows = [record for record in records(output) if record["kind"] == "train"]
    assert [record["skipped_steps"] for record in rows] == [0] * before + [1] * (7 - before)
    assert [record["step"] for record in rows if record["loss"] is None] == [before + 1]
    assert all(value.isfinite().all() for value in weights(output).values())


@pytest.mark.slow
def test_a_skipped_step_leaves_the_weights_untouched(project, tmp_path):
    """Every step is skipped: the weights at the end are those of the beginning."""
    settings = ("solver.on_nonfinite=skip", "solver.epochs=1", "engine.precision=fp32", "engine.zero_stage=0")
    poison = "--not-finite -1"
    project.train_with(tmp_path / "run", poison, *settings, ranks=1)
    tower = load_file(project.base / "clip" / "tiny.safetensors")
    trained = weights(tmp_path / "run")
    shared = [name for name in trained if name in tower]
    assert shared and all(trained[name].equal(tower[name]) for name in shared if name != "logit_scale")


@pytest.mark.slow
def test_a_full_disk_is_noticed_before_and_leaves_the_last_checkpoint(project, tmp_path):
    """A disk of 40 MB takes some checkpoints of 5 MB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=40m", "t4v", disk], check=False).returncode:
        pytest.skip("mounting a small disk needs root")
    try:
        output = disk / "run"
        code, text = finish(start(TRAIN, *project.arguments(output, "logging.keep_checkpoints=50")))[0]
        assert code == 1 and "51 more checkpoints need" in text.splitlines()[-1] and "are free" in text.splitlines()[-1]
        filler = disk / "other"
        processes = project.start_with(output, "--slow 0.5", "logging.save_steps=1", ranks=1)
        wait_for(lambda: len(list(output.glob("checkpoints/step-*"))) > 1, processes)
        filler.write_bytes(bytes(_free(disk) - (1 << 20)))
        code, text = finish(processes)[0]
        assert code == 1 and "are free; free some" in text.splitlines()[-1]
        filler.unlink()
        assert "resumed from" in run(TRAIN, *project.arguments(output))
    finally:
        subprocess.run(["umount", "-l", disk], check=True)


def _free(folder: Path) -> int:
    status = os.statvfs(folder)
    return status.f_bavail * status.f_frsize


@pytest.mark.slow
def test_checkpoints_on_demand_by_steps_and_by_minutes(project, tmp_path):
    output = tmp_path / "run"
    output.mkdir()
    (output / "save-now").touch()
    project.train(output, "logging.save_steps=5", "logging.keep_checkpoints=20", ranks=1)
    steps = [int(path.name[5:]) for path in sorted(output.glob("checkpoints/step-*"))]
    assert steps == [2, 5, 10, 13, 15, 20, 25, 26, 30, 35, 39]
    assert not (output / "save-now").exists()
    often = tmp_path / "often"
    project.train(often, "logging.save_minutes=1e-6", "logging.keep_checkpoints=3", ranks=1)
    # The ranks agree on a checkpoint a step after it is time for one, so every other step has one, and the last.
    assert [int(path.name[5:]) for path in sorted(often.glob("checkpoints/step-*"))] == [36, 38, 39]
