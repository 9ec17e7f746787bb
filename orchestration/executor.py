"""Where units of work run. An executor knows nothing of steps, shards or models."""

from __future__ import annotations

import errno
import random
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from typing import Any, Protocol

from pydantic import Field

from pipeline.config import Config
from pipeline.errors import PipelineError
from pipeline.registry import Registry
from pipeline.storage.store import Store, storage_error

PAUSES = (1.0, 4.0)
"""Seconds before a unit is tried again after an infrastructure error, give or take a half."""

PASSING = {
    errno.EAGAIN,
    errno.EBUSY,  # s3fs: slow down, service unavailable
    errno.EIO,
    errno.EINTR,
    errno.EHOSTUNREACH,
    errno.ENETDOWN,
    errno.ENETRESET,
    errno.ENETUNREACH,
    errno.ESTALE,  # NFS
    getattr(errno, "EREMOTEIO", errno.EIO),  # s3fs: internal error
}
"""Errors of disks and networks that may be gone at the next try."""

CONNECTION = {"ClientConnectionError", "ClientPayloadError", "HTTPClientError", "IncompleteRead"}
"""Base classes of what aiohttp, botocore and http.client raise where a connection broke."""

KILLS = "kills-worker"
"""Code of the error of a unit that killed its worker each time it was tried."""


class Unit(Protocol):
    """One piece of work: picklable, and all that a worker needs to know of it."""

    @property
    def index(self) -> int:
        """Its place in the step, from 0."""

    @property
    def name(self) -> str:
        """What it is called in messages; unique in its step."""


Record = dict[str, Any]
"""What came of a unit, of plain JSON types: ``error`` is in it where it failed, and ``seconds``,
where they are known, are what it took."""

Rest = Callable[[], Record]
"""What is left to do of a unit when its worker could begin the next: it may be called again."""

Work = Callable[[Any], "Record | Rest"]
"""Does one unit and returns its record, or the rest. Picklable."""


class Resources(Config):
    """What one unit of a step needs."""

    threads: int = Field(
        default=1, ge=1, description="CPU threads; the sums of floats depend on them"
    )
    gpus: float = Field(
        default=0.0,
        ge=0,
        description="GPUs, or the share of one; a network is given 1 where nothing else is said",
    )
    memory: int = Field(
        default=0, ge=0, description="bytes of main memory that Ray sets aside; 0: unsaid"
    )
    workers: int | None = Field(
        default=None, ge=1, description="units at a time; else as many as fit"
    )


class Executor(Protocol):
    """Runs units of work and yields what each returned, in any order."""

    def run(self, work: Work, units: Iterable[Unit], resources: Resources) -> Iterator[Record]:
        """Do every unit, and yield one record for each; its ``name`` is the unit's.

        Raises:
            RunError: no worker there will ever have the resources, or none is left.
        """

    def train(self, work: Any, unit: Any, workers: int, resources: Resources) -> Record:
        """Train one model on several workers at once: a ``FitUnit`` of a ``FitWork``.

        Raises:
            UsageError: this executor has one worker.
        """

    def gpus(self) -> float:
        """GPUs that workers have to be given; what this process has is used without that."""

    def check_output(self, out: Store) -> None:
        """Make sure that every worker writes where this process reads.

        Raises:
            RunError: a worker does not see ``out``, or cannot do this work.
        """

    def close(self) -> None:
        """Let go of processes and connections."""


executors: Registry[Callable[..., Executor]] = Registry(
    "executor",
    {
        "local": "pipeline.orchestration.local_executor:LocalExecutor",
        "ray": "pipeline.orchestration.ray_executor:RayExecutor",
    },
)


def attempts(work: Work, units: Iterable[Unit]) -> Iterator[Record]:
    """Do units one after the other; an error becomes a record, so that the other units go on.

    The rest of a unit, which waits for a disk or a network, is done while the next one is begun.
    """
    with ThreadPoolExecutor(1, "rest") as pool:
        resting: Future[Record] | None = None
        for unit in units:
            begun, before = _tried(partial(work, unit), unit.name), resting
            resting = pool.submit(_tried, begun, unit.name) if callable(begun) else None
            if before:
                yield before.result()
            if not resting:
                yield begun
        if resting:
            yield resting.result()


def _tried(call: Callable[[], Any], unit: str) -> Any:
    """What ``call`` gives, or the record of its error.

    What a disk or a network failed to do is tried again, with a pause; nothing else is.
    """
    pauses = iter(PAUSES)
    while True:
        try:
            return call()
        # Any error of a plug-in is reported with its shard.
        except (Exception, SystemExit) as error:  # noqa: BLE001
            pause = next(pauses, None) if is_passing(error) else None
            if pause is None:
                return failed(error, unit)
        # Not all workers at the same time: they may have failed together.
        time.sleep(pause * random.uniform(0.5, 1.5))  # noqa: S311


def is_passing(error: BaseException) -> bool:
    """Whether infrastructure failed in a way that the next try may not meet again."""
    while isinstance(error, PipelineError):
        # A store says in its own words what a disk or a network said.
        if error.code != "storage-error" or error.__cause__ is None:
            return False
        error = error.__cause__
    if isinstance(error, OSError) and error.errno in PASSING:
        return True
    # By number where a web server answered, as aiohttp and gcsfs have it.
    status = getattr(error, "status", None) or getattr(error, "code", None)
    if isinstance(status, int) and (status in {408, 429} or 500 <= status < 600):
        return True
    kinds = {kind.__name__ for kind in type(error).__mro__}
    return isinstance(error, (ConnectionError, TimeoutError)) or not CONNECTION.isdisjoint(kinds)


def failed(error: BaseException, unit: str) -> Record:
    """The record of a unit that ended with an error."""
    if isinstance(error, PipelineError):
        return _told(error, unit)
    if isinstance(error, OSError):
        told = _told(storage_error(error), unit)
        return {**told, "error": {**told["error"], "traceback": _traceback(error)}}
    return {
        "name": unit,
        "error": {
            "message": f"{type(error).__name__}: {error}.",
            "hint": "'pipeline logs' on the output folder shows the traceback.",
            "code": "stage-failed",
            "where": unit,
            "traceback": _traceback(error),
        },
    }


def _told(error: PipelineError, unit: str) -> Record:
    fields = {"message": error.message, "hint": error.hint, "code": error.code}
    return {"name": unit, "error": {**fields, "where": error.where or unit}}


def _traceback(error: BaseException) -> str:
    import traceback

    return "".join(traceback.format_exception(error))
