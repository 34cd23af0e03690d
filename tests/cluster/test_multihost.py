"""Several hosts for real: the `deepspeed` command over pdsh and ssh, network namespaces for machines."""

import re
import subprocess
import sys
import time
from pathlib import Path

import hosts
import pytest
from hosts import Hosts
from launch import ROOT, wait_for
from project import last_line, losses

REASON = hosts.reason_to_skip()
pytestmark = [
    pytest.mark.multihost, pytest.mark.slow, pytest.mark.timeout(900), pytest.mark.skipif(bool(REASON), reason=REASON),
]  # fmt: skip

DEEPSPEED = Path(sys.executable).parent / "deepspeed"
SETTINGS = ("engine.precision=fp32", "solver.global_batch=6", "data.batch_size=3")


@pytest.fixture
def start_on(project, tmp_path):
    """Starts the same command; only the hostfile changes."""
    (tmp_path / ".deepspeed_env").write_text("OMP_NUM_THREADS=1\nGLOO_SOCKET_IFNAME=eth0\n")

    def start(cluster: Hosts, names: list[str], output: Path, *settings: str) -> subprocess.Popen:
        (tmp_path / "hosts").write_text("".join(f"{name} slots=1\n" for name in names))
        arguments = project.arguments(output, *SETTINGS, *settings)
        command = [DEEPSPEED, "--hostfile", tmp_path / "hosts", ROOT / "text4vis/train.py", *arguments]
        return cluster.start(command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)

    return start


def test_hosts_train_together_and_those_left_go_on_when_one_is_cut_off(project, tmp_path, start_on):
    project.train(tmp_path / "one host", *SETTINGS)
    expected = losses(tmp_path / "one host")
    with Hosts(tmp_path / "machines", 3) as cluster:
        two = start_on(cluster, cluster.names[:2], tmp_path / "two")
        text = two.communicate(timeout=300)[0]
        assert two.returncode == 0, text
        assert "2 (host1, host2)" in text
        assert losses(tmp_path / "two") == pytest.approx(expected, rel=1e-5)

        output, cautious = tmp_path / "three", ("engine.silence_seconds=6", "logging.save_steps=1", "solver.epochs=3")
        three = start_on(cluster, cluster.names, output, *cautious)
        wait_for(lambda: len(list(output.glob("checkpoints/step-*"))) > 1, [three])
        cluster.cut_off("host3")
        text = three.communicate(timeout=120)[0]
        assert three.returncode not in (0, 75), text
        cause = "rank 2 on host host3"
        assert cause in last_line(output) and "has been silent for 6 s: host or network lost" in last_line(output)
        assert any(cause in line for line in text.splitlines() if "host2: train: error:" in line)

        rest = start_on(cluster, cluster.names[:2], output, *cautious)
        text = rest.communicate(timeout=300)[0]
        assert rest.returncode == 0 and "resumed from" in text, text
        assert losses(output) == pytest.approx(expected, rel=1e-5)


def test_sigterm_to_the_command_saves_on_all_hosts(project, tmp_path, start_on):
    output = tmp_path / "run"
    with Hosts(tmp_path / "machines", 2) as cluster:
        job = start_on(cluster, cluster.names, output, "solver.epochs=30")
        wait_for(lambda: (output / "metrics.jsonl").exists() and len(losses(output)) > 2, [job])
        job.terminate()
        job.communicate(timeout=120)
        deadline = time.monotonic() + 60
        while "run the command again to go on" not in last_line(output):
            assert time.monotonic() < deadline, last_line(output)
            time.sleep(0.2)
        stopped = int(re.findall(r"stopped by .* after step (\d+);", last_line(output))[0])
        assert (output / "checkpoints" / f"step-{stopped:08d}").is_dir()
