"""What came of the shards of a step, as a table: of a million as well as of ten."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, overload

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipeline.storage.source import Shard

FILES = pa.list_(pa.struct([("path", pa.string()), ("bytes", pa.int64()), ("sha256", pa.string())]))
RECORDS = pa.schema(
    [
        ("index", pa.int64()),
        ("name", pa.string()),
        ("identity", pa.string()),
        ("rows", pa.int64()),
        ("bytes", pa.int64()),
        ("offset", pa.int64()),
        ("files", FILES),
        ("counts", pa.string()),
        ("metrics", pa.string()),
    ]
)
"""A record: the shard's place in its step, its name, a digest of all that its content depends on,
its rows and their size, the rows before it, its files, and as JSON its counts and metrics."""

TEXTS = ("counts", "metrics")
BATCH = 8192


def to_table(records: Iterable[Mapping[str, Any]], schema: pa.Schema = RECORDS) -> pa.Table:
    """Records as a table."""
    return pa.Table.from_pylist(
        [
            {**record, **{name: _text(record[name]) for name in TEXTS if name in record}}
            for record in records
        ],
        schema,
    )


def to_records(table: pa.Table) -> Iterator[dict[str, Any]]:
    """Records of a table; what one does not have is left out."""
    for batch in table.to_batches(BATCH):
        for row in batch.to_pylist():
            texts = {name: json.loads(row[name]) for name in TEXTS if row.get(name)}
            yield {name: value for name, value in {**row, **texts}.items() if value is not None}


def _text(value: Any) -> str:
    return json.dumps(value, sort_keys=True, allow_nan=False)


def write_records(table: pa.Table, path: Path) -> None:
    """Write a table of records; the same one gives the same bytes."""
    pq.write_table(table, path, row_group_size=BATCH, compression="zstd")


def add_counts(parts: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """The sum of sample counts: ``in`` = ``out`` + ``filtered`` + ``quarantined``."""
    return _sum((part, 1) for part in parts)


def total_counts(table: pa.Table) -> dict[str, Any]:
    """The sum of a table's counts."""
    # Most shards of a data set have the same counts: each is read once.
    texts = pc.value_counts(table["counts"].drop_null()).to_pylist()
    return _sum((json.loads(item["values"]), item["counts"]) for item in texts)


def _sum(parts: Iterable[tuple[Mapping[str, Any], int]]) -> dict[str, Any]:
    sides: Counter[str] = Counter({"in": 0, "out": 0})
    reasons: dict[str, Counter[str]] = {"filtered": Counter(), "quarantined": Counter()}
    for part, times in parts:
        for side in ("in", "out"):
            sides[side] += part[side] * times
        for kind, counter in reasons.items():
            counter.update({reason: rows * times for reason, rows in part[kind].items()})
    return {**sides, **{kind: dict(counter) for kind, counter in reasons.items()}}


class RecordedShards(Sequence[Shard]):
    """The shards of a table of records, made when they are asked for.

    Args:
        table: records with a column ``artifact``, the number of the artifact that they are of.
    """

    def __init__(self, table: pa.Table) -> None:
        self._table = table.combine_chunks()

    def __eq__(self, other: object) -> bool:
        return isinstance(other, RecordedShards) and self._table.equals(other._table)

    __hash__ = None  # type: ignore[assignment]

    def __len__(self) -> int:
        return int(self._table.num_rows)

    def __iter__(self) -> Iterator[Shard]:
        for batch in self._table.to_batches(BATCH):
            yield from map(_shard, batch.to_pylist())

    @overload
    def __getitem__(self, index: int) -> Shard: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Shard]: ...
    def __getitem__(self, index: int | slice) -> Shard | Sequence[Shard]:
        if isinstance(index, slice):
            start, stop, step = index.indices(len(self))
            return [self[place] for place in range(start, stop, step)]
        place = range(len(self))[index]
        return _shard(self._table.slice(place, 1).to_pylist()[0])


def _shard(row: Mapping[str, Any]) -> Shard:
    files = [[entry["path"], entry["bytes"], entry["sha256"]] for entry in row["files"]]
    place = {"artifact": row["artifact"], "offset": row["offset"], "files": files}
    return Shard(row["name"], row["identity"], row["rows"], place, row["bytes"])
