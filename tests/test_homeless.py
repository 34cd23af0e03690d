"""Every program works for a user without a name and a home, and where the home cannot be written, as in containers.

All at once, because a program that works under all of it works under each: one core, a network of 127.0.0.1 without
IPv6, the locale C, names with spaces and accents, a checkout that cannot be written, and a working folder elsewhere.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from frame_folders import make_frame_folders
from launch import ROOT, free_port
from project import EVALUATE, TRAIN
from videos import write_video

UNKNOWN = 54321  # a number that no list of users has
HOMES = [
    pytest.param({"LC_ALL": "C"}, id="no home"),
    pytest.param({"LC_ALL": "POSIX", "HOME": "/proc"}, id="a home that cannot be written", marks=pytest.mark.long),
]

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(os.getuid() != 0 or shutil.which("setpriv") is None, reason="needs root and setpriv"),
]

NO_IPV6 = 'ip link set lo up && echo 1 > /proc/sys/net/ipv6/conf/all/disable_ipv6 && exec "$@"'


def narrowed() -> list[str]:
    """The beginning of a command that has one core, and a network without IPv6 where such a one can be made."""
    command = ["taskset", "--cpu-list", str(min(os.sched_getaffinity(0)))]
    network = ["unshare", "--net", "sh", "-c", NO_IPV6, "sh"]
    can = shutil.which("ip") and subprocess.run([*network, "true"], capture_output=True, check=False).returncode == 0
    return [*command, *network] if can else command


def as_unknown(folder: Path, home: dict[str, str], *words: object) -> subprocess.CompletedProcess[str]:
    """Runs a program of this environment as a user that the system does not know, who may read all and write FOLDER.

    Reading all lets it run whatever folder Python and the project are installed in.
    """
    user = [f"--reuid={UNKNOWN}", f"--regid={UNKNOWN}", "--clear-groups"]
    may_read = ["--inh-caps=+dac_read_search", "--ambient-caps=+dac_read_search"]
    variables = {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "TMPDIR": str(folder / "tmp"), **home}
    return subprocess.run(
        [*narrowed(), "setpriv", *user, *may_read, *map(str, words)],
        cwd=folder, env=variables, capture_output=True, text=True, timeout=400, check=False,
    )  # fmt: skip


@pytest.fixture
def folder(tmp_path):
    """A folder that everybody may write."""
    own = tmp_path / "Läufe von früher"
    (own / "tmp").mkdir(parents=True)
    for path in (own, own / "tmp"):
        path.chmod(0o777)
    return own


@pytest.mark.parametrize("home", HOMES)
def test_every_program_works(project, folder, tmp_path, home):
    frames = make_frame_folders(tmp_path / "les vidéos", [3, 4], prefix="saut à ski/vidéo n°")
    write_video(tmp_path / "mein Clip ñ.mp4", 9, 7)
    recipe = ["--config", project.config]
    small = ["--set=solver.epochs=1", "--set=logging.pictures=2"]
    programs = [
        ("tools/build_shards.py", "--annotations", frames.annotations, "--root", frames.root, "--labels", frames.labels,
         "--output", "shards"),
        ("tools/check_shards.py", "shards"),
        ("tools/doctor.py", *recipe),
        (TRAIN, *recipe, *small, "--output", "run"),
        (EVALUATE, *recipe, "--model", "run", "--report", "report.json"),
        ("tools/build_classifier.py", *recipe, "--output", "classes.safetensors"),
        ("tools/export.py", "run", "--output", "export"),
        ("tools/predict.py", tmp_path / "mein Clip ñ.mp4", "--model", "export", "--picture", "seen.png"),
        ("tools/report.py", "run", "--output", "report.html"),
    ]  # fmt: skip
    said = {}
    for program, *words in programs:
        done = as_unknown(folder, home, sys.executable, ROOT / program, *words)
        assert done.returncode == 0, f"{program}: {done.stdout}{done.stderr}"
        said[program] = done.stdout + done.stderr
    assert all((folder / name).exists() for name in ("run/report.json", "report.json", "seen.png", "report.html"))
    (kept,) = (folder / "tmp").glob(f"text4vis-{UNKNOWN}")
    assert f"using {kept}: name a folder in data.cache_dir" in said[TRAIN] and list((kept / "classifiers").iterdir())
    elsewhere = as_unknown(folder, home, sys.executable, ROOT / TRAIN, *recipe, *small, "--set=data.cache_dir=kept",
                           "--output", "run")  # fmt: skip
    assert elsewhere.returncode == 0 and "cache:" not in elsewhere.stdout + elsewhere.stderr


@pytest.mark.parametrize("home", HOMES)
def test_the_launcher_works(project, folder, home):
    launcher = ["deepspeed", "--num_gpus", 1, "--master_port", free_port()]
    words = [ROOT / TRAIN, "--config", project.config, "--set=solver.epochs=1", "--output", "run"]
    done = as_unknown(folder, home, *launcher, *words)
    assert done.returncode == 0, done.stdout + done.stderr
    assert (folder / "run" / "report.json").exists()
