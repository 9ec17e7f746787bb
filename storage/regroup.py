"""The samples of a source in other shards."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from typing import TypeVar

import pyarrow as pa

from pipeline.digest import digest
from pipeline.storage.source import Shard, Source

T = TypeVar("T")


@dataclass(frozen=True)
class ChosenSource(Source):
    """Shards of chosen samples in a chosen order, read from ``base`` when they are asked for.

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


@dataclass(frozen=True)
class GroupedSource(Source):
    """Neighbouring shards of ``base`` as one, as long as they come to ``max_bytes`` together.

    A shard of ``base`` is never cut. Row groups of Parquet and the like are often much smaller
    than a shard should be.
    """

    base: Source
    max_bytes: int

    @property
    def classes(self) -> tuple[str, ...]:
        return self.base.classes

    @cached_property
    def shards(self) -> tuple[Shard, ...]:
        groups: list[list[int]] = []
        size = 0
        for index, shard in enumerate(self.base.shards):
            # The size of what does not say it counts as a whole shard.
            own = self.max_bytes if shard.bytes is None else shard.bytes
            if not groups or size + own > self.max_bytes:
                groups.append([])
                size = 0
            groups[-1].append(index)
            size += own
        return tuple(self._shard(number, group) for number, group in enumerate(groups))

    def _shard(self, number: int, group: list[int]) -> Shard:
        members = [self.base.shards[index] for index in group]
        rows = [member.rows for member in members if member.rows is not None]
        sizes = [member.bytes for member in members if member.bytes is not None]
        return Shard(
            f"{number:05d}",
            digest([member.identity for member in members]),
            sum(rows) if len(rows) == len(members) else None,
            {"first": group[0], "last": group[-1]},
            sum(sizes) if len(sizes) == len(members) else None,
        )

    def _members(self, shard: Shard) -> tuple[Shard, ...]:
        return self.base.shards[shard.location["first"] : shard.location["last"] + 1]

    def read(self, shard: Shard) -> pa.Table:
        return pa.concat_tables([self.base.read(member) for member in self._members(shard)])

    def take(self, shard: Shard, keys: Sequence[str]) -> pa.Table:
        return pa.concat_tables([self.base.take(member, keys) for member in self._members(shard)])


@dataclass(frozen=True)
class EvenSource(Source):
    """Shards of ``shard_rows`` rows each but the last, cut from the rows of ``base`` in order.

    Args:
        base: a source that knows the rows of its shards.
        shard_rows: rows of every shard but the last.
    """

    base: Source
    shard_rows: int

    @property
    def classes(self) -> tuple[str, ...]:
        return self.base.classes

    @cached_property
    def _ends(self) -> list[int]:
        rows = [shard.rows for shard in self.base.shards]
        if None in rows:
            raise ValueError("the base does not know the rows of its shards")
        return list(accumulate(count or 0 for count in rows))

    @cached_property
    def shards(self) -> tuple[Shard, ...]:
        total = self._ends[-1] if self._ends else 0
        return tuple(
            Shard(
                f"{start // self.shard_rows:05d}",
                digest(self.base.identity, self.shard_rows, start),
                min(self.shard_rows, total - start),
                {"start": start},
            )
            for start in range(0, total, self.shard_rows)
        )

    def read(self, shard: Shard) -> pa.Table:
        start = shard.location["start"]
        stop = start + (shard.rows or 0)
        parts = []
        for index in range(bisect_right(self._ends, start), len(self._ends)):
            member = self.base.shards[index]
            first = self._ends[index] - (member.rows or 0)
            if first >= stop:
                break
            table = self.base.read(member)
            begin = max(start - first, 0)
            parts.append(table.slice(begin, min(stop - first, table.num_rows) - begin))
        return pa.concat_tables(parts)


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
