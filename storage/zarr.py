"""Zarr v3: one array a column, one Zarr shard a pipeline shard."""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import zarr
from zarr.codecs import Crc32cCodec, ZstdCodec
from zarr.dtype import VariableLengthBytes
from zarr.registry import get_codec_class

from pipeline.digest import digest
from pipeline.errors import PipelineError, RunError, UsageError
from pipeline.storage.classes import numbered
from pipeline.storage.formats import Region
from pipeline.storage.source import Shard, Source
from pipeline.storage.store import Store
from pipeline.tensors import is_tensor, tensor_column, to_numpy

NAME = "data.zarr"
SHARD_ROWS = 1000
ZSTD = 3
"""Level of compression."""
COLUMNS = ("image", "label", "key")


@dataclass(frozen=True)
class ZarrFormat:
    """A group ``data.zarr`` with an array a column; zstd and crc32c on every chunk.

    Every shard but the last must have the same number of rows: shard ``i`` then is one file of
    each array, and workers write files that no other worker touches.

    Args:
        serializers: JSON: metadata of the codecs of arrays that have one of their own, by column.
    """

    serializers: str = "{}"

    name: ClassVar[str] = "zarr"
    regular: ClassVar[bool] = True

    def write(self, table: pa.Table, directory: Path, region: Region) -> None:
        stop = region.offset + table.num_rows
        serializers = json.loads(self.serializers)
        with quiet():
            group = zarr.open_group(directory / NAME, mode="w", zarr_format=3)
            for column in table.column_names:
                values = _values(column, table[column])
                array = group.create_array(
                    column,
                    shape=(region.total_rows, *values.shape[1:]),
                    dtype=_stored_type(table[column].type, values),
                    chunks=(_chunk_rows(values, region.shard_rows), *values.shape[1:]),
                    shards=(region.shard_rows, *values.shape[1:]),
                    serializer=_serializer(serializers.get(column)),
                    compressors=[
                        *([] if column in serializers else [ZstdCodec(level=ZSTD, checksum=True)]),
                        Crc32cCodec(),
                    ],
                    # A chunk of zeros is data: only then is a missing file known to be missing.
                    config={"write_empty_chunks": True},
                )
                array[region.offset : stop] = values

    def read(self, directory: Path, name: str, offset: int, rows: int) -> pa.Table:
        with quiet():
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
                columns[column] = _arrow(array, values)
        return pa.table(columns)


def _serializer(codec: dict[str, Any] | None) -> Any:
    """The codec with this metadata; what Zarr takes for the type where there is none."""
    return "auto" if codec is None else get_codec_class(codec["name"]).from_dict(codec)


def _values(name: str, column: pa.ChunkedArray) -> npt.NDArray[Any]:
    kind = column.type
    texts = (pa.types.is_string, pa.types.is_large_string, pa.types.is_binary)
    text = any(is_kind(kind) for is_kind in texts)
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


def _stored_type(kind: pa.DataType, values: npt.NDArray[Any]) -> Any:
    if pa.types.is_binary(kind):
        return VariableLengthBytes()
    return "str" if values.dtype == object else values.dtype


def _arrow(array: Any, values: npt.NDArray[Any]) -> pa.Array:
    if values.dtype.kind not in "OTU":
        return tensor_column(values)
    kind = pa.binary() if isinstance(array.metadata.data_type, VariableLengthBytes) else pa.string()
    return pa.array(values.tolist(), kind)


def _chunk_rows(values: npt.NDArray[Any], shard_rows: int) -> int:
    """Rows a chunk: as many as fit in 1 MiB and divide the shard."""
    if values.dtype == object:
        row_bytes = max(1, sum(map(len, values)) // max(1, len(values)))
    else:
        row_bytes = max(1, values[:1].nbytes)
    fits = max(1, min(shard_rows, 2**20 // row_bytes))
    return next(rows for rows in range(fits, 0, -1) if shard_rows % rows == 0)


@contextmanager
def quiet() -> Iterator[None]:
    """Without warnings that say nothing to a user."""
    with warnings.catch_warnings():
        # Text and bytes have no final Zarr v3 specification yet; every library reads this encoding.
        warnings.filterwarnings("ignore", message=".*does not have a Zarr V3 specification.*")
        yield


@dataclass(frozen=True)
class ZarrSource(Source):
    """A Zarr group with the arrays ``image``, and optionally ``label`` and ``key``.

    Images are N x H x W or N x H x W x C in uint8, or N encoded images of variable length. Shards
    are whole Zarr shards (chunks, where it has none) of about 1,000 rows. A missing chunk is an
    error: Zarr itself would read its fill value.

    Args:
        store: the folder of the group.
        class_names: names by label; the numbers up to the highest label where not given.
    """

    store: Store
    class_names: tuple[str, ...] = ()

    @cached_property
    def _arrays(self) -> dict[str, Any]:
        try:
            with quiet():
                group: Any = zarr.open_group(self.store.url, mode="r", zarr_format=3)
                # Not 'name in group', which takes a damaged array for one that is not there.
                names = [n for n in COLUMNS if self.store.info(f"{n}/zarr.json")]
                arrays = {name: group[name] for name in names}
                facts = {name: (_kind(a), len(a.shape)) for name, a in arrays.items()}
                partial = [n for n, a in arrays.items() if a.nchunks_initialized < a.nchunks]
        except Exception as error:  # damaged, it raises anything
            raise self._wrong(f"{type(error).__name__}: {error}") from error
        if facts.pop("image", None) not in {("uint8", 3), ("uint8", 4), ("bytes", 1)}:
            raise self._wrong("its array 'image' is missing, of another type or of another shape")
        for name, fact in facts.items():
            if fact != ({"label": "integer", "key": "text"}[name], 1):
                raise self._wrong(f"its array '{name}' is of type {fact[0]}, or no list")
        if len({array.shape[0] for array in arrays.values()}) > 1:
            raise self._wrong("its arrays are not of one length")
        if partial:
            raise self._wrong(f"chunks are missing in {', '.join(partial)}")
        return arrays

    def _wrong(self, found: str) -> UsageError:
        return UsageError(
            f"The Zarr group cannot be used: {found}.",
            hint="It needs an array 'image' (uint8 N x H x W or N x H x W x C, or N of bytes), and "
            "'label' (integers) and 'key' (text) where there are such; write every chunk.",
            code="damaged-zarr",
            where=self.store.url,
        )

    @cached_property
    def classes(self) -> tuple[str, ...]:
        if self.class_names or "label" not in self._arrays:
            return self.class_names
        labels = self._read("label", slice(None))
        return numbered(int(labels.max()) if len(labels) else -1, self.store.url)

    @cached_property
    def shards(self) -> tuple[Shard, ...]:
        image = self._arrays["image"]
        unit = (image.shards or image.chunks)[0]
        step = unit * max(1, SHARD_ROWS // unit)
        marks = [[info.name, *info.mark] for info in self.store.files()]
        return tuple(
            Shard(
                f"{start // step:05d}",
                digest("zarr", marks, start),
                min(step, image.shape[0] - start),
                {"start": start},
            )
            for start in range(0, image.shape[0], step)
        )

    def read(self, shard: Shard) -> pa.Table:
        start = shard.location["start"]
        rows = slice(start, start + (shard.rows or 0))
        found = {name: self._read(name, rows) for name in self._arrays}
        image = found["image"]
        if "key" in found:
            keys = found["key"].tolist()
        else:
            keys = [f"{row:08d}" for row in range(rows.start, rows.stop)]
        if image.dtype == object:
            column = _arrow(self._arrays["image"], image)
        else:
            column = tensor_column(image[..., None] if image.ndim == 3 else image)
        columns = {"key": pa.array(keys, pa.string()), "image": column}
        if "label" in found:
            columns["label"] = pa.array(found["label"].astype(np.int64))
        return pa.table(columns)

    def _read(self, name: str, rows: slice) -> npt.NDArray[Any]:
        try:
            with quiet():
                return np.asarray(self._arrays[name][rows])
        except PipelineError:
            raise
        except Exception as error:  # damaged, it raises anything
            place = f"rows {rows.start or 0} to {rows.stop or 'the end'} of '{name}'"
            raise self._wrong(f"{place}: {error}") from error


def _kind(array: Any) -> str:
    if isinstance(array.metadata.data_type, VariableLengthBytes):
        return "bytes"
    if array.dtype == np.uint8 and len(array.shape) > 1:
        return "uint8"
    return {"i": "integer", "u": "integer", "O": "text", "T": "text", "U": "text"}.get(
        array.dtype.kind, str(array.dtype)
    )
