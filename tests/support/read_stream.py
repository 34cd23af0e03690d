"""One rank of a job that only reads: prints the videos of its first batches as JSON, for comparison between jobs.

RANK=0 WORLD_SIZE=2 python tests/support/read_stream.py CONFIG STEPS CONSUMED
"""

import hashlib
import itertools
import json
import sys

from text4vis.cluster import distributed
from text4vis.config.loading import load_config
from text4vis.data.loader import Batch, build_loader


def identify(batch: Batch) -> list[tuple[int, int, str]]:
    """(id, label, hash of the pixels) of each video of a batch."""
    return [
        (int(i), int(label), hashlib.sha256(frames.contiguous().numpy().tobytes()).hexdigest())
        for i, label, frames in zip(batch.ids, batch.labels, batch.frames, strict=True)
    ]


def main() -> None:
    path, steps, consumed = sys.argv[1:]
    ranks = distributed.ranks()
    config = load_config(path)
    with build_loader(config, "train", rank=ranks.rank, world_size=ranks.world_size, consumed=int(consumed)) as loader:
        print(json.dumps([identify(batch) for batch in itertools.islice(loader, int(steps))]))


if __name__ == "__main__":
    main()
