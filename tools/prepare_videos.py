"""Your own videos to shards: makes class names and a split, then packs them. Run it again after an interruption.

Examples:
    python tools/prepare_videos.py videos --output data                      # videos/surfing/a.mp4, videos/skiing/b.mp4
    python tools/prepare_videos.py videos --table videos.csv --output data   # lines `path,label[,split]`
    python tools/prepare_videos.py videos --output data --lists-only

Writes data/labels.csv, data/train.txt and data/val.txt, and from them data/shards/train and data/shards/val. The lists
are yours to edit: with --lists-only nothing is packed yet, and lists that are there already are used as they are.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from shards.annotations import Annotation, parse_annotations, parse_labels
from shards.folders import LABELS, SPLITS, read_table, scan_folders, split_videos, write_lists
from shards.format import ShardError
from shards.text import shown
from shards.writer import build_shards
from text4vis.common.progress import Progress


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("videos", type=Path, help="folder with a sub-folder of videos for each class")
    add("--output", required=True, type=Path, metavar="DIR", help="folder of the lists and the shards")
    add("--table", type=Path, metavar="CSV", help="`path,label[,split]` instead of class folders")
    add("--val-share", type=float, default=0.2, metavar="P", help="share of each class that validates (0.2)")
    add("--seed", type=int, default=0, metavar="S", help="of the split and of the order of the videos (0)")
    add("--lists-only", action="store_true", help="write the lists and stop, to edit them first")
    add("--short-side", type=int, default=256, metavar="PX", help="scale frames down to this shorter side (256)")
    add("--fps", type=float, metavar="N", help="keep N frames a second; by default all")
    add("--store", choices=("frames", "video"), default="frames", help="JPEG frames, or the video files as they are")
    add("--on-error", choices=("fail", "skip"), default="fail", help="what to do about a video that cannot be read")
    add("--workers", type=int, metavar="N", help="threads; by default one a core")
    return parser.parse_args()


def _advance(bar: Progress) -> Callable[[int, int, int], None]:
    def advance(videos: int, _frames: int, _bytes: int) -> None:
        bar.update(videos)

    return advance


def refuse_overlap(output: Path, lists: Mapping[str, Sequence[Annotation]]) -> None:
    train = {one.name for one in lists["train"]}
    if both := [one for one in lists["val"] if one.name in train]:
        raise ShardError(
            f"{output / SPLITS['val']}:{both[0].line}: {both[0].name!r} is in {SPLITS['train']} too, and "
            f"{len(both) - 1} more are; a model must be measured on videos that it has not seen: remove them from one "
            "of the lists"
        )


def tell_unlisted(arguments: argparse.Namespace, output: Path, lists: Mapping[str, Sequence[Annotation]]) -> None:
    """The lists are their owner's, and videos that came later are not in them: say so."""
    try:
        videos = read_table(arguments.table) if arguments.table else scan_folders(arguments.videos)
    except ShardError:  # e.g. no class folders, for the lists were made from a table
        return
    known = {one.name for of_split in lists.values() for one in of_split}
    if new := [video.path for video in videos if video.path not in known]:
        print(
            f"prepare_videos: notice: {len(new)} of {len(videos)} videos are in no list and left out, the first is "
            f"{new[0]!r}. Add lines for them, or delete {LABELS} and the lists to have them made anew; either way "
            f"delete {output / 'shards'} as well",
            file=sys.stderr,
        )


def main() -> None:
    arguments = parse_arguments()
    output = arguments.output
    lists = [output / name for name in (LABELS, *SPLITS.values())]
    present = [path for path in lists if path.exists()]
    if not present:
        videos = read_table(arguments.table) if arguments.table else scan_folders(arguments.videos)
        counts = write_lists(split_videos(videos, arguments.val_share, arguments.seed), output)
        print(f"{output}: {len(parse_labels(output / LABELS))} classes, {counts['train']} videos to train, "
              f"{counts['val']} to validate: {', '.join(path.name for path in lists)}")  # fmt: skip
    elif len(present) < len(lists):
        missing = next(path for path in lists if path not in present)
        raise ShardError(f"{missing}: missing beside {present[0].name}; delete the lists to have them made anew")
    else:
        print(f"{output}: using the lists that are there")
    labels = parse_labels(output / LABELS)
    annotations = {
        split: parse_annotations(output / file, len(labels), labels_file=output / LABELS)
        for split, file in SPLITS.items()
    }
    if present:
        tell_unlisted(arguments, output, annotations)
    refuse_overlap(output, annotations)
    if arguments.lists_only:
        return
    for split, file in SPLITS.items():
        with Progress(split, len(annotations[split])) as bar:
            manifest = build_shards(
                annotations[split],
                root=arguments.videos,
                labels=labels,
                output=output / "shards" / split,
                short_side=arguments.short_side if arguments.store == "frames" else None,
                fps=arguments.fps,
                store=arguments.store,
                seed=arguments.seed,
                workers=arguments.workers,
                on_error=arguments.on_error,
                list_name=output / file,
                progress=_advance(bar),
            )
        skipped = f", {len(manifest.skipped)} skipped" if manifest.skipped else ""
        print(f"{output / 'shards' / split}: {manifest.num_videos} videos{skipped}")
    print(f"next: DATA={output} deepspeed text4vis/train.py --config configs/own.yaml --output runs/own\n"
          "      (without a GPU or a network: --config configs/own-small.yaml)")  # fmt: skip


if __name__ == "__main__":
    try:
        main()
    except (ShardError, OSError, ValueError) as error:
        print(f"prepare_videos: error: {shown(error)}", file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt:
        print("prepare_videos: stopped; run the same command again to go on", file=sys.stderr)
        sys.exit(130)
