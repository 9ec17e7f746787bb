"""Where units of work run. An executor knows nothing of steps, shards or models."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

from pipeline.errors import PipelineError
from pipeline.registry import Registry
from pipeline.storage.store import storage_error

Work = Callable[[str], dict[str, Any]]
"""Does one unit, given its name, and returns a record of plain JSON types. Picklable."""


class Executor(Protocol):
    """Runs units of work and yields what each returned, in any order."""

    def run(self, work: Work, units: Sequence[str], threads: int) -> Iterator[dict[str, Any]]:
        """Do every unit; ``threads`` is how many CPU threads one unit uses."""

    def close(self) -> None:
        """Let go of processes and connections."""


executors: Registry[Callable[..., Executor]] = Registry(
    "executor",
    {
        "local": "pipeline.orchestration.local_executor:LocalExecutor",
        "ray": "pipeline.orchestration.ray_executor:RayExecutor",
    },
)


def attempt(work: Work, unit: str) -> dict[str, Any]:
    """Do one unit; an error becomes a record, so that the other units go on."""
    try:
        return work(unit)
    except PipelineError as error:
        return _told(error, unit)
    except OSError as error:
        told = _told(storage_error(error), unit)
        return {"error": {**told["error"], "traceback": _traceback(error)}}
    except Exception as error:  # noqa: BLE001 - any error of a plug-in is reported with its shard
        return {
            "error": {
                "message": f"{type(error).__name__}: {error}.",
                "hint": "The file .run/log.txt in the output folder holds the traceback.",
                "code": "stage-failed",
                "where": unit,
                "traceback": _traceback(error),
            }
        }


def _told(error: PipelineError, unit: str) -> dict[str, Any]:
    fields = {"message": error.message, "hint": error.hint, "code": error.code}
    return {"error": {**fields, "where": error.where or unit}}


def _traceback(error: BaseException) -> str:
    import traceback

    return "".join(traceback.format_exception(error))
