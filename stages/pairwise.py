"""Members of clusters to the earlier ones that they are most like."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import ClassVar

import numpy as np
import pyarrow as pa

from pipeline.pruning.semantic_duplicates import earlier_similarity, order_of
from pipeline.stage import ShardContext
from pipeline.tensors import to_numpy


@dataclass(frozen=True)
class Pairwise:
    """The largest cosine of each member of a group with an earlier one of the same group.

    Takes the tables of :class:`~pipeline.storage.cluster_source.ClusterSource`; gives ``sample``,
    ``similarity`` (float32, -1 for the first of a group) and ``of``, the earlier one.

    Args:
        block: members that are compared with all before them at a time.
    """

    block: int = 1024

    version: ClassVar[int] = 1

    def __call__(self, table: pa.Table, context: ShardContext) -> pa.Table:
        groups = np.asarray(table["group"])
        edges = np.flatnonzero(np.diff(groups, prepend=groups[:1] - 1, append=groups[-1:] + 1))
        x, distances = to_numpy(table["feature"]), np.asarray(table["distance"])
        samples = table["sample"].combine_chunks()
        similarity = np.full(len(table), -1.0, np.float32)
        of = np.full(len(table), -1, np.int64)
        for lo, hi in pairwise(edges):
            rows = lo + order_of(distances[lo:hi], samples[lo:hi])
            similarity[rows], earlier = earlier_similarity(x[rows], self.block)
            of[rows] = np.where(earlier >= 0, rows[earlier], -1)
        names = samples.take(pa.array(of, pa.int64(), mask=of < 0))
        return pa.table({"sample": samples, "similarity": pa.array(similarity), "of": names})
