"""The samples of a source that a selection names."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property, lru_cache

import pyarrow as pa
import pyarrow.compute as pc

from pipeline.digest import digest
from pipeline.storage.artifact import Artifact, ArtifactSource
from pipeline.storage.source import Shard, Source
from pipeline.storage.store import Store


@dataclass(frozen=True)
class SelectedSource(Source):
    """The shards of ``base`` with the selected samples alone; nothing is copied.

    Samples are found by key, so a selection fits any copy of the data set it was made of.

    Args:
        base: a source with the column ``key``.
        selection: a table with the column ``key``, as ``pipeline run prune`` publishes it.
    """

    base: Source
    selection: Artifact

    @property
    def classes(self) -> tuple[str, ...]:
        return self.base.classes

    @cached_property
    def shards(self) -> tuple[Shard, ...]:
        identity = self.selection.identity
        return tuple(
            # How many rows are left is not known; the base may need to know what it had.
            Shard(
                shard.name,
                digest(shard.identity, identity),
                location={"base": asdict(shard)},
                bytes=shard.bytes,
            )
            for shard in self.base.shards
        )

    def lean(self) -> SelectedSource:
        return replace(self, base=self.base.lean())

    def read(self, shard: Shard) -> pa.Table:
        table = self.base.read(Shard(**shard.location["base"]))
        return table.filter(pc.is_in(table["key"], selected_keys(self.selection)))

    def take(self, shard: Shard, keys: Sequence[str]) -> pa.Table:
        table = self.base.take(Shard(**shard.location["base"]), keys)
        return table.filter(pc.is_in(table["key"], selected_keys(self.selection)))


def selected_keys(selection: Artifact) -> pa.Array:
    """The keys of a selection, in its order; one copy a process."""
    return _keys(selection.store, selection.identity)


@lru_cache(maxsize=2)
def _keys(store: Store, _identity: str) -> pa.Array:
    tables = [table.select(["key"]) for table in ArtifactSource(Artifact.open(store)).tables()]
    empty = pa.table({"key": pa.array([], pa.string())})
    return pa.concat_tables(tables or [empty])["key"].combine_chunks()
