"""Parquet, in the layout of Hugging Face data sets and as a format of this project."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipeline.digest import digest
from pipeline.errors import UsageError
from pipeline.storage.formats import Region
from pipeline.storage.listing import file_identity, shard_names
from pipeline.storage.source import Shard, Source


@dataclass(frozen=True)
class ParquetSource(Source):
    """Parquet files with ``image`` (binary, or struct of bytes and path) and ``label`` (int).

    One row group is one shard. The key is the column ``key`` or ``file_name``, the image's path,
    or ``<file>-<row>`` where there is neither. Class names come from the Hugging Face metadata.
    """

    paths: tuple[Path, ...]
    class_names: tuple[str, ...] = ()

    @cached_property
    def classes(self) -> tuple[str, ...]:
        if self.class_names:
            return self.class_names
        with _readable(self.paths[0]):
            metadata: Mapping[bytes, bytes] = pq.read_schema(self.paths[0]).metadata or {}
        features = json.loads(metadata.get(b"huggingface", b"{}")).get("info", {}).get("features")
        label: Any = (features or {}).get("label", {})
        if names := label.get("names"):
            return tuple(names)
        return tuple(str(index) for index in range(max(map(_top_label, self.paths)) + 1))

    @cached_property
    def shards(self) -> tuple[Shard, ...]:
        shards = []
        for name, path in zip(shard_names(self.paths), self.paths, strict=True):
            with _readable(path):
                metadata = pq.read_metadata(path)
            first = 0
            for group in range(metadata.num_row_groups):
                rows = metadata.row_group(group).num_rows
                location = {"path": str(path), "name": name, "group": group, "first": first}
                identity = digest(file_identity(path), group, "parquet")
                shards.append(Shard(f"{name}-{group:05d}", identity, rows, location))
                first += rows
        return tuple(shards)

    def read(self, shard: Shard) -> pa.Table:
        path = Path(shard.location["path"])
        with _readable(path):
            table = pq.ParquetFile(path).read_row_group(shard.location["group"])
        if missing := {"image", "label"} - set(table.column_names):
            raise _bad_columns(path, f"no column {' or '.join(sorted(missing))}")
        image, names = table["image"].combine_chunks(), None
        if pa.types.is_struct(image.type):
            image, names = image.field("bytes"), image.field("path")
        keys = next((table[c] for c in ("key", "file_name") if c in table.column_names), names)
        if keys is None or keys.null_count:
            name, first = shard.location["name"], shard.location["first"]
            keys = pa.array([f"{name}-{first + row:08d}" for row in range(len(table))])
        return pa.table(
            {
                "key": keys.cast(pa.string()),
                "image": image.cast(pa.binary()),
                "label": table["label"].cast(pa.int64()),
            }
        )


def _top_label(path: Path) -> int:
    with _readable(path):
        file = pq.ParquetFile(path)
        if "label" not in file.schema_arrow.names:
            raise _bad_columns(path, "no column label")
        labels = file.read(columns=["label"])["label"]
    if not pa.types.is_integer(labels.type):
        raise _bad_columns(path, f"labels of type {labels.type}")
    return int(pc.max(labels).as_py() or 0)


def _bad_columns(path: Path, found: str) -> UsageError:
    return UsageError(
        f"The Parquet file has {found}.",
        hint="It needs 'image' (binary, or a struct of bytes and path) and 'label' (integers).",
        code="bad-columns",
        where=str(path),
    )


@contextmanager
def _readable(path: Path) -> Iterator[None]:
    try:
        yield
    except (pa.ArrowException, OSError) as error:
        raise UsageError(
            f"The Parquet file cannot be read: {error}.",
            hint="Fetch or write it anew.",
            code="damaged-parquet",
            where=str(path),
        ) from error


@dataclass(frozen=True)
class ParquetFormat:
    """One zstd-compressed Parquet file with page checksums a shard; tensors stay tensors."""

    name: ClassVar[str] = "parquet"
    regular: ClassVar[bool] = False

    def write(self, table: pa.Table, directory: Path, region: Region) -> None:
        path = directory / f"{region.name}.parquet"
        pq.write_table(table, path, compression="zstd", write_page_checksum=True)

    def read(self, directory: Path, name: str, offset: int, rows: int) -> pa.Table:
        return pq.read_table(
            directory / f"{name}.parquet", page_checksum_verification=True, partitioning=None
        )
