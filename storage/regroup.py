"""The samples of a source in other shards."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from itertools import accumulate, pairwise
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
        shard_rows: rows of every shard but the last, or of each.
    """

    base: Source
    places: tuple[tuple[int, int], ...]
    shard_rows: int | tuple[int, ...]

    @property
    def classes(self) -> tuple[str, ...]:
        return self.base.classes

    @cached_property
    def shards(self) -> tuple[Shard, ...]:
        return tuple(
            self._shard(index, group)
            for index, group in enumerate(cut(self.places, self.shard_rows))
        )

    def _shard(self, index: int, group: Sequence[tuple[int, int]]) -> Shard:
        numbers = sorted({number for number, _ in group})
        members = [self.base.shards[number] for number in numbers]
        rows = [[numbers.index(number), row] for number, row in group]
        identity = digest([member.identity for member in members], rows)
        place = {"members": [asdict(member) for member in members], "rows": rows}
        return Shard(f"{index:05d}", identity, len(group), place)

    def lean(self) -> ChosenSource:
        return replace(self, base=self.base.lean(), places=())

    def read(self, shard: Shard) -> pa.Table:
        members = [self.base.read(member) for member in _members(shard)]
        return pa.concat_tables(
            [members[number].slice(row, 1) for number, row in shard.location["rows"]]
        )


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
            {"members": [asdict(member) for member in members]},
            sum(sizes) if len(sizes) == len(members) else None,
        )

    def lean(self) -> GroupedSource:
        return replace(self, base=self.base.lean())

    def read(self, shard: Shard) -> pa.Table:
        return pa.concat_tables([self.base.read(member) for member in _members(shard)])

    def take(self, shard: Shard, keys: Sequence[str]) -> pa.Table:
        return pa.concat_tables([self.base.take(member, keys) for member in _members(shard)])


@dataclass(frozen=True)
class SampledSource(Source):
    """The first samples of some shards of ``base``, evenly spaced: a look at all of it.

    Args:
        base: any source.
        count: shards, or as many as there are.
        rows: samples of each, at most.
    """

    base: Source
    count: int
    rows: int

    @property
    def classes(self) -> tuple[str, ...]:
        return self.base.classes

    @cached_property
    def shards(self) -> tuple[Shard, ...]:
        every = self.base.shards
        count = min(self.count, len(every))
        chosen = [every[place * len(every) // count] for place in range(count)]
        return tuple(
            Shard(shard.name, digest(shard.identity, self.rows), location={"base": asdict(shard)})
            for shard in chosen
        )

    def lean(self) -> SampledSource:
        return replace(self, base=self.base.lean())

    def read(self, shard: Shard) -> pa.Table:
        return self.base.read(Shard(**shard.location["base"])).slice(0, self.rows)


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
        return tuple(self._shard(start, total) for start in range(0, total, self.shard_rows))

    def _shard(self, start: int, total: int) -> Shard:
        stop = min(start + self.shard_rows, total)
        first, last = bisect_right(self._ends, start), bisect_right(self._ends, stop - 1)
        members = self.base.shards[first : last + 1]
        skip, rows = start - (self._ends[first - 1] if first else 0), stop - start
        identity = digest([member.identity for member in members], skip, rows)
        place = {"members": [asdict(member) for member in members], "skip": skip}
        return Shard(f"{start // self.shard_rows:05d}", identity, rows, place)

    def lean(self) -> EvenSource:
        return replace(self, base=self.base.lean())

    def read(self, shard: Shard) -> pa.Table:
        skip, missing = shard.location["skip"], shard.rows or 0
        parts = []
        for member in _members(shard):
            parts.append(self.base.read(member).slice(skip, missing))
            skip, missing = 0, missing - parts[-1].num_rows
        return pa.concat_tables(parts)


def _members(shard: Shard) -> Iterator[Shard]:
    """The shards of the base that a shard lies in."""
    return (Shard(**member) for member in shard.location["members"])


def find_places(base: Source) -> dict[str, tuple[int, int]]:
    """Where each key lies in ``base``, as (shard number, row)."""
    return {
        key: (index, row)
        for index, table in enumerate(base.tables())
        for row, key in enumerate(table["key"].to_pylist())
    }


def cut(items: Sequence[T], size: int | Sequence[int]) -> list[Sequence[T]]:
    """``items`` in runs of ``size``, the last of which may be shorter, or of these sizes."""
    if isinstance(size, int):
        return [items[start : start + size] for start in range(0, len(items), size)]
    ends = list(accumulate(size, initial=0))
    return [items[start:stop] for start, stop in pairwise(ends)]
