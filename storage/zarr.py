"""Zarr v3 as a format: one array a column, one Zarr shard a pipeline shard."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import zarr
from zarr.codecs import Crc32cCodec, ZstdCodec

from pipeline.errors import RunError
from pipeline.storage.formats import Region
from pipeline.tensors import is_tensor, tensor_column, to_numpy

NAME = "data.zarr"


@dataclass(frozen=True)
class ZarrFormat:
    """A group ``data.zarr`` with an array a column; zstd and crc32c on every chunk.

    Every shard but the last must have the same number of rows: shard ``i`` then is one file of
    each array, and workers write files that no other worker touches.
    """

    name: ClassVar[str] = "zarr"
    regular: ClassVar[bool] = True

    def write(self, table: pa.Table, directory: Path, region: Region) -> None:
        stop = region.offset + table.num_rows
        with _quiet():
            group = zarr.open_group(directory / NAME, mode="w", zarr_format=3)
            for column in table.column_names:
                values = _values(column, table[column])
                array = group.create_array(
                    column,
                    shape=(region.total_rows, *values.shape[1:]),
                    dtype="str" if values.dtype == object else values.dtype,
                    chunks=(_chunk_rows(values, region.shard_rows), *values.shape[1:]),
                    shards=(region.shard_rows, *values.shape[1:]),
                    compressors=[ZstdCodec(level=3, checksum=True), Crc32cCodec()],
                    # A chunk of zeros is data: only then is a missing file known to be missing.
                    config={"write_empty_chunks": True},
                )
                array[region.offset : stop] = values

    def read(self, directory: Path, name: str, offset: int, rows: int) -> pa.Table:
        with _quiet():
            group = zarr.open_group(directory / NAME, mode="r")
            columns = {}
            for column, array in sorted(group.arrays()):
                try:
                    values = np.asarray(array[offset : offset + rows])
                except (ValueError, RuntimeError) as error:
                    raise RunError(
                        f"The array '{column}' is damaged in rows {offset} to {offset + rows}: "
                        f"{error}.",
                        hint="Delete the artifact's folder and run again to make it anew.",
                        code="damaged-zarr",
                        where=str(directory / NAME),
                    ) from error
                text = values.dtype.kind in "OTU"
                columns[column] = pa.array(values.tolist()) if text else tensor_column(values)
        return pa.table(columns)


def _values(name: str, column: pa.ChunkedArray) -> npt.NDArray[Any]:
    kind = column.type
    text = pa.types.is_string(kind) or pa.types.is_large_string(kind)
    numbers = pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_boolean(kind)
    if column.null_count or not (text or numbers or is_tensor(kind)):
        what = f"{column.null_count} missing values" if column.null_count else f"type {kind}"
        raise RunError(
            f"The format 'zarr' cannot hold the column '{name}': it has {what}.",
            hint="Write this data set as parquet, or leave the column out.",
            code="bad-column",
        )
    if text:
        return np.array(column.to_pylist(), dtype=object)
    return to_numpy(column)


def _chunk_rows(values: npt.NDArray[Any], shard_rows: int) -> int:
    """Rows a chunk: as many as fit in 1 MiB and divide the shard."""
    row_bytes = 64 if values.dtype == object else max(1, values[:1].nbytes)
    fits = max(1, min(shard_rows, 2**20 // row_bytes))
    return next(rows for rows in range(fits, 0, -1) if shard_rows % rows == 0)


@contextmanager
def _quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        # Text has no final Zarr v3 specification yet; every Zarr library reads this encoding.
        warnings.filterwarnings("ignore", message=".*does not have a Zarr V3 specification.*")
        yield
