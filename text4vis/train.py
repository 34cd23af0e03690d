"""Trains a video recogniser.

Examples:
    deepspeed text4vis/train.py --config configs/demo.yaml --output runs/demo
    deepspeed --hostfile hosts text4vis/train.py --config C.yaml --output OUT --resume auto

Also runs under `torchrun`, `srun`, `mpirun` and plain `python` (one process); docs/cluster.md explains each. The same
command, given again, resumes where the run stopped, on any number of ranks. `touch OUT/save-now` asks for a checkpoint.

Exit codes: 0 done, 1 failed, 2 wrong usage, 75 stopped early (SIGTERM, SIGUSR1, Ctrl-C or engine.wall_minutes) after
saving: run the same command again. 130: Ctrl-C twice, which ends at once.
"""

from __future__ import annotations

import argparse
import logging
import os
import signal
import sys
import traceback
from contextlib import suppress
from pathlib import Path

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # until `main` runs, Ctrl-C ends the program without a traceback

# Run by path, this folder comes first on sys.path: its rooms would hide installed packages of the same names.
sys.path[:] = [entry for entry in sys.path if Path(entry or ".").resolve() != Path(__file__).resolve().parent]

from shards.format import ShardError
from shards.text import shown
from text4vis.cluster.interrupt import Interrupts
from text4vis.cluster.stop import EXIT_CODE, NonFiniteError, Stopped, StopRequest
from text4vis.common.programs import prepare_output, unnameable
from text4vis.config.loading import Origins, resolve_config
from text4vis.config.page import print_config
from text4vis.config.schema import Config, ConfigError


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", required=True, help="recipe, e.g. configs/demo.yaml")
    parser.add_argument("--set", action="append", default=[], metavar="SECTION.KEY=VALUE", help="overrides one key")
    parser.add_argument("--output", type=Path, help="folder of the run; default: runs/<name of the config>")
    parser.add_argument("--resume", default="auto", metavar="auto|never|PATH", help="default: auto")
    parser.add_argument("--dry-run", action="store_true", help="build everything, try one batch, write nothing")
    parser.add_argument("--print-config", action="store_true", help="show every key's value and origin, and stop")
    parser.add_argument("--local_rank", type=int, default=0, help=argparse.SUPPRESS)  # the deepspeed launcher adds it
    return parser.parse_args()


def train(arguments: argparse.Namespace, config: Config, output: Path, stop: StopRequest) -> None:
    """Runs the trainer to its end, or tries one batch with --dry-run."""
    from text4vis.data.prefetch import settled
    from text4vis.training.logs import log_to
    from text4vis.training.trainer import Trainer

    log_to(None if arguments.dry_run else output)
    with Trainer(config, output, stop, arguments.resume) as trainer:
        if arguments.dry_run:
            trainer.dry_run()
        else:
            with settled():
                trainer.fit()


def main() -> int:
    """Returns the exit code."""
    prepare_output()
    arguments = parse_arguments()
    try:
        config, origins = resolve_config(arguments.config, arguments.set)
        if arguments.print_config:
            print(print_config(arguments.config, arguments.set), end="")
            return 0
    except UnicodeEncodeError as error:
        return fail(unnameable(error))
    except (ConfigError, OSError) as error:
        return fail(str(error))
    return run(arguments, config, origins)


def run(arguments: argparse.Namespace, config: Config, origins: Origins) -> int:
    """Joins the job, trains and leaves it. Returns the exit code."""
    # These load torch, which takes seconds: too long for --help or for the answer to a wrong recipe.
    from text4vis.cluster import distributed
    from text4vis.cluster.watch import Watch
    from text4vis.saved.checkpoint import CheckpointError
    from text4vis.saved.runs import claim

    stop = StopRequest(ctrl_c=not arguments.dry_run)
    if not arguments.dry_run:
        notice = "train: Ctrl-C: saves after the next step and ends; once more ends at once"
        Interrupts(notice if distributed.ranks().is_main else "")
    try:
        distributed.start()
        output = arguments.output or Path("runs") / Path(arguments.config).stem
        if not arguments.dry_run:
            distributed.from_main(lambda: claim(output))
    except (ConfigError, CheckpointError, OSError) as error:
        return fail(str(error))
    watch = Watch(config.engine.silence_seconds, lambda cause: end(output, cause))
    code = 0
    try:
        train(arguments, config, output, stop)
    except Stopped as reason:
        logging.getLogger("text4vis").info("%s", reason)
        code = EXIT_CODE
    except (ConfigError, ShardError, CheckpointError, NonFiniteError, OSError) as error:
        watch.fail(origins.explain(error))
    except UnicodeEncodeError as error:
        watch.fail(unnameable(error))
    except Exception as error:
        print(shown(traceback.format_exc()), file=sys.stderr)
        watch.fail(f"{type(error).__name__}: {error}", sure=not distributed.is_consequence(error))
    watch.close()
    distributed.stop()
    return code


def end(output: Path, cause: str) -> None:
    """Ends this process at once, from any thread: the main one may wait for a rank that is gone."""
    from text4vis.training.logs import end_log

    with suppress(OSError):  # a full disk, for one, must not keep the process
        end_log(output, cause)
    fail(cause)
    sys.stderr.flush()
    os._exit(1)


def fail(reason: str) -> int:
    """Prints what went wrong to standard error. Returns the exit code."""
    print(f"train: error: {shown(reason)}", file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main())
