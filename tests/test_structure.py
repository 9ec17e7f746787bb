"""Where code belongs: the table of rooms and what none of them may do."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ROOMS = {
    "storage": set[str](),
    "clustering": set[str](),
    "stages": {"storage", "clustering", "dataset_distill", "pruning", "tokenizers", "codecs"},
    "dataset_distill": {"clustering", "codecs"},
    "pruning": {"clustering"},
    "tokenizers": {"clustering", "codecs"},
    "codecs": {"clustering"},
    "orchestration": {"storage"},
}
"""What each folder may import beside itself and the base modules."""

MAY_IMPORT = {
    **{room: {room, "base", *others} for room, others in ROOMS.items()},
    "base": {"base"},
    # A conformance suite speaks of the contracts that it checks.
    "testing": {"testing", "base", "storage"},
    "front": {"front", "base", *ROOMS},
}
FRONT = {
    "__init__",
    "api",
    "cli",
    "commands",
    "datasets",
    "diff",
    "distilled_samples",
    "exports",
    "feature_samples",
    "image_tensors",
    "inspect",
    "inspect_text",
    "interchange",
    "loaders",
    "open_output",
    "options",
    "recipes",
    "report",
    "run_text",
    "sample_index",
    "samples",
    "schedules",
    "sheet",
    "token_samples",
}
LAZY = re.compile(r"pipeline(\.\w+)+:\w+")


def place_of(module: str) -> str | None:
    """The room of a module by its dotted name; ``None`` for other packages."""
    parts = module.split(".")
    if parts[0] != "pipeline":
        return None
    name = parts[1] if len(parts) > 1 else "__init__"
    if name in ROOMS or name == "testing":
        return name
    return "front" if name in FRONT else "base"


def imports(tree: ast.AST) -> Iterator[str]:
    """Dotted names of the modules that a file imports, lazy ``module:attribute`` too."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            module = "." * node.level + (node.module or "")
            yield from (
                (f"{module}.{a.name}" for a in node.names) if module == "pipeline" else [module]
            )
        elif isinstance(node, ast.Constant) and LAZY.fullmatch(str(node.value)):
            yield str(node.value).partition(":")[0]


def wrong_imports(place: str, source: str) -> list[str]:
    """What a file in ``place`` imports and may not."""
    wrong = []
    for module in imports(ast.parse(source)):
        target = place_of(module)
        bare = module.startswith(".") or module.split(".")[0] in ROOMS
        if bare or (target and target not in MAY_IMPORT[place]):
            wrong.append(module)
    return wrong


def dotted(node: ast.AST) -> str:
    if isinstance(node, ast.Attribute):
        return f"{dotted(node.value)}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else "?"


FORBIDDEN = re.compile(
    r"(c?[pP]ickle|dill|cloudpickle|joblib|marshal|shelve|pd|pandas)\.(loads?|open|read_pickle)"
    r"|(.*\.)?(Unpickler|extractall|extract|unpack_archive)"
    r"|yaml\.(load|full_load|unsafe_load)(_all)?"
    r"|os\.(system|popen)|eval|exec|__import__"
)


def unsafe_calls(source: str) -> list[str]:
    """Calls that run, or may run, what a file holds."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.Call):
            continue
        name = dotted(node.func)
        options = {k.arg: k.value.value for k in node.keywords if isinstance(k.value, ast.Constant)}
        loads_code = name == "torch.load" and options.get("weights_only") is not True
        told_to = options.get("allow_pickle") is True or options.get("shell") is True
        if loads_code or told_to or FORBIDDEN.fullmatch(name):
            found.append(name)
    return found


def modules() -> list[tuple[str, Path]]:
    """Every module of the package by dotted name; a linked folder's files once."""
    found = []
    for room in ROOMS:
        files = sorted((ROOT / room).rglob("*.py"))
        found += [(f"pipeline.{room}.{file.stem}", file) for file in files]
    for file in sorted((ROOT / "pipeline").rglob("*.py")):
        parts = file.relative_to(ROOT / "pipeline").with_suffix("").parts
        if parts[0] not in ROOMS:
            found.append((".".join(("pipeline", *parts)), file))
    return found


def test_the_modules_are_found() -> None:
    names = {name for name, _ in modules()}
    assert {"pipeline.cli", "pipeline.storage.atomic", "pipeline.recipes.distill"} <= names
    assert {place_of(name) for name in names} >= {"front", "base", "testing", "storage"}


@pytest.mark.parametrize(("name", "file"), modules(), ids=lambda value: str(value).split("/")[-1])
def test_a_module_imports_what_its_room_may(name: str, file: Path) -> None:
    place = place_of(name)
    assert place
    assert wrong_imports(place, file.read_text()) == []


@pytest.mark.parametrize("room", sorted(ROOMS))
def test_rooms_are_linked_and_hold_no_init(room: str) -> None:
    assert (ROOT / "pipeline" / room).readlink() == Path("..", room)
    assert (ROOT / room).is_dir()
    assert not list((ROOT / room).rglob("__init__.py"))


OWN_PICKLES = "orchestration/ray_tasks.py"
"""Unpickles, on a worker of a cluster, what the driver has sent it: no file holds that."""


def test_nothing_that_a_file_holds_is_ever_run() -> None:
    files = [file for _, file in modules()] + sorted((ROOT / "benchmarks").rglob("*.py"))
    found = {
        file.relative_to(ROOT).as_posix(): calls
        for file in files
        if (calls := unsafe_calls(file.read_text()))
    }
    assert found == {OWN_PICKLES: ["pickle.loads"] * 2}


@pytest.mark.parametrize(
    ("place", "source"),
    [
        ("storage", "import pipeline.orchestration.run"),
        ("storage", "from pipeline.stages.decode import Decode"),
        ("clustering", "from pipeline import storage"),
        ("dataset_distill", "def f():\n    from pipeline.storage.artifact import Artifact"),
        ("orchestration", "from pipeline.stages import decode"),
        ("base", "from pipeline.storage.images import ALLOWED"),
        ("base", "from pipeline import cli"),
        ("codecs", "X = 'pipeline.tokenizers.a:B'"),
        ("stages", "from pipeline.testing import check_stage"),
        ("front", "from codecs import open"),
        ("storage", "from . import atomic"),
    ],
)
def test_a_wrong_import_is_seen(place: str, source: str) -> None:
    assert wrong_imports(place, source)


@pytest.mark.parametrize(
    ("place", "source"),
    [
        ("storage", "from pipeline.errors import RunError\nimport pipeline.storage.atomic"),
        ("stages", "from pipeline.dataset_distill.recover import recover"),
        ("front", "from pipeline import backbones\nfrom pipeline.orchestration.run import Run"),
        ("base", "import torch\nX = 'a:b'"),
    ],
)
def test_a_right_import_is_let_pass(place: str, source: str) -> None:
    assert wrong_imports(place, source) == []


@pytest.mark.parametrize(
    "call",
    [
        "pickle.loads(x)",
        "pickle.load(f)",
        "joblib.load(f)",
        "torch.load(f)",
        "torch.load(f, weights_only=False)",
        "yaml.load(f)",
        "yaml.unsafe_load(f)",
        "tar.extractall(d)",
        "np.load(f, allow_pickle=True)",
        "eval(x)",
        "exec(x)",
    ],
)
def test_an_unsafe_call_is_seen(call: str) -> None:
    assert len(unsafe_calls(call)) == 1


@pytest.mark.parametrize(
    "call",
    [
        "model.eval()",
        "torch.load(f, weights_only=True)",
        "yaml.safe_load(f)",
        "np.load(f, allow_pickle=False)",
        "json.loads(x)",
        "tar.extractfile(m)",
    ],
)
def test_a_safe_call_is_let_pass(call: str) -> None:
    assert unsafe_calls(call) == []
