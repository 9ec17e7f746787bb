"""Steps over shards: memoised, accounted for, and finished by a second start."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from samples import keyed, local_run

from pipeline.errors import RunError
from pipeline.orchestration.ledger import Ledger
from pipeline.orchestration.local_executor import LocalExecutor
from pipeline.orchestration.run import Run, add_counts, open_run
from pipeline.stage import ShardContext
from pipeline.storage.artifact import Artifact, ArtifactSource
from pipeline.storage.atomic import FileEntry
from pipeline.storage.formats import Format
from pipeline.storage.parquet import ParquetFormat
from pipeline.storage.source import Source
from pipeline.storage.webdataset import WebDatasetFormat
from pipeline.storage.zarr import ZarrFormat
from pipeline.testing import check_stage, tree_digest

DONE: list[str] = []
"""Shards that a :class:`Sieve` has worked on."""


@dataclass(frozen=True)
class Sieve:
    """Keeps, filters or sets aside each sample by the number in its key."""

    fates: str = "k"
    """One letter a sample: keep, filter, bad, or lose."""
    fails: tuple[str, ...] = ()

    version: ClassVar[int] = 1

    def __call__(self, table: pa.Table, context: ShardContext) -> pa.Table:
        DONE.append(context.shard)
        if context.shard in self.fails and not (Path(tempfile.gettempdir()) / "mended").exists():
            raise ValueError("not today")
        keep = []
        for key in table["key"].to_pylist():
            fate = self.fates[int(key[1:]) % len(self.fates)]
            keep.append(fate == "k")
            if fate in "fg":
                context.filter(f"reason {fate}")
            if fate == "b":
                context.quarantine(key, "bad", "It is bad.", key.encode())
        context.metrics["rows"] = table.num_rows
        return table.filter(pa.array(keep, pa.bool_()))
