"""A small surface that costs nothing to import."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

import pipeline
import pipeline.testing

ROOT = Path(__file__).parents[1]
HEAVY = ["torch", "ray", "pydantic", "pyarrow", "numpy", "zarr", "sklearn", "PIL", "yaml", "triton"]

REPORT = f"""
import json, sys
print("\\n" + json.dumps([name for name in {HEAVY} if name in sys.modules]))
"""


def loaded_by(code: str) -> list[str]:
    """Heavy packages that a fresh interpreter holds after ``code``."""
    done = subprocess.run(
        [sys.executable, "-c", code + REPORT],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=True,
    )
    found: list[str] = json.loads(done.stdout.splitlines()[-1])
    return found


def test_importing_the_package_imports_nothing_heavy() -> None:
    assert loaded_by("import pipeline") == []


@pytest.mark.parametrize("arguments", [["--help"], ["--version"], ["run", "distill", "--help"]])
def test_help_imports_nothing_heavy(arguments: list[str]) -> None:
    code = f"""
from pipeline.cli import main
try:
    main({arguments})
except SystemExit as stop:
    assert not stop.code
"""
    assert loaded_by(code) == []


def test_recipes_import_neither_ray_nor_what_few_of_their_steps_need() -> None:
    code = "from pipeline.recipes import recipes; [recipes.get(name) for name in recipes]"
    assert not {"ray", "sklearn", "triton"} & set(loaded_by(code))


def test_the_report_sees_what_is_loaded() -> None:
    assert "pyarrow" in loaded_by("import pipeline.stage")


def test_names_of_recipes_are_listed_without_importing_them() -> None:
    code = "from pipeline.registry import Registry; list(Registry('recipe', {'a': 'torch:nn'}))"
    assert "torch" not in loaded_by(code)


def public_names(module: ModuleType) -> set[str]:
    """What a module defines itself, lazily or not, under a name without an underscore."""
    lazy: dict[str, Any] = getattr(module, "_LAZY", {})
    own = {
        name
        for name, value in vars(module).items()
        if not name.startswith("_")
        and not isinstance(value, ModuleType)
        and str(getattr(value, "__module__", "")).startswith("pipeline")
    }
    return own | set(lazy)


def test_all_is_what_is_public() -> None:
    assert set(pipeline.__all__) - {"__version__"} == public_names(pipeline)
    assert set(pipeline.testing.__all__) == public_names(pipeline.testing)
    for module in (pipeline, pipeline.testing):
        assert list(module.__all__) == sorted(module.__all__)


def test_every_public_name_is_there_and_documented() -> None:
    for module in (pipeline, pipeline.testing):
        for name in module.__all__:
            value = getattr(module, name)
            assert isinstance(value, str) or value.__doc__
    assert pipeline.__version__.split(".")[0].isdigit()
    with pytest.raises(AttributeError, match="'nothing'"):
        pipeline.nothing  # type: ignore[attr-defined]  # noqa: B018


def test_the_public_surface_is_frozen() -> None:
    assert pipeline.__all__ == [
        "PipelineError",
        "RunError",
        "Samples",
        "UsageError",
        "__version__",
        "load_codec",
        "load_teacher",
        "load_tokenizer",
        "open",
        "plan",
        "run",
    ]
