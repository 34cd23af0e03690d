"""Checks machine, libraries, hosts, configuration and data before a job, and says what would go wrong.

probe (here, and on each host by ssh) ──┐
configuration ── data sets ── weights ──┼──> Finding: fine, a warning, or a problem with its fix
hostfile ───────────────────────────────┘
"""

from __future__ import annotations

import json
import logging
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import accumulate, chain
from pathlib import Path
from typing import Any

from shards.address import scheme_of
from shards.format import ShardError
from text4vis.config.batches import BatchSizes
from text4vis.config.loading import resolve_config
from text4vis.config.schema import Config, ConfigError
from text4vis.config.sources import addresses
from text4vis.doctor.probe import SHARED_MEMORY, probe

FINE, WARNING, PROBLEM = "fine", "warning", "PROBLEM"
LAUNCHERS_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "OMPI_COMM_WORLD_RANK")
_GB = 1e9


@dataclass(frozen=True)
class Finding:
    """level: FINE, WARNING or PROBLEM. fix: what to do about it; empty if the level is FINE."""

    subject: str
    level: str
    message: str
    fix: str = ""


def diagnose(config: str | None, overrides: Sequence[str], hostfile: str | None, output: Path) -> Iterator[Finding]:
    """Yields findings as they are made. config: a recipe, or None to check only the machine."""
    yield from _environment()
    here = probe([])
    yield from machine(here)
    settings: Config | None = None
    if config is not None:
        try:
            settings, origins = resolve_config(config, overrides)
            yield Finding("configuration", FINE, f"{config} is complete and free of contradictions")
        except (ConfigError, OSError) as error:
            yield Finding("configuration", PROBLEM, str(error), "change the key that is named")
    if settings is not None:
        settings, problems = _settled(settings)
        found = chain(problems, _engine(settings, here), _data(settings), _model_and_output(settings, output))
        for finding in found:
            is_problem = finding.level == PROBLEM
            yield replace(finding, message=origins.explain(finding.message)) if is_problem else finding
    if hostfile is not None:
        yield from hosts(Path(hostfile), settings, here, config, output)


def _environment() -> Iterator[Finding]:
    set_here = [name for name in LAUNCHERS_VARIABLES if name in os.environ]
    if set_here:
        yield Finding(
            "environment", WARNING, f"{', '.join(set_here)}: a launcher's variables are set in this shell",
            f"unset {' '.join(set_here)}: a program that starts here would run as a rank of that job",
        )  # fmt: skip
    for path in (Path(".deepspeed_env"), Path(os.path.expanduser("~/.deepspeed_env"))):  # noqa: PTH111 (no home: as it is)
        if not path.exists():
            continue
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
        bad = [n for n, line in enumerate(lines, start=1) if not re.fullmatch(r"[A-Za-z_]\w*=.*", line)]
        if bad:
            yield Finding(
                "environment", PROBLEM, f"{path}: line {bad[0]} is not NAME=value",
                "write one variable a line and no empty lines: DeepSpeed's launcher fails on others",
            )  # fmt: skip


def machine(found: Mapping[str, Any]) -> Iterator[Finding]:
    """Findings from the probe of one machine."""
    for name, reason in found["broken"].items():
        hint = "torchvision and torch must be of one release; " if name == "torchvision" else ""
        yield Finding("libraries", PROBLEM, f"{name} {found['versions'][name]}: {reason}", f"{hint}pip install -e .")
    if not found["broken"]:
        wanted = ("torch", "deepspeed", *(name for name in found["versions"] if name.startswith("nvidia-dali")))
        versions = ", ".join(f"{name} {found['versions'][name]}" for name in wanted)
        yield Finding("libraries", FINE, f"Python {found['python']}, {versions}")
    yield from _gpus(found)
    memory = found["memory"] / _GB
    yield Finding("machine", FINE, f"{found['cores']} cores, {memory:.0f} GB of memory")
    if found["cuda"]["gpus"] and found["shared_memory"] < 1 << 30:
        yield Finding(
            "machine", WARNING, f"{SHARED_MEMORY} has {found['shared_memory'] / 1e6:.0f} MB, which NCCL needs",
            "start the container with --shm-size=8g or --ipc=host",
        )  # fmt: skip
    if found["open_files"] < 4096:
        yield Finding("machine", WARNING, f"at most {found['open_files']} open files", "ulimit -n 65536")


def _gpus(found: Mapping[str, Any]) -> Iterator[Finding]:
    cuda, driver = found["cuda"], found["driver"]
    if cuda["gpus"]:
        names = sorted({gpu["name"] for gpu in cuda["gpus"]})
        yield Finding(
            "GPU", FINE, f"{len(cuda['gpus'])} x {', '.join(names)}, driver {driver}, CUDA {cuda['built_for']}"
        )
        if min(gpu["capability"] for gpu in cuda["gpus"]) < [8, 0]:
            yield Finding("GPU", WARNING, "computes bf16 slowly", "engine.precision: fp16, or fp32")
        major = int(str(driver).split(".")[0]) if driver else 580
        if major < 580 and "nvidia-dali-cuda130" in found["versions"]:  # NVIDIA: CUDA 13 needs driver 580
            yield Finding(
                "GPU", PROBLEM, f"driver {driver} is too old for DALI's build for CUDA 13",
                "pip uninstall nvidia-dali-cuda130, then pip install -e '.[cuda12]'; or install driver 580 or newer",
            )  # fmt: skip
    elif driver or found["programs"]["nvidia-smi"]:
        reason = f"torch is built for CUDA {cuda['built_for']}" if cuda["built_for"] else "this torch is built for CPUs"
        yield Finding(
            "GPU", PROBLEM, f"an NVIDIA driver ({driver or 'nvidia-smi'}) is here, but torch sees no GPU: {reason}",
            "install the torch build for this driver, and check CUDA_VISIBLE_DEVICES and nvidia-smi",
        )  # fmt: skip
    else:
        yield Finding(
            "GPU", WARNING, "none: everything runs on the CPU",
            "nothing to do for small models, such as that of configs/demo.yaml and own-small.yaml",
        )  # fmt: skip


def _engine(config: Config, here: Mapping[str, Any]) -> Iterator[Finding]:
    engine, has_gpu = config.engine, bool(here["cuda"]["gpus"])
    if engine.precision == "fp16" and not has_gpu:
        yield Finding("engine", PROBLEM, "engine.precision: fp16 runs on GPUs only", "engine.precision: bf16")
    if (engine.compile or engine.offload != "none") and not here["programs"]["g++"]:
        yield Finding("engine", PROBLEM, "engine.compile and engine.offload need g++", "install it: apt install g++")
    if config.data.decode == "gpu" and not has_gpu:
        yield Finding("engine", PROBLEM, "data.decode: gpu, but this machine has no GPU", "data.decode: auto")


def _settled(config: Config) -> tuple[Config, list[Finding]]:
    """The configuration with what follows from the model, and what is wrong where that cannot be known."""
    from text4vis.model.preprocessing import settle

    try:
        return settle(config, say=lambda _: None), []
    except (ConfigError, OSError) as error:
        return config, [Finding("pixels and activation", PROBLEM, str(error), "give the keys that are named")]


def _data(config: Config) -> Iterator[Finding]:
    """Opens both data sets and makes a batch of each."""
    from text4vis.data.datasets import check_labels, check_same_classes, class_names
    from text4vis.data.loader import build_loader
    from text4vis.data.traps import find_traps

    classes = {}
    for split in ("train", "val"):
        subject = f"data.{split}"
        try:
            with build_loader(config, split) as loader:
                batches = iter(loader)
                batch = next(batches)
                batches.close()
                names = class_names(config, loader.dataset)
                check_labels(config, split, loader.dataset)
                classes[split] = loader.dataset.classes
                count = len(loader.dataset)
                traps = find_traps(config, names, loader.dataset) if split == "train" else []
        except (ConfigError, ShardError, OSError, RuntimeError) as error:  # the last: what DALI and CUDA raise
            yield Finding(
                subject,
                PROBLEM,
                str(error).removeprefix(f"{subject}: "),
                "build it (docs/data-sets.md), correct the path or $DATA, or check it with tools/check_shards.py",
            )
            continue
        shape = "x".join(str(size) for size in batch.frames.shape)
        yield Finding(subject, FINE, f"{count:,} videos of {len(names)} classes; a batch of {shape} was made")
        if split == "train" and count < config.data.batch_size:
            yield Finding(
                subject, WARNING, f"{count} videos are fewer than data.batch_size ({config.data.batch_size})",
                f"every batch holds videos more than once; set data.batch_size to at most {count}",
            )  # fmt: skip
        for trap in traps:
            yield Finding(subject, WARNING, trap.message, trap.fix)
    if len(classes) == 2:
        try:
            check_same_classes(config, classes["train"], classes["val"])
        except ConfigError as error:
            what, _, fix = str(error).removeprefix("data.val: ").partition("; ")
            yield Finding("data.val", PROBLEM, what, fix)


def _model_and_output(config: Config, output: Path) -> Iterator[Finding]:
    """Builds the model, which reveals missing weights, and checks the disk's space for its checkpoints."""
    from text4vis.model.adapters import add_adapters
    from text4vis.model.video_clip import build_model
    from text4vis.saved.checkpoint import CheckpointError, read_state
    from text4vis.saved.runs import find_start
    from text4vis.training.checkpointing import check_room
    from text4vis.training.memory import StateMemory

    parameters = trainable = 0
    logging.disable()  # a download logs each retry; its outcome becomes a finding below
    try:
        model = build_model(config.network, config.data.num_segments, image_size=config.data.input_size)
        add_adapters(model, config.network)
        memory = StateMemory.of(model, config, BatchSizes.of(config, config.engine.world_size or 1), 1)
        parameters, trainable = memory.total, memory.trainable
        words = memory.in_words()
        found = Finding(
            "network", FINE, f"{config.network.arch}: {words['trainable parameters']} parameters train; on one rank "
            f"{words['memory a rank']}",
        )  # fmt: skip
    except (ConfigError, OSError) as error:
        fix = "give network.pretrained a local file where there is no internet"
        found = Finding("network", PROBLEM, str(error), fix)
    finally:
        logging.disable(logging.NOTSET)
    yield found
    folder = next(path for path in (output.absolute(), *output.absolute().parents) if path.exists())
    if not os.access(folder, os.W_OK, effective_ids=True):
        yield Finding("output", PROBLEM, f"{folder} cannot be written", "give another --output")
        return
    try:
        check_room(
            output, config.logging.keep_checkpoints, 4 * parameters, (12 if config.solver.ema else 8) * trainable
        )
        yield Finding("output", FINE, f"room for the run's checkpoints in {folder}")
    except CheckpointError as error:
        yield Finding("output", PROBLEM, str(error), "free some space")
    try:
        start = find_start(output, "auto")
        if start is not None:
            yield Finding("output", FINE, f"{output} holds a run, which would resume at step {read_state(start).step}")
    except CheckpointError as error:
        yield Finding("output", PROBLEM, str(error), "give another --output")


def parse_hostfile(path: Path) -> dict[str, int]:
    """Number of ranks by host. Raises ConfigError."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(
            f"{path}: cannot be read ({error}); `deepspeed` would only warn and train on this machine alone"
        ) from None
    slots: dict[str, int] = {}
    for number, line in enumerate(lines, start=1):
        words = line.partition("#")[0].strip()
        if not words:
            continue
        match = re.fullmatch(r"([^\s-]\S*)\s+slots=(\d+)", words)
        if match is None or match[1] in slots or not int(match[2]):
            raise ConfigError(f"{path}, line {number}: expected `host slots=N`, each host once, got {line!r}")
        slots[match[1]] = int(match[2])
    if not slots:
        raise ConfigError(f"{path}: names no host")
    return slots


def hosts(
    path: Path, config: Config | None, here: Mapping[str, Any], config_path: str | None, output: Path
) -> Iterator[Finding]:
    """Checks whether each host can be reached, has this machine's library versions and sees the same files."""
    try:
        slots = parse_hostfile(path)
    except ConfigError as error:
        yield Finding("hostfile", PROBLEM, str(error), "one `host slots=N` a line")
        return
    ranks = sum(slots.values())
    yield Finding("hostfile", FINE, f"{len(slots)} hosts, {ranks} ranks")
    if config is not None:
        yield from _batch(config, slots)
    for program in ("ssh", "pdsh"):
        if not here["programs"][program]:
            yield Finding("hostfile", PROBLEM, f"{program} is not installed here", f"apt install {program}")
    if not here["programs"]["ssh"]:
        return
    paths = [] if config is None else [str(Path(name).absolute()) for name in _local_paths(config, config_path, output)]
    with ThreadPoolExecutor(min(32, len(slots))) as pool:
        for host, (found, reason) in zip(slots, pool.map(lambda host: _probe(host, paths), slots), strict=True):
            yield from _host(host, found, reason, here, slots[host])


def _batch(config: Config, slots: Mapping[str, int]) -> Iterator[Finding]:
    from text4vis.cluster.distributed import Ranks
    from text4vis.training.joining import check_streams

    ranks = sum(slots.values())
    expected = config.engine.world_size
    if expected not in (None, ranks):
        yield Finding(
            "hostfile", PROBLEM, f"engine.world_size expects {expected} ranks, the hostfile has {ranks}",
            "change one of the two",
        )  # fmt: skip
    try:
        sizes = BatchSizes.of(config, ranks)
        for first, count in zip(accumulate(slots.values(), initial=0), slots.values(), strict=False):
            check_streams(config.data.streams, sizes.global_batch, Ranks(first, ranks, 0, count))
        yield Finding(
            "hostfile", FINE, f"global batch of {sizes.global_batch}: {sizes.micro} videos a rank, "
            f"{sizes.accumulation} x accumulated",
        )  # fmt: skip
    except ConfigError as error:
        yield Finding("hostfile", PROBLEM, str(error), "change the key or the number of slots")


def _local_paths(config: Config, config_path: str | None, output: Path) -> Iterator[str]:
    """Files that every host must see under the same path."""
    yield str(Path.cwd())
    if config_path is not None:
        yield config_path
    yield str(next(path for path in (output.absolute(), *output.absolute().parents) if path.exists()))
    for address in addresses((*config.data.train, *config.data.val)):
        if scheme_of(address) is None and Path(address).exists():
            yield address
    for name in (config.network.arch, config.network.pretrained, config.data.label_list):
        if name and Path(name).is_file():
            yield name


def _probe(host: str, paths: Sequence[str]) -> tuple[dict[str, Any] | None, str]:
    """The probe of a host, over ssh, or None and the reason why there is none."""
    remote = (
        shlex.join(["cd", str(Path.cwd())])
        + " && "
        + shlex.join([sys.executable, "-m", "text4vis.doctor.probe", *paths])
    )
    command = ["ssh", "-o", "BatchMode=yes", "-o", "ConnectTimeout=10", "--", host, remote]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    except subprocess.TimeoutExpired:
        return None, "did not answer within 300 s"
    if done.returncode:
        return None, " ".join(done.stderr.split())[-300:] or f"ssh ended with exit code {done.returncode}"
    try:
        return json.loads(done.stdout.strip().splitlines()[-1]), ""
    except (ValueError, IndexError):
        return None, f"answered {done.stdout[-200:]!r}; its shell must print nothing at login"


def _host(
    host: str, found: dict[str, Any] | None, reason: str, here: Mapping[str, Any], slots: int
) -> Iterator[Finding]:
    subject = f"host {host}"
    if found is None:
        fix = f"make `ssh {host} true` work without a password, and install the same {sys.executable} there"
        yield Finding(subject, PROBLEM, reason, fix)
        return
    sound = True
    for name, version in here["versions"].items():
        other = found["versions"].get(name, "")
        if other != version or found["broken"].get(name):
            sound = False
            problem = found["broken"].get(name) or f"{name} {other or 'missing'}, here {version}"
            yield Finding(subject, PROBLEM, f"{name}: {problem}", "install the same versions on every host")
    for path, exists in found["paths"].items():
        if not exists:
            sound = False
            yield Finding(subject, PROBLEM, f"{path} is not there", "put it on storage that all hosts share")
    gpus = len(found["cuda"]["gpus"])
    if gpus and slots > gpus:
        sound = False
        yield Finding(subject, PROBLEM, f"slots={slots}, but it has {gpus} GPUs", f"slots={gpus}")
    if sound:
        yield Finding(subject, FINE, f"same versions and files, {gpus} GPUs, {found['cores']} cores, {slots} ranks")
