"""The arrows between the rooms point one way, and nothing untrusted is executed."""

import ast
import importlib
import inspect
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FORBIDDEN = re.compile(
    r"(torch\.jit|joblib|dill|marshal|shelve|cloudpickle)\.\w+|yaml\.(unsafe_|full_)?load(_all)?|pickle\.(loads?|Unpickler)"
    r"|os\.(system|popen)|eval|exec|compile|__import__|.*\.(extractall|extract)"
)
SOURCES = sorted(path for folder in ("shards", "text4vis", "tools") for path in (ROOT / folder).rglob("*.py"))

# The rooms from the ground up: each may import those before it in this table, and what it must not import besides.
ROOMS: dict[str, set[str]] = {
    "shards": {"torch", "torchvision", "nvidia", "deepspeed", "open_clip"},
    "text4vis.config": {"torch", "nvidia", "deepspeed"},
    "text4vis.cluster": {"nvidia"},
    "text4vis.common": {"torch", "nvidia", "deepspeed"},
    "text4vis.data": {"deepspeed", "open_clip"},
    "text4vis.model": {"nvidia", "deepspeed", "text4vis.data"},
    "text4vis.classifier": {"nvidia", "deepspeed"},
    "text4vis.saved": {"nvidia", "deepspeed"},
    "text4vis.evaluation": {"nvidia", "deepspeed"},
    "text4vis.report": {"nvidia", "deepspeed"},
    "text4vis.training": {"nvidia"},
    "text4vis.serving": {"nvidia", "deepspeed", "text4vis.training"},
    "text4vis.doctor": {"nvidia", "deepspeed"},
    "text4vis": {"nvidia", "deepspeed"},
    "tools": {"nvidia", "deepspeed"},
}
# Measuring and drawing may use what they measure, and each other's modules.
WORKSHOPS = ("tools.benchmarks", "tools.drawings")
DALI = {"text4vis.data.dali"}
DEEPSPEED = {"text4vis.training.engine", "text4vis.cluster.distributed"}


def module_of(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def room_of(module: str) -> str | None:
    """The room that a module of ours belongs to; None for one of somebody else."""
    return max((room for room in ROOMS if module == room or module.startswith(f"{room}.")), key=len, default=None)


def imports(path: Path) -> set[str]:
    """Absolute names of all modules that a file imports, anywhere in it, for type checkers alone too."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def uses(path: Path, package: str) -> bool:
    return any(name == package or name.startswith(f"{package}.") for name in imports(path))


@pytest.mark.parametrize("path", SOURCES, ids=module_of)
def test_a_room_imports_those_above_it_alone(path):
    module = module_of(path)
    room = room_of(module)
    assert room, f"{module}: name its room in the table"
    if module.startswith(WORKSHOPS):
        return
    order = list(ROOMS)
    below = order[order.index(room) + 1 :]
    # A room's name stands for its modules; the package text4vis itself, which holds the programs, for no other room's.
    wrong = [name for name in imports(path) if room_of(name) in below and name != "text4vis"]
    known = DALI | DEEPSPEED
    wrong += [package for package in ROOMS[room] if uses(path, package) and module not in known]
    assert wrong == []


def test_every_room_is_in_the_table():
    folders = {module_of(path) for path in SOURCES if path.name == "__init__.py"}
    assert folders == {*ROOMS} - {"tools"} | {*WORKSHOPS}


def test_tools_do_not_import_each_other():
    programs = {path.stem for path in SOURCES if path.parent.name == "tools"}
    for path in SOURCES:
        if path.parent.name == "tools":
            assert imports(path) & programs == set()


def test_nothing_of_the_product_imports_the_workshops():
    workshops = {name.removeprefix("tools.") for name in WORKSHOPS} | {"tools"}
    product = [path for path in SOURCES if path.relative_to(ROOT).parts[0] != "tools"]
    assert [(path, name) for path in product for name in workshops if uses(path, name)] == []


def test_one_module_knows_dali_and_two_know_the_engine():
    product = [path for path in SOURCES if not module_of(path).startswith(WORKSHOPS)]
    assert {module_of(path) for path in product if uses(path, "nvidia")} == DALI
    assert {module_of(path) for path in product if uses(path, "deepspeed")} == DEEPSPEED


def test_no_module_imports_itself_in_a_circle():
    """At the top of files, where a circle breaks; what a function imports late is looked at by the rooms alone."""
    known = {module_of(path) for path in SOURCES}
    graph = {module_of(path): top_level_imports(path) & known for path in SOURCES}
    done: set[str] = set()

    def visit(module: str, above: tuple[str, ...]) -> None:
        assert module not in above, " -> ".join([*above, module])
        if module not in done:
            for name in graph[module]:
                visit(name, (*above, module))
            done.add(module)

    for module in graph:
        visit(module, ())


def top_level_imports(path: Path) -> set[str]:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    names = set()
    for node in tree.body:
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return names


# What `import text4vis` and the use of a room must not load, for it takes seconds or is not there.
LEAN = {
    "import text4vis, shards": {"torch", "numpy", "av", "nvidia.dali", "deepspeed", "open_clip", "matplotlib"},
    "import text4vis; text4vis.config.load_config": {"torch", "nvidia.dali", "deepspeed", "open_clip"},
    "import text4vis; text4vis.data.train_indices": {"torch", "nvidia.dali", "deepspeed", "open_clip"},
    "import text4vis; text4vis.saved.load_text4vis": {"nvidia.dali", "deepspeed"},
    "import text4vis; text4vis.serving.Predictor": {"nvidia.dali", "deepspeed", "matplotlib", "sklearn"},
    "import text4vis; text4vis.evaluation.mean_average_precision": {"nvidia.dali", "deepspeed"},
}


@pytest.mark.slow
@pytest.mark.parametrize("code", LEAN)
def test_a_face_loads_only_what_it_needs(code):
    command = f"{code}\nimport sys\nprint(*sorted(set(sys.modules) & {LEAN[code]!r}))"
    ended = subprocess.run([sys.executable, "-c", command], capture_output=True, text=True, check=True)
    assert ended.stdout.split() == []


def faces() -> list[str]:
    return [module_of(path) for path in SOURCES if path.with_suffix(".pyi").exists() and path.name == "__init__.py"]


def is_ours(value: object) -> bool:
    """Whether it is a function of this project: libraries add methods to the classes that they know."""
    return inspect.isfunction(value) and value.__module__.startswith(("shards.", "text4vis."))


@pytest.mark.parametrize("room", faces())
def test_every_name_of_a_face_is_documented(room):
    face = importlib.import_module(room)
    assert face.__doc__ and face.__all__
    for name in face.__all__:
        what = getattr(face, name)
        assert inspect.getdoc(what), f"{room}.{name} has no docstring"
        members = inspect.getmembers(what) if inspect.isclass(what) else []
        undocumented = [
            member for member, value in members if not member.startswith("_") and is_ours(value) and not value.__doc__
        ]
        assert not undocumented, f"{room}.{name}: {undocumented} have no docstring"


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_nothing_untrusted_is_executed(path):
    """`make lint` has ruff's rules on security too; here nothing is excused by a comment."""
    # OpenAI's archives are TorchScript; one is opened when its SHA-256 is that of a published file.
    known = ["torch.jit.load(path, map_location='cpu')"] if path.name == "tensors.py" else []
    assert forbidden_calls(path.read_text(encoding="utf-8")) == known


@pytest.mark.parametrize("line", [
    "torch.load(p)", "torch.load(p, weights_only=False)", "yaml.load(t, Loader=yaml.Loader)", "yaml.unsafe_load(t)",
    "pickle.loads(b)", "pickle.Unpickler(f)", "np.load(p)", "np.load(p, allow_pickle=True)", "os.system('x')",
    "subprocess.run(c, shell=True)", "eval('1')", "exec('1')", "archive.extractall('.')", "joblib.load(p)",
    "torch.jit.load(p)", "os.popen('x')", "__import__('x')",
])  # fmt: skip
def test_what_is_forbidden_is_found(line):
    assert len(forbidden_calls(f"def f():\n    return [{line}]")) == 1
    assert forbidden_calls("torch.load(p, weights_only=True); np.load(p, allow_pickle=False); model.eval()") == []


def forbidden_calls(source: str) -> list[str]:
    """Calls that run what a file or a text says, or write where an archive says."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Call):
            call, name = ast.unparse(node), ast.unparse(node.func)
            needed = {"torch.load": "weights_only=True", "np.load": "allow_pickle=False"}.get(name)
            if (needed and needed not in call) or "shell=True" in call or FORBIDDEN.fullmatch(name):
                found.append(call)
    return found
