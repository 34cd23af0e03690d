"""Decodes videos into folders of JPEG frames and lists them in OUT/annotations.txt. Run it again after an interruption.

Examples:
    python tools/extract_frames.py --videos train.txt --root videos --output frames
    python tools/extract_frames.py --videos train.txt --root videos --output frames --fps 10 --short-side 0

Exit codes: 0 done, 1 failed, 2 wrong usage, 130 stopped by Ctrl-C.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

from shards.annotations import parse_annotations
from shards.extraction import ANNOTATIONS, extract_frames
from shards.format import ShardError
from text4vis.common.programs import run_program
from text4vis.common.progress import Progress


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--videos", required=True, metavar="LIST", help="lines of `video.mp4 label`")
    add("--root", required=True, metavar="DIR", help="folder that the paths in the list are relative to")
    add("--output", required=True, metavar="DIR", help="folder for the frame folders and annotations.txt")
    add("--short-side", type=int, default=256, metavar="PX", help="scale the shorter side down to PX (256); 0: keep it")
    add("--fps", type=float, metavar="N", help="take N frames a second instead of all")
    add("--quality", type=int, default=90, metavar="Q", help="JPEG quality (90)")
    add("--image-template", default="img_{:05d}.jpg", metavar="NAME", help="file name of a frame (img_{:05d}.jpg)")
    add("--workers", type=int, metavar="N", help="threads; by default one per core")
    return parser.parse_args()


def main() -> None:
    arguments = parse_arguments()
    videos = parse_annotations(arguments.videos, root=arguments.root)
    started = time.perf_counter()
    with Progress(total=len(videos)) as bar:

        def advance(num_videos: int, _num_frames: int) -> None:
            bar.update(num_videos)

        frames = extract_frames(
            videos,
            root=arguments.root,
            output=arguments.output,
            short_side=arguments.short_side or None,
            quality=arguments.quality,
            fps=arguments.fps,
            image_template=arguments.image_template,
            workers=arguments.workers,
            progress=advance,
            list_name=arguments.videos,
        )
    seconds = time.perf_counter() - started
    print(
        f"{arguments.output}: {len(videos)} videos, {frames} frames in {seconds:.1f} s; list: "
        f"{Path(arguments.output) / ANNOTATIONS}"
    )


if __name__ == "__main__":
    run_program(main, ShardError, OSError, ValueError, stopped="stopped; run the same command again to go on")
