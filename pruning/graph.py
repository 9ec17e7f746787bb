"""A selector on a graph of nearest neighbours."""

from __future__ import annotations

import heapq
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from pipeline.clustering.compiled import compiled
from pipeline.pruning.coverage import checked_features
from pipeline.pruning.neighbours import nearest_neighbours
from pipeline.pruning.pool import Pool, Rows


@dataclass(frozen=True)
class D2:
    """Hard samples that are unlike one another.

    Source: Maharana et al., "D2 Pruning: Message Passing for Balancing Diversity and Difficulty in
    Data Pruning", 2023. On the graph of the ``neighbours`` nearest, each sample's value is its
    score between 0 and 1, and gains exp(-d) of the values of its neighbours. Then the largest value
    is taken again and again, and the values of its neighbours lose exp(-``gamma`` d) of it.
    Distances d are in units of the mean distance of neighbours.

    Args:
        neighbours: of each sample.
        gamma: how far a sample reaches.
        beta: share of the hardest that is left out as mislabelled, where enough is left.
    """

    neighbours: int = 5
    gamma: float = 1.0
    beta: float = 0.0

    name: ClassVar[str] = "d2"
    per_class: ClassVar[bool] = True
    needs: ClassVar[tuple[str, ...]] = ("scores", "features")

    def rank(self, pool: Pool, count: int, seed: int) -> Rows:
        order = np.argsort(pool.by_key)
        hardest = np.lexsort((np.arange(len(order)), -pool.scores[order]))
        dropped = min(int(self.beta * len(order)), len(order) - min(count, len(order)))
        kept = order[np.sort(hardest[dropped:])]
        scores = pool.scores[kept]
        spread = float(np.ptp(scores))
        values = (scores - scores.min()) / spread if spread else np.ones(len(scores))
        x = np.ascontiguousarray(checked_features(pool)[kept], np.float32)
        near, apart = nearest_neighbours(x, self.neighbours)
        unit = float(apart.mean()) if apart.size else 1.0
        distance = apart.astype(np.float64) / (unit or 1.0)
        values = values + (np.exp(-distance) * values[near]).sum(1)
        best = _greedy(values, near, np.exp(-self.gamma * distance), min(count, len(kept)))
        return np.concatenate([kept[best], order[hardest[:dropped]]])


@compiled
def _greedy(values: Any, near: Any, reach: Any, count: int) -> Any:
    values = values.copy()
    taken = np.zeros(len(values), np.bool_)
    chosen = np.empty(count, np.int64)
    # Values only fall: what a heap holds is a bound, and is put back where it is out of date.
    heap = [(-values[i], i) for i in range(len(values))]
    heapq.heapify(heap)
    done = 0
    while done < count:
        value, i = heapq.heappop(heap)
        if taken[i]:
            continue
        if -value > values[i]:
            heapq.heappush(heap, (-values[i], i))
            continue
        taken[i], chosen[done] = True, i
        done += 1
        for j in range(near.shape[1]):
            values[near[i, j]] -= reach[i, j] * max(values[i], 0.0)
    return chosen
