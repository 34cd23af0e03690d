"""Packs videos into WebDataset tar shards with an index. Run it again after an interruption: it goes on.

Examples:
    python tools/build_shards.py --annotations train.txt --root frames --labels labels.csv --output shards/train
    python tools/build_shards.py --annotations train.txt --root videos --labels labels.csv --output shards/train \\
        --short-side 256 --max-frames 64 --on-error skip
    python tools/build_shards.py --annotations more.txt --root videos --labels labels.csv --output shards/train --append

Exit codes: 0 done, 1 failed, 2 wrong usage, 130 stopped by Ctrl-C.
"""

from __future__ import annotations

import argparse
import re
import time
from pathlib import Path

from shards.annotations import parse_annotations, parse_labels
from shards.format import MANIFEST, ShardError
from shards.writer import build_shards
from text4vis.common.programs import run_program
from text4vis.common.progress import Progress

_UNITS = {"": 1, "B": 1, **{f"{letter}B": 1000**power for power, letter in enumerate("KMGT", start=1)}}
_UNITS |= {f"{letter}IB": 1024**power for power, letter in enumerate("KMGT", start=1)}

_SHOWN_SKIPS = 10


def parse_bytes(text: str) -> int:
    """Bytes of `1GB`, `500MB`, `1GiB` or a plain number."""
    match = re.fullmatch(r"(\d{1,15})(?:\.(\d{1,9}))?\s*([a-zA-Z]*)", text.strip())
    if match is None or match[3].upper() not in _UNITS:
        raise argparse.ArgumentTypeError(f"expected bytes such as 1GB, 500MB, 1GiB or 1000000, got {text!r}")
    value = int(float(f"{match[1]}.{match[2] or 0}") * _UNITS[match[3].upper()])
    if value < 1:
        raise argparse.ArgumentTypeError(f"expected at least 1 byte, got {text!r}")
    return value


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--annotations", required=True, metavar="LIST", help="lines of `folder frames label` or `video.mp4 label`")
    add("--root", required=True, metavar="DIR", help="folder that the paths in the list are relative to")
    add("--labels", required=True, metavar="CSV", help="class list with the header `id,name`")
    add("--output", required=True, metavar="DIR", help="folder of the data set")
    add("--image-template", default="img_{:05d}.jpg", metavar="NAME", help="file name of a frame (img_{:05d}.jpg)")
    add(
        "--shard-bytes",
        type=parse_bytes,
        default="1GB",
        metavar="SIZE",
        help="close a shard that has reached this size (1GB)",
    )
    add("--max-frames", type=int, metavar="K", help="keep K evenly spaced frames of longer videos")
    add("--short-side", type=int, metavar="PX", help="re-encode: scale the shorter side down to PX")
    add("--quality", type=int, metavar="Q", help="re-encode: JPEG quality (90 if only --short-side is given)")
    add("--seed", type=int, default=0, metavar="S", help="seed of the order of the videos (0)")
    add(
        "--workers",
        type=int,
        metavar="N",
        help="threads; by default one per core, or 2 if frames are only copied (try more on a network mount)",
    )
    add("--on-error", choices=("fail", "skip"), default="fail", help="what to do with an unreadable video (fail)")
    add("--append", action="store_true", help="add the videos to the finished data set in --output, as new shards")
    add(
        "--store",
        choices=("frames", "video"),
        default="frames",
        help="store JPEG frames, or the video files, unchanged without --gop (frames)",
    )
    add("--gop", type=int, metavar="N", help="--store video: re-encode with a key frame every N frames; 16 reads fast")
    add("--fps", type=float, metavar="N", help="resample video files to N frames a second")
    return parser.parse_args()


def main() -> None:
    arguments = parse_arguments()
    labels = parse_labels(arguments.labels)
    annotations = parse_annotations(
        arguments.annotations, len(labels), labels_file=arguments.labels, root=arguments.root
    )
    options = {name: value for name, value in vars(arguments).items() if name not in ("annotations", "labels")}
    started = time.perf_counter()
    videos = size = 0
    with Progress(total=len(annotations)) as bar:

        def advance(num_videos: int, _num_frames: int, num_bytes: int) -> None:
            nonlocal videos, size
            videos, size = videos + num_videos, size + num_bytes
            bar.update(num_videos, f"{size / 1e6:.0f} MB")

        manifest = build_shards(
            annotations, labels=labels, progress=advance, list_name=arguments.annotations, **options
        )
    seconds = time.perf_counter() - started
    if videos == 0:
        print(f"{arguments.output}: already complete")
    total_bytes = sum(shard.bytes for shard in manifest.shards)
    print(
        f"{arguments.output}: {manifest.num_videos} videos, {manifest.num_members} "
        f"{'frames' if manifest.content == 'frames' else 'video files'}, {len(manifest.shards)} shards, "
        f"{total_bytes / 1e6:.1f} MB; this run: {seconds:.1f} s, {size / 1e6 / seconds:.0f} MB/s; "
        f"{len(manifest.skipped)} skipped"
    )
    for entry in manifest.skipped[:_SHOWN_SKIPS]:
        print(f"  skipped line {entry['line']}: {entry['reason']}")
    if len(manifest.skipped) > _SHOWN_SKIPS:
        print(
            f"  and {len(manifest.skipped) - _SHOWN_SKIPS} more, see `skipped` in {Path(arguments.output) / MANIFEST}"
        )


if __name__ == "__main__":
    run_program(main, ShardError, OSError, ValueError, stopped="stopped; run the same command again to go on")
