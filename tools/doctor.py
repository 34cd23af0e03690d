"""Checks this machine, a recipe, its data and the hosts of a job, and says what would go wrong and how to fix it.

Opens the data sets and makes a batch, builds the model, checks the space on the disk, logs in to every host of a
hostfile and compares versions and files. Trains nothing and writes nothing; `train.py --dry-run` then tries a step.
Exit codes: 0 no problems (warnings are allowed), 1 problems, 2 wrong usage, 130 stopped by Ctrl-C.

Examples:
  python tools/doctor.py
  python tools/doctor.py --config configs/demo.yaml --set data.train=demo/shards/train --set data.val=demo/shards/val
  python tools/doctor.py --config configs/demo.yaml --hostfile hosts --output runs/demo
"""

from __future__ import annotations

import argparse
from pathlib import Path

from shards.text import shown
from text4vis.common.console import console
from text4vis.common.programs import run_program
from text4vis.doctor.checks import FINE, PROBLEM, WARNING, diagnose

_STYLES = {FINE: "green", WARNING: "yellow", PROBLEM: "bold red"}


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", metavar="FILE", help="recipe; without it only the machine is checked")
    parser.add_argument("--set", action="append", default=[], metavar="SECTION.KEY=VALUE", help="as for train.py")
    parser.add_argument("--hostfile", metavar="FILE", help="as for deepspeed")
    parser.add_argument("--output", type=Path, metavar="DIR", help="as for train.py")
    return parser.parse_args()


def main() -> int:
    arguments = parse_arguments()
    output = arguments.output or Path("runs") / Path(arguments.config or "run").stem
    screen = console()
    counts = dict.fromkeys(_STYLES, 0)
    for finding in diagnose(arguments.config, arguments.set, arguments.hostfile, output):
        counts[finding.level] += 1
        screen.print(f"{finding.level:8}", style=_STYLES[finding.level], end="")
        screen.print(shown(f"{finding.subject}: {finding.message}"), soft_wrap=True)  # one line, easy to copy
        if finding.fix:
            screen.print(f"{'':8}-> {finding.fix}", soft_wrap=True)
    screen.print(f"\nproblems: {counts[PROBLEM]}, warnings: {counts[WARNING]}")
    return 1 if counts[PROBLEM] else 0


if __name__ == "__main__":
    run_program(main)
