"""Which shards of a step are finished: one small record a shard, written by its worker."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from pipeline.storage.atomic import seal, unseal
from pipeline.storage.store import Store


@dataclass(frozen=True)
class Ledger:
    """The records of one step.

    Args:
        store: where the records lie.
        artifact: the published files that the records speak of.
    """

    store: Store
    artifact: Store

    def write(self, name: str, record: Mapping[str, Any]) -> None:
        """Commit a shard: from now on it is finished."""
        self.store.replace(f"{name}.json", seal(record))

    def records(self) -> Iterator[dict[str, Any]]:
        """The records that are whole; a shard whose record is damaged is done again."""
        names = [info.name for info in self.store.files() if info.has("json")]
        for data in self.store.read_many(names):
            with suppress(ValueError):
                yield unseal(data)

    def finished(self) -> dict[str, dict[str, Any]]:
        """Records by shard name; one counts only if its files are there with their sizes."""
        records = list(self.records())
        sizes = {info.name: info.bytes for info in self.artifact.files()} if records else {}
        return {
            record["name"]: record
            for record in records
            if all(sizes.get(entry["path"]) == entry["bytes"] for entry in record["files"])
        }
