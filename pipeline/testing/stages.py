"""What every stage promises."""

from __future__ import annotations

import copy
import dataclasses
import json
from typing import Any, cast

import pyarrow as pa

from pipeline.digest import canonical, digest
from pipeline.stage import ShardContext, Stage
from pipeline.testing.pickled import pickled
from pipeline.testing.tables import assert_same_rows


def check_stage(stage: Stage, table: pa.Table, context: ShardContext) -> pa.Table:
    """Check the contract of :class:`~pipeline.stage.Stage` on one table.

    Args:
        stage: the stage.
        table: what it takes.
        context: what the stage reports to, as at the end of the first of two runs.

    Returns:
        What the stage made of the table.

    Raises:
        AssertionError: a promise is broken; the message says which.
    """
    _check_identity(stage)
    second = copy.deepcopy(context)
    before = _left_out(context)
    result = stage(table, context)
    left_out = _left_out(context) - before
    assert table.num_rows == result.num_rows + left_out, (
        f"{table.num_rows} samples went in, {result.num_rows} came out and {left_out} were reported"
    )
    _check_keys(table, result, context)
    assert_same_rows(pickled(stage)(table, second), result)
    assert (second.filtered, second.bad) == (context.filtered, context.bad), (
        "a second run reports other samples"
    )
    assert digest(second.metrics) == digest(context.metrics), "a second run measures otherwise"
    return result


def _left_out(context: ShardContext) -> int:
    return len(context.bad) + sum(context.filtered.values())


def _check_identity(stage: Stage) -> None:
    assert dataclasses.is_dataclass(stage), "a stage is a dataclass"
    assert isinstance(getattr(type(stage), "version", None), int), "a stage has a version"
    json.dumps(canonical(stage), allow_nan=False)
    for field in dataclasses.fields(cast("Any", stage)):
        other = copy.copy(stage)
        object.__setattr__(other, field.name, "another value")
        assert digest(other) != digest(stage), f"the identity overlooks the field '{field.name}'"


def _check_keys(table: pa.Table, result: pa.Table, context: ShardContext) -> None:
    if "key" not in table.column_names or "key" not in result.column_names:
        return
    keys, known = result["key"].to_pylist(), set(table["key"].to_pylist())
    bad = [row["key"] for row in context.bad]
    assert len(set(keys)) == len(keys), "a sample came out twice"
    assert known.issuperset(keys), "a sample came out that did not go in"
    assert known.issuperset(bad), "a sample is in quarantine that did not go in"
    assert not set(keys) & set(bad), "a sample came out and is in quarantine"
