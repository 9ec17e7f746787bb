"""Features to their nearest prototypes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import pyarrow as pa

from pipeline.pruning.scores import cosine_distance
from pipeline.stage import ShardContext
from pipeline.storage.array_artifact import read_arrays
from pipeline.storage.artifact import Artifact
from pipeline.tensors import to_numpy

_PRODUCTS = 2**22
"""Products of features and centroids that are held at a time: 16 MB."""


@dataclass(frozen=True)
class Assign:
    """Add the two centroids that ``feature`` points most towards, and the distance to the first.

    ``cluster`` and ``second`` are int32; ``distance``, float32, is 1 less the cosine. That is the
    self-supervised prototype score of Sorscher et al., "Beyond neural scaling laws", 2022.

    Args:
        centroids: a step in rounds that has found ``centroids`` (K, D), at least two.
    """

    centroids: Artifact

    version: ClassVar[int] = 1

    def __call__(self, table: pa.Table, context: ShardContext) -> pa.Table:
        x = np.asarray(to_numpy(table["feature"]), np.float32)
        c = np.asarray(read_arrays(self.centroids)["centroids"], np.float64)
        unit = (c / np.maximum(np.linalg.norm(c, axis=1, keepdims=True), 1e-300)).astype(np.float32)
        first, second = (np.empty(len(x), np.int32) for _ in range(2))
        rows = max(_PRODUCTS // len(c), 1)
        for start in range(0, len(x), rows):
            products = x[start : start + rows] @ unit.T
            here = np.arange(len(products))
            first[start : start + rows] = products.argmax(1)
            products[here, first[start : start + rows]] = -np.inf
            second[start : start + rows] = products.argmax(1)
        distance = cosine_distance(x, c[first]).astype(np.float32)
        for name, column in (("cluster", first), ("second", second), ("distance", distance)):
            table = table.append_column(name, pa.array(column))
        return table
