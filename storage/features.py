"""Vectors of samples as shards: a column of an output, of Parquet files, or a Zarr array."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, overload

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
import zarr

from pipeline.digest import digest
from pipeline.errors import PipelineError, UsageError
from pipeline.storage.artifact import MANIFEST, Artifact, ArtifactSource
from pipeline.storage.places import resolve
from pipeline.storage.source import Shard, Source, shard_names
from pipeline.storage.store import FileInfo, Store, storage_error
from pipeline.storage.zarr import quiet
from pipeline.tensors import from_bytes, is_tensor, tensor_column, to_numpy

_ROWS = 2**14
"""Rows of a shard of a Zarr array, or the next multiple of what it is stored in."""


def open_features(place: str | Path | Store, column: str) -> Source:
    """Vectors at a path or URL, a shard at a time.

    Args:
        place: an output of this pipeline, Parquet files, or a Zarr array (N, D) or group.
        column: name of the column, or of the array in the group.

    Returns:
        A source whose tables have ``column``: fixed-shape tensors of D numbers.

    Raises:
        UsageError: nothing there holds vectors by that name.
        RunError: the place cannot be read.
    """
    try:
        store, chosen = resolve(place)
        files = store.files() if chosen is None else chosen
        names = {file.name for file in files}
        if MANIFEST in names and chosen is None:
            return _artifact(store)
        if "zarr.json" in names:
            return ZarrFeatures(store, column)
        parquet = tuple(file for file in files if file.has("parquet"))
        if parquet:
            return ParquetFeatures(store, parquet, column)
    except OSError as error:
        raise storage_error(error, str(place)) from error
    raise UsageError(
        "There are no vectors here.",
        hint="Give an output of this pipeline, Parquet files with a column of vectors, or a Zarr "
        "array.",
        code="no-features",
        where=str(place),
    )


def _artifact(store: Store) -> ArtifactSource:
    artifact = Artifact.open(store)
    if artifact.products and "train" in artifact.products:
        artifact = artifact.product("train")
    if artifact.manifest["kind"] != "table":
        raise UsageError(
            f"This output holds '{artifact.manifest['kind']}' and no samples.",
            hint="Give the folder of a step that writes a table.",
            code="no-features",
            where=str(store),
        )
    return ArtifactSource(artifact)


@dataclass(frozen=True)
class ParquetFeatures(Source):
    """A column of vectors in Parquet files: lists, fixed-size lists or tensors of equal length.

    One row group is one shard.
    """

    store: Store
    files: tuple[FileInfo, ...]
    column: str

    @property
    def classes(self) -> tuple[str, ...]:
        return ()

    @cached_property
    def shards(self) -> tuple[Shard, ...]:
        made = []
        for name, info in zip(shard_names(self.files), self.files, strict=True):
            with self.store.open(info.name) as file:
                metadata = pq.ParquetFile(file).metadata
            for group in range(metadata.num_row_groups):
                about = metadata.row_group(group)
                place = {"file": info.name, "group": group}
                identity = digest(info.mark, group, self.column)
                made.append(Shard(f"{name}-{group:05d}", identity, about.num_rows, place))
        return tuple(made)

    def lean(self) -> ParquetFeatures:
        return ParquetFeatures(self.store, (), self.column)

    def read(self, shard: Shard) -> pa.Table:
        with self.store.open(shard.location["file"]) as opened:
            file = pq.ParquetFile(opened)
            if self.column not in file.schema_arrow.names:
                raise _no_column(self.column, file.schema_arrow.names, shard.location["file"])
            table = file.read_row_group(shard.location["group"], columns=[self.column])
        column = from_bytes(table)[self.column]
        if is_tensor(column.type):
            return pa.table({self.column: column})
        return pa.table({self.column: tensor_column(_vectors(column, shard.name))})


def _vectors(column: pa.ChunkedArray, where: str) -> npt.NDArray[Any]:
    """Lists of equal length as (N, D)."""
    lists = pa.types.is_list(column.type) or pa.types.is_large_list(column.type)
    if lists or pa.types.is_fixed_size_list(column.type):
        values = column.combine_chunks()
        flat = values.flatten()
        rows = len(values)
        if rows and not column.null_count and not flat.null_count and len(flat) % rows == 0:
            lengths = np.asarray(values.value_lengths()) if lists else np.full(rows, 1)
            numbers = pa.types.is_floating(flat.type) or pa.types.is_integer(flat.type)
            if numbers and (lengths == lengths[0]).all():
                return np.asarray(flat).reshape(rows, -1)
    raise UsageError(
        f"A column of type {column.type} does not hold a vector of one length in each row.",
        hint="Choose a column of lists of numbers, all of one length and none missing.",
        code="no-features",
        where=where,
    )


@dataclass(frozen=True)
class ZarrFeatures(Source):
    """A Zarr array (N, D), by itself or in a group; a shard is a run of rows of whole chunks."""

    store: Store
    column: str

    @property
    def classes(self) -> tuple[str, ...]:
        return ()

    @cached_property
    def _array(self) -> Any:
        try:
            with quiet():
                found: Any = zarr.open(self.store.url, mode="r")
        except Exception as error:  # damaged, it raises anything
            raise self._wrong(f"{type(error).__name__}: {error}") from error
        if isinstance(found, zarr.Group):
            names = [name for name, _ in found.arrays()]
            if self.column not in names:
                raise _no_column(self.column, names, str(self.store))
            found = found[self.column]
        if found.ndim != 2 or found.dtype.kind not in "fiu":
            raise self._wrong(f"shape {found.shape} of {found.dtype} is no matrix of numbers")
        if found.nchunks_initialized < found.nchunks:
            # Zarr itself would read its fill value.
            raise self._wrong("chunks are missing")
        return found

    def _wrong(self, found: str) -> UsageError:
        return UsageError(
            f"The Zarr array cannot be used: {found}.",
            hint="It needs shape (N, D), one vector a row, and every chunk written.",
            code="damaged-zarr",
            where=self.store.url,
        )

    def lean(self) -> ZarrFeatures:
        return ZarrFeatures(self.store, self.column)

    @cached_property
    def shards(self) -> tuple[Shard, ...]:
        array = self._array
        stored = (array.shards or array.chunks)[0]
        rows = -(-_ROWS // stored) * stored
        marks = digest([[info.name, *info.mark] for info in self.store.files()])
        return tuple(
            Shard(
                f"rows-{start:012d}",
                digest(marks, self.column, start),
                min(rows, array.shape[0] - start),
                {"start": start},
            )
            for start in range(0, array.shape[0], rows)
        )

    def read(self, shard: Shard) -> pa.Table:
        start = shard.location["start"]
        try:
            values = np.asarray(self._array[start : start + (shard.rows or 0)])
        except PipelineError:
            raise
        except Exception as error:  # damaged, it raises anything
            raise self._wrong(f"rows from {start}: {error}") from error
        return pa.table({self.column: tensor_column(values)})


class FeatureArrays(Sequence[npt.NDArray[Any]]):
    """The shards of a source as arrays (n, D), each read when it is taken out by its number.

    Where a row of the column has several vectors (n, P, D), these follow one another.

    Args:
        source: of :func:`open_features`, or the output of a step.
        column: of vectors.
    """

    def __init__(self, source: Source, column: str) -> None:
        self.source, self.column = source, column

    def __len__(self) -> int:
        return len(self.source.shards)

    @overload
    def __getitem__(self, number: int) -> npt.NDArray[Any]: ...
    @overload
    def __getitem__(self, number: slice) -> list[npt.NDArray[Any]]: ...
    def __getitem__(self, number: int | slice) -> Any:
        if isinstance(number, slice):
            return [self[each] for each in range(*number.indices(len(self)))]
        found = read_columns(self.source, self.source.shards[number], (self.column,))[0]
        return found.reshape(-1, found.shape[-1]) if found.ndim == 3 else found


def read_columns(
    source: Source, shard: Shard, columns: Sequence[str]
) -> tuple[npt.NDArray[Any], ...]:
    """Columns of one shard as arrays (n, ...).

    Raises:
        UsageError: there is no such column.
    """
    table = source.read(shard)
    for column in columns:
        if column not in table.column_names:
            raise _no_column(column, table.column_names, shard.name)
    return tuple(to_numpy(table[column]) for column in columns)


def _no_column(column: str, names: Sequence[str], where: str) -> PipelineError:
    return UsageError(
        f"There is no column '{column}'.",
        hint=f"The columns are: {', '.join(names) or 'none'}.",
        code="no-column",
        where=where,
    )
