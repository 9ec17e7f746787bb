"""Fixed-shape tensors as Arrow columns."""

from __future__ import annotations

import json
import math
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa


def tensor_column(array: npt.NDArray[Any]) -> pa.Array:
    """An array of shape (N, ...) as a column of N rows; one value a row where N is all there is."""
    array = np.ascontiguousarray(array)
    if array.ndim == 1:
        return pa.array(array)
    value = pa.from_numpy_dtype(array.dtype)
    kind = pa.fixed_shape_tensor(value, array.shape[1:])
    flat = pa.array(array.reshape(-1), type=value)
    storage = pa.FixedSizeListArray.from_arrays(flat, int(np.prod(array.shape[1:])))
    return pa.ExtensionArray.from_storage(kind, storage)


def is_tensor(kind: pa.DataType) -> bool:
    """Whether a column of this type holds fixed-shape tensors."""
    return isinstance(kind, pa.FixedShapeTensorType)


def to_numpy(column: pa.ChunkedArray) -> npt.NDArray[Any]:
    """A tensor column as an array (N, ...), any other column as an array (N,)."""
    if not is_tensor(column.type):
        return np.asarray(column.to_numpy())
    chunk = column.combine_chunks()
    if isinstance(chunk, pa.ChunkedArray):
        chunk = pa.concat_arrays(chunk.chunks)
    flat = chunk.storage.flatten().to_numpy(zero_copy_only=False)
    return np.asarray(flat).reshape(len(chunk), *column.type.shape)


TENSOR = b"tensor"
"""Key of a field's metadata: type and shape of the tensors whose bytes the column holds."""


def as_bytes(table: pa.Table) -> pa.Table:
    """Tensors as their bytes, which Parquet writes and reads many times faster than lists.

    A column that has missing values, dimensions with names or no numbers is left as it is.
    """
    for index, field in enumerate(table.schema):
        if is_tensor(field.type) and (width := _width(field.type)):
            chunks = table.column(index).chunks
            values = [chunk.storage.flatten() for chunk in chunks]
            if any(part.null_count for part in (*chunks, *values)):
                continue
            kind = pa.binary(width)
            column = pa.chunked_array(
                [
                    pa.FixedSizeBinaryArray.from_buffers(kind, len(chunk), [None, _bytes(part)])
                    for chunk, part in zip(chunks, values, strict=True)
                ],
                kind,
            )
            about = json.dumps({"type": str(field.type.value_type), "shape": field.type.shape})
            packed = pa.field(field.name, kind, field.nullable, {TENSOR: about})
            table = table.set_column(index, packed, column)
    return table


def from_bytes(table: pa.Table) -> pa.Table:
    """What :func:`as_bytes` was given; the numbers are not copied."""
    for index, field in enumerate(table.schema):
        if TENSOR in (field.metadata or {}):
            about = json.loads(field.metadata[TENSOR])
            value, size = pa.type_for_alias(about["type"]), math.prod(about["shape"])
            kind = pa.fixed_shape_tensor(value, about["shape"])
            chunks = []
            for chunk in table.column(index).chunks:
                numbers = len(chunk) * size
                flat = pa.Array.from_buffers(value, numbers, [None, _bytes(chunk)])
                storage = pa.FixedSizeListArray.from_arrays(flat, size)
                chunks.append(pa.ExtensionArray.from_storage(kind, storage))
            unpacked = pa.field(field.name, kind, field.nullable)
            table = table.set_column(index, unpacked, pa.chunked_array(chunks, kind))
    return table


def _width(kind: pa.FixedShapeTensorType) -> int:
    """Bytes of one tensor; 0 where its numbers alone do not say all."""
    value = kind.value_type
    numbers = pa.types.is_integer(value) or pa.types.is_floating(value)
    if kind.dim_names or kind.permutation or not numbers:
        return 0
    return int(math.prod(kind.shape) * value.bit_width // 8)


def _bytes(array: pa.Array) -> pa.Buffer:
    """The bytes of an array's values, those of its own rows alone."""
    width = array.type.bit_width // 8
    return array.buffers()[1].slice(array.offset * width, len(array) * width)
