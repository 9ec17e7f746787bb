"""Where units of work run. An executor knows nothing of steps, shards or models."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol

from pipeline.errors import PipelineError
from pipeline.registry import Registry
from pipeline.storage.store import storage_error


class Unit(Protocol):
    """One piece of work: picklable, and all that a worker needs to know of it."""

    @property
    def name(self) -> str:
        """What it is called in messages; unique in its step."""


Record = dict[str, Any]
"""What came of a unit, of plain JSON types: ``error`` is in it where it failed."""

Work = Callable[[Any], Record]
"""Does one unit and returns its record. Picklable."""


@dataclass(frozen=True)
class Resources:
    """What one unit of a step needs.

    Attributes:
        threads: CPU threads. Part of the step's identity: the sums of floats depend on them.
        gpus: GPUs, or the share of one: with 0.5 two units work on a GPU at a time.
        memory: bytes of main memory that Ray sets aside; 0 leaves it unsaid.
        workers: units at a time; as many as there is room for where not given.
    """

    threads: int = 1
    gpus: float = 0.0
    memory: int = 0
    workers: int | None = None


class Executor(Protocol):
    """Runs units of work and yields what each returned, in any order."""

    def run(self, work: Work, units: Iterable[Unit], resources: Resources) -> Iterator[Record]:
        """Do every unit, and yield one record for each; its ``name`` is the unit's."""

    def close(self) -> None:
        """Let go of processes and connections."""


executors: Registry[Callable[..., Executor]] = Registry(
    "executor",
    {
        "local": "pipeline.orchestration.local_executor:LocalExecutor",
        "ray": "pipeline.orchestration.ray_executor:RayExecutor",
    },
)


def attempt(work: Work, unit: Unit) -> Record:
    """Do one unit; an error becomes a record, so that the other units go on."""
    try:
        return work(unit)
    except PipelineError as error:
        return _told(error, unit.name)
    except OSError as error:
        told = _told(storage_error(error), unit.name)
        return {**told, "error": {**told["error"], "traceback": _traceback(error)}}
    except Exception as error:  # noqa: BLE001 - any error of a plug-in is reported with its shard
        return {
            "name": unit.name,
            "error": {
                "message": f"{type(error).__name__}: {error}.",
                "hint": "The file .run/log.txt in the output folder holds the traceback.",
                "code": "stage-failed",
                "where": unit.name,
                "traceback": _traceback(error),
            },
        }


def _told(error: PipelineError, unit: str) -> Record:
    fields = {"message": error.message, "hint": error.hint, "code": error.code}
    return {"name": unit, "error": {**fields, "where": error.where or unit}}


def _traceback(error: BaseException) -> str:
    import traceback

    return "".join(traceback.format_exception(error))
