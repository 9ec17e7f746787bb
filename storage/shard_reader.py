"""Samples of a source by their place, in any order."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from pipeline.errors import RunError
from pipeline.storage.source import Source

Rows = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Places:
    """Where n samples lie: in which shard, and there in which row or under which key.

    Attributes:
        shards: int32 (n,), numbers of shards in their source, ascending.
        rows: int32 (n,); ``None`` where samples are found by key.
        keys: n strings; ``None`` where they have not been read.
    """

    shards: npt.NDArray[np.int32]
    rows: npt.NDArray[np.int32] | None
    keys: pa.Array | None

    @classmethod
    def of(cls, source: Source) -> Places:
        """Of all samples of a source; its shards are read where they do not say how many."""
        counts = [shard.rows for shard in source.shards]
        if None in counts:
            return cls.read(source)
        return cls.counted([count or 0 for count in counts])

    @classmethod
    def counted(cls, counts: Sequence[int], keys: pa.Array | None = None) -> Places:
        """Of all rows of shards of known sizes."""
        rows = [np.arange(count, dtype=np.int32) for count in counts]
        shards = np.repeat(np.arange(len(counts), dtype=np.int32), counts)
        return cls(shards, np.concatenate([np.empty(0, np.int32), *rows]), keys)

    @classmethod
    def read(cls, source: Source) -> Places:
        """Of all samples of a source, with their keys; reads all of it."""
        keys = [_text(table["key"]) for table in source.tables()]
        return cls.counted([len(part) for part in keys], pa.concat_arrays([_text(None), *keys]))

    def __len__(self) -> int:
        return len(self.shards)

    @cached_property
    def edges(self) -> Rows:
        """Where each shard that has samples begins, and the end."""
        return np.flatnonzero(np.diff(self.shards, prepend=-1, append=-2))

    def take(self, rows: Rows) -> Places:
        """Some of them, in ascending order."""
        rows_in = None if self.rows is None else self.rows[rows]
        keys = None if self.keys is None else self.keys.take(pa.array(rows))
        return Places(self.shards[rows], rows_in, keys)


def _text(column: pa.ChunkedArray | None) -> pa.Array:
    if column is None:
        return pa.array([], pa.string())
    whole = column.cast(pa.string()).combine_chunks()
    return pa.concat_arrays(whole.chunks) if isinstance(whole, pa.ChunkedArray) else whole


@dataclass
class _Held:
    """A shard's table."""

    table: pa.Table

    @cached_property
    def keys(self) -> dict[str, int]:
        names = self.table["key"].to_pylist()
        return {name: row for row, name in reversed(list(enumerate(names)))}


class ShardReader:
    """Reads samples by their places and keeps the shards that were used last.

    It may be used by several threads, of which one reads a shard; other processes get an empty one.

    Args:
        source: what is read.
        max_bytes: of the tables that are kept, without the one at hand.
    """

    def __init__(self, source: Source, max_bytes: int = 2**28) -> None:
        self.source, self.max_bytes = source, max_bytes
        self._lock = threading.Lock()
        self._held: OrderedDict[int, Future[_Held]] = OrderedDict()

    def __getstate__(self) -> dict[str, Any]:
        return {"source": self.source, "max_bytes": self.max_bytes}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(**state)  # type: ignore[misc]

    def read(self, shard: int, places: Places, rows: Rows) -> pa.Table:
        """The samples at some of ``places`` that lie in one shard, in their order.

        Raises:
            RunError: the shard is damaged, or a sample is not in it any more.
        """
        held = self._shard(shard)
        if places.rows is not None:
            return held.table.take(pa.array(places.rows[rows]))
        keys = places.keys.take(pa.array(rows)).to_pylist()  # type: ignore[union-attr]
        found = [held.keys.get(key) for key in keys]
        if None in found:
            raise RunError(
                f"The sample '{keys[found.index(None)]}' is not where it was.",
                hint="The data set has changed since it was pruned: prune it again.",
                code="no-sample",
            )
        return held.table.take(pa.array(found, pa.int64()))

    def _shard(self, number: int) -> _Held:
        with self._lock:
            found = self._held.get(number)
            if found is not None:
                self._held.move_to_end(number)
            else:
                mine = self._held[number] = Future[_Held]()
        if found is not None:
            return found.result()
        try:
            table = self.source.read(self.source.shards[number])
            held = _Held(table.combine_chunks() if len(table) else table)
        except BaseException as error:
            with self._lock:
                self._held.pop(number, None)
            mine.set_exception(error)
            raise
        mine.set_result(held)
        self._make_room(number)
        return held

    def _make_room(self, newest: int) -> None:
        with self._lock:
            done = {n: f.result().table.nbytes for n, f in self._held.items() if f.done()}
            total = sum(done.values()) - done.get(newest, 0)
            for number, size in done.items():
                if total <= self.max_bytes:
                    break
                if number != newest:
                    del self._held[number]
                    total -= size


def keys_in(places: Places, wanted: pa.Array) -> Rows:
    """Rows of places whose keys are among ``wanted``."""
    return np.flatnonzero(np.asarray(pc.is_in(places.keys, wanted)))
