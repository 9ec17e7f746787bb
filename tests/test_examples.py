"""Examples run as they stand, and a typed program that uses the public API type-checks."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path
from typing import Any

import pytest
from test_structure import ROOMS

ROOT = Path(__file__).parents[1]
EXAMPLES = ROOT / "examples"
TRAININGS = ["distilled", "features", "seta", "tokens"]

PROGRAM = '''
"""A training loop as its author would write it."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor
from typing_extensions import assert_type

import pipeline
from pipeline import PipelineError, Samples
from pipeline.distilled_samples import DistilledSamples
from pipeline.recipes.distill_config import DistillConfig


def main(out: Path) -> None:
    config = DistillConfig(ipc=5, seeds=1)
    summary = pipeline.run("distill", source="digits", config=config, out=out)
    print(summary["out"], pipeline.plan("distill", "digits", ipc=5)["todo"])
    try:
        data = pipeline.open(out)
    except PipelineError as error:
        print(error.hint)
        return
    assert_type(data, Samples)
    loader = data.subset(data.keys[:8]).to_torch(size=32).loader(4, seed=1, num_workers=2)
    for batch in loader:
        assert_type(batch.image, Tensor)
        assert_type(batch.key, list[str])
        images, labels, _ = batch
        print(images.mean() + labels.float().mean())
    loader.load_state_dict(loader.state_dict())
    if isinstance(data, DistilledSamples):
        image, logits, key = data.to_torch()[0]
        print(image.shape, logits.argmax(), key)
    scores = data.join(out).to_arrow()
    print(scores, pipeline.load_tokenizer(out).form, pipeline.load_teacher(out).training)
'''


@pytest.mark.parametrize("name", TRAININGS)
def test_an_example_learns(name: str, tmp_path: Path) -> None:
    assert len((EXAMPLES / f"{name}.py").read_text().splitlines()) < 60
    done = subprocess.run(
        [sys.executable, EXAMPLES / f"{name}.py", tmp_path],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=True,
    )
    told = done.stdout.rpartition("accuracy")[2]
    percent = next(word for word in told.replace(",", " ").split() if word.endswith("%"))
    assert float(percent.rstrip("%")) > 75


def notebook() -> list[dict[str, Any]]:
    """The cells of code."""
    cells = json.loads((EXAMPLES / "pictures.ipynb").read_text())["cells"]
    return [cell for cell in cells if cell["cell_type"] == "code"]


def test_the_notebook_shows_its_pictures() -> None:
    outputs = [output for cell in notebook() for output in cell["outputs"]]
    assert sum("image/png" in output.get("data", {}) for output in outputs) == 4
    for cell in notebook():
        compile("".join(cell["source"]), "cell", "exec")


@pytest.mark.slow
def test_the_notebook_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    for cell in notebook():
        exec(compile("".join(cell["source"]), "cell", "exec"), names)


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Python of an environment with the package as a wheel, and all else as it is here."""
    folder = tmp_path_factory.mktemp("installed")
    tree, environment = folder / "tree", folder / "environment"
    tree.mkdir()
    for name in (*ROOMS, "pipeline"):
        shutil.copytree(ROOT / name, tree / name, symlinks=True)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tree)
    venv.create(environment, with_pip=False)
    python = environment / "bin" / "python"
    call = [python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"]
    packages = subprocess.run(call, capture_output=True, text=True, check=True).stdout.strip()
    build = ["install", "--quiet", "--no-deps", "--no-build-isolation", "--target", packages, tree]
    subprocess.run([sys.executable, "-m", "pip", *build], check=True)
    (Path(packages) / "others.pth").write_text(sysconfig.get_path("purelib"))
    return python


def test_a_typed_program_type_checks(installed: Path, tmp_path: Path) -> None:
    (tmp_path / "program.py").write_text(PROGRAM)
    call = [sys.executable, "-m", "mypy", "--strict", "--config-file", "", "program.py"]
    call += ["--python-executable", str(installed)]
    done = subprocess.run(call, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.stdout.startswith("Success"), done.stdout
