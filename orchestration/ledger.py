"""Which shards of a step are finished: a record of each, written by its worker.

A worker writes a small file a shard. The driver gathers them into parts, tables of some thousand
records, so that a step of a million shards is a few hundred files; a million names, sizes and
counts are then read in a second, part by part.
"""

from __future__ import annotations

import hashlib
import io
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipeline.storage.atomic import seal, unseal
from pipeline.storage.records import RECORDS, add_counts, to_table, total_counts
from pipeline.storage.store import Store

PART = 4096
"""Records of a part."""
ENTRIES = RECORDS.append(pa.field("at", pa.float64())).append(pa.field("seconds", pa.float64()))
"""A record with when its shard was finished (Unix time) and how long that took."""
Flags = npt.NDArray[np.bool_]


@dataclass
class Totals:
    """What the finished shards of a step come to.

    Attributes:
        shards: how many there are.
        rows: samples that they hold.
        bytes: size of these as tables.
        seconds: time that workers spent on them.
        first, last: when the first and the last was finished, Unix time; 0 where none was.
        counts: samples ``in``, ``out``, ``filtered`` and ``quarantined``.
    """

    shards: int = 0
    rows: int = 0
    bytes: int = 0
    seconds: float = 0.0
    first: float = 0.0
    last: float = 0.0
    counts: dict[str, Any] = field(default_factory=lambda: add_counts([]))

    def add(self, table: pa.Table) -> None:
        """Count the records of a table."""
        if not table.num_rows:
            return
        times = pc.min_max(table["at"]).as_py()
        self.shards += table.num_rows
        self.rows += pc.sum(table["rows"]).as_py() or 0
        self.bytes += pc.sum(table["bytes"]).as_py() or 0
        self.seconds += pc.sum(table["seconds"]).as_py() or 0.0
        self.first = min(self.first or times["min"], times["min"])
        self.last = max(self.last, times["max"])
        self.counts = add_counts([self.counts, total_counts(table)])


@dataclass(frozen=True)
class Ledger:
    """The records of one step.

    Args:
        store: where the records lie.
        artifact: the published files that the records speak of.
    """

    store: Store
    artifact: Store

    def write(self, record: Mapping[str, Any]) -> None:
        """Commit a shard: from now on it is finished."""
        # Not forced to the disk: its files are, and a record that is lost is written once more.
        self.store.replace(_loose(record["name"]), seal(record), durable=False)

    def compact(self, records: Sequence[Mapping[str, Any]]) -> None:
        """Gather records that their workers have written into a part."""
        if not records:
            return
        buffer = io.BytesIO()
        pq.write_table(to_table(records, ENTRIES), buffer, compression="zstd")
        data = buffer.getvalue()
        self.store.replace(f"parts/{hashlib.sha256(data).hexdigest()}.parquet", data)
        for record in records:
            self.store.delete(_loose(record["name"]))

    def tables(self, columns: Sequence[str] = tuple(ENTRIES.names)) -> Iterator[pa.Table]:
        """The records that are whole, each once; a shard whose record is damaged is done again.

        Args:
            columns: those that are wanted, ``index`` among them.
        """
        seen = np.zeros(0, np.bool_)
        for table in self._tables(list(columns)):
            index = table["index"].to_numpy()
            seen = np.pad(seen, (0, max(0, index.max(initial=-1) + 1 - len(seen))))
            new = _first(index, seen)
            yield table if new.all() else table.filter(pa.array(new))

    def _tables(self, columns: list[str]) -> Iterator[pa.Table]:
        names = [info.name for info in self.store.files()]
        for name in names:
            if name.startswith("parts/"):
                data = self.store.read(name)
                if hashlib.sha256(data).hexdigest() == name[6:70]:
                    # Not by 'read_table', which takes long to import what it would need.
                    yield pq.ParquetFile(io.BytesIO(data)).read(columns).select(columns)
        loose = [name for name in names if name.startswith("shards/")]
        for start in range(0, len(loose), PART):
            records = []
            for data in self.store.read_many(loose[start : start + PART]):
                with suppress(ValueError):
                    records.append(unseal(data))
            yield to_table(records, ENTRIES).select(columns)

    def totals(self) -> Totals:
        """What the records come to; their files are not looked for."""
        totals = Totals()
        for table in self.tables(("index", "rows", "bytes", "counts", "at", "seconds")):
            totals.add(table)
        return totals

    def finished(self, columns: Sequence[str] = tuple(ENTRIES.names)) -> Iterator[pa.Table]:
        """The records whose files are there with their sizes.

        Args:
            columns: those that are wanted, ``index`` and ``files`` among them.
        """
        sizes: Sizes | None = None
        for table in self.tables(columns):
            if table.num_rows:
                sizes = sizes or Sizes(self.artifact.sizes())
                yield table.filter(pa.array(sizes.hold(table["files"].combine_chunks())))

    def collect(self) -> pa.Table:
        """The finished records in the order of their shards, as an artifact's index holds them."""
        parts = [RECORDS.empty_table()]
        parts += [table.select(RECORDS.names) for table in self.finished()]
        table = pa.concat_tables(parts)
        table = table.take(pc.sort_indices(table["index"])).combine_chunks()
        if table["rows"].null_count:
            return table
        rows = table["rows"].to_numpy()
        offsets = pa.array(np.cumsum(rows) - rows, pa.int64())
        return table.set_column(RECORDS.get_field_index("offset"), "offset", offsets)

    def fail(self, record: Mapping[str, Any]) -> None:
        """Put a shard into quarantine: it is left alone until it is taken up again."""
        self.store.replace(f"failed/{record['name']}.json", seal(record))

    def failed(self) -> dict[str, dict[str, Any]]:
        """The errors of the shards in quarantine, by name."""
        names = [info.name for info in self.store.files() if info.name.startswith("failed/")]
        found = {}
        for data in self.store.read_many(names):
            with suppress(ValueError):
                record = unseal(data)
                found[record["name"]] = record["error"]
        return found

    def forgive(self) -> None:
        """Let the shards in quarantine be tried again."""
        for name in self.failed():
            self.store.delete(f"failed/{name}.json")


class Sizes:
    """The sizes of a million files in 16 MB: by a number for each name, not by the name.

    Args:
        files: names and sizes in bytes.
    """

    def __init__(self, files: Iterable[tuple[str, int]]) -> None:
        pairs = np.fromiter(
            ((hash(name), size) for name, size in files),
            np.dtype([("name", np.int64), ("bytes", np.int64)]),
        )
        order = np.argsort(pairs["name"])
        self._names, self._bytes = pairs["name"][order], pairs["bytes"][order]

    def hold(self, files: pa.ListArray) -> Flags:
        """Whether all files of each list are there with their sizes."""
        flat = files.flatten()
        wanted = np.fromiter(map(hash, flat.field("path").to_pylist()), np.int64)
        sizes = flat.field("bytes").to_numpy()
        place = np.searchsorted(self._names, wanted)
        missing = np.ones(len(wanted), np.bool_)
        inside = place < len(self._names)
        found, at = place[inside], np.flatnonzero(inside)
        missing[at] = (self._names[found] != wanted[at]) | (self._bytes[found] != sizes[at])
        owner = np.repeat(np.arange(len(files)), files.value_lengths().to_numpy())
        whole: Flags = np.bincount(owner, missing, len(files)) == 0
        return whole


def _loose(name: str) -> str:
    return f"shards/{name}.json"


def _first(index: npt.NDArray[np.int64], seen: Flags) -> Flags:
    """Which records are of shards not seen yet; these are then seen."""
    new: Flags = np.zeros(len(index), np.bool_)
    new[np.unique(index, return_index=True)[1]] = True
    new &= ~seen[index]
    seen[index] = True
    return new
