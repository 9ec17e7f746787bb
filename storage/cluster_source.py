"""Samples by cluster: what is compared with what."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from pipeline.digest import digest
from pipeline.storage.artifact import ArtifactSource
from pipeline.storage.source import Shard, Source


@dataclass(frozen=True)
class ClusterSource(Source):
    """The members of ranges of clusters, a range a shard.

    A sample is a member of its ``cluster`` and of the ``second`` nearest. A shard is a table of
    ``sample``, the key; ``feature``, ``distance`` and ``group``, the cluster, in whose order rows
    are. The shards of ``base`` are read one after the other, so that no more than the members and
    one of them are in memory.

    Args:
        base: a step's output with ``key``, ``feature``, ``cluster``, ``second`` and ``distance``.
        ranges: first cluster of each shard, and the one after its last.
    """

    base: ArtifactSource
    ranges: tuple[tuple[int, int], ...]

    @property
    def classes(self) -> tuple[str, ...]:
        return ()

    @cached_property
    def shards(self) -> tuple[Shard, ...]:
        return tuple(
            Shard(
                f"clusters-{first:06d}",
                digest(self.base.identity, first, end),
                location={"first": first, "end": end},
            )
            for first, end in self.ranges
        )

    def lean(self) -> ClusterSource:
        # A worker reads all shards of the base, whose list it finds in the artifact.
        return ClusterSource(self.base.lean(), ())

    def read(self, shard: Shard) -> pa.Table:
        first, end = shard.location["first"], shard.location["end"]
        parts = []
        for table in self.base.tables():
            for name in ("cluster", "second"):
                groups = np.asarray(table[name], np.int32)
                rows = pa.array(np.flatnonzero((groups >= first) & (groups < end)))
                chosen = table.select(["key", "feature", "distance"]).take(rows)
                columns = ["sample", "feature", "distance"]
                group = pa.array(groups[np.asarray(rows)], pa.int32())
                parts.append(chosen.rename_columns(columns).append_column("group", group))
        members = pa.concat_tables(parts)
        order = np.argsort(np.asarray(members["group"]), kind="stable")
        return members.take(pa.array(order))


def cluster_ranges(members: npt.NDArray[np.int64], rows: int) -> tuple[tuple[int, int], ...]:
    """Neighbouring clusters that have no more than ``rows`` members together, or are alone.

    Args:
        members: of each cluster.
        rows: of a shard.
    """
    found: list[tuple[int, int]] = []
    start, total = 0, 0
    for cluster, count in enumerate(members.tolist()):
        if total and total + count > rows:
            found.append((start, cluster))
            start, total = cluster, 0
        total += count
    return (*found, (start, len(members))) if total else tuple(found)


def count_members(tables: Iterable[pa.Table], clusters: int) -> npt.NDArray[np.int64]:
    """Members of each cluster: samples of which it is the nearest or the second."""
    total = np.zeros(clusters, np.int64)
    for table in tables:
        for name in ("cluster", "second"):
            total += np.bincount(np.asarray(table[name]), minlength=clusters)
    return total
