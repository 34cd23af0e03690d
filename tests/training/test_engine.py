"""What the engine section's options do, how launchers place the ranks."""

import json
import os
import socket

import pytest
import torch
from launch import finish, free_port, run, start, start_rank
from project import TRAIN, losses

from text4vis.cluster import distributed
from text4vis.config.loading import load_config
from text4vis.config.schema import ConfigError
from text4vis.training.logs import Metrics


@pytest.fixture
def launcher(monkeypatch):
    """Sets a launcher's variables in place of this process's own."""

    def set_variables(**variables: object) -> None:
        for name in list(os.environ):
            if name.startswith(("SLURM_", "OMPI_", "PMIX_")) or name in {
                "RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "LOCAL_SIZE", "MASTER_ADDR", "MASTER_PORT",
            }:  # fmt: skip
                monkeypatch.delenv(name)
        for name, value in variables.items():
            monkeypatch.setenv(name, str(value))

    return set_variables


SRUN = {
    "SLURM_PROCID": 5, "SLURM_STEP_NUM_TASKS": 11, "SLURM_LOCALID": 1, "SLURM_NODEID": 1, "SLURM_JOB_ID": 77,
    "SLURM_STEP_TASKS_PER_NODE": "4(x2),3", "SLURM_STEP_NODELIST": "gpu[07-08,12]",
}  # fmt: skip


def test_each_launcher_places_the_ranks(launcher):
    launcher()
    assert distributed.ranks() == distributed.Ranks(0, 1, 0, 1)
    launcher(**SRUN)
    assert distributed.ranks() == distributed.Ranks(5, 11, 1, 4)
    assert distributed._master(distributed.ranks())[0] == "gpu07"
    launcher(SLURM_PROCID=0, SLURM_NTASKS=8)  # a batch script that has not called srun
    assert distributed.ranks().world_size == 1
    ranks = {"RANK": 3, "LOCAL_RANK": 1, "WORLD_SIZE": 4, "LOCAL_SIZE": 2}
    launcher(**SRUN, **ranks)  # `deepspeed` or `torchrun` inside a Slurm step
    assert distributed.ranks() == distributed.Ranks(3, 4, 1, 2)
    launcher(**{f"OMPI_COMM_WORLD_{name}": value for name, value in
                {"RANK": 2, "SIZE": 4, "LOCAL_RANK": 0, "LOCAL_SIZE": 2}.items()})  # fmt: skip
    assert distributed.ranks() == distributed.Ranks(2, 4, 0, 2)
    with pytest.raises(OSError, match="MASTER_ADDR is not set; pass it: mpirun -x"):
        distributed._master(distributed.ranks())


@pytest.mark.parametrize(
    ("nodes", "first"),
    [("node1", "node1"), ("a,b", "a"), ("gpu[07-09,12],cpu1", "gpu07"), ("n[3,5]", "n3"), ("x,gpu[1-2]", "x"),
     ("r[1-2]-gpu", "r1-gpu")],
)  # fmt: skip
def test_the_first_node_of_slurms_list(nodes, first):
    assert distributed._slurm_first_node(nodes) == first


def job(project, output, variables: list[dict[str, object]], *settings: str) -> list[tuple[int, str]]:
    """Processes with the given variables and no other launcher's."""
    arguments = project.arguments(output, *settings)
    return finish([start_rank(TRAIN, *arguments, variables=own) for own in variables])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("ranks", "precision", "optim"), [(2, "bf16", "adamw"), (3, "fp32", "adamw"), (2, "fp32", "sgd")]
)
def test_the_state_moves_between_all_stages_and_a_wrong_step_changes_nothing(ranks, precision, optim):
    """See tests/support/engine_states.py. At one number of ranks all stages even compute the same, to a rounding."""
    text = run("tests/support/engine_states.py", precision, optim, ranks=ranks)
    results = json.loads([line for line in text.splitlines() if line.startswith("[{")][-1])
    single = [result for result in results if "kind" in result]
    moves = [result for result in results if "from" in result]
    assert len(single) == 6 and len(moves) == 36
    for result in single:
        assert result["losses"] == pytest.approx(single[0]["losses"], rel=1e-6)
        assert result["moved"] > 1e-3 and result["applied"] and result["written"] == result["best"] == 0
        assert not result["applied_wrong"] and result["changed_by_wrong"] == 0
    for result in moves:
        assert result["kept"] == 0, result
        assert abs(result["loss"]) < 1e-7 and result["last"] < 1e-6, result
        if result["from"] == result["to"] and ranks == 2:  # the sum of two is the same in any order
            assert result["loss"] == result["last"] == 0, result
    for reads in zip(*(rank.values() for rank in results[-2].get("reads", ())), strict=True):
        assert sum(reads) < 1.1 and max(reads) < 1 / ranks + 0.1, "each byte once a host, but for whole pages"
    told = results[-1]["failure"]
    assert len(told) == ranks and len(set(told)) == 1, "all ranks end with the same word"
    assert "/.step-00000003." in told[0] and "cannot be written (Bad file descriptor); free space" in told[0]


@pytest.mark.slow
def test_srun_and_mpirun_start_the_same_job(project, tmp_path):
    """The variables that the two launchers set, with real processes in the place of theirs."""
    settings, number = ("solver.epochs=1", "engine.precision=fp32"), free_port()
    srun = [
        {"SLURM_PROCID": rank, "SLURM_LOCALID": rank, "SLURM_NODEID": 0, "SLURM_STEP_NUM_TASKS": 2,
         "SLURM_JOB_ID": number, "SLURM_STEP_TASKS_PER_NODE": "2", "SLURM_STEP_NODELIST": "localhost"}
        for rank in range(2)
    ]  # fmt: skip
    mpirun = [
        {"OMPI_COMM_WORLD_RANK": rank, "OMPI_COMM_WORLD_LOCAL_RANK": rank, "OMPI_COMM_WORLD_SIZE": 2,
         "OMPI_COMM_WORLD_LOCAL_SIZE": 2, "PMIX_NAMESPACE": number}
        for rank in range(2)
    ]  # fmt: skip
    for name, variables in (("srun", srun), ("mpirun", mpirun)):
        results = job(project, tmp_path / name, variables, *settings)
        assert [code for code, _ in results] == [0, 0], results
    project.train(tmp_path / "plain", *settings)
    assert losses(tmp_path / "srun") == losses(tmp_path / "mpirun") == losses(tmp_path / "plain")


@pytest.mark.slow
def test_a_port_that_is_taken_is_named(project, tmp_path):
    with socket.socket() as other:
        other.bind(("", 0))
        other.listen()
        port = other.getsockname()[1]
        place = {"RANK": 0, "WORLD_SIZE": 2, "LOCAL_RANK": 0, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        ((code, text),) = finish([start_rank(TRAIN, *project.arguments(tmp_path / "run"), variables=place)])
    assert code == 1 and f"port {port} is in use" in text and "--master_port" in text and "Traceback" not in text


@pytest.mark.slow
def test_a_wrong_number_of_ranks_is_an_error_and_a_dry_run_leaves_nothing(project, tmp_path):
    output = tmp_path / "run"
    code, text = finish(start(TRAIN, *project.arguments(tmp_path / "wrong", "engine.world_size=2")))[0]
    assert code == 1 and "expected 2 ranks, the job has 1" in text and "--hostfile" in text.splitlines()[-1]
    text = run(TRAIN, *project.arguments(output, "solver.grad_accumulation_steps=3"), "--dry-run", ranks=2)
    for row in ("global batch | 12 videos", "micro batch | 2 videos a rank", "accumulation | 3 x", "precision | bf16"):
        name, value = row.split(" | ")
        assert any(name in line and value in line for line in text.splitlines()), row
    assert "GB on the rank that used most" in text
    assert not output.exists()


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("engine.offload=parameters", "engine.offload: parameters needs engine.zero_stage 3, got 1"),
        ("engine.zero_stage=0", "engine.offload: optimizer needs engine.zero_stage 1, 2 or 3"),
        ("engine.precision=amp", "engine.precision: amp needs engine.zero_stage 0, 1 or 2 and engine.offload none"),
    ],
)
def test_offload_needs_its_stage(tmp_path, setting, message):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("engine:\n  offload: optimizer\n")
    with pytest.raises(ConfigError, match=message):
        load_config(recipe, [setting])


OPTIONS = {
    "activation checkpointing": ("engine.activation_checkpointing=true",),
    "compile": ("engine.compile=true",),
    "optimiser on the host": ("engine.offload=optimizer", "engine.zero_stage=2"),
    "parameters on the host": ("engine.offload=parameters", "engine.zero_stage=3"),
}


@pytest.fixture(scope="module")
def plain(project, tmp_path_factory):
    output = tmp_path_factory.mktemp("plain") / "run"
    project.train(output, "engine.precision=fp32", "solver.epochs=1")
    return losses(output)


@pytest.mark.slow
@pytest.mark.parametrize(
    "option", [pytest.param(name, marks=[pytest.mark.long] * (name == "compile")) for name in OPTIONS]
)
def test_options_compute_the_same_training(project, tmp_path, plain, option):
    project.train(tmp_path / "run", "engine.precision=fp32", "solver.epochs=1", *OPTIONS[option])
    assert losses(tmp_path / "run") == pytest.approx(plain, rel=1e-4)


@pytest.mark.slow
def test_activation_checkpointing_saves_memory(project):
    """Fewer bytes are kept for the backward pass."""
    from tiny import random_frames

    from text4vis.model.video_clip import build_model

    config = load_config(project.config)

    def kept(checkpointing: bool) -> int:
        model = build_model(config.network, 4, image_size=32)
        model.visual.set_grad_checkpointing(checkpointing)
        tensors = {}
        with torch.autograd.graph.saved_tensors_hooks(
            lambda tensor: tensors.setdefault(tensor.data_ptr(), tensor), lambda tensor: tensor
        ):
            model.encode_frames(random_frames(8, 4))
        return sum(tensor.nbytes for tensor in tensors.values())

    assert kept(True) < 0.5 * kept(False)


def test_metrics_are_cut_to_the_step_a_run_goes_on_from(tmp_path):
    metrics = Metrics(tmp_path, 0)
    for step in (1, 2, 3):
        metrics.write("train", {"step": step, "loss": 1.0 / step})
    metrics.close()
    path = tmp_path / "metrics.jsonl"
    path.write_text(path.read_text() + '{"kind": "train", "ste')  # killed while it wrote
    Metrics(tmp_path, 2).close()
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [1, 2]
