"""Recognises actions in videos with a trained model.

Examples:
    python tools/predict.py clip.mp4 --model exported
    python tools/predict.py clip.mp4 frames/clip2 --model runs/own --labels 'surfing,skiing' --top 2 --picture seen.png
    python tools/predict.py videos 'more/*.mp4' https://host/x.mp4 --model exported --json all.json --csv all.csv
    python tools/predict.py match.mp4 --model exported --window 4 --picture timeline.png

A folder of images is one video; a folder of video files stands for all videos in it and in its sub-folders. With
--window a video is scanned in windows of that many seconds, each half a window after the last. A model of several
labels a video shows every class above its threshold instead of the --top likeliest. A video that cannot be read is
named and skipped, and the exit code is 1. Exit codes: 0 done, 1 failed, 2 wrong usage, 130 stopped by Ctrl-C; --json
and --csv then hold the predictions made so far.
"""

from __future__ import annotations

import argparse
import csv
import glob
import json
import sys
from collections.abc import Iterator
from functools import partial
from itertools import repeat
from pathlib import Path
from typing import Any

from rich.console import Console

import text4vis
from shards.address import scheme_of
from shards.annotations import parse_labels
from shards.files import require_file
from shards.folders import find_videos as list_videos
from shards.format import ShardError
from shards.list_lines import is_video_file
from shards.text import redact, shown
from shards.walk import describe, is_hidden
from text4vis import saved, serving  # faces: they load torch where it is first needed
from text4vis.common.console import console, table
from text4vis.common.progress import Progress
from text4vis.config.schema import ConfigError

# Keys of a video: "video", "top" (a list of {"class", "probability"}), "calibrated", and "sure" and "candidates" if
# asked for; "present", like "top", for models of several labels a video; of a window: "video", "start", "end", "top";
# of a video that cannot be read: "video", "error".
Row = dict[str, Any]


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("videos", nargs="+", metavar="VIDEO", help="video file, folder, pattern, frame folder or address")
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
    arguments = parser.parse_args()
    for name in ("top", "batch_size"):
        if getattr(arguments, name) < 1:
            parser.error(f"--{name.replace('_', '-')}: expected at least 1, got {getattr(arguments, name)}")
    if arguments.picture and arguments.picture.suffix.lower() != ".png":
        parser.error(f"--picture: expected a name that ends with .png, got {arguments.picture}")
    if arguments.window is not None and (arguments.accuracy or arguments.coverage):
        parser.error("--accuracy and --coverage were measured on whole videos; leave --window out")
    if arguments.window is not None and arguments.window <= 0:
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


def find_videos(arguments: list[str]) -> list[str]:
    """The videos that the command's VIDEO arguments stand for, each once, in order. Raises PredictionError."""
    found: list[str] = []
    for argument in arguments:
        if scheme_of(argument) is not None or not any(character in argument for character in "*?["):
            paths = [argument]
        else:
            paths = [argument] if Path(argument).exists() else sorted(glob.glob(argument, recursive=True))  # noqa: PTH207
            if not paths:
                raise serving.PredictionError(f"{argument}: no file fits this pattern")
        for path in paths:
            found += [path] if scheme_of(path) or not Path(path).is_dir() else _in_folder(Path(path))
    return list(dict.fromkeys(found))


def _in_folder(folder: Path) -> list[str]:
    """The folder itself if it holds frames, else the videos in it and below it."""
    files = [path for path in folder.iterdir() if path.is_file() and not is_hidden(path.name)]
    has_frames = any(path.suffix.lower() in serving.FRAME_SUFFIXES for path in files)
    if has_frames and not any(is_video_file(path.name) for path in files):
        return [str(folder)]
    videos, left_out = list_videos(folder)
    if notice := describe(left_out):
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


def recognise(recogniser: serving.Predictor, videos: list[str], arguments: argparse.Namespace) -> Iterator[list[Row]]:
    """Yields the rows of each video and writes its picture."""
    labels = class_names(arguments)
    results: Iterator[Any]
    if arguments.window is None:
        results = recogniser.predict_many(
            videos,
            labels,
            arguments.top,
            arguments.batch_size,
            accuracy=arguments.accuracy,
            coverage=arguments.coverage,
        )
    else:
        scan = partial(recogniser.scan, window_seconds=arguments.window, batch_size=arguments.batch_size)
        results = map(scan, videos, repeat(labels))  # next() continues with the next video after one has raised
    for number, video in enumerate(videos):
        name = redact(video)
        try:
            result = next(results)
        except serving.PredictionError as error:
            result = error
        picture = arguments.picture and picture_path(arguments.picture, number, len(videos))
        if isinstance(result, serving.PredictionError):
            yield [{"video": name, "error": str(result)}]
        elif isinstance(result, serving.Timeline):
            if picture:
                serving.save_timeline(result, name, picture)
            yield [
                {"video": name, "start": start, "end": end, "top": top_rows(result.top(window, arguments.top))}
                for window, (start, end) in enumerate(result.seconds_W2.round(3).tolist())
            ]
        else:
            if picture:
                serving.save_prediction(result, name, picture)
            row: Row = {"video": name, "top": top_rows(result.top), "calibrated": result.calibrated}
            if result.sure is not None:
                row["sure"] = result.sure
            if result.candidates is not None:
                row["candidates"] = result.candidates
            if result.present is not None:
                row["present"] = top_rows(result.present)
            yield [row]


def show(rows: list[Row], screen: Console) -> None:
    if "error" in rows[0]:
        screen.print("not recognised:", style="red", end=" ")
        screen.print(rows[0]["error"])
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
    screen.print(rows[0]["video"], style="bold")
    if rows[0].get("sure") is False:
        screen.print("unsure", style="yellow")
    if rows[0].get("present") == []:
        screen.print("none of the classes; the likeliest are", style="yellow")
    screen.print(drawn)
    if (candidates := rows[0].get("candidates")) is not None:
        screen.print(f"one of: {', '.join(candidates) or 'none of the classes'}")


def write_csv(path: Path, rows: list[Row]) -> None:
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["video", "start", "end", "rank", "class", "probability", "error"])
        for row in rows:
            head = [row["video"], row.get("start", ""), row.get("end", "")]
            for rank, entry in enumerate(row["present"] if "present" in row else row.get("top", []), start=1):
                writer.writerow([*head, rank, entry["class"], entry["probability"], ""])
            if "error" in row:
                writer.writerow([*head, "", "", "", row["error"]])


def run(arguments: argparse.Namespace) -> int:
    for option in ("picture", "json", "csv"):
        if path := getattr(arguments, option):
            require_file(path, f"--{option}")
    videos = find_videos(arguments.videos)
    recogniser = text4vis.load(arguments.model)
    screen = console()
    rows: list[Row] = []
    pictures: list[Path] = []
    try:
        with Progress(total=len(videos), quiet=len(videos) == 1) as progress:
            for number, video_rows in enumerate(recognise(recogniser, videos, arguments)):
                rows += video_rows
                if arguments.picture and "error" not in video_rows[0]:
                    pictures.append(picture_path(arguments.picture, number, len(videos)))
                with progress.aside():
                    show(video_rows, screen)
                progress.update()
    finally:  # after Ctrl-C too: the predictions made so far
        if arguments.json:
            arguments.json.write_text(json.dumps(rows, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
        if arguments.csv:
            write_csv(arguments.csv, rows)
    written = [str(path) for path in (arguments.json, arguments.csv) if path]
    if pictures:
        written.append(f"{pictures[0]} to {pictures[-1].name}" if pictures[1:] else str(pictures[0]))
    if written:
        screen.print("wrote " + ", ".join(written))
    failed = sum("error" in row for row in rows)
    if failed:
        print(f"predict: error: {failed} of {len(videos)} videos could not be read", file=sys.stderr)
    return 1 if failed else 0


def main() -> int:
    arguments = parse_arguments()
    try:
        return run(arguments)
    except (saved.CheckpointError, ConfigError, ShardError, serving.PredictionError, OSError) as error:
        print(f"predict: error: {shown(error)}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("predict: stopped", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
