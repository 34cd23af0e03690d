"""Every way out of the programs: what it leaves behind, what it says, and the exit code."""

import signal
import time

import pytest
from launch import finish, start, wait_for
from original_files import save_train
from project import last_line, records

from text4vis.config.loading import load_config
from text4vis.model.video_clip import build_model

CTRL_C = 130
LOADERS_THREADS = ("train-loader", "val-loader", "read_", "decode_", "finish_", "shards-")


def threads_left(text: str) -> list[str]:
    (line,) = [line for line in text.splitlines() if line.startswith("threads left:")]
    return line.split()[2:]


def has_begun(output):
    return lambda: (output / "metrics.jsonl").exists() and len(records(output)) > 1


@pytest.mark.slow
def test_ctrl_c_saves_and_says_how_to_go_on(project, tmp_path):
    """The terminal sends it to all ranks, and some launchers pass it on: twice within a second is once."""
    output = tmp_path / "run"
    processes = project.start_with(output, "--slow 0.3")
    wait_for(has_begun(output), processes)
    for process in processes * 2:
        process.send_signal(signal.SIGINT)
    results = finish(processes)
    assert [code for code, _ in results] == [75, 75]
    assert "stopped by Ctrl-C after step" in last_line(output) and "run the command again" in last_line(output)
    step = int(last_line(output).split("after step ")[1].split(";")[0])
    assert (output / "checkpoints" / f"step-{step:08d}").is_dir()
    for rank, (_, text) in enumerate(results):
        assert "Traceback" not in text and text.count("train: Ctrl-C: saves after the next step") == (rank == 0)
        assert not [name for name in threads_left(text) if name.startswith(LOADERS_THREADS)]


@pytest.mark.slow
def test_ctrl_c_twice_ends_at_once(project, tmp_path):
    """In the middle of a step that would take a minute."""
    output = tmp_path / "run"
    processes = project.start_with(output, f"--slow 60 --ledger {tmp_path / 'book'}", ranks=1)
    wait_for((tmp_path / "book" / "0.jsonl").exists, processes)
    processes[0].send_signal(signal.SIGINT)
    time.sleep(1.2)
    assert processes[0].poll() is None, "the first one lets the step end"
    processes[0].send_signal(signal.SIGINT)
    asked = time.monotonic()
    ((code, text),) = finish(processes)
    assert code == CTRL_C and time.monotonic() - asked < 10 and "Traceback" not in text
    assert not list(output.glob("checkpoints/step-*"))


@pytest.fixture
def evaluating(project, tmp_path):
    """Starts tests/support/evaluate_with.py on a model of random weights; returns the ranks once they compute."""
    config = load_config(project.config)
    model = build_model(config.network, config.data.num_segments, image_size=config.data.input_size)
    save_train(tmp_path / "model.pt", model)
    (tmp_path / "begun").mkdir()

    def started(*options, ranks=2):
        given = ["--config", project.config, "--model", tmp_path / "model.pt", "--report", tmp_path / "report.json"]
        program = "tests/support/evaluate_with.py"
        processes = start(program, "--begun", tmp_path / "begun", *options, "--", *given, ranks=ranks)
        wait_for(lambda: len(list((tmp_path / "begun").iterdir())) == ranks, processes)
        return processes

    return started


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2])
def test_ctrl_c_ends_an_evaluation_in_a_line(evaluating, tmp_path, ranks):
    processes = evaluating("--slow", 0.5, ranks=ranks)
    for process in processes:
        process.send_signal(signal.SIGINT)
    for code, text in finish(processes):
        assert code == CTRL_C and "Traceback" not in text
        assert text.splitlines()[-1].endswith("stopped by Ctrl-C; no report was written")
        if ranks == 1:
            assert not [name for name in threads_left(text) if name.startswith(LOADERS_THREADS)]
    assert not (tmp_path / "report.json").exists()


@pytest.mark.slow
def test_a_killed_rank_ends_the_evaluation_of_the_others(evaluating):
    processes = evaluating("--slow", 0.5)
    processes[1].kill()
    processes[0].wait(timeout=30)
    code, text = finish(processes)[0]
    assert code == 1 and "ended without a word: killed, or out of memory" in text.splitlines()[-1]


@pytest.mark.slow
def test_one_ranks_error_ends_an_evaluation_and_is_the_last_line_of_all(evaluating):
    results = finish(evaluating("--raise"))
    assert [code for code, _ in results] == [1, 1]
    assert all(text.splitlines()[-1].endswith("KeyError: 'broken on purpose'") for _, text in results)
    assert "rank 1 on host" in results[0][1].splitlines()[-1]
