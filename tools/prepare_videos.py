"""Turns your own videos into shards: lists the classes, splits the videos and packs them.

Examples:
    python tools/prepare_videos.py videos --output data                      # videos/surfing/a.mp4, videos/skiing/b.mp4
    python tools/prepare_videos.py videos --table videos.csv --output data   # lines `path,label[,split]`
    python tools/prepare_videos.py videos --output data --lists-only

Writes data/labels.csv, data/train.txt and data/val.txt, and from them data/shards/train and data/shards/val. If the
folders are split already (videos/train/surfing/a.mp4, videos/val/surfing/b.mp4, perhaps test), that split is used.
Every video is opened before anything is written; other files are named and left out. You may edit the lists: write
them with --lists-only, then run the command without it. After an interruption, run it again.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from shards.format import ShardError
from shards.preparing import LABELS, list_file, pack_split, prepare_lists, shards_folder
from text4vis.common.programs import run_program
from text4vis.common.progress import Progress

SETTINGS = ("short_side", "fps", "store", "seed", "workers", "on_error")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("videos", type=Path, help="folder with a sub-folder of videos for each class")
    add("--output", required=True, type=Path, metavar="DIR", help="folder of the lists and the shards")
    add("--table", type=Path, metavar="CSV", help="`path,label[,split]`, or `labels` joined by |, for class folders")
    add("--val-share", type=float, default=0.2, metavar="P", help="share of each class for validation (0.2)")
    add("--seed", type=int, default=0, metavar="S", help="seed of the split and of the order of the videos (0)")
    add("--lists-only", action="store_true", help="write the lists and stop, to edit them first")
    add("--short-side", type=int, default=256, metavar="PX", help="scale frames down to this shorter side (256)")
    add("--fps", type=float, metavar="N", help="keep N frames a second; by default all")
    add("--store", choices=("frames", "video"), default="frames", help="JPEG frames, or the video files as they are")
    add("--on-error", choices=("fail", "skip"), default="fail", help="what to do with an unreadable video (fail)")
    add("--workers", type=int, metavar="N", help="threads; by default one per core")
    return parser.parse_args()


def main() -> None:
    arguments = parse_arguments()
    output = arguments.output
    with Progress("checking files", unit="file", keep=False) as bar:
        prepared = prepare_lists(
            arguments.videos,
            output,
            table=arguments.table,
            val_share=arguments.val_share,
            seed=arguments.seed,
            skip_broken=arguments.on_error == "skip",
            workers=arguments.workers,
            progress=bar.update,
        )
    for notice in prepared.notices:
        print(f"prepare_videos: notice: {notice}", file=sys.stderr)
    if prepared.made:
        counts = ", ".join(f"{len(videos)} in {split}" for split, videos in prepared.lists.items())
        files = ", ".join([LABELS, *map(list_file, prepared.lists)])
        print(f"{output}: {len(prepared.labels)} classes; videos: {counts}; lists: {files}")
    else:
        print(f"{output}: using the existing lists")
    if arguments.lists_only:
        return
    settings = {name: getattr(arguments, name) for name in SETTINGS}
    for split, videos in prepared.lists.items():
        with Progress(split, len(videos)) as bar:
            line = pack_split(
                videos,
                shards_folder(output, split),
                root=arguments.videos,
                labels=prepared.labels,
                list_name=output / list_file(split),
                progress=bar.update,
                **settings,
            )
        print(line)
    print(f"next: DATA={output} deepspeed text4vis/train.py --config configs/own.yaml --output runs/own\n"
          "      (without a GPU or a network: --config configs/own-small.yaml)")  # fmt: skip


if __name__ == "__main__":
    run_program(main, ShardError, OSError, ValueError, stopped="stopped; run the same command again to go on")
