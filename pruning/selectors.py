"""Which samples are kept: selectors that rank by score alone."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Protocol

import numpy as np

from pipeline.pruning.pool import Pool, Rows, key_numbers
from pipeline.registry import Registry


class Selector(Protocol):
    """A frozen dataclass that ranks the samples of a pool, best first.

    Its ranking depends on keys, scores, labels, features and the seed, and not on the order of the
    pool's rows.

    Attributes:
        name: as in :data:`selectors`.
        per_class: whether it is asked for each class apart.
        needs: attributes of the pool that have to be there.
    """

    name: ClassVar[str]
    per_class: ClassVar[bool]
    needs: ClassVar[tuple[str, ...]]

    def rank(self, pool: Pool, count: int, seed: int) -> Rows:
        """Rows, best first, each once: the best ``count``, or all where classes are not apart."""


@dataclass(frozen=True)
class Hard:
    """The highest scores."""

    name: ClassVar[str] = "hard"
    per_class: ClassVar[bool] = False
    needs: ClassVar[tuple[str, ...]] = ("scores",)

    def rank(self, pool: Pool, count: int, seed: int) -> Rows:
        return np.lexsort((pool.by_key, -pool.scores))


@dataclass(frozen=True)
class Easy:
    """The lowest scores."""

    name: ClassVar[str] = "easy"
    per_class: ClassVar[bool] = False
    needs: ClassVar[tuple[str, ...]] = ("scores",)

    def rank(self, pool: Pool, count: int, seed: int) -> Rows:
        return np.lexsort((pool.by_key, pool.scores))


@dataclass(frozen=True)
class Band:
    """Scores nearest to the median of their class, by rank.

    Source: Xia et al., "Moderate Coreset", ICLR 2023: of a share r the percentiles from
    0.5 - r / 2 to 0.5 + r / 2 are kept.
    """

    name: ClassVar[str] = "band"
    per_class: ClassVar[bool] = True
    needs: ClassVar[tuple[str, ...]] = ("scores",)

    def rank(self, pool: Pool, count: int, seed: int) -> Rows:
        order = np.lexsort((pool.by_key, pool.scores))
        # Twice the distance from the middle; of two as far the harder one is first.
        apart = np.abs(2 * np.arange(len(order)) - (len(order) - 1))
        return order[np.lexsort((-np.arange(len(order)), apart))]


@dataclass(frozen=True)
class Ccs:
    """Equally many of each stratum of the score, after the hardest are left out.

    Source: Zheng et al., "Coverage-centric Coreset Selection for High Pruning Rates", ICLR 2023.
    The hardest ``beta`` are dropped as mislabelled, where enough is left; the rest is cut into
    ``strata`` ranges of equal width. From the smallest stratum on, each gives an equal part of what
    is still to be chosen, or all it has, at random.

    Args:
        beta: share of the pool that is dropped. It depends on the data: the paper takes 0 to 0.4.
        strata: ranges of the score.
    """

    beta: float = 0.1
    strata: int = 50

    name: ClassVar[str] = "ccs"
    per_class: ClassVar[bool] = False
    needs: ClassVar[tuple[str, ...]] = ("scores",)

    def rank(self, pool: Pool, count: int, seed: int) -> Rows:
        size = len(pool)
        order = np.lexsort((pool.by_key, pool.scores))
        left = size - min(int(self.beta * size), size - min(count, size))
        kept, dropped = order[:left], order[left:]
        scores = pool.scores[kept]
        low, high = float(scores[0]), float(scores[-1])
        width = (high - low) / self.strata or 1.0
        stratum = np.minimum(((scores - low) / width).astype(np.int64), self.strata - 1)
        number = key_numbers(pool.keys, seed)[kept]
        # Each stratum in random order, the place of each sample in it, and what strata give.
        shuffled = np.lexsort((pool.by_key[kept], number, stratum))
        sizes = np.bincount(stratum, minlength=self.strata)
        given = self._given(sizes, min(count, left))
        starts = np.concatenate([[0], np.cumsum(sizes)[:-1]])
        place = np.arange(left) - starts[stratum[shuffled]]
        chosen = place < given[stratum[shuffled]]
        rest = shuffled[~chosen]
        rest = rest[np.argsort(number[rest], kind="stable")]
        # Of what is chosen no sample is better than another: at random, so that any part will do.
        best = shuffled[chosen]
        best = best[np.argsort(number[best], kind="stable")]
        return np.concatenate([kept[best], kept[rest], dropped])

    def _given(self, sizes: Rows, count: int) -> Rows:
        given = np.zeros(self.strata, np.int64)
        order = [s for s in np.argsort(sizes, kind="stable").tolist() if sizes[s]]
        left = count
        for done, s in enumerate(order):
            given[s] = min(int(sizes[s]), left // (len(order) - done))
            left -= int(given[s])
        return given


@dataclass(frozen=True)
class Random:
    """Equally many of each class at random, of others more where one has fewer: the baseline."""

    name: ClassVar[str] = "random"
    per_class: ClassVar[bool] = False
    needs: ClassVar[tuple[str, ...]] = ()

    def rank(self, pool: Pool, count: int, seed: int) -> Rows:
        number = key_numbers(pool.keys, seed)
        turn = np.empty(len(pool), np.int64)
        for rows in pool.classes():
            turn[rows[np.lexsort((pool.by_key[rows], number[rows]))]] = np.arange(len(rows))
        return np.lexsort((pool.by_key, number, turn))


selectors: Registry[type[Selector]] = Registry(
    "selector",
    {
        "hard": "pipeline.pruning.selectors:Hard",
        "easy": "pipeline.pruning.selectors:Easy",
        "band": "pipeline.pruning.selectors:Band",
        "ccs": "pipeline.pruning.selectors:Ccs",
        "random": "pipeline.pruning.selectors:Random",
        "d2": "pipeline.pruning.graph:D2",
        "herding": "pipeline.pruning.coverage:Herding",
        "k-center": "pipeline.pruning.coverage:KCenter",
    },
)
"""Selectors by name; each is made without arguments."""
