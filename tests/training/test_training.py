"""Training, resuming, evaluating and predicting with the real programs, the real engine and a tiny CLIP."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from launch import ROOT, finish, free_port, run, start
from project import EVALUATE, NUM_VIDEOS, TRAIN, losses, weights


@pytest.fixture(scope="module")
def finished(project) -> Path:
    """An uninterrupted run at two ranks, bf16 and ZeRO-1."""
    output = project.base / "finished"
    project.train(output)
    return output


@pytest.mark.slow
def test_a_run_leaves_what_the_design_promises(project, finished):
    assert list(losses(finished)) == list(range(1, 3 * NUM_VIDEOS // 4 + 2))
    report = json.loads((finished / "report.json").read_text())
    assert report["videos"] == NUM_VIDEOS == sum(row["videos"] for row in report["per_class"])
    assert report["top1_correct"] == sum(row["correct"] for row in report["per_class"])
    assert yaml.safe_load((finished / "config.yaml").read_text())["data"]["batch_size"] == 2
    assert "top-1" in (finished / "log.txt").read_text()
    assert list((finished / "tensorboard").glob("events.*"))
    evaluations = [line for line in (finished / "metrics.jsonl").read_text().splitlines() if '"val"' in line]
    assert len(evaluations) == 3
    assert sorted(path.name for path in (finished / "checkpoints").iterdir())[0] == "best"


@pytest.mark.slow
def test_the_learning_rates_follow_the_schedule(finished):
    """Two groups, tower at a tenth of the head's, warm-up over half an epoch, then a cosine to zero."""
    from text4vis.training.optim import learning_rate

    for line in (finished / "metrics.jsonl").read_text().splitlines():
        record = json.loads(line)
        if record["kind"] == "train":
            epoch = (record["step"] - 1) * 4 / NUM_VIDEOS
            assert record["lr_head"] == pytest.approx(learning_rate(epoch, 2e-3, 3, 0.5))
            assert record["lr_clip"] == pytest.approx(0.1 * record["lr_head"])


@pytest.mark.slow
def test_ranks_and_stages_compute_the_same_training(project, tmp_path):
    """fp32: one rank with twice the batch, two ranks, and two ranks at ZeRO-2 with accumulation agree."""
    fp32 = "engine.precision=fp32"
    project.train(tmp_path / "one", fp32, "engine.zero_stage=0", "data.batch_size=4", ranks=1)
    project.train(tmp_path / "two", fp32, "engine.zero_stage=0")
    project.train(
        tmp_path / "sharded", fp32, "engine.zero_stage=2", "data.batch_size=1", "solver.grad_accumulation_steps=2"
    )
    expected = losses(tmp_path / "one")
    assert losses(tmp_path / "two") == pytest.approx(expected, rel=1e-4)
    assert losses(tmp_path / "sharded") == pytest.approx(expected, rel=1e-4)


@pytest.mark.slow
def test_evaluating_a_checkpoint_gives_the_report_of_its_run(project, finished, tmp_path):
    last = sorted(finished.glob("checkpoints/step-*"))[-1]
    run(EVALUATE, "--config", project.config, "--model", last, "--report", tmp_path / "report.json")
    alone, within = (json.loads((folder / "report.json").read_text()) for folder in (tmp_path, finished))
    assert alone["model"] == str(last) and within["step"] == len(losses(finished))
    assert within["weights"] == alone["weights"]
    assert {key: within[key] for key in within.keys() - {"step", "date"}} == {
        key: alone[key] for key in alone.keys() - {"model", "date"}
    }


@pytest.mark.slow
def test_the_deepspeed_launcher_starts_it_and_a_finished_run_stays_finished(project, finished, tmp_path):
    output = tmp_path / "run"
    shutil.copytree(finished, output)
    before = weights(output)
    command = [Path(sys.executable).parent / "deepspeed", "--num_gpus", "2", "--master_port", str(free_port()), TRAIN]
    result = subprocess.run(
        [*command, *map(str, project.arguments(output))],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    assert "resumed from" in result.stdout + result.stderr
    assert losses(output) == losses(finished) and all(
        before[name].equal(value) for name, value in weights(output).items()
    )


@pytest.mark.slow
def test_export_and_prediction_agree_with_evaluation(project, finished, tmp_path):
    import text4vis

    export = tmp_path / "exported"
    assert "exported 3 classes" in run("tools/export.py", finished, "--output", export)
    report = tmp_path / "report.json"
    run(EVALUATE, "--config", project.config, "--model", export, "--report", report, "--set=engine.precision=fp32")
    recogniser = text4vis.load(export)
    correct = 0
    for number, name in enumerate(project.names):
        top = recogniser.predict(project.frames / name).top
        assert sum(probability for _, probability in top) == pytest.approx(1)
        correct += top[0][0] == f"class {number % 3}"
    assert correct == json.loads(report.read_text())["top1_correct"]
    picture = tmp_path / "seen.png"
    output = run(
        "tools/predict.py", project.frames / project.names[0], "--model", export, "--labels", "one thing, another",
        "--top", 1, "--picture", picture,
    )  # fmt: skip
    assert picture.stat().st_size > 10_000
    assert ("one thing" in output) != ("another" in output) and f"wrote {picture}" in output


@pytest.mark.slow
def test_a_run_is_never_overwritten_or_mixed_by_accident(project, finished, tmp_path):
    def refusal(*arguments):
        code, output = finish(start(TRAIN, *arguments))[0]
        assert code == 1 and "Traceback" not in output
        return output

    output = tmp_path / "run"
    shutil.copytree(finished, output)
    shutil.rmtree(output / "checkpoints" / "best")
    assert "holds a run already" in refusal(*project.arguments(output), "--resume", "never")
    changed = refusal(*project.arguments(output, "solver.lr=1"))
    assert "solver.lr: 0.002 -> 1.0" in changed and "another --output" in changed and "--set pretrain=" in changed
    assert "steps of this run are done" in run(TRAIN, *project.arguments(output))
    assert "neither an export nor a checkpoint nor a run" in refusal(*project.arguments(output), "--resume", tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--set=data.train=/nowhere"], "/nowhere"),
        (["--set=data.bach_size=3"], "did you mean data.batch_size?"),
        (["--set=network.arch=ViT-B/13"], "network.arch"),
    ],
)
def test_mistakes_end_in_one_line_and_exit_code_1(project, tmp_path, arguments, message):
    code, output = finish(start(TRAIN, *project.arguments(tmp_path / "out"), *arguments))[0]
    lines = [line for line in output.splitlines() if line.startswith("train: error:")]
    assert code == 1 and len(lines) == 1 and message in lines[0] and "Traceback" not in output
