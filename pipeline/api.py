"""The recipes as functions."""

from __future__ import annotations

import json
import logging
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from pipeline.config import Config, build, merge
from pipeline.datasets import Dataset, find_dataset, with_selection
from pipeline.digest import dumps
from pipeline.errors import UsageError
from pipeline.options import FLAGS
from pipeline.orchestration.executor import Resources, executors
from pipeline.orchestration.memory import WORK
from pipeline.orchestration.plan import Planner
from pipeline.orchestration.progress import Progress
from pipeline.orchestration.run import open_run
from pipeline.orchestration.status import status
from pipeline.recipes import recipes
from pipeline.storage.store import Store, open_store

log = logging.getLogger(__name__)
COMMAND = "command.json"


def configure(
    recipe: str, source: str, data: str | Path | None, values: Mapping[str, Any]
) -> Config:
    """The full configuration of a recipe on a data set: its defaults under ``values``."""
    return _configure(recipe, find_dataset(source, data), values)


@dataclass(frozen=True, kw_only=True)
class Job:
    """A recipe on a data set, and how it is run. What :func:`run` and :func:`plan` take.

    Attributes:
        recipe: name of a recipe, such as ``distill``.
        source: name of a data set, its path or its URL.
        data: where named data sets lie.
        selection: output of a run of ``prune``: only the training samples that it kept are used.
        out: output folder, or its URL; ``runs/<recipe>-<dataset>`` where not given.
        config: what differs from the recipe's defaults: nested by section, or the recipe's own
            configuration, of which what was set counts.
        executor: ``local`` (this process) or ``ray``.
        address: Ray cluster to join.
        workers: Ray workers at a time.
        threads: CPU threads of one worker; part of what the output depends on.
        resources: what one shard of a step needs where that differs, by the step's name:
            ``threads``, ``gpus``, ``memory`` (bytes) and ``workers``, as in
            :class:`~pipeline.orchestration.executor.Resources`.
        checkpoint_minutes: time between two checkpoints of a training, or of a synthesis.
        seed: seed of everything random.
        max_bad: unreadable samples above which the run fails: a share (float) or a count (int).
    """

    recipe: str
    source: str | Path
    data: str | Path | None = None
    selection: str | Path | None = None
    out: str | Path | None = None
    config: Mapping[str, Any] | Config = field(default_factory=dict)
    executor: str = "local"
    address: str | None = None
    workers: int | None = None
    threads: int = 1
    resources: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    checkpoint_minutes: float = 10.0
    seed: int = 0
    max_bad: float | int = 0.01

    def check(self) -> None:
        """Raise UsageError where a number is out of its range."""
        numbers = (self.threads, 1 if self.workers is None else self.workers)
        too_many = isinstance(self.max_bad, float) and self.max_bad > 1
        if min(numbers) < 1 or min(self.max_bad, self.checkpoint_minutes) < 0 or too_many:
            raise UsageError(
                "Threads and workers are at least 1, minutes between checkpoints at least 0, and "
                "the share of bad samples is from 0 to 1.",
                hint="Check --threads, --workers, --checkpoint-minutes and --max-bad.",
                code="bad-option",
            )

    @property
    def options(self) -> dict[str, Any]:
        """What a :class:`~pipeline.orchestration.run.Run` needs to know of it."""
        resources = {
            step: build(Resources, {"threads": self.threads, **values})
            for step, values in self.resources.items()
        }
        return {
            "seed": self.seed,
            "threads": self.threads,
            "max_bad": self.max_bad,
            "resources": resources,
            "checkpoint_seconds": self.checkpoint_minutes * 60,
        }

    def command(self, dataset: Dataset) -> dict[str, Any]:
        """The job as plain JSON types, with places as a later process finds them."""
        values = {item.name: getattr(self, item.name) for item in fields(self)}
        values["source"] = self.source if dataset.info else _absolute(str(self.source))
        values["config"] = self.values
        for place in ("data", "selection"):
            values[place] = None if values[place] is None else _absolute(str(values[place]))
        del values["out"]
        return values

    @property
    def values(self) -> dict[str, Any]:
        """What differs from the recipe's defaults."""
        if isinstance(self.config, Config):
            return self.config.model_dump(mode="json", exclude_unset=True)
        return dict(self.config)

    def store(self, dataset: Dataset) -> Store:
        """Where the output goes."""
        # Absolute, since the workers of a cluster have working directories of their own.
        return open_store(self.out or Path("runs") / f"{self.recipe}-{dataset.name}")


def run(
    recipe: str,
    source: str | Path,
    *,
    retry: Collection[str] | None = None,
    progress: Progress | None = None,
    **options: Any,
) -> dict[str, Any]:
    """Run a recipe to its end, from wherever an earlier run stopped.

    Args:
        recipe: name of a recipe, such as ``distill``.
        source: name of a data set, its path or its URL.
        retry: take up samples in quarantine once more: those with one of these reasons, or all
            where it is empty; shards in quarantine too.
        progress: what is shown of it; log lines where not given.
        options: the other attributes of :class:`Job`, and settings of the recipe by the names that
            its options have on the command line, as in ``ipc=10``, or by those of its sections.

    Returns:
        A summary of plain JSON types, with the paths of what was written and the seconds that
        workers spent on each step, in all starts of the run.

    Raises:
        UsageError: something asked for does not exist or does not hold.
        RunError: the run started and could not finish.
    """
    job = _job(recipe, source, options)
    found, chosen, values = _prepared(job)
    store, command = job.store(found), job.command(found)
    where = executors.get(job.executor)(address=job.address, workers=job.workers)
    with open_run(
        store,
        where,
        command=f"{recipe} {source}",
        about=command,
        progress=progress,
        retry=None if retry is None else frozenset(retry),
        **job.options,
    ) as opened:
        opened.out.replace(f"{WORK}/{COMMAND}", dumps(command))
        summary = chosen.run(opened, found, values)
        if not opened.executed:
            log.info("nothing to do: everything in %s is finished", store)
        seconds = {step.step: step.totals.seconds for step in status(store).steps}
    return {**summary, "seconds": seconds, "out": str(store)}


def plan(
    recipe: str, source: str | Path, *, gpu: str | None = None, **options: Any
) -> dict[str, Any]:
    """What :func:`run` with the same arguments would do. Nothing is started or written.

    Args:
        recipe: name of a recipe, such as ``distill``.
        source: name of a data set, its path or its URL.
        gpu: name of the GPU that hours are told for, such as ``a100``; the device at hand where not
            given.
        options: as for :func:`run`.

    Returns:
        ``estimate``, units, FLOPs, hours and bytes, of recipes that tell them; ``steps``, each a
        :class:`~pipeline.orchestration.plan.StepPlan` as plain JSON types; ``until``, the step
        whose output has to be there to tell what comes after it, if there is one; and ``todo``,
        whether there is anything to do.

    Raises:
        UsageError: something asked for does not exist or does not hold.
    """
    job = _job(recipe, source, options)
    found, chosen, values = _prepared(job)
    planner = Planner(job.store(found), executors.get("local")(), **job.options)
    until = planner.follow(lambda run: chosen.run(run, found, values))
    # What the recipe refuses it has refused by now.
    estimate = chosen.estimate(found, values, gpu) if chosen.estimate else None
    steps = [
        {
            **vars(step),
            "stages": list(step.stages),
            "resources": _told(step.resources),
            "missing": step.missing,
        }
        for step in planner.plans
    ]
    todo = bool(until) or planner.publishes or any(step.missing for step in planner.plans)
    told = {"out": str(planner.out), "steps": steps, "until": until, "todo": todo}
    return told if estimate is None else {**told, "estimate": estimate}


def _told(resources: Resources) -> dict[str, Any]:
    """Resources as plain JSON types; GPUs of which nothing was said are null."""
    said = "gpus" in resources.model_fields_set
    return {**resources.model_dump(), "gpus": resources.gpus if said else None}


def _job(recipe: str, source: str | Path, options: Mapping[str, Any]) -> Job:
    """A job; options that it does not have are settings of the recipe."""
    known = {item.name for item in fields(Job)}
    job = Job(recipe=recipe, source=source, **{n: v for n, v in options.items() if n in known})
    values = job.values
    for name, value in options.items():
        if name not in known:
            nested = value
            for part in reversed(FLAGS.get(name, name).split(".")):
                nested = {part: nested}
            values = merge(values, nested)
    return replace(job, config=values)


def _prepared(job: Job) -> tuple[Dataset, Any, Config]:
    job.check()
    found = find_dataset(str(job.source), job.data)
    if job.selection is not None:
        found = with_selection(found, job.selection)
    return found, recipes.get(job.recipe), _configure(job.recipe, found, job.values)


def resume(
    out: str | Path,
    *,
    retry: Collection[str] | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Run once more what was run in the folder ``out``, with the same arguments.

    Args:
        out: output folder of a run, finished or not.
        retry: as for :func:`run`.
        progress: as for :func:`run`.

    Raises:
        UsageError: nothing was run there.
    """
    store = open_store(out)
    return run(**recorded(store), out=store.url, retry=retry, progress=progress)


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
    return build(chosen.config, merge(chosen.defaults(dataset, values), values))


def _absolute(place: str) -> str:
    """A place as a later process finds it, wherever it is started."""
    return str(Path(place).absolute()) if Path(place).exists() else place
