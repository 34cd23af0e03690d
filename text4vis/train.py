"""Trains a video recogniser.

    deepspeed text4vis/train.py --config configs/demo.yaml --output runs/demo
    deepspeed --hostfile hosts text4vis/train.py --config C.yaml --output OUT --resume auto

Also runs under `torchrun` and plain `python` (one process). Exit codes: 0 done, 1 failed, 2 wrong usage.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from shards.format import ShardError
from text4vis import distributed
from text4vis.checkpoint import CheckpointError
from text4vis.config import ConfigError, load_config


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", required=True, help="recipe, e.g. configs/demo.yaml")
    parser.add_argument("--set", action="append", default=[], metavar="SECTION.KEY=VALUE", help="overrides one key")
    parser.add_argument("--output", type=Path, help="folder of the run; default: runs/<name of the config>")
    parser.add_argument("--resume", default="auto", metavar="auto|never|PATH", help="default: auto")
    parser.add_argument("--local_rank", type=int, default=0, help=argparse.SUPPRESS)  # the deepspeed launcher adds it
    return parser.parse_args()


def main() -> int:
    arguments = parse_arguments()
    try:
        config = load_config(arguments.config, arguments.set)
        output = arguments.output or Path("runs") / Path(arguments.config).stem
        ranks = distributed.start()
        from text4vis.trainer import Trainer, log_to

        log_to(output)
        Trainer(config, output, arguments.resume, progress=ranks.is_main and sys.stderr.isatty()).fit()
    except (ConfigError, ShardError, CheckpointError, OSError) as error:
        print(f"train: error: {error}", file=sys.stderr)
        return 1
    finally:
        distributed.stop()
    return 0


if __name__ == "__main__":
    sys.exit(main())
