"""The recipes as functions."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pipeline.config import Config, build, merge
from pipeline.datasets import Dataset, find_dataset
from pipeline.errors import UsageError
from pipeline.orchestration.executor import executors
from pipeline.orchestration.run import open_run
from pipeline.recipes import recipes

log = logging.getLogger(__name__)


def configure(
    recipe: str, dataset: str, data: str | Path | None, values: Mapping[str, Any]
) -> Config:
    """The full configuration of a recipe on a data set: its defaults under ``values``."""
    return _configure(recipe, _find(dataset, data), values)


def run(
    recipe: str,
    dataset: str,
    *,
    data: str | Path | None = None,
    out: str | Path | None = None,
    config: Mapping[str, Any] | None = None,
    executor: str = "local",
    address: str | None = None,
    workers: int | None = None,
    threads: int = 1,
    seed: int = 0,
    max_bad: float = 0.01,
) -> dict[str, Any]:
    """Run a recipe to its end, from wherever an earlier run stopped.

    Args:
        recipe: name of a recipe, such as ``distill``.
        dataset: name of a data set, or a path.
        data: where named data sets lie.
        out: output folder; ``runs/<recipe>-<dataset>`` where not given.
        config: values that differ from the recipe's defaults, nested by section.
        executor: ``local`` (this process) or ``ray``.
        address: Ray cluster to join.
        workers: Ray workers at a time.
        threads: CPU threads of one worker; part of what the output depends on.
        seed: seed of everything random.
        max_bad: share of unreadable samples above which the run fails.

    Returns:
        A summary of plain JSON types, with the paths of what was written.

    Raises:
        UsageError: something asked for does not exist or does not hold.
        RunError: the run started and could not finish.
    """
    found = _find(dataset, data)
    chosen = recipes.get(recipe)
    values = _configure(recipe, found, config or {})
    if threads < 1 or (workers is not None and workers < 1) or not 0 <= max_bad <= 1:
        raise UsageError(
            "Threads and workers are at least 1, and the share of bad samples is from 0 to 1.",
            hint="Check --threads, --workers and --max-bad.",
            code="bad-option",
        )
    # Absolute, since the workers of a cluster have working directories of their own.
    folder = Path(out or Path("runs") / f"{recipe}-{found.name}").absolute()
    where = executors.get(executor)(address=address, workers=workers)
    with open_run(folder, where, seed=seed, threads=threads, max_bad=max_bad) as opened:
        summary = chosen.run(opened, found, values)
        if not opened.executed:
            log.info("nothing to do: everything in %s is finished", folder)
    return {**summary, "out": str(folder), "report": str(folder / "report.html")}


def _find(dataset: str, data: str | Path | None) -> Dataset:
    return find_dataset(dataset, Path(data).absolute() if data else None)


def _configure(recipe: str, dataset: Dataset, values: Mapping[str, Any]) -> Config:
    chosen = recipes.get(recipe)
    return build(chosen.config, merge(chosen.defaults(dataset), values))
