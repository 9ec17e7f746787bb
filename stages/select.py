"""Which samples and which columns go on."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar, Literal

import pyarrow as pa

from pipeline.stage import ShardContext


@dataclass(frozen=True)
class Split:
    """The train or test part of a data set that comes in one piece.

    A sample belongs to the test part if the first 32 bits of its key's SHA-256, read as a
    big-endian number, are divisible by five. The rule looks at nothing else, so a sample stays
    where it is when others are added.
    """

    part: Literal["train", "test"]

    version: ClassVar[int] = 1

    def __call__(self, table: pa.Table, context: ShardContext) -> pa.Table:
        keys = table["key"].to_pylist()
        keep = [in_test(key) == (self.part == "test") for key in keys]
        context.filter("other split", keep.count(False))
        return table.filter(pa.array(keep, pa.bool_()))


def in_test(key: str) -> bool:
    """Whether :class:`Split` puts the sample ``key`` into the test part."""
    return int.from_bytes(hashlib.sha256(key.encode()).digest()[:4], "big") % 5 == 0


@dataclass(frozen=True)
class Keep:
    """The samples with the given keys."""

    keys: tuple[str, ...]

    version: ClassVar[int] = 1

    @cached_property
    def _set(self) -> frozenset[str]:
        return frozenset(self.keys)

    def __call__(self, table: pa.Table, context: ShardContext) -> pa.Table:
        keep = [key in self._set for key in table["key"].to_pylist()]
        context.filter("not selected", keep.count(False))
        return table.filter(pa.array(keep, pa.bool_()))


@dataclass(frozen=True)
class Columns:
    """The named columns, in that order."""

    names: tuple[str, ...]

    version: ClassVar[int] = 1

    def __call__(self, table: pa.Table, context: ShardContext) -> pa.Table:
        return table.select(list(self.names))
