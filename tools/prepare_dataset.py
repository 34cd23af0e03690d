"""Turns a published data set into lists, class names and shards, from its annotation files as they are distributed.

Examples:
    python tools/prepare_dataset.py kinetics400 --annotations annotations --videos videos --output $DATA/k400
    python tools/prepare_dataset.py ucf101 --annotations ucfTrainTestlist --videos UCF-101 --output $DATA/ucf101
    python tools/prepare_dataset.py hmdb51 --annotations splits --videos hmdb51 --output $DATA/hmdb51-2 --split 2
    python tools/prepare_dataset.py something-v2 --annotations labels --videos videos --output $DATA/ssv2

Writes labels.csv, train.txt, val.txt (test.txt), the names of missing videos (missing_train.txt …), and shards in
train, val (test). Videos may lie in any sub-folders and have any ending. After an interruption, run it again.

Exit codes: 0 done, 1 failed, 2 wrong usage, 130 stopped by Ctrl-C.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from shards.annotations import format_annotation, parse_annotations
from shards.files import require_folder, write_atomically
from shards.format import MANIFEST, ShardError
from shards.matching import VideoFiles, match_videos
from shards.official import DATASETS, read_official
from shards.preparing import format_labels, pack_split
from shards.walk import describe
from text4vis.common.programs import run_program
from text4vis.common.progress import Progress

CLASSES = Path(__file__).resolve().parent.parent / "configs" / "classes"
SETTINGS = ("short_side", "max_frames", "fps", "store", "seed", "workers", "on_error")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("dataset", choices=sorted(DATASETS), help="which data set")
    add("--annotations", required=True, type=Path, metavar="DIR", help="folder of the official annotation files")
    add("--videos", required=True, type=Path, metavar="DIR", help="folder of the videos, in any sub-folders")
    add("--output", required=True, type=Path, metavar="DIR", help="folder of the lists and the shards")
    add("--split", type=int, choices=(1, 2, 3), help="official split of ucf101 and hmdb51 (1)")
    add("--lists-only", action="store_true", help="write the lists and stop")
    add("--short-side", type=int, default=256, metavar="PX", help="scale frames down to this shorter side (256)")
    add("--fps", type=float, metavar="N", help="keep N frames a second; by default all")
    add("--max-frames", type=int, metavar="K", help="thin longer videos to K frames, uniformly")
    add("--store", choices=("frames", "video"), default="frames", help="JPEG frames, or the video files as they are")
    add("--on-error", choices=("fail", "skip"), default="fail", help="what to do with an unreadable video (fail)")
    add("--seed", type=int, default=0, metavar="S", help="seed of the order of the videos (0)")
    add("--workers", type=int, metavar="N", help="threads; by default one a core")
    arguments = parser.parse_args()
    if arguments.split and DATASETS[arguments.dataset].num_splits == 1:
        parser.error(f"--split {arguments.split}: {arguments.dataset} has one official split; leave the option out")
    return arguments


def write_lists(arguments: argparse.Namespace) -> tuple[list[str], list[str]]:
    """Class names, and the splits whose lists were written."""
    official = read_official(arguments.dataset, arguments.annotations, CLASSES, arguments.split or 1)
    if not arguments.videos.is_dir():
        raise ShardError(f"{arguments.videos}: no such folder; give the folder of the videos as --videos")
    files = VideoFiles(arguments.videos)
    matched = match_videos(official, files)
    output = arguments.output
    contents = {output / "labels.csv": format_labels(official.names)}
    for split, found in matched.items():
        lines = [
            f"{format_annotation(path, None, several[0] if len(several) == 1 else several)}\n"
            for path, several in found.videos
        ]
        if lines:
            contents[output / f"{split}.txt"] = "".join(lines).encode()
            _refuse_finished(output, split, contents[output / f"{split}.txt"])
        contents[output / f"missing_{split}.txt"] = "".join(f"{name}\n" for name in found.missing).encode()
    require_folder(output)
    for path, content in contents.items():
        write_atomically(path, content)
    for notice in filter(None, [describe(files.left_out), *official.notices]):
        print(f"prepare_dataset: notice: {notice}", file=sys.stderr)
    for split, found in matched.items():
        total = len(official.splits[split])
        missing = f"; {len(found.missing)} are missing: missing_{split}.txt" if found.missing else ""
        print(f"{output / split}.txt: {len(found.videos)} of {total} videos of the official {split} list{missing}")
    return official.names, [split for split, found in matched.items() if found.videos]


def _refuse_finished(output: Path, split: str, content: bytes) -> None:
    """Raises ShardError if shards are finished of another list: it would no longer say what they hold."""
    path = output / f"{split}.txt"
    if (output / split / MANIFEST).exists() and path.exists() and (old := path.read_bytes()) != content:
        changed = sorted(set(old.splitlines()) ^ set(content.splitlines()))
        first = f", the first is {changed[0].decode()!r}" if changed else ""
        raise ShardError(
            f"{output / split}: these shards are finished, and {len(changed)} lines of {path.name} have changed since"
            f"{first}; delete {output / split} to build it anew, or name another --output"
        )


def main() -> None:
    arguments = parse_arguments()
    labels, splits = write_lists(arguments)
    if arguments.lists_only:
        return
    settings = {name: getattr(arguments, name) for name in SETTINGS}
    for split in splits:
        path = arguments.output / f"{split}.txt"
        videos = parse_annotations(path, len(labels), root=arguments.videos)
        with Progress(split, len(videos)) as bar:
            line = pack_split(
                videos,
                arguments.output / split,
                root=arguments.videos,
                labels=labels,
                list_name=path,
                progress=bar.update,
                **settings,
            )
        print(line)


if __name__ == "__main__":
    run_program(main, ShardError, OSError, ValueError, stopped="stopped; run the same command again to go on")
