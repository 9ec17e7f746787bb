"""What a data set is made of: an ordered, frozen list of shards and a way to read each."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import PurePosixPath
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from pipeline.digest import digest
from pipeline.errors import PipelineError
from pipeline.storage.store import FileInfo

ROW = pa.schema({"key": pa.string(), "image": pa.binary(), "label": pa.int64()})
"""Columns of encoded images with labels."""
UNREADABLE = (PipelineError, OSError, ValueError, pa.ArrowException)
"""What a damaged shard makes its source raise."""


@dataclass(frozen=True)
class Shard:
    """One shard of a source: the unit of work, of commit and of retry.

    Attributes:
        name: file-name stem that is unique in its source.
        identity: digest that changes whenever what the shard holds changes.
        rows: number of samples, where it is known without reading.
        location: what the source needs to find the shard again; plain JSON.
        bytes: size of what it is read from, where that is known.
    """

    name: str
    identity: str
    rows: int | None = None
    location: dict[str, Any] = field(default_factory=dict)
    bytes: int | None = None


class Source(ABC):
    """A data set seen as shards.

    ``read`` and ``take`` look at the shard that they are given and never at the list of shards: a
    worker has a ``lean`` copy of the source.

    ``read`` gives a table with at least ``key`` (string, unique in the data set), and where the
    source has them ``image`` (encoded bytes as they were found, or a fixed-shape uint8 tensor
    H x W x C) and ``label`` (int64 index into ``classes``). A sample that lacks its image or label
    is given all the same, with null in its place: a step puts it into quarantine. So it does with
    one that has a text in the column ``error``, which says why it could not be read. The list of
    shards depends on the input alone, never on who reads it.
    """

    @property
    @abstractmethod
    def shards(self) -> Sequence[Shard]:
        """The shards, in order."""

    @property
    @abstractmethod
    def classes(self) -> tuple[str, ...]:
        """Class names by label; empty where the source has no labels."""

    @abstractmethod
    def read(self, shard: Shard) -> pa.Table:
        """The samples of one shard."""

    def take(self, shard: Shard, keys: Sequence[str]) -> pa.Table:
        """The samples of one shard with the given keys."""
        table = self.read(shard)
        return table.filter(pc.is_in(table["key"], pa.array(keys, pa.string())))

    @cached_property
    def identity(self) -> str:
        """Digest of the list of shards and of the class names."""
        shards = hashlib.sha256()
        for shard in self.shards:
            shards.update(f"{shard.identity}\n".encode())
        return digest(shards.hexdigest(), self.classes)

    def lean(self) -> Source:
        """This source without its list of shards: what a worker needs to read those it is given."""
        return self

    def tables(self) -> Iterator[pa.Table]:
        """Every shard's table, in order."""
        for shard in self.shards:
            yield self.read(shard)


@dataclass(frozen=True)
class TableSource(Source):
    """Shards held in memory: lists of keys and labels made by a recipe.

    What is read is built anew: then its size in memory does not tell where the table came from.

    Args:
        parts: (shard name, table) pairs in order.
        classes: class names by label.
    """

    parts: tuple[tuple[str, pa.Table], ...]
    classes: tuple[str, ...] = ()

    @cached_property
    def shards(self) -> tuple[Shard, ...]:
        return tuple(
            Shard(name, digest(name, table.to_pydict()), table.num_rows)
            for name, table in self.parts
        )

    def read(self, shard: Shard) -> pa.Table:
        table = dict(self.parts)[shard.name]
        return pa.Table.from_pydict(table.to_pydict(), schema=table.schema)


def shard_names(files: Sequence[FileInfo]) -> list[str]:
    """A shard name for each file: its stem, after its number where two have the same stem."""
    stems = [PurePosixPath(file.name).name.partition(".")[0] for file in files]
    if len(set(stems)) == len(stems):
        return stems
    return [f"{number:05d}-{stem}" for number, stem in enumerate(stems)]
