"""Checks data sets of shards for damage, leaks and other problems, and shows what they hold.

Examples:
    python tools/check_shards.py shards/train shards/val
    python tools/check_shards.py shards/val --deep --labels labels.csv --json report.json
    python tools/check_shards.py shards/train shards/val --similar      # also warn of look-alikes in both

Exit codes: 0 sound, 1 unsound, 2 wrong usage, 130 stopped by Ctrl-C.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from shards.annotations import parse_labels
from shards.checker import VIDEOS_PER_RANK, Report, check_datasets
from shards.files import require_file
from shards.format import ShardError
from shards.text import shown
from text4vis.common.console import console, table
from text4vis.common.programs import run_program
from text4vis.common.progress import Progress

_SHOWN_LINES = 20


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("datasets", nargs="+", metavar="DIR", help="data sets; no video may be in two of them")
    parser.add_argument("--deep", action="store_true", help="also decode every frame")
    parser.add_argument("--similar", action="store_true", help="also warn of videos in two of them that look alike")
    parser.add_argument("--labels", metavar="CSV", help="class list that the data sets must have")
    parser.add_argument("--json", metavar="FILE", help="write the report here as JSON")
    parser.add_argument("--workers", type=int, metavar="N", help="threads; by default one per core")
    return parser.parse_args()


def print_table(report: Report) -> None:
    columns = [_cells(dataset.statistics) for dataset in report.datasets]
    rows = table(("",), [ascii(dataset.path)[1:-1] for dataset in report.datasets])
    for name in dict.fromkeys(name for cells in columns for name in cells):
        rows.add_row(name, *(cells.get(name, "-") for cells in columns))
    rows.add_row("result", *("UNSOUND" if dataset.problems else "sound" for dataset in report.datasets))
    console().print(rows)


def _cells(statistics: dict[str, Any]) -> dict[str, str]:
    if not statistics:
        return {}

    def spread(name: str) -> str:
        return "{min:,} / {median:,} / {max:,}".format(**statistics[name])

    return {
        "content": statistics["content"],
        "fingerprint": statistics["fingerprint"][:16],
        "videos": f"{statistics['videos']:,}",
        "frames": f"{statistics['frames']:,}",
        "shards": f"{statistics['shards']:,}",
        "MB": f"{statistics['bytes'] / 1e6:,.1f}",
        "frames per video, min / median / max": spread("frames_per_video"),
        "bytes per member": spread("member_bytes"),
        "shorter side, pixels": spread("short_side"),
        "classes (empty)": f"{statistics['classes']} ({statistics['empty_classes']})",
        "videos per class": spread("videos_per_class"),
        **({"labels per video": spread("labels_per_video")} if "labels_per_video" in statistics else {}),
        "skipped when built": f"{statistics['skipped']:,}",
        f"ranks with >= {VIDEOS_PER_RANK} videos each per epoch": f"at most {statistics['well_fed_ranks']:,}",
        "ranks, if a reader splits by shard": f"at most {statistics['shards']:,}",
    }


def main() -> int:
    arguments = parse_arguments()
    try:
        labels = parse_labels(arguments.labels) if arguments.labels else None
        if arguments.json:
            require_file(arguments.json, "--json")
    except (ShardError, OSError) as error:
        print(f"check_shards: error: {shown(error)}", file=sys.stderr)
        return 2
    with Progress() as bar:
        report = check_datasets(
            arguments.datasets,
            labels=labels,
            deep=arguments.deep,
            similar=arguments.similar,
            workers=arguments.workers,
            progress=bar.update,
        )
    print_table(report)
    lines = [f"problem: {line}" for dataset in report.datasets for line in dataset.problems]
    lines += [f"leak: {line}" for line in report.leaks]
    lines += [f"warning: {line}" for dataset in report.datasets for line in dataset.warnings]
    lines += [f"warning: {line}" for line in report.similar]
    for line in lines[:_SHOWN_LINES]:
        print(line)
    if len(lines) > _SHOWN_LINES:
        print(f"and {len(lines) - _SHOWN_LINES} more lines; --json FILE lists all")
    if arguments.json:
        Path(arguments.json).write_text(report.to_json(), encoding="utf-8")
    print("sound" if report.sound else "UNSOUND")
    return 0 if report.sound else 1


if __name__ == "__main__":
    run_program(main, OSError)
