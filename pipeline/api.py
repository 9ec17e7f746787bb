"""The recipes as functions."""

from __future__ import annotations

import json
import logging
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from pipeline.config import Config, build, merge
from pipeline.datasets import Dataset, find_dataset
from pipeline.digest import dumps
from pipeline.errors import UsageError
from pipeline.orchestration.executor import executors
from pipeline.orchestration.run import WORK, open_run
from pipeline.recipes import recipes
from pipeline.storage.store import Store, open_store

log = logging.getLogger(__name__)
COMMAND = "command.json"


def configure(
    recipe: str, dataset: str, data: str | Path | None, values: Mapping[str, Any]
) -> Config:
    """The full configuration of a recipe on a data set: its defaults under ``values``."""
    return _configure(recipe, find_dataset(dataset, data), values)


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
    max_bad: float | int = 0.01,
    retry: Collection[str] | None = None,
) -> dict[str, Any]:
    """Run a recipe to its end, from wherever an earlier run stopped.

    Args:
        recipe: name of a recipe, such as ``distill``.
        dataset: name of a data set, or a path.
        data: where named data sets lie.
        out: output folder, or its URL; ``runs/<recipe>-<dataset>`` where not given.
        config: values that differ from the recipe's defaults, nested by section.
        executor: ``local`` (this process) or ``ray``.
        address: Ray cluster to join.
        workers: Ray workers at a time.
        threads: CPU threads of one worker; part of what the output depends on.
        seed: seed of everything random.
        max_bad: unreadable samples above which the run fails: a share (float) or a count (int).
        retry: take up samples in quarantine once more: those with one of these reasons, or all
            where it is empty.

    Returns:
        A summary of plain JSON types, with the paths of what was written.

    Raises:
        UsageError: something asked for does not exist or does not hold.
        RunError: the run started and could not finish.
    """
    found = find_dataset(dataset, data)
    chosen = recipes.get(recipe)
    values = _configure(recipe, found, config or {})
    too_many = isinstance(max_bad, float) and max_bad > 1
    if threads < 1 or (workers is not None and workers < 1) or max_bad < 0 or too_many:
        raise UsageError(
            "Threads and workers are at least 1, and the share of bad samples is from 0 to 1.",
            hint="Check --threads, --workers and --max-bad.",
            code="bad-option",
        )
    # Absolute, since the workers of a cluster have working directories of their own.
    store = open_store(out or Path("runs") / f"{recipe}-{found.name}")
    command = {
        "recipe": recipe,
        "dataset": dataset if found.info else _absolute(dataset),
        "data": None if data is None else _absolute(str(data)),
        "config": config or {},
        "executor": executor,
        "address": address,
        "workers": workers,
        "threads": threads,
        "seed": seed,
        "max_bad": max_bad,
    }
    where = executors.get(executor)(address=address, workers=workers)
    options = {"seed": seed, "threads": threads, "max_bad": max_bad}
    again = None if retry is None else frozenset(retry)
    with open_run(store, where, retry=again, **options) as opened:
        opened.out.replace(f"{WORK}/{COMMAND}", dumps(command))
        summary = chosen.run(opened, found, values)
        if not opened.executed:
            log.info("nothing to do: everything in %s is finished", store)
    return {**summary, "out": str(store)}


def resume(out: str | Path, *, retry: Collection[str] | None = None) -> dict[str, Any]:
    """Run once more what was run in the folder ``out``, with the same arguments.

    Args:
        out: output folder of a run, finished or not.
        retry: as for :func:`run`.

    Raises:
        UsageError: nothing was run there.
    """
    store = open_store(out)
    command = recorded(store)
    return run(command.pop("recipe"), command.pop("dataset"), out=store.url, retry=retry, **command)


def recorded(store: Store) -> dict[str, Any]:
    """The arguments of :func:`run` that the output in ``store`` was made with.

    Raises:
        UsageError: nothing was run there.
    """
    try:
        found: dict[str, Any] = json.loads(store.read(f"{WORK}/{COMMAND}"))
        return found
    except (OSError, ValueError) as error:
        raise UsageError(
            "This folder does not say how it was made.",
            hint="Give the folder that was given with --out, with its folder .run; or start the "
            "same command again.",
            code="no-command",
            where=str(store),
        ) from error


def _configure(recipe: str, dataset: Dataset, values: Mapping[str, Any]) -> Config:
    chosen = recipes.get(recipe)
    return build(chosen.config, merge(chosen.defaults(dataset), values))


def _absolute(place: str) -> str:
    """A place as a later process finds it, wherever it is started."""
    return str(Path(place).absolute()) if Path(place).exists() else place
