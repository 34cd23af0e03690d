"""Recognises actions in videos with a trained model.

Examples:
    python tools/predict.py clip.mp4 --model exported
    python tools/predict.py clip.mp4 frames/clip2 --model runs/own --labels 'surfing,skiing' --top 2 --picture seen.png
    python tools/predict.py videos 'more/*.mp4' https://host/x.mp4 --model exported --json all.json --csv all.csv
    python tools/predict.py match.mp4 --model exported --window 4 --picture timeline.png
    deepspeed tools/predict.py videos --model exported --jsonl answers.jsonl

A folder of images is one video; a folder of video files stands for all videos in it and in its sub-folders. With
--window a video is scanned in windows of that many seconds, each half a window after the last. A model of several
labels a video shows every class above its threshold instead of the --top likeliest. A video that cannot be read is
named and skipped, and the exit code is 1. Exit codes: 0 done, 1 failed, 2 wrong usage, 130 stopped by Ctrl-C; --json
and --csv then hold the predictions made so far.

--jsonl is for long lists: any number of processes on any number of hosts, started by deepspeed, torchrun or by hand,
share the videos and append to one file, a line for each video. After a kill the same command goes on.
"""

from __future__ import annotations

import argparse
import csv
import glob
import sys
from collections import deque
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any, TypeAlias

from rich.console import Console

import text4vis
from shards.address import scheme_of
from shards.annotations import parse_labels
from shards.files import require_file
from shards.folders import find_videos as list_videos
from shards.format import ShardError
from shards.list_lines import is_video_file, lines_with_paths
from shards.text import json_text, printable, redact, shown
from shards.walk import describe, is_hidden
from text4vis import cluster, saved, serving  # faces: they load torch where it is first needed
from text4vis.common.console import console, table
from text4vis.common.programs import run_program
from text4vis.common.progress import Progress
from text4vis.common.threads import sleep_while_waiting
from text4vis.config.schema import ConfigError

# Keys of a video: "video", "top" (a list of {"class", "probability"}), "calibrated", and "sure" and "candidates" if
# asked for; "present", like "top", for models of several labels a video; of a window: "video", "start", "end", "top";
# of a video that cannot be read: "video", "error".
Row = dict[str, Any]


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("videos", nargs="*", metavar="VIDEO", help="video file, folder, pattern, frame folder or address")
    add("--list", type=Path, metavar="FILE", help="more of these from a text file, one a line")
    add("--model", required=True, type=Path, help="folder written by tools/export.py, or a run")
    labels = parser.add_mutually_exclusive_group()
    labels.add_argument("--labels", help="class names to choose from, separated by commas; default: the model's own")
    labels.add_argument("--labels-file", type=Path, help="the same, from a CSV `id,name`")
    add("--top", type=int, default=5, help="classes to show (default 5)")
    add("--accuracy", type=float, metavar="PERCENT", help='print "unsure" for answers that are right less often')
    add("--coverage", type=float, metavar="PERCENT", help="list as many classes as hold the right one this often")
    add("--window", type=float, metavar="SECONDS", help="scan long videos in windows of this length")
    add("--batch-size", type=int, default=8, help="videos or windows at a time (default 8)")
    add(
        "--picture",
        type=Path,
        help="write a PNG: frames and bars, or the timeline; for several videos NAME-1.png, NAME-2.png, …",
    )
    add("--json", type=Path, metavar="FILE", help="write all predictions as JSON")
    add("--csv", type=Path, metavar="FILE", help="write all predictions as CSV, one line per class")
    add("--jsonl", type=Path, metavar="FILE", help="append the predictions, a line per video; goes on after a kill")
    add("--local_rank", type=int, default=0, help=argparse.SUPPRESS)  # the deepspeed launcher adds it
    arguments = parser.parse_args()
    if not arguments.videos and arguments.list is None:
        parser.error("no videos: give VIDEO or --list FILE")
    if arguments.jsonl and (arguments.json or arguments.csv or arguments.picture):
        parser.error("--jsonl: leave --json, --csv and --picture out; they are written when all is done")
    for name in ("top", "batch_size"):
        if getattr(arguments, name) < 1:
            parser.error(f"--{name.replace('_', '-')}: expected at least 1, got {getattr(arguments, name)}")
    if arguments.picture and arguments.picture.suffix.lower() != ".png":
        parser.error(f"--picture: expected a name that ends with .png, got {arguments.picture}")
    if arguments.window is not None and (arguments.accuracy or arguments.coverage):
        parser.error("--accuracy and --coverage were measured on whole videos; leave --window out")
    if arguments.json and arguments.csv and arguments.json.absolute() == arguments.csv.absolute():
        parser.error(f"--json and --csv: both name {arguments.json}; name two files")
    if arguments.window is not None and not arguments.window > 0:
        parser.error(f"--window: expected seconds above 0, got {arguments.window}")
    return arguments


def class_names(arguments: argparse.Namespace) -> list[str] | None:
    if arguments.labels_file:
        return parse_labels(arguments.labels_file)
    if arguments.labels is None:
        return None
    names = [name.strip() for name in arguments.labels.split(",") if name.strip()]
    if not names:
        raise serving.PredictionError("--labels: no class names given; separate them by commas")
    return names


def find_videos(arguments: argparse.Namespace) -> list[str]:
    """The videos that the command's VIDEO arguments and list stand for, each once, in order. Raises PredictionError."""
    given = list(arguments.videos)
    if arguments.list is not None:
        given += lines_with_paths(arguments.list)
    found: list[str] = []
    for argument in given:
        if scheme_of(argument) is not None or not any(character in argument for character in "*?["):
            paths = [argument]
        else:
            paths = [argument] if Path(argument).exists() else sorted(glob.glob(argument, recursive=True))  # noqa: PTH207
            if not paths:
                raise serving.PredictionError(f"{argument}: no file fits this pattern")
        for path in paths:
            found += [path] if scheme_of(path) or not Path(path).is_dir() else _in_folder(Path(path))
    if not found:
        raise serving.PredictionError(f"--list: {arguments.list} names no video; write one path on each line")
    return list(dict.fromkeys(found))


def _in_folder(folder: Path) -> list[str]:
    """The folder itself if it holds frames, else the videos in it and below it."""
    files = [path for path in folder.iterdir() if path.is_file() and not is_hidden(path.name)]
    has_frames = any(path.suffix.lower() in serving.FRAME_SUFFIXES for path in files)
    if has_frames and not any(is_video_file(path.name) for path in files):
        return [str(folder)]
    videos, left_out = list_videos(folder)
    if (notice := describe(left_out)) and cluster.ranks().is_main:
        print(f"predict: notice: {folder}: {notice}", file=sys.stderr)
    if not videos:
        raise serving.PredictionError(
            f"{folder}: holds neither videos nor frames ({', '.join(sorted(serving.FRAME_SUFFIXES))})"
        )
    return [str(folder / path) for path in videos]


def picture_path(path: Path, number: int, count: int) -> Path:
    return path if count == 1 else path.with_stem(f"{path.stem}-{number + 1:0{len(str(count))}}")


def top_rows(top: list[tuple[str, float]]) -> list[Row]:
    return [{"class": name, "probability": round(probability, 6)} for name, probability in top]


Answer: TypeAlias = "serving.Prediction | serving.Timeline | serving.PredictionError"


def recognise(
    recogniser: serving.Predictor, videos: Iterable[str], arguments: argparse.Namespace
) -> Iterator[tuple[str, Answer]]:
    """Yields each video with its answer, in order. Videos are taken ahead of the answers."""
    labels = class_names(arguments)
    if arguments.window is not None:
        for video in videos:
            try:
                scan = recogniser.scan(video, labels, window_seconds=arguments.window, batch_size=arguments.batch_size)
            except serving.PredictionError as error:
                yield video, error
            else:
                yield video, scan
        return
    taken: deque[str] = deque()

    def take() -> Iterator[str]:
        for video in videos:
            taken.append(video)
            yield video

    for answer in recogniser.predict_many(
        take(), labels, arguments.top, arguments.batch_size, accuracy=arguments.accuracy, coverage=arguments.coverage
    ):
        yield taken.popleft(), answer


def name_of(video: str) -> str:
    """What the output calls a video: the path itself, by which the file is found again; an address without secrets."""
    return video if scheme_of(video) is None else redact(video)


def rows_of(video: str, answer: Answer, top: int) -> list[Row]:
    name = name_of(video)
    if isinstance(answer, serving.PredictionError):
        return [{"video": name, "error": str(answer)}]
    if isinstance(answer, serving.Timeline):
        return [
            {"video": name, "start": start, "end": end, "top": top_rows(answer.top(window, top))}
            for window, (start, end) in enumerate(answer.seconds_W2.round(3).tolist())
        ]
    row: Row = {"video": name, "top": top_rows(answer.top), "calibrated": answer.calibrated}
    if answer.sure is not None:
        row["sure"] = answer.sure
    if answer.candidates is not None:
        row["candidates"] = answer.candidates
    if answer.present is not None:
        row["present"] = top_rows(answer.present)
    return [row]


def draw(video: str, answer: Answer, picture: Path) -> None:
    if isinstance(answer, serving.Timeline):
        serving.save_timeline(answer, redact(video), picture)
    elif isinstance(answer, serving.Prediction):
        serving.save_prediction(answer, redact(video), picture)


def show(rows: list[Row], screen: Console) -> None:
    if "error" in rows[0]:
        screen.print("not recognised:", style="red", end=" ")
        screen.print(shown(rows[0]["error"]))
        return
    if "start" in rows[0]:
        drawn = table(("seconds", "class"), ("%",))
        for row in rows:
            best = row["top"][0]
            seconds = f"{row['start']:.1f} to {row['end']:.1f}"
            drawn.add_row(seconds, best["class"], f"{100 * best['probability']:.1f}")
    else:
        drawn = table(("class",), ("%",))
        for entry in rows[0].get("present") or rows[0]["top"]:
            drawn.add_row(entry["class"], f"{100 * entry['probability']:.1f}")
    screen.print(printable(rows[0]["video"]), style="bold")
    if rows[0].get("sure") is False:
        screen.print("unsure", style="yellow")
    if rows[0].get("present") == []:
        screen.print("none of the classes; the likeliest are", style="yellow")
    screen.print(drawn)
    if (candidates := rows[0].get("candidates")) is not None:
        screen.print(f"one of: {', '.join(map(printable, candidates)) or 'none of the classes'}")


def cell(text: str) -> str:
    """Text for a spreadsheet: what it would take for a formula begins with an apostrophe, control characters are
    escapes. JSON has texts as they are."""
    return f"'{printable(text)}" if text.startswith(("=", "+", "-", "@", "\t", "\r")) else printable(text)


def write_csv(path: Path, rows: list[Row]) -> None:
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["video", "start", "end", "rank", "class", "probability", "error"])
        for row in rows:
            head = [cell(row["video"]), row.get("start", ""), row.get("end", "")]
            for rank, entry in enumerate(row["present"] if "present" in row else row.get("top", []), start=1):
                writer.writerow([*head, rank, cell(entry["class"]), entry["probability"], ""])
            if "error" in row:
                writer.writerow([*head, "", "", "", cell(row["error"])])


def record_of(rows: list[Row]) -> Row:
    """A video's line in --jsonl: its row; the windows of a timeline are a list in it."""
    if "start" not in rows[0]:
        return rows[0]
    return {
        "video": rows[0]["video"],
        "windows": [{key: value for key, value in row.items() if key != "video"} for row in rows],
    }


def recognise_listed(recogniser: serving.Predictor, videos: list[str], arguments: argparse.Namespace) -> int:
    """Recognises this process's share of the videos, and waits for the others. Returns the number of failed ones."""
    by_name = {name_of(video): video for video in videos}
    if len(by_name) < len(videos):
        raise serving.PredictionError(
            "--jsonl: several addresses differ only in what must not be written (passwords, ?…)"
        )
    settings = recogniser.settings(class_names(arguments))
    settings |= {name: getattr(arguments, name) for name in ("top", "accuracy", "coverage", "window")}
    place = cluster.ranks()
    with serving.WorkList(arguments.jsonl, by_name, settings, key="video") as work:
        seen = work.num_done
        with Progress(total=len(by_name) - seen, quiet=not place.is_main) as progress:
            while work.is_unfinished():
                claimed = (by_name[name] for name in work.claim(place.rank, place.world_size))
                for records in batched(recognise(recogniser, claimed, arguments), arguments):
                    work.append(records)
                    progress.update(work.num_done - seen)
                    seen = work.num_done
            progress.update(work.num_done - seen)
        return work.num_failed


def batched(answers: Iterator[tuple[str, Answer]], arguments: argparse.Namespace) -> Iterator[list[Row]]:
    """Records of the answers, as many at a time as the model answers."""
    while records := [
        record_of(rows_of(video, answer, arguments.top)) for video, answer in islice(answers, arguments.batch_size)
    ]:
        yield records


def recognise_and_show(recogniser: serving.Predictor, videos: list[str], arguments: argparse.Namespace) -> int:
    """Shows the answer of each video and writes the files that were asked for. Returns the number of failed ones."""
    screen = console()
    rows: list[Row] = []
    pictures: list[Path] = []
    try:
        with Progress(total=len(videos), quiet=len(videos) == 1) as progress:
            for number, (video, answer) in enumerate(recognise(recogniser, videos, arguments)):
                if arguments.picture and not isinstance(answer, serving.PredictionError):
                    pictures.append(picture_path(arguments.picture, number, len(videos)))
                    draw(video, answer, pictures[-1])
                rows += (video_rows := rows_of(video, answer, arguments.top))
                with progress.aside():
                    show(video_rows, screen)
                progress.update()
    finally:  # after Ctrl-C too: the predictions made so far
        if arguments.json:
            arguments.json.write_text(json_text(rows, indent=1) + "\n", encoding="utf-8")
        if arguments.csv:
            write_csv(arguments.csv, rows)
    written = [str(path) for path in (arguments.json, arguments.csv) if path]
    if pictures:
        written.append(f"{pictures[0]} to {pictures[-1].name}" if pictures[1:] else str(pictures[0]))
    if written:
        screen.print("wrote " + ", ".join(written))
    return sum("error" in row for row in rows)


def run(arguments: argparse.Namespace) -> int:
    for option in ("picture", "json", "csv", "jsonl"):
        if path := getattr(arguments, option):
            require_file(path, f"--{option}")
    place = cluster.ranks()
    if place.world_size > 1 and not arguments.jsonl:
        raise serving.PredictionError(
            f"{place.world_size} processes share their videos through a file: give --jsonl FILE"
        )
    videos = find_videos(arguments)
    recogniser = text4vis.load(arguments.model, str(cluster.device()))
    if arguments.jsonl:
        failed = recognise_listed(recogniser, videos, arguments)
        if place.is_main:
            console().print(f"{arguments.jsonl}: {len(videos)} videos")
    else:
        failed = recognise_and_show(recogniser, videos, arguments)
    if failed and place.is_main:
        print(f"predict: error: {failed} of {len(videos)} videos could not be read", file=sys.stderr)
        if arguments.jsonl:
            print("predict: delete their lines, which have an `error`, to try them again", file=sys.stderr)
    return 1 if failed else 0


def main() -> int:
    arguments = parse_arguments()
    sleep_while_waiting()  # videos are decoded beside the model
    try:
        return run(arguments)
    except (
        saved.CheckpointError,
        ConfigError,
        ShardError,
        serving.PredictionError,
        serving.WorkListError,
        OSError,
    ) as error:
        print(f"predict: error: {shown(error)}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    run_program(main)
