"""Which shards of a step are finished: one small record a shard, written by its worker."""

from __future__ import annotations

from collections.abc import Mapping
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

    def finished(self) -> dict[str, dict[str, Any]]:
        """Records by shard name; one counts only if it is whole and its files have their sizes."""
        names = [info.name for info in self.store.files() if info.has("json")]
        sizes = {info.name: info.bytes for info in self.artifact.files()} if names else {}
        found = {}
        for data in self.store.read_many(names):
            try:
                record = unseal(data)
            except ValueError:
                continue  # damaged: the shard is done again
            if all(sizes.get(entry["path"]) == entry["bytes"] for entry in record["files"]):
                found[record["name"]] = record
        return found
