"""Comparing Arrow tables."""

from __future__ import annotations

import pyarrow as pa

from pipeline.storage.images import decode_png
from pipeline.tensors import is_tensor, to_numpy


def assert_same_rows(found: pa.Table, expected: pa.Table) -> None:
    """Check that two tables hold the same columns with the same values, in any column order.

    Tensors must agree in type, shape and every bit. Other values must be of the same kind
    (1 is not 1.0), while the width of a number may differ. Encoded images stand for their pixels
    where a tensor of pixels is expected.

    Raises:
        AssertionError: they differ; the message names the column.
    """
    names = sorted(expected.column_names)
    assert sorted(found.column_names) == names, f"columns {found.column_names}, not {names}"
    assert found.num_rows == expected.num_rows, f"{found.num_rows} rows, not {expected.num_rows}"
    for name in names:
        assert _same(found[name], expected[name]), f"the values of column '{name}' differ"


def _same(found: pa.ChunkedArray, expected: pa.ChunkedArray) -> bool:
    if is_tensor(expected.type) and is_tensor(found.type):
        same_type = bool(found.type == expected.type)
        return same_type and to_numpy(found).tobytes() == to_numpy(expected).tobytes()
    if is_tensor(expected.type) and pa.types.is_binary(found.type):
        pixels = [decode_png(data) for data in found.to_pylist()]
        images = to_numpy(expected)
        return all(
            mine.shape == theirs.shape and bool((mine == theirs).all())
            for mine, theirs in zip(pixels, images, strict=True)
        )
    return not is_tensor(expected.type) and repr(found.to_pylist()) == repr(expected.to_pylist())
