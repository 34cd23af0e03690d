"""Compares two reports of text4vis/evaluate.py, or gives mean and deviation over several.

Examples:
    python tools/compare_reports.py before.json after.json
    python tools/compare_reports.py --mean split1.json split2.json split3.json

Shows the figures side by side, what differs in their protocol cards, the classes that gained and lost most, the pairs
confused most often, and whether the difference in top-1 may be chance: McNemar's exact test where both reports list
their predictions for the same videos, and each report's 95 % interval. --mean is for the seeds of a
few-shot run or the splits of a protocol.

Exit codes: 0 done and comparable, 1 failed, 2 wrong usage, 3 shown, but the two do not measure the same thing: their
data, classes, classifier, template or views differ.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from shards.address import shown
from text4vis.comparison import ClassFigure, Comparison, Confusion, Setting, compare, read_report, summarise
from text4vis.config import ConfigError

NOT_COMPARABLE = 3


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("reports", nargs="+", type=Path, metavar="REPORT", help="two reports, A and B, or several")
    parser.add_argument("--mean", action="store_true", help="mean and standard deviation over all reports")
    parser.add_argument("--top", type=int, default=10, metavar="N", help="rows of each list of classes")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the comparison here as JSON")
    arguments = parser.parse_args()
    if not arguments.mean and len(arguments.reports) != 2:
        parser.error("give two reports to compare, or --mean")
    return arguments


def show(found: Comparison, names: tuple[str, str], top: int, console: Console) -> None:
    if found.protocol:
        console.print("NOT COMPARABLE: the figures do not measure the same thing", style="bold red")
        console.print(_settings(found.protocol, names))
    table = Table("", *(f"{letter}: {name}" for letter, name in zip("AB", names, strict=True)), "B - A")
    for column in table.columns[1:]:
        column.justify = "right"
    for figure in found.figures:
        table.add_row(figure.name, f"{figure.a:.2f}", f"{figure.b:.2f}", f"{figure.difference:+.2f}")
    console.print(table)
    intervals = ", ".join(f"{x} {low:.2f} to {high:.2f}" for x, (low, high) in zip("AB", found.intervals, strict=True))
    console.print(f"95 % intervals of top-1: {intervals}")
    if tested := found.significance:
        verdict = "unlikely to be chance" if tested.p < 0.05 else "may be chance"
        console.print(
            f"{tested.only_a} videos right in A only, {tested.only_b} in B only: McNemar's exact p = {tested.p:.2g}, "
            f"the difference {verdict}"
        )
    gained = [one for one in found.classes if one.difference > 0][:top]
    lost = [one for one in reversed(found.classes) if one.difference < 0][:top]
    for title, changes in (("gained most", gained), ("lost most", lost)):
        if changes:
            console.print(_classes(title, changes))
    if found.confused:
        console.print(_confused(found.confused[:top]))
    if found.settings:
        console.print("what else differs")
        console.print(_settings(found.settings, names))


def _settings(settings: list[Setting], names: tuple[str, str]) -> Table:
    table = Table("", *names)
    for setting in settings:
        width = 12 if setting.key.endswith(("fingerprint", "weights", "class_embeddings")) else None
        table.add_row(setting.key, str(setting.a)[:width], str(setting.b)[:width])
    return table


def _classes(title: str, changes: list[ClassFigure]) -> Table:
    table = Table(title, "videos", "A %", "B %", "B - A")
    for one in changes:
        table.add_row(one.name, str(one.videos), f"{one.a:.1f}", f"{one.b:.1f}", f"{one.difference:+.1f}")
    return table


def _confused(pairs: list[Confusion]) -> Table:
    table = Table("most confused", "taken for", "videos", "A", "B")
    for pair in pairs:
        table.add_row(pair.name, pair.taken_for, str(pair.videos), str(pair.a), str(pair.b))
    return table


def _show_mean(means: dict[str, tuple[float, float]], count: int, console: Console) -> None:
    table = Table(f"{count} reports", "mean", "deviation")
    for name, (mean, deviation) in means.items():
        table.add_row(name, f"{mean:.2f}", f"{deviation:.2f}")
    console.print(table)


def run(arguments: argparse.Namespace) -> int:
    reports = [read_report(path) for path in arguments.reports]
    console = Console(markup=False, highlight=False, width=None if sys.stdout.isatty() else 120)
    content: dict[str, Any]
    if arguments.mean:
        means = summarise(reports)
        content = {name: {"mean": mean, "std": deviation} for name, (mean, deviation) in means.items()}
        _show_mean(means, len(reports), console)
        status = 0
    else:
        found = compare(*reports)
        content = {"comparable": found.is_comparable, **asdict(found)}
        show(found, (str(arguments.reports[0]), str(arguments.reports[1])), arguments.top, console)
        status = 0 if found.is_comparable else NOT_COMPARABLE
    if arguments.json:
        arguments.json.write_text(json.dumps(content, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
    return status


def main() -> int:
    arguments = parse_arguments()
    try:
        return run(arguments)
    except (ConfigError, OSError) as error:
        print(f"compare_reports: error: {shown(error)}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
