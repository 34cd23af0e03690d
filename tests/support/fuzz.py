"""Feeds every parser damaged files: it may raise only the errors that it documents.

    nice python tests/support/fuzz.py [--cases 100000] [--seed 0] [--guided] [target …]

A case takes a valid file of the target and changes it: bytes flipped, cut, repeated or spliced, tokens of the format
put in, JSON values replaced by others; every 20th case is random bytes. Case k of a target is the same in every run.
The file of a case is kept until the next one, so a crash of the process leaves it behind. A case that takes more than
20 seconds, or 2 GiB more memory than the program, is a failure too. --guided: coverage decides which cases are changed
further (atheris: pip install -e '.[fuzz]'; one target). pytest runs a few hundred cases of each (tests/test_fuzz.py).
"""

from __future__ import annotations

import argparse
import gc
import random
import resource
import signal
import sys
import tempfile
import time
import warnings
from collections import Counter
from dataclasses import replace
from pathlib import Path
from types import FunctionType

import fuzz_page
import fuzz_shards
import fuzz_text4vis
from fuzz_changes import Target, mutated

CASE_SECONDS = 20
CASE_BYTES = 2 << 30

TARGETS = fuzz_shards.TARGETS | fuzz_text4vis.TARGETS | fuzz_page.TARGETS


def attempt(target: Target, data: bytes, folder: Path) -> str:
    """Name of the documented error that the data give, or "accepted". Other errors pass through."""
    try:
        target.parse(data, folder)
    except target.errors as error:
        return type(error).__name__
    return "accepted"


def _too_long(*_: object) -> None:
    raise AssertionError(f"took more than {CASE_SECONDS} seconds")


def fuzz(name: str, cases: int, seed: int) -> bool:
    """Whether all cases of a target end well; prints what came out, and the first failures of each kind."""
    target = TARGETS[name]
    outcomes: Counter[str] = Counter()
    failures: dict[str, str] = {}
    slowest = 0.0
    started = time.monotonic()
    with tempfile.TemporaryDirectory(
        prefix=f"fuzz-{name}-", dir="/dev/shm" if Path("/dev/shm").is_dir() else None
    ) as place:
        folder = Path(place)
        seeds = target.seeds(folder)
        for data in seeds:
            attempt(target, data, folder)
        for case in range(cases):
            data = mutated(target, seeds, random.Random(f"{name} {seed} {case}"))
            (folder / "case").write_bytes(data)
            began = time.monotonic()
            signal.alarm(CASE_SECONDS)
            try:
                outcomes[attempt(target, data, folder)] += 1
            except BaseException as error:
                if isinstance(error, KeyboardInterrupt):
                    raise
                frame = error.__traceback__
                while frame is not None and frame.tb_next is not None:
                    frame = frame.tb_next
                place_of = f"{frame.tb_frame.f_code.co_filename}:{frame.tb_lineno}" if frame else ""
                kind = f"{type(error).__name__} at {place_of}"
                outcomes["FAILED"] += 1
                failures.setdefault(kind, f"case {case}: {str(error)[:200]!r}, file {data[:200]!r}")
            finally:
                signal.alarm(0)
            slowest = max(slowest, time.monotonic() - began)
    seconds = time.monotonic() - started
    counts = ", ".join(f"{count} {kind}" for kind, count in outcomes.most_common())
    print(f"{name}: {cases} cases in {seconds:.0f} s, slowest {slowest:.2f} s: {counts}", flush=True)
    for kind, example in failures.items():
        print(f"  {kind}: {example}", flush=True)
    return not failures


def fuzz_guided(name: str, cases: int, seed: int) -> None:
    """The same, where what reaches new lines of the program is changed further. Ends the process."""
    try:
        import atheris
    except ImportError:
        sys.exit("fuzz: error: --guided needs atheris, which is there for Linux on x86-64: pip install -e '.[fuzz]'")
    target = TARGETS[name]
    folder = Path(tempfile.mkdtemp(prefix=f"fuzz-{name}-"))
    seeds = target.seeds(folder)
    corpus = folder / "corpus"
    corpus.mkdir()
    for number, data in enumerate(seeds):
        (corpus / str(number)).write_bytes(data)

    def change(data: bytes, max_size: int, number: int) -> bytes:
        draw = random.Random(number)
        if draw.random() < 0.5:
            return atheris.Mutate(data, max_size)
        return mutated(replace(target, is_json=False), [data or b"x", *seeds], draw)[:max_size]

    for function in gc.get_objects():
        if isinstance(function, FunctionType) and str(function.__module__).split(".")[0] in ("shards", "text4vis"):
            atheris.instrument_func(function)
    options = [
        f"-runs={cases}",
        f"-seed={seed + 1}",
        f"-timeout={CASE_SECONDS}",
        "-rss_limit_mb=0",
        "-print_final_stats=1",
    ]
    atheris.Setup(
        [sys.argv[0], *options, str(corpus)], lambda data: attempt(target, data, folder), custom_mutator=change
    )
    atheris.Fuzz()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("targets", nargs="*", metavar="target", help=f"default: all of {', '.join(TARGETS)}")
    parser.add_argument("--cases", type=int, default=100_000, help="of each target")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--guided", action="store_true", help="guided by coverage, with atheris")
    arguments = parser.parse_args()
    names = arguments.targets or list(TARGETS)
    for name in names:
        if name not in TARGETS:
            parser.error(f"no target {name!r}; there are {', '.join(TARGETS)}")
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + CASE_BYTES, used + CASE_BYTES))
    warnings.simplefilter("ignore")
    if arguments.guided:
        if len(names) != 1:
            parser.error("--guided takes one target: its engine ends the process")
        fuzz_guided(names[0], arguments.cases, arguments.seed)
    signal.signal(signal.SIGALRM, _too_long)
    ends = [fuzz(name, arguments.cases, arguments.seed) for name in names]
    return 0 if all(ends) else 1


if __name__ == "__main__":
    sys.exit(main())
