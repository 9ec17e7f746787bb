"""Units on Ray Data: one unit is one block and one task."""

from __future__ import annotations

import gc
import json
import logging
import pickle
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import ray
import ray.data
from ray import cloudpickle

from pipeline.orchestration.executor import Record, Unit, attempt, failed


@dataclass(frozen=True)
class How:
    """What Ray sets aside for a unit.

    Attributes:
        cpus: CPUs, or the share of one.
        gpus: GPUs, or the share of one; 0 for a task, else an actor.
        memory: bytes; 0 leaves it unsaid.
        workers: units at a time; as many as there is room for where not given.
        room: units for which there is room.
    """

    cpus: float
    gpus: float
    memory: int
    workers: int | None
    room: int

    def options(self, work: bytes, units: int) -> dict[str, Any]:
        """The arguments of ``map_batches``."""
        needs = {
            "num_cpus": self.cpus,
            "num_gpus": self.gpus or None,
            "memory": self.memory or None,
        }
        if not self.gpus:
            # Tasks, not actors: Ray keeps a task's process for the next step, with all that it has
            # imported and loaded, while a pool of actors is started anew for each.
            tasks = ray.data.TaskPoolStrategy(size=min(self.workers or units, units))
            return {**needs, "fn": _do, "fn_args": (work,), "compute": tasks, "max_retries": 0}
        # One unit in flight: what waits for an actor would die with it. A pool of fixed size, since
        # Ray lets one grow only where units are waiting.
        size = max(1, min(self.workers or self.room, units))
        actors = ray.data.ActorPoolStrategy(size=size, max_tasks_in_flight_per_actor=1)
        again = {"max_restarts": -1, "max_task_retries": 0}
        return {**needs, "fn": _Actor, "fn_constructor_args": (work,), "compute": actors, **again}


def one_pass(work: bytes, units: Sequence[Unit], how: How, causes: list[str]) -> Iterator[Record]:
    """Try every unit once; the records of those whose worker lived, as they are done.

    Args:
        work: pickled.
        units: the blocks.
        how: what each needs.
        causes: is filled with what Ray says of the others.

    Raises:
        RayError: the pass could not be carried to its end.
    """
    rows = [{"name": unit.name, "unit": cloudpickle.dumps(unit)} for unit in units]
    with warnings.catch_warnings():
        # 'max_retries' has no other way in; Ray announces that it will get one.
        warnings.simplefilter("ignore", DeprecationWarning)
        blocks = ray.data.from_items(rows, override_num_blocks=len(rows)).map_batches(
            **how.options(work, len(rows)), batch_size=1, batch_format="pyarrow"
        )
    with _listening(causes):
        try:
            for bundle in blocks.iter_internal_ref_bundles():
                for ref in bundle.block_refs:
                    try:
                        table = ray.get(ref)
                    except ray.exceptions.RayError as error:
                        # The node died when the record was on its way: its shard is done again.
                        causes.append(f"{type(error).__name__}: {error}")
                        continue
                    for record in table["record"].to_pylist():
                        yield json.loads(record)
        finally:
            # The errors of workers that died hold on to actors, and those to their GPUs.
            gc.collect()


def _do(units: pa.Table, work: bytes) -> pa.Table:
    records = [json.dumps(_attempt(work, unit)) for unit in units.to_pylist()]
    return pa.table({"record": records})


def _attempt(work: bytes, row: dict[str, Any]) -> Record:
    # Unpickled here and not by Ray, for which a plug-in that is missing is the death of a task.
    try:
        unit = pickle.loads(row["unit"])  # noqa: S301 - what the driver sent
        return attempt(pickle.loads(work), unit)  # noqa: S301
    except Exception as error:  # noqa: BLE001
        return failed(error, row["name"])


class _Actor:
    """A worker that keeps its GPU for the whole step."""

    def __init__(self, work: bytes) -> None:
        self._work = work

    def __call__(self, units: pa.Table) -> pa.Table:
        return _do(units, self._work)


class _Listener(logging.Filter):
    def __init__(self, causes: list[str]) -> None:
        super().__init__()
        self._causes = causes

    def filter(self, record: logging.LogRecord) -> bool:
        error = record.exc_info and record.exc_info[1]
        if error:
            self._causes.append(f"{type(error).__name__}: {error}")
            # Not to be kept by any handler: an error's frames hold on to the actors of the pass.
            record.exc_info = None
        return True


@contextmanager
def _listening(causes: list[str]) -> Iterator[None]:
    """Hear why workers died: Ray Data, told to go on, says it to its log alone."""
    logger = logging.getLogger("ray.data._internal.execution.streaming_executor_state")
    listener = _Listener(causes)
    logger.addFilter(listener)
    try:
        yield
    finally:
        logger.removeFilter(listener)
