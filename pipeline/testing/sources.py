"""What every source promises."""

from __future__ import annotations

import json
from collections.abc import Collection, Sequence

import pyarrow as pa
import pyarrow.compute as pc

from pipeline.storage.source import Shard, Source
from pipeline.tensors import is_tensor
from pipeline.testing.pickled import pickled
from pipeline.testing.tables import assert_same_rows


def check_source(source: Source, *, may_lack: Collection[str] = ()) -> None:
    """Check the contract of :class:`~pipeline.storage.source.Source`; reads everything thrice.

    Args:
        source: a small one, with at least one sample.
        may_lack: those of the columns ``image`` and ``label`` that some of its samples have not.

    Raises:
        AssertionError: a promise is broken; the message says which.
    """
    again = pickled(source)
    _check_shards(source.shards)
    assert [*source.shards] == [*again.shards], "a copy sees other shards, or in another order"
    assert source.identity == again.identity, "a copy has another identity"
    assert source.classes == again.classes, "a copy has other classes"
    lean = pickled(source.lean())
    keys: list[str] = []
    for shard in source.shards:
        table = source.read(shard)
        assert_same_rows(lean.read(shard), table)
        _check_table(table, shard, len(source.classes), may_lack)
        _check_take(lean, shard, table)
        keys += table["key"].to_pylist()
    assert keys, "there are no samples to check"
    assert len(set(keys)) == len(keys), "two samples have the same key"


def _check_shards(shards: Sequence[Shard]) -> None:
    assert isinstance(shards, Sequence), "shards are not a sequence"
    assert [shards[place] for place in range(len(shards))] == [*shards], "shards have no order"
    names = [shard.name for shard in shards]
    assert len(set(names)) == len(names), "two shards have the same name"
    for shard in shards:
        plain = bool(shard.name) and "/" not in shard.name and not shard.name.startswith(".")
        assert plain, f"'{shard.name}' cannot be the name of a file"
        carried = json.loads(json.dumps(shard.location))
        assert carried == shard.location, f"the location of '{shard.name}' is not plain JSON"
        assert shard.bytes is None or shard.bytes > 0, f"'{shard.name}' has {shard.bytes} bytes"


def _check_table(table: pa.Table, shard: Shard, classes: int, may_lack: Collection[str]) -> None:
    assert shard.rows in {None, table.num_rows}, (
        f"'{shard.name}' was declared with {shard.rows} rows and has {table.num_rows}"
    )
    assert pa.types.is_string(table["key"].type), "keys are not strings"
    assert not table["key"].null_count, "a key is missing"
    if "image" in table.column_names:
        kind = table["image"].type
        pixels = is_tensor(kind) and kind.value_type == pa.uint8() and len(kind.shape) == 3
        assert pixels or pa.types.is_binary(kind), (
            f"images are neither bytes nor uint8 tensors H x W x C: {kind}"
        )
        assert "image" in may_lack or not table["image"].null_count, "an image is missing"
    if "label" in table.column_names and table.num_rows:
        _check_labels(table["label"], classes, may_lack)


def _check_labels(labels: pa.ChunkedArray, classes: int, may_lack: Collection[str]) -> None:
    assert labels.type == pa.int64(), "labels are not int64"
    assert "label" in may_lack or not labels.null_count, "a label is missing"
    low, high = pc.min_max(labels).as_py().values()
    assert low is None or low >= 0, "a label is negative"
    assert high is None or high < classes, f"label {high} in a source of {classes} classes"


def _check_take(source: Source, shard: Shard, table: pa.Table) -> None:
    keys = table["key"].to_pylist()
    choices: list[list[str]] = [[], keys[::2], keys[::-1]]
    for wanted in choices:
        rows = [row for row, key in enumerate(keys) if key in wanted]
        found = source.take(shard, [*wanted, "\0 no such key"])
        try:
            assert_same_rows(found, table.take(pa.array(rows, pa.int64())))
        except AssertionError as error:
            raise AssertionError(f"'take' gives other rows than 'read': {error}") from error
