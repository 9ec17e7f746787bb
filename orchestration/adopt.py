"""Shards that an earlier snapshot holds already: they are taken over, not made again."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from typing import Any

import numpy as np
import pyarrow as pa

from pipeline.errors import PipelineError
from pipeline.orchestration.ledger import PART
from pipeline.orchestration.memory import StepFolders
from pipeline.orchestration.steps import ShardUnit
from pipeline.storage.artifact import Artifact
from pipeline.storage.atomic import FileEntry
from pipeline.storage.records import to_records
from pipeline.storage.store import Store

CONNECTIONS = 16


def earlier(out: Store, name: str, work: str) -> list[Artifact]:
    """The finished artifacts of one step in the published output, made in the same way.

    Args:
        out: the output folder.
        name: of the step.
        work: digest of all that the step's output depends on beside its source.
    """
    try:
        steps = Artifact.open(out).manifest.get("steps", ())
        found = [Artifact.open(out.below(step)) for step in steps if step.startswith(f"{name}-")]
    except PipelineError:
        return []  # nothing was published yet, or it is damaged
    return [artifact for artifact in found if artifact.manifest.get("work") == work]


class Known:
    """The shards of earlier artifacts by what their content depends on: tables, and 16 bytes each.

    Args:
        found: the artifacts.
    """

    def __init__(self, found: Iterable[Artifact]) -> None:
        parts = [(artifact.store, artifact.records_table()) for artifact in found]
        self._stores = [store for store, table in parts for _ in table.to_batches()]
        self._batches = [batch for _, table in parts for batch in table.to_batches()]
        self._ends = np.cumsum([len(batch) for batch in self._batches], dtype=np.int64)
        names = (name for batch in self._batches for name in batch["identity"].to_pylist())
        keys = np.fromiter(map(hash, names), np.int64)
        self._order = np.argsort(keys)
        self._keys = keys[self._order]

    def __len__(self) -> int:
        return len(self._keys)

    def __contains__(self, identity: str) -> bool:
        return self._row(identity) is not None

    def __getitem__(self, identity: str) -> tuple[Store, dict[str, Any]]:
        """Where a shard lies, and its record."""
        row = self._row(identity)
        if row is None:
            raise KeyError(identity)
        batch, first = self._place(row)
        records = to_records(pa.Table.from_batches([self._batches[batch].slice(row - first, 1)]))
        return self._stores[batch], next(records)

    def _place(self, row: int) -> tuple[int, int]:
        """The batch that a row lies in, and the first row of that."""
        batch = int(np.searchsorted(self._ends, row, "right"))
        return batch, int(self._ends[batch]) - len(self._batches[batch])

    def _row(self, identity: str) -> int | None:
        key = hash(identity)
        place = int(np.searchsorted(self._keys, key))
        # Two names may have one hash: the names themselves decide.
        while place < len(self._keys) and self._keys[place] == key:
            row = int(self._order[place])
            batch, first = self._place(row)
            if self._batches[batch]["identity"][row - first].as_py() == identity:
                return row
            place += 1
        return None


def adopt(folders: StepFolders, units: Iterable[ShardUnit], known: Known) -> int:
    """Give the shards of earlier artifacts that are the same a name in this one.

    Args:
        folders: of the step.
        units: those that are not finished.
        known: shards of earlier artifacts of the step.

    Returns:
        How many shards were taken over.
    """
    adopted = 0
    pending: list[dict[str, Any]] = []
    with ThreadPoolExecutor(CONNECTIONS) as pool:
        for record in _taken(folders, units, known, pool):
            pending.append(record)
            if len(pending) == PART:
                folders.ledger.compact(pending)
                adopted, pending = adopted + len(pending), []
    folders.ledger.compact(pending)
    return adopted + len(pending)


def _taken(
    folders: StepFolders,
    units: Iterable[ShardUnit],
    known: Known,
    pool: ThreadPoolExecutor,
) -> Iterator[dict[str, Any]]:
    def take(unit: ShardUnit) -> dict[str, Any] | None:
        store, record = known[unit.identity]
        for entry in record["files"]:
            if not FileEntry(**entry).present(store):
                return None  # it is made again
            try:
                folders.artifact.link(entry["path"], store)
            except FileExistsError:
                if not FileEntry(**entry).intact(folders.artifact):
                    return None
        return {**record, "index": unit.index, "at": time.time(), "seconds": 0.0}

    same = (unit for unit in units if unit.identity in known)
    while some := list(islice(same, PART)):
        yield from (record for record in pool.map(take, some) if record is not None)
