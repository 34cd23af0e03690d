"""Measures the data engine and the training engine against common alternatives.

Contenders take turns (A B C, A B C, …); the table shows medians and their spread. Run it on an idle machine. It makes
the data that it needs below --work and reuses them; docs/performance.md explains every line.

Examples:
    python tools/benchmark.py all --json figures.json
    python tools/benchmark.py loader --clips videos --videos 60 --runs 3
    python tools/benchmark.py step --model configs/models/demo-clip.json --step-videos 8

Exit codes: 0 done, 1 failed, 2 wrong usage, 130 stopped by Ctrl-C.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import benchmarks

from shards.files import require_file
from shards.format import ShardError
from text4vis.common.console import console, table
from text4vis.common.programs import run_program
from text4vis.config.schema import ConfigError

if TYPE_CHECKING:
    from benchmarks.data import Workload
    from benchmarks.figures import Figure


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Shows every default, and the description with its line breaks."""


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    add = parser.add_argument
    add("benchmark", choices=(*benchmarks.NAMES, "all"), help="what to measure")
    add("--json", type=Path, metavar="FILE", help="write all figures and the machine's description here")
    add("--runs", type=int, default=5, metavar="N", help="times that each contender runs")
    add("--seconds", type=float, default=8, metavar="S", help="shortest duration of a throughput measurement")
    add("--batch-size", type=int, default=32, metavar="B", help="videos in a training batch")
    add("--workers", type=int, default=len(os.sched_getaffinity(0)), metavar="N", help="threads or worker processes")
    add(
        "--peers",
        nargs="*",
        default=benchmarks.PEERS,
        choices=benchmarks.PEERS,
        metavar="NAME",
        help="loaders of others, for loader and remote; what is not installed is left out",
    )
    data = parser.add_argument_group("data")
    add = data.add_argument
    add("--work", type=Path, default=Path("bench"), metavar="DIR", help="folder for the data that are made")
    add("--clips", type=Path, metavar="DIR", help="video files to cut the frames from, instead of two photographs")
    add("--videos", type=int, default=240, metavar="N", help="videos to make")
    add("--frames-per-video", type=int, default=100, metavar="N", help="frames of each of these videos")
    add("--shards", type=Path, metavar="DIR", help="use this data set instead; needs --frames")
    add("--frames", type=Path, metavar="DIR", help="the folders of frames that --shards was built from")
    add("--index-videos", type=int, default=240_000, metavar="N", help="videos in the index for open and position")
    add("--index-frames", type=int, default=300, metavar="N", help="frames of each video in it")
    add("--order-samples", type=int, default=10_000_000, metavar="N", help="samples that order permutes")
    engine = parser.add_argument_group("engine: step, memory, resume, scale")
    add = engine.add_argument
    add("--model", default="ViT-S-32", metavar="ARCH", help="an open_clip ViT or a model JSON; weights are random")
    add("--step-videos", type=int, default=16, metavar="B", help="videos of 8 frames in a training step")
    add("--precision", choices=("fp32", "bf16"), default="fp32", help="precision of step and resume")
    add("--ranks", type=int, nargs="+", default=(1, 2, 4), metavar="N", help="numbers of ranks for memory")
    videos = (10**6, 10**7, 10**8)
    add("--scale-videos", type=int, nargs="+", default=videos, metavar="N", help="sizes of data sets for scale")
    add("--world-sizes", type=int, nargs="+", default=(1, 8, 1024, 4096), metavar="N", help="numbers of ranks, also")
    predict = parser.add_argument_group("predict")
    predict.add_argument(
        "--predict-videos", type=int, default=200, metavar="N", help="clips to recognise, --clips in turn"
    )
    predict.add_argument("--predict-minutes", type=float, default=30, metavar="M", help="length of the long file")
    search = parser.add_argument_group("search")
    search.add_argument(
        "--search-windows", type=int, default=10**6, metavar="N", help="windows in the index for search"
    )
    arguments = parser.parse_args()
    if (arguments.shards is None) != (arguments.frames is None):
        parser.error("--shards and --frames go together: the alternatives read the frame folders")
    counts = ("runs", "batch_size", "workers", "videos", "frames_per_video", "index_videos", "index_frames")
    lists = ("ranks", "scale_videos", "world_sizes")
    for name in (*counts, "order_samples", "step_videos", "predict_videos", "search_windows", *lists):
        given = getattr(arguments, name)
        if (smallest := min(given) if name in lists else given) < 1:
            parser.error(f"--{name.replace('_', '-')}: expected at least 1, got {smallest}")
    return arguments


def workload(arguments: argparse.Namespace) -> Workload:
    from benchmarks.data import make_workload, open_workload

    if arguments.shards is not None:
        return open_workload(arguments.shards, arguments.frames)
    return make_workload(
        arguments.work,
        num_videos=arguments.videos,
        num_frames=arguments.frames_per_video,
        clips=arguments.clips,
    )


def print_table(figures: list[Figure]) -> None:
    rows = table(("benchmark", "what"), ("median", "spread", "ratio", "target"))
    for figure in figures:
        rows.add_row(
            figure.benchmark,
            figure.what,
            f"{_number(figure.median)} {figure.unit}",
            f"{_number(min(figure.values))} to {_number(max(figure.values))}",
            "" if figure.ratio is None else f"{figure.ratio:.2f}",
            figure.target,
        )
    console().print(rows)


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def main() -> None:
    arguments = parse_arguments()
    from benchmarks.figures import Processes, machine  # these load torch and DALI: too slow for --help
    from benchmarks.suites import SUITES, Task

    if arguments.json:
        require_file(arguments.json, "--json")
    names = list(SUITES) if arguments.benchmark == "all" else [arguments.benchmark]
    arguments.work.mkdir(parents=True, exist_ok=True)
    (arguments.work / ".gitignore").write_text("*\n")
    figures: list[Figure] = []
    with Processes() as processes:
        task = Task(
            find_workload=partial(workload, arguments),
            batch_size=arguments.batch_size,
            workers=arguments.workers,
            processes=processes,
            work=arguments.work,
            peers=arguments.peers,
            rounds=arguments.runs,
            seconds=arguments.seconds,
            index_videos=arguments.index_videos,
            index_frames=arguments.index_frames,
            order_samples=arguments.order_samples,
            model=arguments.model,
            step_videos=arguments.step_videos,
            precision=arguments.precision,
            ranks=arguments.ranks,
            scale_videos=arguments.scale_videos,
            world_sizes=arguments.world_sizes,
            clips=arguments.clips,
            predict_videos=arguments.predict_videos,
            predict_minutes=arguments.predict_minutes,
            search_windows=arguments.search_windows,
        )
        for name in names:
            figures += SUITES[name](task)
    print_table(figures)
    description = machine()
    print("{processor}, {cores} cores, {date}, load average {load_average:.1f}".format(**description))
    if arguments.json:
        content = {
            "machine": description,
            "arguments": {
                name: str(value) if isinstance(value, Path) else value for name, value in vars(arguments).items()
            },
            "figures": [figure.to_dict() for figure in figures],
        }
        arguments.json.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    run_program(main, ShardError, ConfigError, OSError, subprocess.CalledProcessError)
