"""Recognises actions in videos with a trained model.

Examples:
    python tools/predict.py clip.mp4 --model exported
    python tools/predict.py clip.mp4 frames/clip2 --model runs/own --labels 'surfing,skiing' --top 2 --picture seen.png
    python tools/predict.py videos 'more/*.mp4' https://host/x.mp4 --model exported --json all.json --csv all.csv
    python tools/predict.py match.mp4 --model exported --window 4 --picture timeline.png

A folder of images is one video, frame by frame; one with video files in it stands for these and those below. With
--window a video is scanned in windows of so many seconds, a new one every half. Of a model of several labels a video
every class above its threshold is shown, instead of the --top likeliest. A video that cannot be read is named and left
out, and the exit code is 1. Exit codes: 0 done, 1 failed, 2 wrong usage, 130 stopped by hand: --json and --csv then
hold what was done.
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
from text4vis.common.console import console, table
from text4vis.common.progress import Progress
from text4vis.config.schema import ConfigError
from text4vis.saved.checkpoint import CheckpointError
from text4vis.serving.pictures import save_prediction, save_timeline
from text4vis.serving.predictor import FRAME_SUFFIXES, PredictionError, Predictor, Timeline

# {"video", "top": [{"class", "probability"}], "calibrated"}, on demand with "sure" and "candidates", for models of
# several labels a video with "present", like "top"; of a window {"video", "start", "end", "top"}; {"video", "error"}.
Row = dict[str, Any]


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("videos", nargs="+", metavar="VIDEO", help="video file, folder, pattern, frame folder or address")
    add("--model", required=True, type=Path, help="folder written by tools/export.py, or a run")
    labels = parser.add_mutually_exclusive_group()
    labels.add_argument("--labels", help="class names to choose from, separated by commas; default: the model's own")
    labels.add_argument("--labels-file", type=Path, help="the same as a CSV `id,name`")
    add("--top", type=int, default=5, help="classes to show (default 5)")
    add("--accuracy", type=float, metavar="PERCENT", help='say "unsure" where answers are right less often')
    add("--coverage", type=float, metavar="PERCENT", help="name the classes that hold the right one this often")
    add("--window", type=float, metavar="SECONDS", help="scan long videos in windows of this length")
    add("--batch-size", type=int, default=8, help="videos or windows at a time (default 8)")
    add(
        "--picture",
        type=Path,
        help="write a PNG: frames and bars, or the timeline; several videos: NAME-1.png, … in their order",
    )
    add("--json", type=Path, metavar="FILE", help="write all predictions as JSON")
    add("--csv", type=Path, metavar="FILE", help="write all predictions as CSV, one line a class")
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
        raise PredictionError("--labels: no class names given; separate them by commas")
    return names


def find_videos(words: list[str]) -> list[str]:
    """The videos that the words of the command line stand for, each once, in order. Raises PredictionError."""
    found: list[str] = []
    for word in words:
        if scheme_of(word) is not None or not any(character in word for character in "*?["):
            paths = [word]
        else:
            paths = [word] if Path(word).exists() else sorted(glob.glob(word, recursive=True))  # noqa: PTH207
            if not paths:
                raise PredictionError(f"{word}: no file fits this pattern")
        for path in paths:
            found += [path] if scheme_of(path) or not Path(path).is_dir() else _in_folder(Path(path))
    return list(dict.fromkeys(found))


def _in_folder(folder: Path) -> list[str]:
    """A folder of frames itself, or the videos below a folder."""
    files = [path for path in folder.iterdir() if path.is_file() and not is_hidden(path.name)]
    has_frames = any(path.suffix.lower() in FRAME_SUFFIXES for path in files)
    if has_frames and not any(is_video_file(path.name) for path in files):
        return [str(folder)]
    videos, left_out = list_videos(folder)
    if notice := describe(left_out):
        print(f"predict: notice: {folder}: {notice}", file=sys.stderr)
    if not videos:
        raise PredictionError(f"{folder}: holds neither videos nor frames ({', '.join(sorted(FRAME_SUFFIXES))})")
    return [str(folder / path) for path in videos]


def picture_path(path: Path, number: int, count: int) -> Path:
    return path if count == 1 else path.with_stem(f"{path.stem}-{number + 1:0{len(str(count))}}")


def named(top: list[tuple[str, float]]) -> list[Row]:
    return [{"class": name, "probability": round(probability, 6)} for name, probability in top]


def recognise(recogniser: Predictor, videos: list[str], arguments: argparse.Namespace) -> Iterator[list[Row]]:
    """The rows of each video, and its picture."""
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
        results = map(scan, videos, repeat(labels))  # goes on behind a video that raises
    for number, video in enumerate(videos):
        shown = redact(video)
        try:
            result = next(results)
        except PredictionError as error:
            result = error
        picture = arguments.picture and picture_path(arguments.picture, number, len(videos))
        if isinstance(result, PredictionError):
            yield [{"video": shown, "error": str(result)}]
        elif isinstance(result, Timeline):
            if picture:
                save_timeline(result, shown, picture)
            yield [
                {"video": shown, "start": start, "end": end, "top": named(result.top(window, arguments.top))}
                for window, (start, end) in enumerate(result.seconds_W2.round(3).tolist())
            ]
        else:
            if picture:
                save_prediction(result, shown, picture)
            row: Row = {"video": shown, "top": named(result.top), "calibrated": result.calibrated}
            if result.sure is not None:
                row["sure"] = result.sure
            if result.candidates is not None:
                row["candidates"] = result.candidates
            if result.present is not None:
                row["present"] = named(result.present)
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
            for number, of_one in enumerate(recognise(recogniser, videos, arguments)):
                rows += of_one
                if arguments.picture and "error" not in of_one[0]:
                    pictures.append(picture_path(arguments.picture, number, len(videos)))
                with progress.aside():
                    show(of_one, screen)
                progress.update()
    finally:  # what there is, also when somebody stops the program
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
    except (CheckpointError, ConfigError, ShardError, PredictionError, OSError) as error:
        print(f"predict: error: {shown(error)}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("predict: stopped", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
