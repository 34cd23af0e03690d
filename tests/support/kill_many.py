"""Kills random ranks of a run at random moments, resumes each time, and compares with a run that was left alone.

    python tests/support/kill_many.py [--in-saves] [--kills 20] [--stages 0 1 2 3] [--ranks 2] [--seed 0]

--in-saves: each moment is one at which the job is writing a checkpoint in the background.

The final weights must be equal bit for bit, and the ledger of samples must hold each global batch once. pytest runs the
same with a few kills (tests/training/test_resume.py).
"""

from __future__ import annotations

import argparse
import os
import random
import signal
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path

from launch import finish
from project import Project, last_line, ledger, losses, weights

SLOW_SAVE = 0.1  # seconds that each of at least three files of a save takes longer


def kill_and_go_on(
    project: Project, output: Path, ledgers: Path, settings: tuple[str, ...], *, ranks: int, kills: int, seed: int,
    in_saves: bool = False,
) -> int:  # fmt: skip
    """Trains to the end although random ranks are killed; returns how often. Every death must end the whole job.

    in_saves: a death counts only if it leaves a checkpoint unfinished.
    """
    draw = random.Random(seed)
    done = 0
    while True:
        slow_save = SLOW_SAVE if in_saves and done < kills else 0
        options = f"--ledger {ledgers} --slow 0.05 --slow-save {slow_save}"
        processes = project.start_with(output, options, *settings, ranks=ranks)
        started = time.time()
        if done < kills:
            victim = processes[draw.randrange(ranks)]
            if in_saves:
                _wait_for_saves(output, draw.randrange(1, 4), started, processes)
                time.sleep(draw.uniform(0, 2 * SLOW_SAVE))
            else:
                _wait_for_steps(ledgers, started, processes)
                time.sleep(draw.uniform(0, 3))
            if victim.poll() is None:
                os.kill(victim.pid, signal.SIGKILL)
                done += not in_saves
        results = finish(processes)
        done += in_saves and bool(_unfinished(output, started))
        codes = [code for code, _ in results]
        if codes == [0] * ranks:
            return done
        assert sorted(set(codes)) in ([-9], [-9, 1]), results
        assert ranks == 1 or "ended without a word: killed, or out of memory" in last_line(output), results


def _wait_for_steps(ledgers: Path, started: float, processes: list) -> None:
    """Waits until this job has begun a step."""
    while all(process.poll() is None for process in processes):
        if any(path.stat().st_mtime > started for path in ledgers.glob("*.jsonl")):
            return
        time.sleep(0.05)


def _wait_for_saves(output: Path, number: int, started: float, processes: list) -> None:
    """Waits until this job has begun so many checkpoints."""
    seen: set[str] = set()
    while len(seen) < number and all(process.poll() is None for process in processes):
        seen |= _unfinished(output, started)
        time.sleep(0.01)


def _unfinished(output: Path, started: float) -> set[str]:
    """Names of the folders that a job which started then is writing, or has left unfinished."""
    found = set()
    for path in output.glob("checkpoints/.*.partial"):
        with suppress(FileNotFoundError):  # it has its name by now
            if path.stat().st_mtime > started:
                found.add(path.name)
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--in-saves", action="store_true")
    parser.add_argument("--stages", type=int, nargs="+", default=[0, 1, 2, 3])
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        base = Path(folder)
        project = Project(base)
        for stage in arguments.stages:
            settings = (f"engine.zero_stage={stage}", "logging.save_steps=2", "solver.epochs=20")
            whole, killed = base / f"whole-{stage}", base / f"killed-{stage}"
            project.train_with(whole, f"--ledger {base}/ledgers-whole-{stage}", *settings, ranks=arguments.ranks)
            kills = kill_and_go_on(
                project, killed, base / f"ledgers-killed-{stage}", settings,
                ranks=arguments.ranks, kills=arguments.kills, seed=arguments.seed + stage, in_saves=arguments.in_saves,
            )  # fmt: skip
            ours, expected = weights(killed), weights(whole)
            same = {
                "weights": all(ours[name].equal(expected[name]) for name in expected),
                "losses": losses(killed) == losses(whole),
                "samples": ledger(base / f"ledgers-killed-{stage}") == ledger(base / f"ledgers-whole-{stage}"),
            }
            print(f"ZeRO {stage}: {kills} kills, {len(losses(whole))} steps, equal: {same}", flush=True)
            if not all(same.values()) or kills < arguments.kills:
                return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
