"""Indexes WebDataset tars that other programs wrote, in place: nothing is copied.

Examples:
    python tools/index_shards.py 's3://bucket/clips/{00000..00099}.tar' --labels labels.csv --output index/clips
    python tools/index_shards.py downloaded --output downloaded
    python tools/index_shards.py https://host/clips/00000.tar --output index --label-key meta.category --on-error skip

A sample is `key.mp4`, or `key.000.jpg key.001.jpg ...`, with its label in `key.cls`, `key.json` or `key.txt`. Name the
output folder in `data.train` or `data.val`. Every tar is read once; after an interruption, run it again to continue.

Exit codes: 0 done, 1 failed, 2 wrong usage, 130 stopped by Ctrl-C.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from shards.annotations import parse_labels
from shards.foreign import index_tars
from shards.format import ShardError
from shards.text import shown
from text4vis.common.programs import run_program
from text4vis.common.progress import Progress


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tars", nargs="+", metavar="ADDRESS", help="tars, or folders that hold *.tar; braces expand")
    parser.add_argument("--output", required=True, type=Path, metavar="DIR", help="folder for the index")
    parser.add_argument("--labels", metavar="CSV", help="class list; needed where the labels are numbers")
    parser.add_argument("--label-key", metavar="KEY", help="key of the samples' JSON that holds the label, as a.b.c")
    parser.add_argument("--on-error", choices=("fail", "skip"), default="fail", help="about an unusable sample (fail)")
    parser.add_argument("--workers", type=int, metavar="N", help="tars read at the same time; by default one per core")
    return parser.parse_args()


def main() -> int:
    arguments = parse_arguments()
    try:
        with Progress() as bar:
            manifest = index_tars(
                arguments.tars,
                output=arguments.output,
                labels=parse_labels(arguments.labels) if arguments.labels else None,
                label_key=arguments.label_key,
                on_error=arguments.on_error,
                workers=arguments.workers,
                progress=bar.update,
            )
    except (ShardError, OSError) as error:
        print(f"index_shards: error: {shown(error)}", file=sys.stderr)
        return 1
    print(
        f"{manifest.num_videos} videos of {len(manifest.classes)} classes in {len(manifest.shards)} tars; index in "
        f"{arguments.output}"
    )
    for entry in manifest.skipped:
        print(shown(f"left out: {entry['name']}: {entry['reason']}"))
    unused = manifest.build["unused_members"]
    if unused:
        print(shown("members not used: " + ", ".join(f"{count} {kind}" for kind, count in unused.items())))
    return 0


if __name__ == "__main__":
    run_program(main, stopped="stopped; run the same command again to go on")
