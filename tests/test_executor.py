"""Units one after the other: what is tried again, and what is done at the same time."""

from __future__ import annotations

import errno
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest
from samples import attempt

from pipeline.errors import RunError, UsageError
from pipeline.orchestration import executor as units_module
from pipeline.orchestration.executor import Record, Resources, attempts
from pipeline.orchestration.local_executor import LocalExecutor
from pipeline.storage.object_store import ObjectStore


@dataclass(frozen=True)
class Job:
    index: int
    name: str


@pytest.fixture(autouse=True)
def hurry(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(units_module, "PAUSES", (0.0, 0.0))


def test_the_rest_of_a_unit_is_done_while_the_next_is_begun() -> None:
    begun = [threading.Event() for _ in range(4)]
    events: list[str] = []

    def work(unit: Job) -> Any:
        begun[unit.index].set()
        events.append(f"begin {unit.name}")
        if unit.index == 2:
            raise ValueError("no")

        def rest() -> Record:
            # The last one has none beside it.
            assert unit.index == 3 or begun[unit.index + 1].wait(60)
            events.append(f"rest {unit.name}")
            return {"name": unit.name}

        return rest

    def units() -> Iterator[Job]:
        yield from (Job(index, f"u{index}") for index in range(4))

    records = attempts(work, units())
    assert next(records) == {"name": "u0"}
    assert events[:2] == ["begin u0", "begin u1"]
    rest = list(records)
    assert [record["name"] for record in rest] == ["u1", "u2", "u3"]
    assert ["error" in record for record in rest] == [False, True, False]


def test_what_was_computed_is_finished_though_no_other_is_wanted() -> None:
    finished = []

    def work(unit: Job) -> Any:
        return lambda: finished.append(unit.index) or {"name": unit.name}

    records = attempts(work, [Job(index, f"u{index}") for index in range(4)])
    next(records)
    records.close()  # type: ignore[attr-defined]
    assert finished == [0, 1]


class ServiceError(Exception):
    status = 503


@pytest.mark.parametrize(
    ("error", "tries"),
    [
        (OSError(errno.EIO, "Input/output error"), 3),
        (OSError(errno.EBUSY, "Please reduce your request rate."), 3),
        (TimeoutError("timed out"), 3),
        (ConnectionResetError(errno.ECONNRESET, "Connection reset by peer"), 3),
        (ServiceError("unavailable"), 3),
        (OSError(errno.ENOSPC, "No space left on device"), 1),
        (OSError(errno.EDQUOT, "Disk quota exceeded"), 1),
        (PermissionError(errno.EACCES, "Permission denied"), 1),
        (FileNotFoundError(errno.ENOENT, "No such file or directory"), 1),
        (FileExistsError(errno.EEXIST, "File exists"), 1),
        (OSError(errno.EROFS, "Read-only file system"), 1),
        (OSError(errno.EINVAL, "Bad digest"), 1),
        (ValueError("an application error"), 1),
        (RunError("x", hint="y", code="ragged-shards"), 1),
    ],
)
@pytest.mark.parametrize("told", [False, True])
@pytest.mark.parametrize("late", [False, True])
def test_only_what_may_pass_is_tried_again(
    error: Exception, tries: int, told: bool, late: bool
) -> None:
    begun, calls = [], []

    def work(unit: Job) -> Any:
        begun.append(unit)
        return fail if late else fail()

    def fail() -> Record:
        calls.append(1)
        if told:
            raise RunError("The storage failed.", hint="x", code="storage-error") from error
        raise error

    record = attempt(work, Job(0, "u"))
    assert "error" in record
    assert len(calls) == tries
    assert len(begun) == (1 if late else tries)  # what was computed is not computed again


def test_a_store_that_recovers_is_no_error(
    s3: ObjectStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []
    real = type(s3._fs).cat_file

    def cat(self: Any, *arguments: Any, **options: Any) -> Any:
        calls.append(arguments)
        if len(calls) < 3:
            raise OSError(errno.EBUSY, "Please reduce your request rate.")
        return real(self, *arguments, **options)

    s3.replace("name", b"data")
    monkeypatch.setattr(type(s3._fs), "cat_file", cat)
    record = attempt(lambda unit: {"name": unit.name, "data": s3.read("name")}, Job(0, "u"))
    assert record["data"] == b"data"


def test_the_local_executor_trains_with_one_worker() -> None:
    with pytest.raises(UsageError, match="runs on Ray"):
        LocalExecutor().train(None, None, 2, Resources())
