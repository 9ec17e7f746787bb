"""Vectors from Parquet, Zarr and outputs, a shard at a time."""

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zarr
from samples import local_run

from pipeline.clustering.hierarchical_kmeans import HierarchicalKMeans
from pipeline.errors import PipelineError
from pipeline.storage.features import FeatureArrays, open_features
from pipeline.storage.parquet import ParquetFormat
from pipeline.storage.source import TableSource
from pipeline.storage.zarr import ZarrFormat
from pipeline.tensors import as_bytes, tensor_column

X = np.random.default_rng(0).normal(size=(50, 7)).astype(np.float32)


def lists(x, kind):
    if kind == "tensors":
        return tensor_column(x)
    if kind == "fixed":
        return pa.FixedSizeListArray.from_arrays(pa.array(x.ravel()), x.shape[1])
    kinds = {"lists": pa.float32(), "doubles": pa.float64()}
    return pa.array(x.tolist(), pa.list_(kinds[kind]))


@pytest.mark.parametrize("kind", ["tensors", "bytes", "fixed", "lists", "doubles"])
def test_parquet(tmp_path, kind):
    for number, rows in enumerate((slice(0, 30), slice(30, 50))):
        column = lists(X[rows], "tensors" if kind == "bytes" else kind)
        table = pa.table({"other": list(range(len(X[rows]))), "v": column})
        table = as_bytes(table) if kind == "bytes" else table
        pq.write_table(table, tmp_path / f"{number}.parquet", row_group_size=20)
    source = open_features(tmp_path, "v")
    arrays = FeatureArrays(source, "v")
    assert [len(part) for part in arrays] == [20, 10, 20]
    np.testing.assert_array_equal(np.concatenate(list(arrays)), X)
    lean = source.lean()
    np.testing.assert_array_equal(
        np.concatenate([FeatureArrays(source, "v")[1], arrays[2]]), X[20:]
    )
    assert lean.read(source.shards[2]).num_rows == 20
    assert len({shard.identity for shard in source.shards}) == 3


@pytest.mark.parametrize("grouped", [False, True])
def test_zarr(tmp_path, grouped, monkeypatch):
    monkeypatch.setattr("pipeline.storage.features._ROWS", 16)
    where = tmp_path / "x.zarr"
    if grouped:
        array = zarr.open_group(where, mode="w").create_array(
            "v", shape=X.shape, chunks=(6, 7), dtype="f4"
        )
    else:
        array = zarr.create_array(where, shape=X.shape, chunks=(6, 7), dtype="f4")
    array[:] = X
    source = open_features(where, "v")
    arrays = FeatureArrays(source, "v")
    assert [len(part) for part in arrays] == [18, 18, 14]
    np.testing.assert_array_equal(np.concatenate(list(arrays)), X)
    chunk = next(path for path in where.rglob("c/*/*") if path.is_file())
    chunk.unlink()
    with pytest.raises(PipelineError, match="chunks are missing"):
        open_features(where, "v").shards  # noqa: B018


@pytest.mark.parametrize("to", [ParquetFormat(), ZarrFormat()], ids=["parquet", "zarr"])
def test_the_output_of_a_step(tmp_path, to):
    parts = []
    for number, rows in enumerate((slice(0, 30), slice(30, 50))):
        keys = [f"k{i}" for i in range(rows.start, rows.stop)]
        labels = pa.array([0] * len(keys), pa.int64())
        table = {"key": keys, "label": labels, "v": tensor_column(X[rows])}
        parts.append((f"{number:03d}", pa.table(table)))
    made = local_run(tmp_path).map("features", TableSource(tuple(parts), ("all",)), [], to=to)
    source = open_features(tmp_path / made.artifact.name, "v")
    np.testing.assert_array_equal(np.concatenate(list(FeatureArrays(source, "v"))), X)


def test_a_stream_is_clustered(tmp_path):
    pq.write_table(pa.table({"v": lists(X, "fixed")}), tmp_path / "x.parquet", row_group_size=13)
    shards = FeatureArrays(open_features(tmp_path, "v"), "v")
    made = HierarchicalKMeans(5, random_state=0).fit(shards)
    other = HierarchicalKMeans(5, random_state=0).fit(X)
    np.testing.assert_array_equal(made.cluster_centers_, other.cluster_centers_)


@pytest.mark.parametrize(
    ("column", "says"),
    [
        ("w", "no column 'w'"),
        ("ragged", "one length"),
        ("text", "one length"),
        ("gap", "one length"),
    ],
)
def test_columns_that_are_not_vectors(tmp_path, column, says):
    table = {
        "v": lists(X[:3], "fixed"),
        "ragged": pa.array([[1.0], [1.0, 2.0], [1.0, 2.0, 3.0]]),
        "text": ["a", "b", "c"],
        "gap": pa.array([[1.0], None, [2.0]]),
    }
    pq.write_table(pa.table(table), tmp_path / "x.parquet")
    source = open_features(tmp_path, column)
    with pytest.raises(PipelineError, match=says):
        FeatureArrays(source, column)[0]


def test_nothing_there(tmp_path):
    with pytest.raises(PipelineError, match="no vectors"):
        open_features(tmp_path, "v")
    zarr.create_array(tmp_path / "x.zarr", shape=(3,), dtype="f4")[:] = 1
    with pytest.raises(PipelineError, match="no matrix"):
        open_features(tmp_path / "x.zarr", "v").shards  # noqa: B018
