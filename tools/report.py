"""Compares training runs on one HTML page that needs no network, no server and no other file.

Examples:
    python tools/report.py runs/own
    python tools/report.py runs/before runs/after runs/other --output compared.html

Shows, for run folders (or single reports of text4vis/evaluate.py --report): the results and how they differ from the
first run's, the reliability of the probabilities, the curves of metrics.jsonl, the classes that gained and lost, the
most confident right and wrong predictions with the frames that the model saw, the protocol cards side by side, and the
settings that differ. Start it in the folder in which the runs were trained: it reads those frames from their shards,
whose paths in the configurations are relative to that folder.

Exit codes: 0 done, 1 failed, 2 wrong usage, 130 stopped by Ctrl-C.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from shards.files import require_file
from shards.text import printable
from text4vis.common.programs import run_program
from text4vis.common.progress import track
from text4vis.config.schema import ConfigError


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="run folders or reports, the reference first")
    parser.add_argument("--output", type=Path, default=Path("report.html"), metavar="FILE", help="default: %(default)s")
    parser.add_argument(
        "--examples",
        type=int,
        default=3,
        metavar="N",
        help="most confident right and wrong predictions to show of each run (default: %(default)s); 0: none",
    )
    arguments = parser.parse_args()
    if arguments.examples < 0:
        parser.error(f"--examples: expected 0 or more, got {arguments.examples}")
    return arguments


def main() -> int:
    arguments = parse_arguments()
    from text4vis.report.page import read_examples, read_runs, render  # loads matplotlib: too slow for --help

    try:
        require_file(arguments.output, "--output")
        runs = read_runs(arguments.runs)
        found = read_examples(runs, arguments.examples) if arguments.examples else ()
        page = render(runs, list(track(found, "reading frames", len(runs), unit="run", keep=False)))
        arguments.output.write_text(page, encoding="utf-8")
    except (ConfigError, OSError) as error:
        print(f"report: error: {printable(str(error))}", file=sys.stderr)
        return 1
    print(f"{arguments.output}: {len(runs)} {'run' if len(runs) == 1 else 'runs'}")
    return 0


if __name__ == "__main__":
    run_program(main)
