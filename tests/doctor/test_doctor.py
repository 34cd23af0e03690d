"""Each thing that would go wrong is found and comes with its fix; where all is well there is no problem."""

import json
import logging
import os
import subprocess
import sys
from pathlib import Path

import open_clip
import pytest
from frame_folders import make_frame_folders
from launch import program

from shards.annotations import parse_annotations, parse_labels
from shards.writer import build_shards
from text4vis.config.schema import ConfigError
from text4vis.doctor import checks as doctor
from text4vis.doctor.checks import FINE, PROBLEM, WARNING

HEALTHY = {
    "host": "a", "python": "3.11.7", "versions": {"torch": "2.9", "deepspeed": "0.19", "nvidia-dali-cuda130": "2.4"},
    "broken": {}, "cores": 8, "memory": 64e9, "shared_memory": 16e9, "open_files": 65536, "driver": "590.1",
    "programs": {"ssh": "/bin/ssh", "pdsh": "/bin/pdsh", "g++": "/bin/g++", "nvidia-smi": "/bin/nvidia-smi"},
    "cuda": {"built_for": "13.0", "gpus": [{"name": "H100", "memory": 80e9, "capability": [9, 0]}] * 2}, "paths": {},
}  # fmt: skip


@pytest.fixture(autouse=True)
def no_other_files(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in doctor.LAUNCHERS_VARIABLES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.chdir(tmp_path)


def of_level(findings, level):
    return [f"{finding.subject}: {finding.message} -> {finding.fix}" for finding in findings if finding.level == level]


def test_a_healthy_machine_has_no_problem():
    assert {finding.level for finding in doctor.machine(HEALTHY)} == {FINE}


@pytest.mark.parametrize(
    ("changes", "level", "words"),
    [
        ({"broken": {"torch": "ImportError: no libcudart"}}, PROBLEM, ["torch 2.9: ImportError", "pip install -e ."]),
        ({"cuda": {"built_for": None, "gpus": []}}, PROBLEM, ["torch sees no GPU: this torch is built for CPUs"]),
        ({"cuda": {"built_for": "13.0", "gpus": []}}, PROBLEM, ["built for CUDA 13.0", "CUDA_VISIBLE_DEVICES"]),
        ({"driver": "550.54"}, PROBLEM, ["driver 550.54 is too old", "'.[cuda12]'"]),
        ({"shared_memory": 64e6}, WARNING, ["64 MB", "--shm-size"]),
        ({"open_files": 1024}, WARNING, ["1024 open files", "ulimit -n"]),
        (
            {"cuda": {"built_for": "12.8", "gpus": [{"name": "V100", "memory": 1, "capability": [7, 0]}]}},
            WARNING, ["computes bf16 slowly", "fp16"],
        ),
        (
            {"cuda": {"built_for": None, "gpus": []}, "driver": None, "programs": {"nvidia-smi": None}},
            WARNING, ["none: everything runs on the CPU"],
        ),
    ],
)  # fmt: skip
def test_what_is_wrong_with_a_machine_is_found(changes, level, words):
    (found,) = of_level(doctor.machine(HEALTHY | changes), level)
    assert all(word in found for word in words), found


def test_leftovers_of_launchers_are_found(tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    (tmp_path / ".deepspeed_env").write_text("A=1\n\nB=2\n")
    warning, problem, *_ = list(doctor._environment())
    assert "WORLD_SIZE" in warning.message and "unset WORLD_SIZE" in warning.fix
    assert problem.level == PROBLEM and "line 2" in problem.message


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a slots=2\nb\n", "line 2: expected `host slots=N`"),
        ("a slots=2\na slots=2\n", "line 2"),
        ("a slots=0\n", "line 1"),
        ("-oProxyCommand=x slots=1\n", "line 1"),
        ("# nothing\n", "names no host"),
        (None, "would only warn and train on this machine alone"),
    ],
)
def test_a_wrong_hostfile_is_named(tmp_path, text, message):
    path = tmp_path / "hosts"
    if text is not None:
        path.write_text(text)
    with pytest.raises(ConfigError, match=message):
        doctor.parse_hostfile(path)


def test_a_hostfile_is_read_as_the_launcher_reads_it(tmp_path):
    from deepspeed.launcher.runner import fetch_hostfile

    path = tmp_path / "hosts"
    path.write_text("# two\na slots=2\n\nb.c-d slots=16 # more\n")
    assert doctor.parse_hostfile(path) == dict(fetch_hostfile(str(path))) == {"a": 2, "b.c-d": 16}


FAKE_SSH = """#!{python}
import json, sys
host, remote = sys.argv[-2:]
assert sys.argv[1:6] == ["-o", "BatchMode=yes", "-o", "ConnectTimeout=10", "--"]
if host == "gone":
    sys.exit("ssh: connect to host gone port 22: Connection refused")
answer = json.load(open("{answers}"))[host]
answer["paths"] = {{path: path != answer.get("misses") for path in remote.split("text4vis.doctor.probe")[1].split()}}
print("Welcome!")
print(json.dumps(answer))
"""


def test_hosts_are_probed_and_compared(project, tmp_path, monkeypatch):
    other = HEALTHY | {"versions": HEALTHY["versions"] | {"torch": "2.8"}}
    answers = {
        "same": HEALTHY, "other": other, "small": HEALTHY | {"cuda": {"built_for": "13.0", "gpus": [{}]}},
        "blind": HEALTHY | {"misses": str(project.shards)},
    }  # fmt: skip
    (tmp_path / "answers.json").write_text(json.dumps(answers))
    ssh = tmp_path / "bin" / "ssh"
    ssh.parent.mkdir()
    ssh.write_text(FAKE_SSH.format(python=sys.executable, answers=tmp_path / "answers.json"))
    ssh.chmod(0o755)
    monkeypatch.setenv("PATH", f"{ssh.parent}{os.pathsep}{os.environ['PATH']}")
    hosts = tmp_path / "hosts"
    hosts.write_text("".join(f"{name} slots=2\n" for name in (*answers, "gone")))
    config = doctor.resolve_config(project.config, ["engine.world_size=4", "solver.global_batch=15"])[0]
    findings = list(doctor.hosts(hosts, config, HEALTHY, str(project.config), tmp_path / "run"))
    assert [finding.subject for finding in findings if finding.level == FINE] == ["hostfile", "host same"]
    problems = of_level(findings, PROBLEM)
    for words in (
        "expects 4 ranks, the hostfile has 10", "15 videos cannot be shared equally by 10 ranks",
        "host other: torch: torch 2.8, here 2.9", "host small: slots=2, but it has 1 GPUs",
        f"host blind: {project.shards} is not there", "host gone: ssh: connect to host gone port 22",
    ):  # fmt: skip
        assert sum(words in problem for problem in problems) == 1, (words, problems)
    assert len(problems) == 6


@pytest.mark.slow
def test_the_command_looks_at_everything(project, tmp_path):
    good = program("tools/doctor.py", "--config", project.config, "--output", tmp_path / "run")
    assert good.returncode == 0 and "\nproblems: 0," in good.stdout, good.stdout + good.stderr
    assert "data.train: 26 videos of 3 classes; a batch of 2x1x4x3x32x32 was made" in good.stdout
    assert not (tmp_path / "run").exists()


def test_what_is_wrong_with_a_job_is_found(project, tmp_path, monkeypatch):
    monkeypatch.setattr(
        doctor, "probe", lambda paths: HEALTHY | {"cuda": {"built_for": None, "gpus": []}, "driver": None}
    )
    settings = [f"data.val={tmp_path}/nowhere", "engine.precision=fp16", "data.batch_size=30"]
    settings += ["logging.keep_checkpoints=100000000"]
    findings = list(doctor.diagnose(project.config, settings, str(tmp_path / "missing"), tmp_path / "run"))
    problems = of_level(findings, PROBLEM)
    for words in (
        "torch sees no GPU", "fp16 runs on GPUs only", f"{tmp_path}/nowhere", "train on this machine alone",
        f"{tmp_path}: 100000001 more checkpoints need",
    ):  # fmt: skip
        assert sum(words in problem for problem in problems) == 1, (words, problems)
    assert len(problems) == 5
    assert "26 videos are fewer than data.batch_size (30)" in "".join(of_level(findings, WARNING))
    typo = doctor.diagnose(project.config, ["data.bach_size=3"], None, tmp_path / "run")
    assert "did you mean data.batch_size?" in "".join(of_level(typo, PROBLEM))


def test_splits_whose_labels_mean_other_classes_are_found(project, tmp_path, monkeypatch):
    monkeypatch.setattr(doctor, "probe", lambda paths: HEALTHY)
    folders = make_frame_folders(tmp_path, [4, 4, 4])
    annotations, names = parse_annotations(folders.annotations, 3), parse_labels(folders.labels)
    build_shards(annotations, root=folders.root, labels=names[::-1], output=tmp_path / "val")
    words = tmp_path / "words.csv"
    words.write_text("id,name\n0,run\n1,jump\n2,swim\n")
    for setting, message in (
        ("data.label_list=", "its shards name 3 classes that are not the 3 of data.train in their order"),
        (f"data.label_list={words}", "is class 0 of its shards and class 2 of those of data.train"),
    ):
        findings = list(doctor.diagnose(project.config, [f"data.val={tmp_path}/val", setting], None, tmp_path / "run"))
        (problem,) = of_level(findings, PROBLEM)
        assert message in problem and "build both with one --labels file" in problem


@pytest.mark.slow
def test_weights_that_cannot_be_fetched_are_one_finding_without_the_downloads_chatter(
    project, tmp_path, monkeypatch, caplog
):
    def fetch(*_, **__):
        logging.getLogger("huggingface_hub").warning("Retrying in 1s")
        raise RuntimeError("no network")

    monkeypatch.setattr(open_clip, "create_model", fetch)
    settings = ["network.arch=ViT-B/32", "network.pretrained="]
    findings = list(doctor.diagnose(project.config, settings, None, tmp_path / "run"))
    assert "could not be fetched (no network)" in "".join(of_level(findings, PROBLEM))
    assert "Retrying" not in caplog.text
    logging.getLogger("huggingface_hub").warning("heard again")
    assert "heard again" in caplog.text


def test_the_probe_tells_what_does_not_import(tmp_path, monkeypatch):
    """A module that raises, and one that ends the process."""
    from text4vis.doctor import probe

    (tmp_path / "raises.py").write_text("raise OSError('libx.so: cannot open')")
    (tmp_path / "dies.py").write_text("import os; os.abort()")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setattr(probe, "MODULES", {"numpy": "numpy", "pillow": "raises", "pyyaml": "dies", "no-such": "x"})
    broken = probe._broken(probe._versions())
    assert broken == {
        "pillow": "OSError: libx.so: cannot open", "pyyaml": "hangs, or ends the process", "no-such": "not installed"
    }  # fmt: skip


def test_the_probe_outlives_a_library_that_hangs(monkeypatch):
    from text4vis.doctor import probe

    def hang(*_, **__):
        raise subprocess.TimeoutExpired("python", 300, output=b'import:["numpy", "hangs, or ends the process"]\n')

    monkeypatch.setattr(probe.subprocess, "run", hang)
    assert probe._broken({"numpy": "2.0"}) == {"numpy": "hangs, or ends the process"}


@pytest.mark.slow
def test_the_probe_is_json(monkeypatch):
    from text4vis.doctor import probe

    monkeypatch.setattr(probe, "MODULES", {"numpy": "numpy"})
    found = probe.probe([str(Path(__file__)), "/nowhere"])
    assert found["paths"] == {str(Path(__file__)): True, "/nowhere": False}
    assert set(HEALTHY) == set(found) and found["broken"] == {}
    assert json.loads(json.dumps(found)) == found
