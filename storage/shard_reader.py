"""Samples of a source by their place, in any order."""

from __future__ import annotations

import hashlib
import os
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

    @cached_property
    def digest(self) -> str:
        """SHA-256 of which samples are meant."""
        found = hashlib.sha256(self.shards.tobytes())
        if self.rows is not None:
            found.update(self.rows.tobytes())
        else:
            found.update("\n".join(self.keys.to_pylist()).encode())  # type: ignore[union-attr]
        return found.hexdigest()

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

    It may be used by several threads, of which one reads a shard, and in forked processes.

    Args:
        source: what is read.
        max_bytes: of the tables that are kept, without the one at hand.
    """

    def __init__(self, source: Source, max_bytes: int = 2**28) -> None:
        self.source, self.max_bytes = source, max_bytes
        self._held: OrderedDict[int, _Held] = OrderedDict()
        self._begin()

    def _begin(self) -> None:
        self._process, self._lock = os.getpid(), threading.Lock()
        self._reading: dict[int, Future[_Held]] = {}

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

    def shard(self, number: int) -> pa.Table:
        """All of a shard. Raises as its source does."""
        return self._shard(number).table

    def _shard(self, number: int) -> _Held:
        if self._process != os.getpid():
            self._begin()  # what a thread of the parent was reading, nobody reads here
        with self._lock:
            if number in self._held:
                self._held.move_to_end(number)
                return self._held[number]
            other = self._reading.get(number)
            if other is None:
                mine = self._reading[number] = Future[_Held]()
        if other is not None:
            return other.result()
        try:
            table = self.source.read(self.source.shards[number])
            held = _Held(table.combine_chunks() if len(table) else table)
        except BaseException as error:
            with self._lock:
                del self._reading[number]
            mine.set_exception(error)
            raise
        with self._lock:
            del self._reading[number]
            self._make_room()
            self._held[number] = held
        mine.set_result(held)
        return held

    def _make_room(self) -> None:
        total = sum(held.table.nbytes for held in self._held.values())
        while total > self.max_bytes:
            _, oldest = self._held.popitem(last=False)
            total -= oldest.table.nbytes


def keys_in(places: Places, wanted: pa.Array) -> Rows:
    """Rows of places whose keys are among ``wanted``."""
    return np.flatnonzero(np.asarray(pc.is_in(places.keys, wanted)))
