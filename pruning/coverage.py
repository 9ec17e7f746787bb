"""Selectors that cover features: herding and k-center."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt

from pipeline.clustering.compiled import compiled
from pipeline.errors import UsageError
from pipeline.pruning.pool import Pool, Rows

Floats = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Herding:
    """Samples whose mean follows that of their class.

    Source: Welling, "Herding Dynamical Weights to Learn", ICML 2009. With m the mean of the
    features and w = m at first: the sample with the largest <w, x> is taken, and w += m - x.
    """

    name: ClassVar[str] = "herding"
    per_class: ClassVar[bool] = True
    needs: ClassVar[tuple[str, ...]] = ("features",)

    def rank(self, pool: Pool, count: int, seed: int) -> Rows:
        x, order = _by_key(pool)
        best: Rows = order[_herd(x, x.mean(0, dtype=np.float64), min(count, len(x)))]
        return best


@dataclass(frozen=True)
class KCenter:
    """Samples that leave no other far from all of them, found greedily.

    Source: Sener and Savarese, "Active Learning for Convolutional Neural Networks: A Core-Set
    Approach", ICLR 2018. The first is the one nearest to the mean; each next one is that whose
    squared distance to its nearest chosen one is largest. Only these distances are kept, N numbers.
    """

    name: ClassVar[str] = "k-center"
    per_class: ClassVar[bool] = True
    needs: ClassVar[tuple[str, ...]] = ("features",)

    def rank(self, pool: Pool, count: int, seed: int) -> Rows:
        x, order = _by_key(pool)
        best: Rows = order[_furthest(x, x.mean(0, dtype=np.float64), min(count, len(x)))]
        return best


def _by_key(pool: Pool) -> tuple[Floats, Rows]:
    """Features in the order of keys, so that the first of several is that of the first key."""
    order = np.argsort(pool.by_key)
    x = np.ascontiguousarray(checked_features(pool)[order], np.float32)
    return x, order


def checked_features(pool: Pool) -> Floats:
    """The features of a pool.

    Raises:
        UsageError: some are not finite, or there are none.
    """
    features = pool.features
    if features is None or features.ndim != 2 or not np.isfinite(features).all():
        raise UsageError(
            "The features are no finite matrix (N, D).",
            hint="Embed the samples with a network whose outputs are finite.",
            code="bad-features",
        )
    return features


@compiled
def _herd(x: Any, mean: Any, count: int) -> Any:
    taken = np.zeros(x.shape[0], np.bool_)
    chosen, w = np.empty(count, np.int64), mean.copy()
    for k in range(count):
        best, value = -1, -np.inf
        for i in range(x.shape[0]):
            if not taken[i]:
                product = 0.0
                for j in range(x.shape[1]):
                    product += w[j] * x[i, j]
                if product > value:
                    best, value = i, product
        taken[best], chosen[k] = True, best
        for j in range(x.shape[1]):
            w[j] += mean[j] - x[best, j]
    return chosen


@compiled
def _furthest(x: Any, mean: Any, count: int) -> Any:
    near = np.empty(x.shape[0])
    chosen = np.empty(count, np.int64)
    best, value = 0, np.inf
    for i in range(x.shape[0]):
        apart = 0.0
        for j in range(x.shape[1]):
            apart += (mean[j] - x[i, j]) ** 2
        near[i] = np.inf
        if apart < value:
            best, value = i, apart
    for k in range(count):
        chosen[k], near[best] = best, -1.0
        following, value = 0, -1.0
        for i in range(x.shape[0]):
            if near[i] >= 0.0:
                apart = 0.0
                for j in range(x.shape[1]):
                    gap = np.float64(x[best, j]) - np.float64(x[i, j])
                    apart += gap * gap
                near[i] = min(near[i], apart)
                if near[i] > value:
                    following, value = i, near[i]
        best = following
    return chosen
