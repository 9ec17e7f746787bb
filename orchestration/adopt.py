"""Shards that an earlier snapshot holds already: they are taken over, not made again."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from pipeline.errors import PipelineError
from pipeline.orchestration.ledger import PART
from pipeline.orchestration.steps import ShardUnit, StepFolders
from pipeline.storage.artifact import Artifact
from pipeline.storage.atomic import FileEntry
from pipeline.storage.store import Store

CONNECTIONS = 16
Known = dict[str, tuple[Store, dict[str, Any]]]


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


def known_shards(found: Iterable[Artifact]) -> Known:
    """The shards of earlier artifacts by what their content depends on, and where they lie."""
    return {
        record["identity"]: (artifact.store, record)
        for artifact in found
        for record in artifact.records()
    }


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

    same = [unit for unit in units if unit.identity in known]
    for record in pool.map(take, same):
        if record is not None:
            yield record
