"""The units of one step: those that are missing are done, and every one is accounted for."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from pipeline.errors import RunError
from pipeline.orchestration.executor import KILLS, Record, Unit
from pipeline.orchestration.ledger import PART
from pipeline.orchestration.memory import StepFolders
from pipeline.orchestration.progress import Progress

log = logging.getLogger(__name__)
TOLD = 20
"""Failed shards that are named; all are in the log."""
Do = Callable[[Iterator[Unit]], Iterator[Record]]
"""Does units and yields a record for each, in any order."""


def execute(
    name: str,
    folders: StepFolders,
    units: Iterable[Unit],
    total: int,
    do: Do,
    progress: Progress,
) -> pa.Table:
    """Do the units that the ledger does not hold.

    A unit that fails does not stop the others. One that killed its workers is put into quarantine
    and left alone until it is taken up again.

    Args:
        name: of the step.
        folders: of the step.
        units: all of them, in order.
        total: how many there are.
        do: does the missing ones.
        progress: is told of each.

    Returns:
        The records of all, in order.

    Raises:
        RunError: units failed; it lists them.
    """
    ledger = folders.ledger
    failed, done = ledger.failed(), finished(folders, total)
    count = int(done.sum())
    if count:
        log.info("%s: %d of %d shards found finished", name, count, total)
    progress.begin(name, total, count)
    errors = _Errors(name, total)

    def fail(error: Mapping[str, str]) -> None:
        progress.failed(name, error)
        errors.add(error)

    for error in failed.values():
        fail(error)
    missing = (unit for unit in units if not done[unit.index] and unit.name not in failed)
    pending: list[Record] = []
    try:
        for record in do(missing) if count + len(failed) < total else ():
            if "error" in record:
                if record["error"]["code"] == KILLS:
                    ledger.fail(record)
                fail(record["error"])
                continue
            pending.append(record)
            if len(pending) == PART:
                ledger.compact(pending)
                pending = []
            progress.done(name, record)
    finally:
        progress.end(name)
    errors.check()
    records = ledger.collect()
    if records.num_rows < total:
        raise RunError(
            f"{total - records.num_rows} of {total} shards of the step '{name}' were lost after "
            "they were finished.",
            hint="Something else deletes files in the output folder. Start the same command "
            "again: it makes them anew.",
            code="lost-shards",
            where=str(folders.artifact),
        )
    return records


def finished(folders: StepFolders, total: int) -> npt.NDArray[np.bool_]:
    """Which of a step's shards are finished."""
    done = np.zeros(total, np.bool_)
    for table in folders.ledger.finished(("index", "files")):
        done[table["index"].to_numpy()] = True
    return done


@dataclass
class _Errors:
    """What failed of a step; the first ones are kept to be told of."""

    step: str
    total: int
    count: int = 0
    kept: list[Mapping[str, str]] = field(default_factory=list)

    def add(self, error: Mapping[str, str]) -> None:
        self.count += 1
        if len(self.kept) < TOLD:
            self.kept.append(error)

    def check(self) -> None:
        """Raise what failed."""
        if not self.kept:
            return
        first = self.kept[0]
        message, where = first["message"], first["where"]
        if self.total > 1:
            where = ", ".join(e["where"] for e in self.kept) + (", ..." * (self.count > TOLD))
            count = f"{self.count} of {self.total} shards of the step '{self.step}'"
            message = f"{count} failed; the first: {message}"
        raise RunError(message, hint=first["hint"], code=first["code"], where=where)
