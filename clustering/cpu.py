"""Rows in main memory: seeds, nearest centroids and sums, on the threads of one machine."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import numpy as np
import numpy.typing as npt

from pipeline.clustering import kernels
from pipeline.clustering.directions import (
    Directions,
    Doubles,
    Floats,
    Leading,
    Panels,
    empty_panels,
)
from pipeline.clustering.lloyd import Result
from pipeline.clustering.threads import Threads
from pipeline.clustering.tile import LANES, ROWS

T = TypeVar("T")

CHUNK = 4096
"""Rows whose distances are summed in one go: fixed, so that the sum does not depend on threads."""

_LEAST = 64 * ROWS
"""Rows that are worth a thread."""


class Rows:
    """Rows to cluster, with the label of each and its squared distance to that centroid.

    Args:
        x: float32 (N, D), contiguous.
        weights: float32 (N,), not negative.
        directions: leading directions, if any.
        threads: for ranges of rows.
        leading: the rows' leading coordinates, where they are known.
    """

    def __init__(
        self,
        x: Floats,
        weights: Floats,
        directions: Directions | None,
        threads: Threads,
        leading: Leading | None = None,
    ) -> None:
        self.x, self.weights, self.directions, self.threads = x, weights, directions, threads
        self.leading = leading or Leading.of(x, directions, threads)
        self.labels = np.full(len(x), -1, np.int32)
        self.near = np.zeros(len(x), np.float32)
        # What distances are at most, for rows that are not read, and what centroids moved since.
        self._far = np.full(len(x), np.inf, np.float32)
        self._drift: Doubles = np.zeros(0)
        # Clusters whose sums hold the rows, so that only rows that move are read.
        self._summed = np.full(len(x), -1, np.int32)
        self._sums: Doubles = np.zeros((0, x.shape[1]))

    def part(self, rows: npt.NDArray[np.int64] | slice) -> Rows:
        """Some of the rows, not labelled yet; their memory is shared where they are a slice."""
        leading = self.leading.part(rows) if self.directions else None
        return Rows(self.x[rows], self.weights[rows], self.directions, self.threads, leading)

    def assign(self, centroids: Floats, first: int = 0) -> int:
        """Label each row with its nearest centroid; how many labels changed.

        Args:
            centroids: float32 (K, D): any at first and after :meth:`forget`; then those that
                :meth:`means` gave last.
            first: number of the first, where these come to others that rows are labelled with.
        """
        table, lead = Panels.of(centroids, self.directions, self.threads), self.leading
        new = not first and not len(self._drift)
        if new:
            self._split(
                lambda lo, hi: kernels.nearest_head(
                    lead.head, lo, hi, table.panels, table.half, self.labels
                )
            )
            self.measure(centroids)
        moved = self._split(
            lambda lo, hi: kernels.assign(
                self.x,
                (lead.head, lead.square, lead.error),
                lo,
                hi,
                (table.rows, table.panels, table.half, table.reach, table.blur),
                self._drift[first:],
                not (new or first),
                first,
                self.labels,
                self.near,
                self._far,
            )
        )
        self._drift = np.zeros(first + len(centroids))
        return len(self.x) if new else sum(moved)

    def forget(self) -> None:
        """Have the next centroids assigned as the first ones are."""
        self._drift = np.zeros(0)

    def measure(self, centroids: Floats) -> None:
        """Bring ``near`` up to date: squared distances to the centroids rows are labelled with."""
        self._split(
            lambda lo, hi: kernels.measure(
                self.x, centroids, lo, hi, self.labels, self.near, self._far
            )
        )
        self._drift = np.zeros(len(centroids))

    def inertia(self, centroids: Floats) -> float:
        """The weighted sum of squared distances to the centroids rows are labelled with."""
        self.measure(centroids)
        return float(np.sum(self.chunk_sums()))

    def chunk_sums(self) -> Doubles:
        """The sum of ``weights * near`` of each chunk of rows: float64 (C,)."""
        ends = [*range(CHUNK, len(self.x), CHUNK), len(self.x)]
        pairs = zip([0, *ends], ends, strict=False)
        return np.array([kernels.weighted_sum(self.near, self.weights, *pair) for pair in pairs])

    def means(self, centroids: Floats, spherical: bool) -> tuple[Floats, float]:
        """The weighted mean of each cluster's rows, and the sum of squared distances moved.

        A cluster without weight takes the row that is furthest from its centroid, out of that
        one's cluster; the second such cluster the next row, and so on, rows of equal distance in
        their order. Where all rows lie on centroids it keeps its own.

        Args:
            centroids: float32 (K, D), what rows are labelled with.
            spherical: make means of length 1.
        """
        count = len(centroids)
        self._refill(centroids)
        weight = np.empty(count)
        kernels.weigh(self.labels, self.weights, weight)
        self._update_sums(count)
        means, drift = np.empty_like(centroids), np.empty(count)
        self.threads.split(
            lambda lo, hi: kernels.average(
                self._sums, weight, centroids, spherical, lo, hi, means, drift
            ),
            count,
            256,
        )
        self._drift = drift
        return means, float(drift @ drift)

    def run(
        self, centroids: Floats, *, max_iter: int, tol: float, spherical: bool, assigned: bool
    ) -> Result:
        """What :func:`~pipeline.clustering.lloyd.lloyd` does, in one compiled loop.

        For one thread, which so never waits for the others of the interpreter.
        """
        if not assigned:
            self.assign(centroids)
        count, columns = centroids.shape
        lead, directions = self.leading, self.directions
        panels, half = empty_panels(count, columns, directions)
        mean = directions.mean.astype(np.float64) if directions else np.zeros(columns)
        basis = directions.exact if directions else np.zeros((columns, 0))
        self._begin_sums(count)
        made, done, ended = centroids.copy(), 0, 0
        while not ended:
            self._refill(made)
            done, ended = kernels.iterate(
                self.x,
                (lead.head, lead.square, lead.error),
                self.weights,
                mean,
                basis,
                panels,
                half,
                spherical,
                done,
                max_iter,
                tol,
                made,
                (self.labels, self.near, self._far, self._summed, self._sums, self._drift),
            )
        if ended == 2:
            self.assign(made)
        return Result(made, self.inertia(made), done)

    def _refill(self, centroids: Floats) -> None:
        weight = np.empty(len(centroids))
        kernels.weigh(self.labels, self.weights, weight)
        empty = np.flatnonzero(weight == 0.0)
        if not len(empty):
            return
        self.measure(centroids)
        near = np.where(self.weights > 0.0, self.near, 0.0)
        furthest = np.argsort(-near, kind="stable")[: len(empty)]
        furthest = furthest[near[furthest] > 0.0]
        self.labels[furthest] = empty[: len(furthest)]
        # Whatever its distance from where that cluster was: it is read when it is assigned.
        self._far[furthest] = np.inf

    def _begin_sums(self, count: int) -> None:
        if len(self._sums) != count:
            self._sums = np.zeros((count, self.x.shape[1]))
            self._summed[:] = -1

    def _update_sums(self, count: int) -> None:
        self._begin_sums(count)
        rows = kernels.moved_rows(self.labels, self._summed)
        if 2 * len(rows) > len(self.x):
            self._sums[:] = 0.0
            self._summed[:] = -1
            rows = np.arange(len(self.x))
        before, after = self._summed[rows], self.labels[rows]
        _move(self.x, self.weights, rows, before, after, self._sums, self.threads)
        self._summed[rows] = after

    def _split(self, work: Callable[[int, int], T]) -> list[T]:
        return self.threads.split(work, len(self.x), _LEAST)


def add_rows(
    x: Floats, weights: Floats, labels: npt.NDArray[np.int32], sums: Doubles, threads: Threads
) -> None:
    """Add weighted rows, in their order, to the sums of their clusters.

    Args:
        x: float32 (N, D).
        weights: float32 (N,).
        labels: int32 (N,).
        sums: float64 (K, D), changed.
        threads: for ranges of columns.
    """
    _move(x, weights, np.arange(len(x)), np.full(len(x), -1, np.int32), labels, sums, threads)


def _move(
    x: Floats,
    weights: Floats,
    rows: npt.NDArray[np.int64],
    before: npt.NDArray[np.int32],
    after: npt.NDArray[np.int32],
    sums: Doubles,
    threads: Threads,
) -> None:
    threads.split(
        lambda lo, hi: kernels.move_rows(x, weights, rows, before, after, lo, hi, sums),
        x.shape[1],
        LANES,
    )
