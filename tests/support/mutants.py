"""Changes the code in small ways and counts the changes that its tests notice: `make mutants`.

Examples:
    python tests/support/mutants.py                          # a sample of each module of the table below
    python tests/support/mutants.py sampling metrics --all   # every mutant of two modules
    python tests/support/mutants.py order --sample 100 --seed 7 --json order.json
    python tests/support/mutants.py order --again order.json # those that survived there, after a test was added

Works on copies of the tree in a temporary folder; the checkout stays as it is. Each mutant runs its module's tests in a
process that is forked after the libraries were imported: first the tests that call the changed function, quick ones
first, up to the first test that fails. Docstrings, messages (of errors and of the log), annotations and decorators are
left alone. A mutant that no test notices is printed with its line, and so is one whose tests took too long, which
counts as noticed. Those that compute the same are named in mutants_equivalent.txt, with the reason, and do not count.

Exit codes: 0 at least --least per cent were noticed, 1 fewer, 2 wrong usage.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import importlib
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Generator, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from types import FrameType

import hypothesis
import psutil
import pytest

ROOT = Path(__file__).resolve().parents[2]
EQUIVALENT = Path(__file__).with_name("mutants_equivalent.txt")
TIMEOUT = "time-out"

# Name of a module: its files, and the tests that must notice a mistake in them, quick ones first.
MODULES: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "order": (
        ("shards/plan.py", "shards/weave.py"),
        ("shards/test_plan.py", "shards/test_weave.py", "shards/test_mixture.py"),
    ),
    "mixture": (("shards/mixture.py", "text4vis/data/order.py"), ("shards/test_mixture.py", "data/test_order.py")),
    "sampling": (("text4vis/data/sampling.py",), ("data/test_sampling.py",)),
    "augmentation": (("text4vis/data/augmentation.py",), ("data/test_augmentation.py", "data/test_plan.py")),
    "plan": (("text4vis/data/plan.py",), ("data/test_plan.py",)),
    "reader": (
        (
            "shards/reader.py",
            "shards/opening.py",
            "shards/local.py",
            "shards/rows.py",
            "shards/packets.py",
            "shards/stored.py",
        ),
        (
            "shards/test_packets.py",
            "shards/test_reader.py",
            "shards/test_rows.py",
            "shards/test_stored.py",
            "shards/test_many_labels.py",
            "shards/test_remote.py",
        ),
    ),
    "index": (
        ("shards/index.py",),
        ("shards/test_index.py", "shards/test_reader.py", "shards/test_many_labels.py", "shards/test_stored.py"),
    ),
    "format": (
        ("shards/format.py",),
        (
            "shards/test_format.py",
            "shards/test_index.py",
            "shards/test_reader.py",
            "shards/test_many_labels.py",
            "shards/test_stored.py",
        ),
    ),
    "cache": (
        ("shards/cache.py", "shards/cached.py", "shards/ahead.py"),
        ("shards/test_ahead.py", "shards/test_cached.py", "shards/test_cache.py", "shards/test_rows.py"),
    ),
    "remote": (
        ("shards/remote.py", "shards/transfer.py", "shards/stores.py", "shards/answers.py"),
        ("shards/test_stores.py", "shards/test_transfer.py", "shards/test_remote.py", "shards/test_cache.py"),
    ),
    "checkpoint": (
        (
            "text4vis/saved/checkpoint.py",
            "text4vis/training/checkpointing.py",
            "text4vis/training/joining.py",
            "text4vis/training/snapshot.py",
        ),
        (
            "training/test_joining.py",
            "training/test_checkpointing.py",
            "training/test_snapshot.py",
            "saved/test_checkpoint.py",
        ),
    ),
    "engine": (
        ("text4vis/training/engine.py", "text4vis/training/gradients.py", "text4vis/training/runtime_config.py"),
        (
            "training/test_gradients.py",
            "training/test_engine_state.py",
            "training/test_average.py",
            "training/test_host_waits.py",
        ),
    ),
    "trainer": (
        ("text4vis/training/trainer.py", "text4vis/training/steps.py"),
        ("training/test_trainer.py", "training/test_host_waits.py"),
    ),
    "protocols": (("text4vis/evaluation/protocols.py",), ("evaluation/test_protocols.py",)),
    "metrics": (("text4vis/evaluation/metrics.py",), ("evaluation/test_metrics.py",)),
    "calibration": (("text4vis/evaluation/calibration.py",), ("evaluation/test_calibration.py",)),
}
COMPARISONS = {
    ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt, ast.Eq: ast.NotEq, ast.NotEq: ast.Eq,
    ast.Is: ast.IsNot, ast.IsNot: ast.Is, ast.In: ast.NotIn, ast.NotIn: ast.In,
}  # fmt: skip
ARITHMETIC = {
    ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Div, ast.Div: ast.Mult, ast.FloorDiv: ast.Mult,
    ast.Mod: ast.FloorDiv, ast.Pow: ast.Mult, ast.LShift: ast.RShift, ast.RShift: ast.LShift,
    ast.BitAnd: ast.BitOr, ast.BitOr: ast.BitAnd, ast.BitXor: ast.BitAnd,
}  # fmt: skip
NAMES = {
    "min": "max", "max": "min", "any": "all", "all": "any", "floor": "ceil", "ceil": "floor", "sorted": "list",
    "minimum": "maximum", "maximum": "minimum", "argmax": "argmin", "argmin": "argmax",
}  # fmt: skip


@dataclass(frozen=True)
class Mutant:
    """One change of a file: bytes start to stop of its UTF-8 text become `text`."""

    path: str
    line: int
    start: int
    stop: int
    text: str
    function: str  # the dotted name of the function or class around it, "" outside of any
    name: str  # `path function: old -> new`, and #2 for the second such change of that function

    def applied(self, source: bytes) -> bytes:
        return source[: self.start] + self.text.encode() + source[self.stop :]


def mutants_of(path: str, source: str) -> list[Mutant]:
    """All mutants of a file, in the order of their places."""
    lines = source.encode().splitlines(keepends=True)
    starts = [0]
    for line in lines:
        starts.append(starts[-1] + len(line))
    found: list[Mutant] = []
    counts: dict[str, int] = {}
    for node, text, function in _changes(ast.parse(source), ""):
        start = starts[node.lineno - 1] + node.col_offset
        stop = starts[(node.end_lineno or 0) - 1] + (node.end_col_offset or 0)
        old, new = (" ".join(part.split()) for part in (source.encode()[start:stop].decode(), text))
        name = f"{path} {function or '(module)'}: {_shortened(old)} -> {_shortened(new)}"
        counts[name] = counts.get(name, 0) + 1
        name += f" #{counts[name]}" if counts[name] > 1 else ""
        found.append(Mutant(path, node.lineno, start, stop, text, function, name))
    return sorted(found, key=lambda mutant: (mutant.start, mutant.stop))


def _shortened(text: str) -> str:
    return text if len(text) <= 70 else text[:67] + "..."


def _changes(node: ast.AST, function: str) -> Iterator[tuple[ast.expr | ast.stmt, str, str]]:
    """(place, what it becomes, name of the function around it)."""
    if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
        function = f"{function}.{node.name}".lstrip(".")
    if isinstance(node, ast.expr):
        yield from ((node, f"({ast.unparse(new)})", function) for new in _expressions(node))
    elif isinstance(node, ast.stmt):
        yield from ((node, text, function) for text in _statements(node))
    if isinstance(node, (ast.If, ast.While, ast.IfExp)) and not _is_negated_otherwise(node.test):
        yield node.test, f"(not ({ast.unparse(node.test)}))", function
    for child in _children(node):
        yield from _changes(child, function)


def _is_negated_otherwise(test: ast.expr) -> bool:
    """Whether `_expressions` negates a condition already, or nothing does."""
    match test:
        case ast.Compare(_, [ast.Eq() | ast.NotEq() | ast.Is() | ast.IsNot() | ast.In() | ast.NotIn()]):
            return True
        case ast.Constant() | ast.UnaryOp(ast.Not()):
            return True
    return False


def _children(node: ast.AST) -> Iterator[ast.AST]:
    """What may be changed within: no annotation, decorator, message or docstring."""
    if isinstance(node, (ast.JoinedStr, ast.Raise, ast.Assert)):
        return
    left_out = {"annotation", "returns", "decorator_list", "bases", "type_params"}
    for field, value in ast.iter_fields(node):
        if field in left_out:
            continue
        for child in value if isinstance(value, list) else [value]:
            typing = isinstance(child, ast.If) and ast.unparse(child.test) == "TYPE_CHECKING"
            logs = isinstance(child, ast.Expr) and ast.unparse(child.value).startswith(("logger.", "_log."))
            strict = isinstance(child, ast.keyword) and child.arg in {"strict", "dtype"}
            if isinstance(child, ast.AST) and not (typing or logs or strict):
                yield child


def _expressions(node: ast.expr) -> Iterator[ast.expr]:
    """What an expression becomes."""
    match node:
        case ast.Compare(left, ops, comparators):
            for place, operator in enumerate(ops):
                swapped = COMPARISONS[type(operator)]()
                yield ast.Compare(left, [*ops[:place], swapped, *ops[place + 1 :]], comparators)
        case ast.BinOp(left, operator, right) if not _is_text(left) and not _is_text(right):
            yield ast.BinOp(left, ARITHMETIC.get(type(operator), ast.Add)(), right)
        case ast.BoolOp(operator, values):
            yield ast.BoolOp(ast.And() if isinstance(operator, ast.Or) else ast.Or(), values)
        case ast.UnaryOp(ast.Not() | ast.USub(), operand):
            yield operand
        case ast.Constant(bool() as value):
            yield ast.Constant(not value)
        case ast.Constant(int() as value):
            yield ast.Constant(value + 1)
        case ast.Constant(float() as value):
            yield ast.Constant(value * 2 if value else 1.0)
        case ast.Call(ast.Name(name), arguments, keywords) if name in NAMES and not (name == "sorted" and keywords):
            yield ast.Call(ast.Name(NAMES[name]), arguments, keywords)
        case ast.Call(ast.Attribute(value, name), arguments, keywords) if name in NAMES:
            yield ast.Call(ast.Attribute(value, NAMES[name]), arguments, keywords)


def _is_text(node: ast.expr) -> bool:
    return isinstance(node, ast.JoinedStr) or (isinstance(node, ast.Constant) and isinstance(node.value, str))


def _statements(node: ast.stmt) -> Iterator[str]:
    """What a statement becomes."""
    match node:
        case ast.Expr(ast.Constant()):  # a docstring
            return
        case ast.Expr() | ast.Raise() | ast.AugAssign():
            yield "pass"
        case ast.Assign([ast.Subscript() | ast.Attribute()]):
            yield "pass"
        case ast.Return(ast.expr() as value) if not (isinstance(value, ast.Constant) and value.value is None):
            yield "return None"
        case ast.Continue():
            yield "break"
        case ast.Break():
            yield "continue"


def read_equivalent(path: Path = EQUIVALENT) -> dict[str, str]:
    """Names of mutants that compute the same, with the reason. A name and, indented below it, its reason."""
    reasons: dict[str, str] = {}
    name = ""
    for line in path.read_text(encoding="utf-8").splitlines():
        if line.startswith(" "):
            reasons[name] = f"{reasons[name]} {line.strip()}".strip()
        elif line and not line.startswith("#"):
            name = line
            reasons[name] = ""
    if bare := [name for name, reason in reasons.items() if not reason]:
        raise ValueError(f"{path}: {bare[0]!r} has no reason; write it on the next line, indented")
    return reasons


def copy_tree(target: Path) -> None:
    """The files that git tracks or would track, as they are in the checkout."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT, check=True, capture_output=True, text=True,
    ).stdout  # fmt: skip
    for name in filter(None, listed.split("\0")):
        if (ROOT / name).is_file():
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(ROOT / name, target / name)


class Learner:
    """A plugin of pytest that learns from the unchanged code how long each test takes and what it calls.

    learnt: {test: (seconds, names of the functions of `files` that it calls)}.
    """

    def __init__(self, files: tuple[Path, ...]) -> None:
        self.files = set(map(str, files))
        self.learnt: dict[str, tuple[float, list[str]]] = {}

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> Generator[None, object, object]:
        called: set[str] = set()

        def note(frame: FrameType, event: str, _: object) -> None:
            if event == "call" and frame.f_code.co_filename in self.files:
                called.add(frame.f_code.co_name)

        begun = time.monotonic()
        threading.setprofile(note)
        sys.setprofile(note)
        result = yield
        sys.setprofile(None)
        threading.setprofile(None)  # type: ignore[arg-type]
        self.learnt[item.nodeid] = (time.monotonic() - begun, sorted(called))
        return result


class Sorter:
    """A plugin of pytest: within each file the tests that call a function come first, quick ones first."""

    def __init__(self, learnt: dict[str, tuple[float, list[str]]], function: str) -> None:
        self.learnt, self.function = learnt, function.rpartition(".")[2]

    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        files = list(dict.fromkeys(item.path for item in items))

        def turn(item: pytest.Item) -> tuple[bool, int, float]:
            seconds, called = self.learnt.get(item.nodeid, (0.0, []))
            return self.function not in called, files.index(item.path), seconds

        items.sort(key=turn)


def start_tests(tree: Path, tests: tuple[str, ...], plugin: Learner | Sorter, report: Path | None = None) -> int:
    """Forks a process that runs these tests of a copy; gives its id.

    report: file for what the process imported and what its Learner learnt, as JSON.
    """
    sys.stdout.flush()
    if pid := os.fork():
        return pid
    code = 3
    try:
        os.setpgid(0, 0)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        output = os.open(tree / "output.txt", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(output, 1)
        os.dup2(output, 2)
        os.chdir(tree)
        os.environ |= {"PYTHONPATH": str(tree), "PYTHONDONTWRITEBYTECODE": "1", "TMPDIR": str(tree)}
        tempfile.tempdir = None
        # One failing example is enough: nobody reads a smaller one.
        hypothesis.settings.register_profile("mutants", phases=[hypothesis.Phase.explicit, hypothesis.Phase.generate])
        sys.path[:] = [
            str(tree),
            *(entry for entry in sys.path if Path(entry).resolve() not in (ROOT, EQUIVALENT.parent)),
        ]
        options = ["-x", "-q", "-p", "no:cacheprovider", "--hypothesis-profile=mutants", "--hypothesis-seed=0"]
        options += [f"--rootdir={tree}", f"--basetemp={tree}/tmp"]
        code = int(pytest.main([*options, *(f"tests/{test}" for test in tests)], plugins=[plugin]))
        if report and isinstance(plugin, Learner):
            imported = [name for name, module in sys.modules.items() if not _is_ours(module, tree)]
            report.write_text(json.dumps([imported, plugin.learnt]), encoding="utf-8")
    finally:
        os._exit(code)


def _is_ours(module: object, tree: Path) -> bool:
    return str(tree) in str(getattr(module, "__file__", None) or getattr(module, "__path__", ""))


def kill(pid: int) -> None:
    with contextlib.suppress(psutil.NoSuchProcess):
        for process in psutil.Process(pid).children(recursive=True):
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)


class Runner:
    """Runs mutants of one module, several at a time, each in a copy of the tree of its own."""

    def __init__(self, folder: Path, paths: tuple[str, ...], tests: tuple[str, ...], jobs: int) -> None:
        self.tests = tests
        self.trees = [folder / f"tree-{number}" for number in range(jobs)]
        for tree in self.trees:
            copy_tree(tree)
        self.learnt, self.timeout = self._prepare(paths, folder / "learnt.json")

    def _prepare(self, paths: tuple[str, ...], report: Path) -> tuple[dict[str, tuple[float, list[str]]], float]:
        """Runs the unchanged code; imports what its tests do. Gives what is learnt, and a mutant's limit in seconds."""
        learner = Learner(tuple(self.trees[0] / path for path in paths))
        self._run_unchanged(learner, report)
        imported, learnt = json.loads(report.read_text(encoding="utf-8"))
        for name in imported:
            with contextlib.suppress(Exception):
                importlib.import_module(name)
        begun = time.monotonic()
        self._run_unchanged(Sorter(learnt, ""))  # as mutants run: tests that fail there notice nothing
        return learnt, 10 + 3 * (time.monotonic() - begun)

    def _run_unchanged(self, plugin: Learner | Sorter, report: Path | None = None) -> None:
        _, status = os.waitpid(start_tests(self.trees[0], self.tests, plugin, report), 0)
        if status:
            raise RuntimeError(f"the tests fail without a change:\n{self.said(self.trees[0])}")

    @staticmethod
    def said(tree: Path) -> str:
        return (tree / "output.txt").read_text(encoding="utf-8", errors="replace")[-3000:]

    def run(self, mutants: list[Mutant]) -> Iterator[tuple[Mutant, str | None]]:
        """(mutant, the test that failed, TIMEOUT, or None if no test did), as they end."""
        waiting, free = list(reversed(mutants)), list(self.trees)
        running: dict[int, tuple[Mutant, Path, float]] = {}
        try:
            while waiting or running:
                while waiting and free:
                    mutant, tree = waiting.pop(), free.pop()
                    (tree / mutant.path).write_bytes(mutant.applied((ROOT / mutant.path).read_bytes()))
                    pid = start_tests(tree, self.tests, Sorter(self.learnt, mutant.function))
                    running[pid] = (mutant, tree, time.monotonic() + self.timeout)
                for pid, (mutant, tree, deadline) in list(running.items()):
                    ended, status = os.waitpid(pid, os.WNOHANG)
                    late = not ended and time.monotonic() > deadline
                    if late:
                        kill(pid)
                        os.waitpid(pid, 0)
                    if ended or late:
                        del running[pid]
                        failed = re.search(r"^(?:FAILED|ERROR) (\S+)", self.said(tree), re.MULTILINE)
                        (tree / mutant.path).write_bytes((ROOT / mutant.path).read_bytes())
                        shutil.rmtree(tree / "tmp", ignore_errors=True)
                        free.append(tree)
                        noticed_by = failed[1] if failed else "an error before the tests"
                        yield mutant, TIMEOUT if late else noticed_by if status else None
                time.sleep(0.02)
        finally:
            for pid in running:
                kill(pid)


def try_module(name: str, arguments: argparse.Namespace, equivalent: dict[str, str]) -> dict[str, object]:
    """Prints the survivors of a module; gives its figures."""
    paths, tests = MODULES[name]
    every = [mutant for path in paths for mutant in mutants_of(path, (ROOT / path).read_text(encoding="utf-8"))]
    names = {mutant.name for mutant in every}
    for gone in [key for key in equivalent if key.split(" ")[0] in paths and key not in names]:
        print(f"{EQUIVALENT.name}: no such mutant any more: {gone}")
    changing = [mutant for mutant in every if mutant.name not in equivalent]
    if arguments.again:
        results = json.loads(arguments.again.read_text(encoding="utf-8"))
        survived = {mutant["name"] for result in results for mutant in result["survivors"]}
        changing = [mutant for mutant in changing if mutant.name in survived]
    size = len(changing) if arguments.all or arguments.again else min(arguments.sample, len(changing))
    chosen = random.Random(arguments.seed).sample(changing, size)
    chosen.sort(key=lambda mutant: (mutant.path, mutant.start))
    survivors: list[Mutant] = []
    noticed: dict[str, str] = {}
    with tempfile.TemporaryDirectory(prefix="mutants-") as folder:
        for mutant, test in Runner(Path(folder), paths, tests, arguments.jobs).run(chosen):
            if test is None:
                survivors.append(mutant)
            else:
                noticed[mutant.name] = test
            if test in (None, TIMEOUT):
                change = f"{mutant.path}:{mutant.line}: {mutant.name.partition(' ')[2]}"
                print(change + (f" ({TIMEOUT})" if test else ""), flush=True)
    late = list(noticed.values()).count(TIMEOUT)
    score = 100 * (1 - len(survivors) / max(1, len(chosen)))
    excused = sum(mutant.name in equivalent for mutant in every)
    print(
        f"{name}: {len(chosen) - len(survivors)} of {len(chosen)} noticed, {score:.1f} % "
        f"({late} by running too long; {len(every)} mutants in all, {excused} of them equivalent)",
        flush=True,
    )
    return {
        "module": name, "mutants": len(every), "equivalent": excused, "tried": len(chosen), "score": score,
        "survivors": [asdict(mutant) for mutant in survivors], "noticed_by": noticed,
    }  # fmt: skip


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("modules", nargs="*", metavar="MODULE", help=f"default: all of {', '.join(MODULES)}")
    parser.add_argument("--sample", type=int, default=60, help="mutants of each module (default: %(default)s)")
    parser.add_argument("--all", action="store_true", help="try every mutant")
    parser.add_argument("--again", type=Path, metavar="FILE", help="only those that survived, of a file of --json")
    parser.add_argument("--seed", type=int, default=0, help="of the sample (default: %(default)s)")
    parser.add_argument("--jobs", type=int, default=len(os.sched_getaffinity(0)), help="at a time (default: cores)")
    parser.add_argument("--least", type=float, default=97.0, help="per cent to be noticed (default: %(default)s)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write figures, survivors and who noticed here")
    arguments = parser.parse_args()
    if unknown := set(arguments.modules) - set(MODULES):
        parser.error(f"no such module: {', '.join(sorted(unknown))}; known: {', '.join(MODULES)}")
    return arguments


def main() -> int:
    arguments = parse_arguments()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # runs of mutants end with this one
    equivalent = read_equivalent()
    results = []
    for name in arguments.modules or MODULES:
        results.append(try_module(name, arguments, equivalent))
        if arguments.json:
            arguments.json.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    return int(any(float(str(result["score"])) < arguments.least for result in results))


if __name__ == "__main__":
    sys.exit(main())
