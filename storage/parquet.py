"""Parquet, in the layout of Hugging Face data sets and as a format of this project."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import ClassVar

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipeline.digest import digest
from pipeline.errors import UsageError
from pipeline.storage.classes import agreed, numbered
from pipeline.storage.formats import Region
from pipeline.storage.source import Shard, Source, shard_names
from pipeline.storage.store import FileInfo, Store
from pipeline.tensors import TENSOR, as_bytes, from_bytes

CONNECTIONS = 16
"""Files whose row groups are listed at once: on a network each takes a few round trips."""
IMAGE = ("image", "img", "jpg", "png", "webp")
LABEL = ("label", "labels", "fine_label", "cls")
KEY = ("key", "__key__", "file_name")
"""Names that columns go by in published data sets; the first that is there counts."""


@dataclass(frozen=True)
class ParquetSource(Source):
    """Parquet files with images (binary, or struct of bytes and path) and integer labels.

    One row group is one shard. The key is the column ``key``, ``__key__`` or ``file_name``, the
    image's path, or ``<file>-<row>`` where there is none or several images of the row group have
    one path. Class names come from the Hugging Face metadata; there a negative label is a missing
    one. Images without a label column are a data set without classes.
    """

    store: Store
    files: tuple[FileInfo, ...]
    class_names: tuple[str, ...] = ()

    @cached_property
    def _label(self) -> str | None:
        with _opened(self.store, self.files[0].name) as file:
            return _column(file.schema_arrow, LABEL)

    @cached_property
    def classes(self) -> tuple[str, ...]:
        if self._label is None:
            return ()
        with _opened(self.store, self.files[0].name) as file:
            own = _label_names(file.schema_arrow.metadata or {}, self._label)
        if names := agreed(own, self.class_names, str(self.store)):
            return names
        return numbered(max(map(self._top_label, self.files)), str(self.store))

    def lean(self) -> ParquetSource:
        # The first file says which columns there are.
        return replace(self, files=self.files[:1], class_names=self.classes)

    def _top_label(self, info: FileInfo) -> int:
        with _opened(self.store, info.name) as file:
            if self._label not in file.schema_arrow.names:
                raise self._bad_columns(info.name, f"no column {self._label}")
            labels = file.read(columns=[self._label])[self._label]
        top = pc.max(self._checked(labels, info.name, "labels", pa.types.is_integer)).as_py()
        return -1 if top is None else int(top)

    def _checked(
        self, column: pa.ChunkedArray, name: str, what: str, *kinds: Callable[[pa.DataType], bool]
    ) -> pa.ChunkedArray:
        if not any(kind(column.type) for kind in kinds):
            raise self._bad_columns(name, f"{what} of type {column.type}")
        return column

    @cached_property
    def shards(self) -> tuple[Shard, ...]:
        with ThreadPoolExecutor(CONNECTIONS) as pool:
            footers = list(pool.map(self._footer, self.files))
        shards = []
        for name, info, metadata in zip(shard_names(self.files), self.files, footers, strict=True):
            first = 0
            for group in range(metadata.num_row_groups):
                rows = metadata.row_group(group).num_rows
                place = {"file": info.name, "name": name, "group": group, "first": first}
                identity = digest(info.mark, group, "parquet")
                size = metadata.row_group(group).total_byte_size
                shards.append(Shard(f"{name}-{group:05d}", identity, rows, place, size))
                first += rows
        return tuple(shards)

    def _footer(self, info: FileInfo) -> pq.FileMetaData:
        with _opened(self.store, info.name) as file:
            return file.metadata

    def read(self, shard: Shard) -> pa.Table:
        name = shard.location["file"]
        with _opened(self.store, name) as file:
            image, label = (_column(file.schema_arrow, n) for n in (IMAGE, LABEL))
            key = _column(file.schema_arrow, KEY)
            if image is None or label != self._label:
                missing = "image" if image is None else self._label
                raise self._bad_columns(
                    name,
                    f"no column {missing}" if missing else "labels where the first file has none",
                )
            columns = [column for column in (image, label, key) if column]
            table = file.read_row_group(shard.location["group"], columns=columns)
            table.validate(full=True)  # Parquet does not, and text may be none
        images, keys = table[image], table[key] if key else None
        if pa.types.is_struct(images.type):
            fields = [field.name for field in images.type]
            if keys is None and "path" in fields:
                paths = pc.struct_field(images, "path").cast(pa.string())
                valid = len(paths) - paths.null_count
                keys = paths if pc.count_distinct(paths).as_py() == valid else None
            if "bytes" in fields:
                images = pc.struct_field(images, "bytes")
        self._checked(images, name, "images", pa.types.is_binary, pa.types.is_large_binary)
        if keys is None or keys.null_count:
            first, rows = shard.location["first"], range(len(table))
            numbers = pa.array([f"{shard.location['name']}-{first + row:08d}" for row in rows])
            keys = numbers if keys is None else pc.coalesce(keys.cast(pa.string()), numbers)
        found = {"key": keys.cast(pa.string()), "image": images.cast(pa.binary())}
        if label:
            labels = self._checked(table[label], name, "labels", pa.types.is_integer)
            found["label"] = _without_negative(labels)
        return pa.table(found)

    def _bad_columns(self, name: str, found: str) -> UsageError:
        return UsageError(
            f"The Parquet file has {found}.",
            hint="It needs 'image' (binary, or a struct of bytes and path) and 'label' (integers).",
            code="bad-columns",
            where=f"{self.store}/{name}",
        )


def _label_names(metadata: Mapping[bytes, bytes], label: str) -> tuple[str, ...]:
    """Names of a ``ClassLabel`` in what Hugging Face writes beside the schema."""
    try:
        feature = json.loads(metadata[b"huggingface"])["info"]["features"][label]
        return tuple(map(str, feature["names"]))
    except (KeyError, ValueError, TypeError, RecursionError):
        return ()


def _without_negative(labels: pa.ChunkedArray) -> pa.ChunkedArray:
    if pa.types.is_unsigned_integer(labels.type):
        return labels.cast(pa.int64(), safe=False)
    labels = labels.cast(pa.int64())
    return pc.if_else(pc.less(labels, 0), pa.scalar(None, pa.int64()), labels)


def _column(schema: pa.Schema, names: tuple[str, ...]) -> str | None:
    return next((name for name in names if name in schema.names), None)


@contextmanager
def _opened(store: Store, name: str) -> Iterator[pq.ParquetFile]:
    """A Parquet file whose pages are checked where they carry checksums."""
    try:
        with store.open(name) as file:
            yield pq.ParquetFile(file, page_checksum_verification=True, pre_buffer=True)
    except (pa.ArrowException, OSError, ValueError) as error:
        raise UsageError(
            f"The Parquet file cannot be read: {error}.",
            hint="Fetch or write it anew.",
            code="damaged-parquet",
            where=f"{store}/{name}",
        ) from error


@dataclass(frozen=True)
class ParquetFormat:
    """One zstd-compressed Parquet file with page checksums a shard.

    Tensors come back as such; in the file they are bytes, with type and shape in the metadata.
    """

    name: ClassVar[str] = "parquet"
    regular: ClassVar[bool] = False

    def write(self, table: pa.Table, directory: Path, region: Region) -> None:
        write_table(table, directory / f"{region.name}.parquet")

    def read(self, directory: Path, name: str, offset: int, rows: int) -> pa.Table:
        return read_table(directory / f"{name}.parquet")


def write_table(table: pa.Table, path: Path) -> None:
    """Write one Parquet file; the same table gives the same bytes."""
    table = as_bytes(table)
    # Neither a dictionary nor a least and a greatest value is of use for the bytes of a tensor.
    small = [field.name for field in table.schema if TENSOR not in (field.metadata or {})]
    every = len(small) == len(table.schema)
    pq.write_table(
        table,
        path,
        compression="zstd",
        use_dictionary=every or small,
        write_statistics=every or small,
        write_page_checksum=True,
    )


def read_table(path: Path) -> pa.Table:
    """Read one Parquet file that :func:`write_table` wrote, and check its pages."""
    return from_bytes(pq.read_table(path, page_checksum_verification=True, partitioning=None))
