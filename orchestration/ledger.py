"""Which shards of a step are finished: one small record a shard, written by its worker."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.digest import dumps
from pipeline.storage.atomic import FileEntry, write_atomic


@dataclass(frozen=True)
class Ledger:
    """The records of one step.

    Args:
        folder: where the records lie.
        artifact: the folder of the published files that the records speak of.
    """

    folder: Path
    artifact: Path

    def write(self, name: str, record: Mapping[str, Any]) -> None:
        """Commit a shard: from now on it is finished."""
        write_atomic(self.folder / f"{name}.json", dumps(record))

    def finished(self) -> dict[str, dict[str, Any]]:
        """Records by shard name; one counts only if its files are there with their sizes."""
        found = {}
        for path in sorted(self.folder.glob("*.json")):
            record = json.loads(path.read_bytes())
            if all(FileEntry(**entry).present(self.artifact) for entry in record["files"]):
                found[record["name"]] = record
        return found
