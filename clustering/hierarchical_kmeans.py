"""k-means with very many clusters, over rows that do not fit in memory."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any, Self

import numpy as np
import numpy.typing as npt
from sklearn.base import BaseEstimator, ClusterMixin, TransformerMixin
from sklearn.metrics import euclidean_distances
from sklearn.utils import check_random_state
from sklearn.utils.validation import check_is_fitted

from pipeline.clustering import kernels
from pipeline.clustering.batched_kmeans import BatchedKMeans
from pipeline.clustering.checks import (
    InputError,
    check_clusters,
    check_rows,
    check_weights,
    unit_rows,
)
from pipeline.clustering.cpu import add_rows
from pipeline.clustering.directions import Doubles, Floats
from pipeline.clustering.kmeans import KMeans, nearest
from pipeline.clustering.threads import Threads

Integers = npt.NDArray[np.int64]

_SAMPLE = 256
"""Rows of the sample for each cell."""


class HierarchicalKMeans(ClusterMixin, TransformerMixin, BaseEstimator):  # type: ignore[misc]
    """k-means in two levels: cells, and clusters within each.

    About sqrt(K) cells come from a sample; each row goes to its nearest cell; cells are given
    clusters in proportion to their sum of squared distances, and are clustered apart, as many at a
    time as fit into ``memory``. So the work of a level's iteration grows with N sqrt(K), not N K,
    and rows are read in order, a few times, from shards that are read when their turn comes. At the
    end all rows meet all centroids ``refine`` times, which mends the borders of cells.

    Args:
        n_clusters: K, no more than there are rows.
        n_cells: cells of the first level; the square root of K where not given.
        memory: bytes of rows that are held at a time. Beside them, or when they are gone, there
            is a shard, and for each centroid 20 bytes a column.
        max_iter: the most iterations within a cell.
        tol: as for ``KMeans``.
        spherical: cluster directions: rows are made of length 1, and so are centroids.
        refine: Lloyd's iterations over all rows and all centroids, at the end.
        compute_labels: find each row's nearest of all centroids at the end.
        random_state: an integer for results that can be repeated.
        n_jobs: threads; as many as there are cores where not given.

    Attributes:
        cluster_centers_: float32 (K, D), those of a cell after those of the one before.
        labels_: int32 (N,); where ``compute_labels``.
        inertia_: the weighted sum of squared distances to the nearest centroid; without
            ``compute_labels``, before the last refinement, which made it less.
        n_iter_: the most iterations that a cell took.
        n_features_in_: D.

    Examples:
        >>> import numpy as np
        >>> from pipeline.clustering.hierarchical_kmeans import HierarchicalKMeans
        >>> x = np.arange(80.0).reshape(40, 2)
        >>> HierarchicalKMeans(6, random_state=0).fit([x[:25], x[25:]]).cluster_centers_.shape
        (6, 2)
    """

    def __init__(
        self,
        n_clusters: int = 1000,
        *,
        n_cells: int | None = None,
        memory: int = 2**30,
        max_iter: int = 100,
        tol: float = 1e-4,
        spherical: bool = False,
        refine: int = 1,
        compute_labels: bool = True,
        random_state: int | np.random.RandomState | None = None,
        n_jobs: int | None = None,
    ) -> None:
        self.n_clusters = n_clusters
        self.n_cells = n_cells
        self.memory = memory
        self.max_iter = max_iter
        self.tol = tol
        self.spherical = spherical
        self.refine = refine
        self.compute_labels = compute_labels
        self.random_state = random_state
        self.n_jobs = n_jobs

    def fit(
        self,
        X: npt.ArrayLike | Sequence[npt.ArrayLike],  # noqa: N803
        y: None = None,
        sample_weight: Any = None,
    ) -> Self:
        """Find the centroids.

        Args:
            X: (N, D), or a sequence of such arrays, each read when it is taken out by its number.
            y: ignored.
            sample_weight: (N,), 0 or more, of all rows; 1 where not given.

        Raises:
            InputError: what is given cannot be clustered.
        """
        shards = _Shards(self, X)
        weights = check_weights(sample_weight, shards.count)
        check_clusters(self.n_clusters, weights)
        random = check_random_state(self.random_state)
        coarse = self._cells(shards, weights, random)
        cells, near = shards.nearest(coarse)
        cost = np.zeros(len(coarse))
        np.add.at(cost, cells, near * weights.astype(np.float64))
        rows = np.bincount(cells[weights > 0.0], minlength=len(coarse))
        clusters = share_out(self.n_clusters, cost, rows)
        made = list(self._fit_cells(shards, weights, cells, clusters, random))
        self.cluster_centers_ = np.concatenate([part.cluster_centers_ for part in made])
        self.n_iter_ = int(max(part.n_iter_.max() for part in made))
        self.inertia_ = float(sum(part.inertia_.sum() for part in made))
        del made
        for _ in range(self.refine):
            self.cluster_centers_, self.inertia_ = shards.refined(self.cluster_centers_, weights)
        if self.compute_labels:
            self.labels_, near = shards.nearest(self.cluster_centers_)
            self.inertia_ = float(np.dot(near.astype(np.float64), weights))
        return self

    def _cells(self, shards: _Shards, weights: Floats, random: np.random.RandomState) -> Floats:
        """Centroids of the first level, float32 (C, D)."""
        count = self.n_cells or round(math.sqrt(self.n_clusters))
        full = np.flatnonzero(weights)
        count = max(min(count, len(full), self.n_clusters), 1)
        drawn = full
        if _SAMPLE * count < len(full):
            drawn = np.sort(random.choice(full, _SAMPLE * count, replace=False))
        made = KMeans(
            count,
            max_iter=20,
            spherical=self.spherical,
            random_state=random,
            n_jobs=self.n_jobs,
        ).fit(shards.take(drawn), sample_weight=weights[drawn])
        centers: Floats = made.cluster_centers_
        return centers

    def _fit_cells(
        self,
        shards: _Shards,
        weights: Floats,
        cells: npt.NDArray[np.int32],
        clusters: Integers,
        random: np.random.RandomState,
    ) -> Iterator[BatchedKMeans]:
        """Cluster the cells, as many at a time as fit into memory."""
        sizes = np.bincount(cells, minlength=len(clusters))
        row = 4 * shards.columns
        begin = 0
        while begin < len(clusters):
            fits = np.cumsum(sizes[begin:]) * row <= self.memory
            end = begin + max(int(fits.sum()), 1)
            chosen = np.flatnonzero((cells >= begin) & (cells < end))
            chosen = chosen[np.argsort(cells[chosen], kind="stable")]
            # A cell without weight has no cluster, and nothing to find.
            held = [c for c in range(begin, end) if clusters[c]]
            chosen = chosen[np.isin(cells[chosen], held)]
            if held:
                yield BatchedKMeans(
                    clusters[held],
                    max_iter=self.max_iter,
                    tol=self.tol,
                    spherical=self.spherical,
                    random_state=random,
                    n_jobs=self.n_jobs,
                ).fit(
                    shards.take(chosen),
                    sample_weight=weights[chosen],
                    offsets=np.concatenate([[0], np.cumsum(sizes[held])]),
                )
            begin = end

    def predict(
        self,
        X: npt.ArrayLike | Sequence[npt.ArrayLike],  # noqa: N803
    ) -> npt.NDArray[np.int32]:
        """The nearest of all centroids of each row (N, D): int32 (N,)."""
        return self._nearest(X)[0]

    def transform(self, X: npt.ArrayLike) -> Floats:  # noqa: N803
        """The distance of each row (N, D) from each centroid: (N, K), not squared."""
        check_is_fitted(self)
        x = check_rows(self, X, fitting=False)
        made = euclidean_distances(unit_rows(x) if self.spherical else x, self.cluster_centers_)
        return np.asarray(made, np.float32)

    def score(self, X: npt.ArrayLike | Sequence[npt.ArrayLike], y: None = None) -> float:  # noqa: N803
        """Minus the sum of squared distances of rows to their nearest centroid."""
        return -float(self._nearest(X)[1].sum(dtype=np.float64))

    def _nearest(self, x: Any) -> tuple[npt.NDArray[np.int32], Floats]:
        check_is_fitted(self)
        labels, near = [], []
        for part in _parts(x):
            made = check_rows(self, part, fitting=False)
            made = unit_rows(made) if self.spherical else made
            found = nearest(made, self.cluster_centers_, self.n_jobs)
            labels.append(found[0])
            near.append(found[1])
        return np.concatenate(labels), np.concatenate(near)

    @property
    def _n_features_out(self) -> int:
        return self.n_clusters


def share_out(total: int, cost: Doubles, rows: Integers) -> Integers:
    """Clusters for cells, int64 (C,): in proportion to cost, 1 to ``rows``; 0 where no row is.

    Args:
        total: all of them, no more than there are rows.
        cost: float64 (C,), sums of squared distances.
        rows: int64 (C,), rows with weight.
    """
    given = (rows > 0).astype(np.int64)
    while (left := total - int(given.sum())) > 0:
        room = rows - given
        # Where nothing is left to gain, rows lie on one another: any cell will do.
        share = np.where(room > 0, cost, 0.0)
        share = share if share.sum() > 0.0 else room.astype(np.float64)
        want = share / share.sum() * left
        more = np.minimum(np.floor(want).astype(np.int64), room)
        if not more.any():
            # The largest remainders, the first of equal ones.
            order = np.argsort(-np.where(room > 0, want, -1.0), kind="stable")[:left]
            more[order[room[order] > 0]] = 1
        given += more
    return given


class _Shards:
    """Rows in several arrays, of which one is read at a time.

    Args:
        estimator: for whom they are checked.
        x: an array (N, D), or a sequence of arrays.
    """

    def __init__(self, estimator: Any, x: Any) -> None:
        self.estimator, self.parts = estimator, _parts(x)
        sizes = []
        for number, given in enumerate(self.parts):
            part = check_rows(estimator, given, fitting=not number)
            self.columns = part.shape[1]
            sizes.append(len(part))
        self.edges = np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64)
        self.count = int(self.edges[-1])

    def read(self) -> Iterator[tuple[int, Floats]]:
        """The number of the first row of each shard, and its rows as float32."""
        for number in range(len(self.parts)):
            part = np.require(self.parts[number], np.float32, ["C", "A"])
            yield int(self.edges[number]), unit_rows(part) if self.estimator.spherical else part

    def take(self, rows: Integers) -> Floats:
        """Some rows, in the order of their numbers ``rows``: float32 (M, D)."""
        made = np.empty((len(rows), self.columns), np.float32)
        order = np.argsort(rows, kind="stable")
        ordered = rows[order]
        for first, part in self.read():
            lo, hi = np.searchsorted(ordered, [first, first + len(part)])
            made[order[lo:hi]] = part[ordered[lo:hi] - first]
        return made

    def nearest(self, centroids: Floats) -> tuple[npt.NDArray[np.int32], Floats]:
        """The nearest centroid of each row, and the squared distance: int32 and float32 (N,)."""
        labels, near = np.empty(self.count, np.int32), np.empty(self.count, np.float32)
        for first, part in self.read():
            rows = slice(first, first + len(part))
            labels[rows], near[rows] = nearest(part, centroids, self.estimator.n_jobs)
        return labels, near

    def refined(self, centroids: Floats, weights: Floats) -> tuple[Floats, float]:
        """Centroids after one of Lloyd's iterations, and the inertia before it.

        A cluster that no row is nearest to stays where it is.
        """
        count = len(centroids)
        sums, weight, inertia = np.zeros((count, self.columns)), np.zeros(count), 0.0
        with Threads(self.estimator.n_jobs) as threads:
            for first, part in self.read():
                labels, near = nearest(part, centroids, threads.count)
                heavy = weights[first : first + len(part)]
                weight += np.bincount(labels, heavy, count)
                inertia += float(np.dot(near.astype(np.float64), heavy))
                add_rows(part, heavy, labels, sums, threads)
        means = np.empty_like(centroids)
        kernels.average(
            sums, weight, centroids, self.estimator.spherical, 0, count, means, np.empty(count)
        )
        return means, inertia


def _parts(x: Any) -> Any:
    """The arrays of a sequence of arrays; one that is no such sequence is an array itself.

    Raises:
        InputError: the sequence is empty.
    """
    if isinstance(x, np.ndarray) or not isinstance(x, Sequence):
        return [x]
    if not len(x):
        raise InputError(
            "There is no shard.", hint="Give at least one array of rows.", code="bad-rows"
        )
    # A list may be of shards or, as scikit-learn takes it, of rows.
    return x if not isinstance(x, list) or np.ndim(x[0]) == 2 else [x]
