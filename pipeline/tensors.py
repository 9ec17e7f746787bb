"""Fixed-shape tensors as Arrow columns."""

from __future__ import annotations

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
