"""Finds moments in many videos by a sentence or by an example video.

Examples:
    python tools/search.py index videos --model exported --output index
    deepspeed tools/search.py index videos more.txt --model exported --output index --window 4 --stride 2
    python tools/search.py find index 'a dog catching a frisbee' --top 20 --picture sheet.png
    python tools/search.py find index --like clip.mp4 --at 12.5 --json
    python tools/search.py score index --captions captions.csv

`index` embeds videos window by window. A source is a folder, a video file, or a list: a text file (.txt) with a path a
line. The same command again embeds only what is new or changed, goes on after a kill, and may run in any number of
processes at the same time. A file that cannot be read is named and left out, and the exit code is 1.

`find` prints the moments that fit best. `score` tells how well an index finds the videos of given captions.

Exit codes: 0 done, 1 failed, 2 wrong usage, 130 stopped by Ctrl-C; the same command again then goes on.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path

import text4vis
from shards.files import require_file
from shards.folders import find_videos
from shards.format import ShardError
from shards.list_lines import lines_with_paths
from shards.text import printable, shown
from shards.walk import describe
from text4vis import saved, serving  # faces: they load torch where it is first needed
from text4vis.common.console import console, table
from text4vis.common.programs import run_program
from text4vis.common.progress import Progress
from text4vis.common.threads import sleep_while_waiting
from text4vis.config.schema import ConfigError


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--local_rank", type=int, default=0, help=argparse.SUPPRESS)  # the deepspeed launcher adds it
    commands = parser.add_subparsers(dest="command", required=True, help="what to do; each has a --help of its own")
    add = commands.add_parser("index", help="embed videos, or what is new or changed among them").add_argument
    add("sources", nargs="+", metavar="SOURCE", help="folder, video file, or list (.txt) with a path a line")
    add("--model", required=True, type=Path, help="folder written by tools/export.py, or a run")
    add("--output", required=True, type=Path, metavar="INDEX", help="folder of the index")
    add("--window", type=float, metavar="SECONDS", help="length of a window (default: the index's, else 4)")
    add("--stride", type=float, metavar="SECONDS", help="from window to window (default: the index's, else half)")
    add("--batch-size", type=int, default=8, help="windows at a time (default 8)")
    add("--remove-gone", action="store_true", help="remove videos whose files are not there any more")
    find = commands.add_parser("find", help="find moments")
    add = find.add_argument
    add("index", type=Path, metavar="INDEX", help="folder of the index")
    add("text", nargs="?", metavar="TEXT", help="what the video shows, in a sentence")
    add("--like", metavar="VIDEO", help="find what looks like this video instead")
    add("--at", type=float, metavar="SECONDS", help="with --like: like the window of it that begins here")
    add("--top", type=int, default=20, help="moments to find (default 20)")
    add("--picture", type=Path, help="write a PNG with frames of the moments")
    add("--json", action="store_true", help="print the moments as JSON")
    score = commands.add_parser("score", help="R@1, R@5, R@10 and median rank for videos with captions")
    score.add_argument("index", type=Path, metavar="INDEX", help="folder of the index")
    add = score.add_argument
    add("--captions", required=True, type=Path, metavar="CSV", help="columns `video` and `caption`")
    add("--json", type=Path, metavar="FILE", help="write the figures here, too")
    for command in (find, score):
        command.add_argument("--model", type=Path, help="where the index's model lies now, if it was moved")
        command.add_argument("--prompt", default="{}", help="put the text in place of the {} (default: the text alone)")
    arguments = parser.parse_args()
    if arguments.command == "find":
        if (arguments.text is None) == (arguments.like is None):
            find.error("give either a TEXT or --like VIDEO")
        if arguments.at is not None and arguments.like is None:
            find.error("--at goes with --like")
        if arguments.picture and arguments.picture.suffix.lower() != ".png":
            find.error(f"--picture: expected a name that ends with .png, got {arguments.picture}")
    counts = {"index": ("batch_size", "window", "stride"), "find": ("top",)}.get(arguments.command, ())
    for name in counts:
        value = getattr(arguments, name)
        if value is not None and not value > 0:
            parser.error(f"--{name.replace('_', '-')}: expected a number above 0, got {value}")
    return arguments


def list_videos(sources: list[str], index: Path, quiet: bool) -> list[str]:
    """The video files that the sources stand for. Raises SearchError."""
    known = serving.indexed_paths(index)
    videos: list[str] = []
    for source in sources:
        path = Path(source)
        if path.is_dir():
            root = f"{os.path.abspath(path)}/"  # noqa: PTH100
            below = {name.removeprefix(root) for name in known if name.startswith(root)}
            found, left_out = find_videos(path, known=below)
            if (notice := describe(left_out)) and not quiet:
                print(f"search: notice: {shown(path)}: {notice}", file=sys.stderr)
            videos += [str(path / name) for name in found]
        elif path.suffix.lower() == ".txt":
            videos += [str(path.parent / line) for line in lines_with_paths(path)]
        else:
            videos.append(source)
    if not videos:
        raise serving.SearchError(f"{', '.join(sources)}: no videos in there")
    return videos


def index(arguments: argparse.Namespace) -> int:
    from text4vis.cluster import distributed

    place = distributed.ranks()
    distributed.use_cores(0)
    videos = list_videos(arguments.sources, arguments.output, quiet=not place.is_main)
    with Progress(total=len(videos), quiet=not place.is_main) as progress:
        done = 0

        def show(count: int) -> None:
            nonlocal done
            progress.update(count - done)
            done = count

        report = serving.index_videos(
            arguments.output,
            videos,
            arguments.model,
            window=arguments.window,
            stride=arguments.stride,
            batch_size=arguments.batch_size,
            remove_gone=arguments.remove_gone,
            place=place,
            device=distributed.device(),
            progress=show,
        )
    if place.is_main:
        describe_index(arguments.output, report)
    return 1 if report.broken else 0


def describe_index(folder: Path, report: serving.IndexReport) -> None:
    for error in report.broken.values():
        print(f"search: not indexed: {shown(error)}", file=sys.stderr)
    for path in report.gone[:10]:
        print(f"search: gone: {printable(path)}", file=sys.stderr)
    if report.gone:
        what = "removed" if report.removed else "kept; --remove-gone removes what is gone"
        are = "is" if len(report.gone) == 1 else "are"
        print(f"search: notice: {counted(len(report.gone), 'file')} of the index {are} gone: {what}", file=sys.stderr)
    size = f"{counted(report.videos, 'video')}, {counted(report.windows, 'window')}"
    console().print(f"{printable(str(folder))}: {size}")
    if report.broken:
        print(f"search: error: {counted(len(report.broken), 'file')} could not be read", file=sys.stderr)
        print("search: `touch` them to try them again: a file is read anew when its time changes", file=sys.stderr)


def counted(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def find(arguments: argparse.Namespace) -> int:
    if arguments.picture:
        require_file(arguments.picture, "--picture")
    opened = text4vis.open_index(arguments.index, arguments.model)
    if arguments.like is not None:
        title = arguments.like if arguments.at is None else f"{arguments.like} at {arguments.at:g} s"
        moments = opened.like(arguments.like, arguments.at, arguments.top)
    else:
        title = arguments.text
        moments = opened.find(arguments.text, arguments.top, prompt=arguments.prompt)
    if arguments.json:
        print(json.dumps([vars(moment) for moment in moments], indent=1))  # ASCII: names of files may be anything
    else:
        rows = table(("", "score", "from", "to", "video"))
        for number, moment in enumerate(moments, start=1):
            times = map(serving.clock, (moment.start, moment.end))
            rows.add_row(str(number), f"{moment.score:.3f}", *times, moment.video)
        console().print(rows)
    if arguments.picture:
        serving.save_moments(moments, opened.frames(moments), title, arguments.picture)
    return 0


def score(arguments: argparse.Namespace) -> int:
    if arguments.json:
        require_file(arguments.json, "--json")
    opened = text4vis.open_index(arguments.index, arguments.model)
    figures = serving.score_captions(opened, arguments.captions, arguments.prompt)
    rows = table(
        (f"{figures['captions']} captions, {figures['videos']} videos",), ("R@1", "R@5", "R@10", "median rank")
    )
    for name in ("text_to_video", "video_to_text"):
        values = figures[name]
        rows.add_row(name.replace("_", " "), *(f"{value:.1f}" for value in values.values()))
    console().print(rows)
    if arguments.json:
        arguments.json.write_text(json.dumps(figures, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
    return 0


def main() -> int:
    arguments = parse_arguments()
    sleep_while_waiting()  # videos are decoded beside the model
    try:
        return {"index": index, "find": find, "score": score}[arguments.command](arguments)
    except (
        serving.SearchError, serving.PredictionError, saved.CheckpointError, ConfigError, ShardError, OSError,
    ) as error:  # fmt: skip
        print(f"search: error: {shown(error)}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    run_program(main)
