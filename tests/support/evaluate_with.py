"""Runs text4vis/evaluate.py with a model that is slow or fails on purpose.

Arguments before `--` are for this program, those after it for text4vis/evaluate.py:

    --begun DIR         each rank writes DIR/<rank> when its model sees the first batch
    --slow SECONDS      each batch takes longer
    --raise             the last rank's model raises an error at the second batch
"""

import argparse
import signal
import sys
import threading
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "text4vis"))  # what running evaluate.py does

import evaluate

from text4vis.cluster import distributed
from text4vis.model.video_clip import VideoClip


def main() -> int:
    split = sys.argv.index("--")
    parser = argparse.ArgumentParser()
    parser.add_argument("--begun", type=Path, required=True)
    parser.add_argument("--slow", type=float, default=0)
    parser.add_argument("--raise", dest="fails", action="store_true")
    options = parser.parse_args(sys.argv[1:split])
    sys.argv = ["evaluate.py", *sys.argv[split + 1 :]]
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # as evaluate.py begins where it is the program
    place = distributed.ranks()
    encode_video, batches = VideoClip.encode_video, []
    end = evaluate.end

    def watched(self, frames):
        (options.begun / str(place.rank)).touch()
        batches.append(1)
        if options.fails and len(batches) == 2 and place.rank == place.world_size - 1:
            raise KeyError("broken on purpose")
        time.sleep(options.slow)
        return encode_video(self, frames)

    def end_and_print(*arguments):
        print("threads left:", *sorted(thread.name for thread in threading.enumerate()), flush=True)
        end(*arguments)

    VideoClip.encode_video = watched
    evaluate.end = end_and_print
    return evaluate.main()


if __name__ == "__main__":
    sys.exit(main())
