"""How a table becomes files and files become a table again."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Protocol

import pyarrow as pa

from pipeline.registry import Registry


@dataclass(frozen=True)
class Region:
    """Where a shard's rows lie in the whole data set.

    Attributes:
        name: the shard's name.
        offset: rows before it.
        shard_rows: rows of every shard but the last.
        total_rows: rows of all shards.
    """

    name: str
    offset: int
    shard_rows: int
    total_rows: int


class Format(Protocol):
    """A frozen dataclass; its fields are the options that a manifest records."""

    __dataclass_fields__: ClassVar[dict[str, Any]]
    name: ClassVar[str]
    regular: ClassVar[bool]
    """Whether every shard must have the number of rows it was planned with."""

    def write(self, table: pa.Table, directory: Path, region: Region) -> None:
        """Write one shard's files below ``directory``. The same table gives the same bytes."""

    def read(self, directory: Path, name: str, offset: int, rows: int) -> pa.Table:
        """Read back the shard ``name`` from the published files."""


formats: Registry[type[Format]] = Registry(
    "format",
    {
        "folder": "pipeline.storage.folder:FolderFormat",
        "parquet": "pipeline.storage.parquet:ParquetFormat",
        "webdataset": "pipeline.storage.webdataset:WebDatasetFormat",
        "zarr": "pipeline.storage.zarr:ZarrFormat",
    },
)
