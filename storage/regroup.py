"""The samples of a source in other shards and another order."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TypeVar

import pyarrow as pa

from pipeline.digest import digest
from pipeline.storage.source import Shard, Source

T = TypeVar("T")


@dataclass(frozen=True)
class RegroupedSource(Source):
    """Shards of chosen samples, read from ``base`` when they are asked for.

    Args:
        base: the source that holds the samples.
        places: (shard number, row) in ``base`` of each sample, in their new order.
        shard_rows: rows of every shard but the last.
    """

    base: Source
    places: tuple[tuple[int, int], ...]
    shard_rows: int

    @property
    def classes(self) -> tuple[str, ...]:
        return self.base.classes

    @cached_property
    def shards(self) -> tuple[Shard, ...]:
        return tuple(
            Shard(f"{index:05d}", digest(self.base.identity, group), len(group), {"index": index})
            for index, group in enumerate(cut(self.places, self.shard_rows))
        )

    def read(self, shard: Shard) -> pa.Table:
        places = cut(self.places, self.shard_rows)[shard.location["index"]]
        read = {index: self.base.read(self.base.shards[index]) for index, _ in places}
        return pa.concat_tables([read[index].slice(row, 1) for index, row in places])


def find_places(base: Source) -> dict[str, tuple[int, int]]:
    """Where each key lies in ``base``, as (shard number, row)."""
    return {
        key: (index, row)
        for index, table in enumerate(base.tables())
        for row, key in enumerate(table["key"].to_pylist())
    }


def cut(items: Sequence[T], size: int) -> list[Sequence[T]]:
    """``items`` in runs of ``size``; the last may be shorter."""
    return [items[start : start + size] for start in range(0, len(items), size)]
