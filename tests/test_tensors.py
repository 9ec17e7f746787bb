"""Arrays as Arrow columns and back."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pytest

from pipeline.tensors import as_bytes, from_bytes, is_tensor, tensor_column, to_numpy

KINDS = ["uint8", "uint16", "int32", "int64", "float16", "float32", "float64"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", [(5,), (5, 3), (5, 2, 3, 4), (0, 2, 2), (1, 1)])
def test_round_trip_also_in_slices_and_chunks(kind: str, shape: tuple[int, ...]) -> None:
    array = np.random.default_rng(0).integers(0, 99, shape).astype(kind)
    table = pa.table({"x": tensor_column(array)})
    assert is_tensor(table["x"].type) == (array.ndim > 1)
    chunked = pa.concat_tables([table.slice(2, 2), table.slice(0, 1), table.slice(4)])["x"]
    expected = np.concatenate([array[2:4], array[:1], array[4:]])
    sliced = table.slice(1, 3)["x"]
    for column, values in ((table["x"], array), (chunked, expected), (sliced, array[1:4])):
        found = to_numpy(column)
        assert found.dtype == array.dtype
        assert found.shape == values.shape
        assert np.array_equal(found, values)


def test_arrays_in_another_memory_order_keep_their_values() -> None:
    array = np.arange(24).reshape(2, 3, 4).transpose(2, 0, 1)
    assert np.array_equal(to_numpy(pa.table({"x": tensor_column(array)})["x"]), array)


@pytest.mark.parametrize("kind", KINDS)
def test_tensors_as_bytes_come_back_also_from_slices_and_chunks(kind: str) -> None:
    array = np.random.default_rng(0).integers(0, 99, (6, 3, 2)).astype(kind)
    table = pa.table({"key": list("abcdef"), "x": tensor_column(array)})
    chunked = pa.concat_tables([table.slice(4), table.slice(1, 2)])
    for given in (table, table.slice(2, 3), chunked, chunked.slice(1, 2), table.slice(0, 0)):
        packed = as_bytes(given)
        assert packed.schema.field("x").type == pa.binary(6 * array.itemsize)
        assert packed["x"].to_pylist() == [part.tobytes() for part in to_numpy(given["x"])]
        found = from_bytes(packed)
        found.validate(full=True)
        assert found.equals(given)
        assert found.schema.equals(given.schema, check_metadata=True)


@pytest.mark.parametrize(
    "column",
    [
        pa.ExtensionArray.from_storage(
            pa.fixed_shape_tensor(pa.uint8(), [2]),
            pa.array([[1, 2], None], pa.list_(pa.uint8(), 2)),
        ),
        pa.ExtensionArray.from_storage(
            pa.fixed_shape_tensor(pa.uint8(), [2]),
            pa.array([[1, None], [3, 4]], pa.list_(pa.uint8(), 2)),
        ),
        pa.ExtensionArray.from_storage(
            pa.fixed_shape_tensor(pa.uint8(), [1, 2], permutation=[1, 0]),
            pa.array([[1, 2], [3, 4]], pa.list_(pa.uint8(), 2)),
        ),
    ],
    ids=["no tensor", "no number", "permuted"],
)
def test_what_bytes_do_not_say_stays_a_list(column: pa.Array) -> None:
    table = pa.table({"x": column})
    assert as_bytes(table).equals(table)
    assert from_bytes(table).equals(table)
