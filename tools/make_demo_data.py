"""Draws the demo's data set: short videos of little people acting, as folders of JPEG frames.

Examples:
    python tools/make_demo_data.py --output data
    python tools/make_demo_data.py --output small --train-videos 40 --val-videos 20 --unseen-videos 14

The output is an ordinary data set of frame folders:

    frames/train/<video>/img_00001.jpg …    also val/ and unseen/
    train.txt, val.txt, unseen.txt          lines `path frames label`, path relative to frames/
    labels.csv, unseen_labels.csv           id,name; the unseen classes have ids of their own

The unseen classes are new combinations of words that the training classes use ("raising" + "the left arm"). Left and
right are the viewer's. Each video depends only on the seed, its split and its number, so the same arguments give the
same bytes with any number of workers. If the output is already there, nothing is done.
"""

import argparse
import json
import sys
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from drawings.people import ACTIONS, UNSEEN_ACTIONS, Action
from drawings.scene import render_video

from text4vis.common.programs import run_program
from text4vis.common.progress import track

SPLITS = {"train": ACTIONS, "val": ACTIONS, "unseen": UNSEEN_ACTIONS}
IMAGE_TEMPLATE = "img_{:05d}.jpg"
RECORD = "demo.json"
VERSION = 1  # raised when the same arguments produce other bytes


def count(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{number} is too few: give 1 or more")
    return number


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="folder to write")
    parser.add_argument("--train-videos", type=count, default=1400, help="videos to train with (1400)")
    parser.add_argument("--val-videos", type=count, default=1280, help="of the same classes, to validate (1280)")
    parser.add_argument("--unseen-videos", type=count, default=161, help="of classes never trained on (161)")
    parser.add_argument("--seed", type=int, default=0, help="seed of all videos (0)")
    parser.add_argument("--workers", type=count, default=2, help="processes that draw (2)")
    return parser.parse_args()


def video_path(split: str, index: int, action: Action) -> str:
    """The folder of a video, relative to DIR/frames."""
    return f"{split}/{index:05d}_{action.name.replace(' ', '_')}"


def make_video(task: tuple[str, int], frames_dir: Path, seed: int) -> str:
    """Draw one video into its folder and return its line of the list: `path frames label`."""
    split, index = task
    cv2.setNumThreads(1)
    label = index % len(SPLITS[split])
    action = SPLITS[split][label]
    rng = np.random.default_rng((seed, tuple(SPLITS).index(split), index))
    quality = [cv2.IMWRITE_JPEG_QUALITY, int(rng.integers(70, 96))]
    path = video_path(split, index, action)
    folder = frames_dir / path
    folder.mkdir(parents=True, exist_ok=True)
    number = 0
    for number, frame in enumerate(render_video(rng, action), start=1):
        (folder / IMAGE_TEMPLATE.format(number)).write_bytes(cv2.imencode(".jpg", frame, quality)[1].tobytes())
    return f"{path} {number} {label}"


def write_labels(path: Path, actions: tuple[Action, ...]) -> None:
    lines = ["id,name", *(f"{label},{action.name}" for label, action in enumerate(actions))]
    path.write_text("\n".join(lines) + "\n")


def make_data(output: Path, videos: dict[str, int], seed: int, workers: int) -> None:
    """Draw `videos[split]` videos for each split and write their lists and class names."""
    tasks = [(split, index) for split, number in videos.items() for index in range(number)]
    draw = partial(make_video, frames_dir=output / "frames", seed=seed)
    with ProcessPoolExecutor(workers) as executor:
        drawn = executor.map(draw, tasks, chunksize=8)
        lines = list(track(drawn, "drawing", total=len(tasks)))
    for split in videos:
        split_lines = [line for line, task in zip(lines, tasks, strict=True) if task[0] == split]
        (output / f"{split}.txt").write_text("\n".join(split_lines) + "\n")
    write_labels(output / "labels.csv", ACTIONS)
    write_labels(output / "unseen_labels.csv", UNSEEN_ACTIONS)


def main() -> int:
    args = parse_arguments()
    videos = {"train": args.train_videos, "val": args.val_videos, "unseen": args.unseen_videos}
    wanted: dict[str, Any] = {"version": VERSION, "seed": args.seed, "videos": videos}
    record = args.output / RECORD
    if record.is_file():
        if json.loads(record.read_text()) == wanted:
            print(f"{args.output} is up to date: {sum(videos.values())} videos")
            return 0
        print(f"{record} records other arguments: remove {args.output}, or choose another --output", file=sys.stderr)
        return 1
    make_data(args.output, videos, args.seed, args.workers)
    record.write_text(json.dumps(wanted, indent=2) + "\n")
    print(f"{args.output}: {', '.join(f'{number} {split}' for split, number in videos.items())} videos")
    return 0


if __name__ == "__main__":
    run_program(main)
