"""Compares two reports of text4vis/evaluate.py, or shows the mean and standard deviation of several.

Examples:
    python tools/compare_reports.py before.json after.json
    python tools/compare_reports.py --mean split1.json split2.json split3.json

Shows the figures side by side, what differs in their protocol cards, the classes that gained and lost most, the pairs
confused most often, each report's 95 % interval of top-1 and, where both list their predictions for the same videos,
McNemar's exact test of whether the difference may be chance. --mean is for the seeds of a few-shot run or the splits
of a protocol.

Exit codes: 0 done, 1 failed, 2 wrong usage, 3 the two reports are shown but not comparable: their data, classes,
classifier, template or views differ.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from shards.text import json_text, shown
from text4vis.common.console import console, table
from text4vis.common.programs import run_program
from text4vis.config.schema import ConfigError
from text4vis.evaluation.comparison import ClassFigure, Comparison, Confusion, Setting, compare, read_report, summarise

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


def show(found: Comparison, names: tuple[str, str], top: int, screen: Console) -> None:
    if found.protocol:
        screen.print("NOT COMPARABLE: the figures do not measure the same thing", style="bold red")
        screen.print(_settings(found.protocol, names))
    rows = table(("",), (*(f"{letter}: {name}" for letter, name in zip("AB", names, strict=True)), "B - A"))
    for figure in found.figures:
        rows.add_row(figure.name, f"{figure.a:.2f}", f"{figure.b:.2f}", f"{figure.difference:+.2f}")
    screen.print(rows)
    intervals = ", ".join(f"{x} {low:.2f} to {high:.2f}" for x, (low, high) in zip("AB", found.intervals, strict=True))
    screen.print(f"95 % intervals of top-1: {intervals}")
    if tested := found.significance:
        verdict = "unlikely to be chance" if tested.p < 0.05 else "may be chance"
        screen.print(
            f"{tested.only_a} videos right in A only, {tested.only_b} in B only: McNemar's exact p = {tested.p:.2g}, "
            f"the difference {verdict}"
        )
    gained = [one for one in found.classes if one.difference > 0][:top]
    lost = [one for one in reversed(found.classes) if one.difference < 0][:top]
    for title, changes in (("gained most", gained), ("lost most", lost)):
        if changes:
            screen.print(_classes(title, changes))
    if found.confused:
        screen.print(_confused(found.confused[:top]))
    if found.settings:
        screen.print("what else differs")
        screen.print(_settings(found.settings, names))


def _settings(settings: list[Setting], names: tuple[str, str]) -> Table:
    rows = table(("", *names))
    for setting in settings:
        width = 12 if setting.key.endswith(("fingerprint", "weights", "class_embeddings")) else None
        rows.add_row(setting.key, str(setting.a)[:width], str(setting.b)[:width])
    return rows


def _classes(title: str, changes: list[ClassFigure]) -> Table:
    rows = table((title,), ("videos", "A %", "B %", "B - A"))
    for one in changes:
        rows.add_row(one.name, str(one.videos), f"{one.a:.1f}", f"{one.b:.1f}", f"{one.difference:+.1f}")
    return rows


def _confused(pairs: list[Confusion]) -> Table:
    rows = table(("most confused", "taken for"), ("videos", "A", "B"))
    for pair in pairs:
        rows.add_row(pair.name, pair.taken_for, str(pair.videos), str(pair.a), str(pair.b))
    return rows


def _show_mean(means: dict[str, tuple[float, float]], count: int, screen: Console) -> None:
    rows = table((f"{count} reports",), ("mean", "deviation"))
    for name, (mean, deviation) in means.items():
        rows.add_row(name, f"{mean:.2f}", f"{deviation:.2f}")
    screen.print(rows)


def run(arguments: argparse.Namespace) -> int:
    reports = [read_report(path) for path in arguments.reports]
    screen = console()
    content: dict[str, Any]
    if arguments.mean:
        means = summarise(reports)
        content = {name: {"mean": mean, "std": deviation} for name, (mean, deviation) in means.items()}
        _show_mean(means, len(reports), screen)
        status = 0
    else:
        found = compare(*reports)
        content = {"comparable": found.is_comparable, **asdict(found)}
        show(found, (str(arguments.reports[0]), str(arguments.reports[1])), arguments.top, screen)
        status = 0 if found.is_comparable else NOT_COMPARABLE
    if arguments.json:
        arguments.json.write_text(json_text(content, indent=1) + "\n", encoding="utf-8")
    return status


def main() -> int:
    arguments = parse_arguments()
    try:
        return run(arguments)
    except (ConfigError, OSError) as error:
        print(f"compare_reports: error: {shown(error)}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    run_program(main)
