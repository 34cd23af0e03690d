"""Recognises actions in videos or frame folders with an exported model.

    python tools/predict.py clip.mp4 --model exported
    python tools/predict.py clip.mp4 frames/clip2 --model exported --labels 'surfing,skiing' --top 2 --picture seen.png

Exit codes: 0 done, 1 failed, 2 wrong usage.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.table import Table

import text4vis
from shards.annotations import parse_labels
from shards.format import ShardError
from text4vis.config import ConfigError
from text4vis.pictures import save_prediction
from text4vis.predictor import PredictionError


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("videos", nargs="+", type=Path, metavar="VIDEO|FRAME_DIR", help="video files or frame folders")
    parser.add_argument("--model", required=True, type=Path, help="folder written by tools/export.py")
    labels = parser.add_mutually_exclusive_group()
    labels.add_argument("--labels", help="class names to choose from, separated by commas; default: the model's own")
    labels.add_argument("--labels-file", type=Path, help="the same as a CSV `id,name`")
    parser.add_argument("--top", type=int, default=5, help="classes to show (default 5)")
    parser.add_argument("--picture", type=Path, help="write a PNG: frames and bars; several videos: NAME-1.png, ...")
    arguments = parser.parse_args()
    if arguments.top < 1:
        parser.error(f"--top: expected at least 1, got {arguments.top}")
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


def picture_path(path: Path, number: int, count: int) -> Path:
    return path if count == 1 else path.with_stem(f"{path.stem}-{number + 1}")


def run(arguments: argparse.Namespace) -> None:
    labels = class_names(arguments)
    recogniser = text4vis.load(arguments.model)
    console = Console()
    for number, video in enumerate(arguments.videos):
        prediction = recogniser.predict(video, labels, arguments.top)
        table = Table("class", title=escape(str(video)))
        table.add_column("%", justify="right")
        for name, probability in prediction.top:
            table.add_row(escape(name), f"{100 * probability:.1f}")
        console.print(table)
        if arguments.picture:
            path = picture_path(arguments.picture, number, len(arguments.videos))
            save_prediction(prediction, str(video), path)
            console.print(f"picture: {escape(str(path))}")


def main() -> int:
    arguments = parse_arguments()
    try:
        run(arguments)
    except (ConfigError, ShardError, PredictionError, OSError) as error:
        print(f"predict: error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
