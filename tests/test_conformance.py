"""The suites for plug-in authors see what is wrong."""

from __future__ import annotations

import uuid
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from samples import image_table, keyed

from pipeline.stage import ShardContext
from pipeline.storage.formats import Region
from pipeline.storage.source import Shard, Source, TableSource
from pipeline.testing import assert_same_rows, check_format, check_source, check_stage


@dataclass(frozen=True)
class Wrong(TableSource):
    """Two shards with one thing wrong."""

    fault: str = ""

    @property
    def identity(self) -> str:  # type: ignore[override]
        return uuid.uuid4().hex if self.fault == "identity" else "fixed"

    @property
    def shards(self) -> tuple[Shard, ...]:  # type: ignore[override]
        names = [name for name, _ in self.parts]
        shards = [Shard(name, name, 2) for name in names]
        if self.fault == "order" and len(CALLS) % 2:
            shards.reverse()
        CALLS.append(self.fault)
        if self.fault == "rows":
            shards[1] = Shard(names[1], names[1], 3)
        if self.fault == "name":
            shards[1] = shards[0]
        return tuple(shards)

    def read(self, shard: Shard) -> pa.Table:
        table = super().read(shard)
        row = {"key": f"k{len(CALLS)}", "label": 0} if self.fault == "table" else None
        row = {"key": "k0", "label": 0} if self.fault == "key" else row
        row = {"key": "x", "label": 2} if self.fault == "label" else row
        return pa.Table.from_pylist([row, row | {"key": "y"}], table.schema) if row else table


CALLS: list[str] = []


@pytest.mark.parametrize(
    "fault", ["identity", "order", "rows", "name", "table", "key", "label", "unpicklable"]
)
def test_a_wrong_source_is_seen(fault: str) -> None:
    check_source(Wrong(keyed(2, 2).parts, ("a", "b")))
    source: Source = Wrong(keyed(2, 2).parts, ("a", "b"), fault)
    if fault == "unpicklable":
        object.__setattr__(source, "extra", lambda: None)
    with pytest.raises((AssertionError, AttributeError, TypeError), match=r"\w"):
        check_source(source)


@dataclass(frozen=True)
class WrongFormat:
    """Parquet with one thing wrong."""

    fault: str
    level: int = 1

    name: ClassVar[str] = "wrong"
    regular: ClassVar[bool] = False

    def write(self, table: pa.Table, directory: Path, region: Region) -> None:
        if self.fault == "time":
            table = table.replace_schema_metadata({"made": uuid.uuid4().hex})
        if self.fault == "column":
            table = table.drop_columns(["label"])
        if self.fault == "type":
            table = table.set_column(2, "label", table["label"].cast(pa.float64()))
        if self.fault == "shared":
            pq.write_table(table, directory / "shared.parquet")
        if self.fault != "nothing":
            pq.write_table(table, directory / f"{region.name}.parquet")

    def read(self, directory: Path, name: str, offset: int, rows: int) -> pa.Table:
        table = pq.read_table(directory / f"{name}.parquet", partitioning=None)
        return table.take(list(range(rows))[::-1]) if self.fault == "order" else table


@pytest.mark.parametrize("fault", ["time", "column", "type", "shared", "nothing", "order"])
def test_a_wrong_format_is_seen(fault: str) -> None:
    check_format(WrongFormat("none"), image_table(5))
    with pytest.raises(AssertionError, match=r"\w"):
        check_format(WrongFormat(fault), image_table(5))


@dataclass(frozen=True)
class WrongStage:
    """Passes samples on, with one thing wrong."""

    fault: str

    version: ClassVar[int] = 1

    def __call__(self, table: pa.Table, context: ShardContext) -> pa.Table:
        CALLS.append(self.fault)
        if self.fault == "random":
            return table.append_column("x", pa.array([len(CALLS)] * table.num_rows))
        if self.fault == "bad":
            context.quarantine("stranger", "bad", "")
            return table.slice(1)
        if self.fault == "twice":
            context.filter("none", -1)
            return pa.concat_tables([table, table.slice(0, 1)])
        if self.fault == "metrics":
            context.metrics["calls"] = len(CALLS)
        return table


@dataclass(frozen=True)
class RightStage:
    size: int = 1

    version: ClassVar[int] = 1

    def __call__(self, table: pa.Table, context: ShardContext) -> pa.Table:
        context.filter("even", table.num_rows // 2)
        return table.take(list(range(0, table.num_rows, 2)))


@pytest.mark.parametrize("fault", ["random", "bad", "twice", "metrics"])
def test_a_wrong_stage_is_seen(fault: str) -> None:
    check_stage(RightStage(), image_table(6), ShardContext("0", 0))
    check_stage(WrongStage("none"), image_table(6), ShardContext("0", 0))
    with pytest.raises(AssertionError, match=r"\w"):
        check_stage(WrongStage(fault), image_table(6), ShardContext("0", 0))


@dataclass(frozen=True)
class Overlooking(RightStage):
    identity = "the same whatever the size"


def test_a_field_that_the_identity_overlooks_is_seen() -> None:
    with pytest.raises(AssertionError, match="overlooks the field 'size'"):
        check_stage(Overlooking(), image_table(6), ShardContext("0", 0))


CHANGES: list[Callable[[pa.Table], pa.Table]] = [
    lambda t: t.slice(1),
    lambda t: t.drop_columns(["label"]),
    lambda t: t.append_column("more", t["label"]),
    lambda t: t.take([1, 0, 2, 3]),
    lambda t: t.set_column(1, "image", image_table(4, seed=9)["image"]),
    lambda t: t.set_column(2, "label", t["label"].cast(pa.float32())),
]


@pytest.mark.parametrize("change", CHANGES)
def test_tables_that_differ_are_told_apart(change: Callable[[pa.Table], pa.Table]) -> None:
    table = image_table(4)
    assert_same_rows(table.select(["label", "key", "image"]), table)
    with pytest.raises(AssertionError, match=r"\w"):
        assert_same_rows(change(table), table)
