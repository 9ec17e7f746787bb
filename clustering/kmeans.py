"""k-means over rows in memory."""

from __future__ import annotations

from typing import Any, Self

import numpy as np
import numpy.typing as npt
from sklearn.base import BaseEstimator, ClusterMixin, TransformerMixin
from sklearn.metrics import euclidean_distances
from sklearn.utils import check_random_state
from sklearn.utils.validation import check_is_fitted

from pipeline.clustering.checks import (
    check_centroids,
    check_clusters,
    check_rows,
    check_weights,
    spread,
    unit_rows,
)
from pipeline.clustering.cpu import Rows
from pipeline.clustering.directions import Floats, find_directions
from pipeline.clustering.lloyd import Result, lloyd
from pipeline.clustering.seeding import seed
from pipeline.clustering.threads import Threads


class KMeans(ClusterMixin, TransformerMixin, BaseEstimator):  # type: ignore[misc]
    """k-means with scikit-learn's contract: exact, and the same for any number of threads.

    Each row is compared with the few centroids that could be its nearest (see
    :mod:`pipeline.clustering.directions`), in k-means++ as in Lloyd's iteration; the result is that
    of comparing it with all. Distances are float32, sums float64. Of centroids at equal distance
    the first is taken. A cluster that loses its rows takes the row furthest from its centroid.
    Where there are fewer distinct rows than clusters, some centroids stand on one another, and all
    but the first of these are empty.

    Args:
        n_clusters: K, no more than there are rows.
        init: ``"k-means++"`` (greedy), ``"k-means||"`` (scalable), ``"random"`` rows, or an array
            (K, D).
        init_size: rows that the first centroids are sought among; 64 for each cluster, and at least
            16,384, where not given.
        n_init: how often to begin anew; the result of least inertia is kept.
        max_iter: the most iterations.
        tol: end where the squared distances that centroids moved come to no more than this share of
            the mean variance of the columns.
        spherical: cluster directions: rows are made of length 1, and so are centroids.
        random_state: an integer for results that can be repeated.
        n_jobs: threads; as many as there are cores where not given.

    Attributes:
        cluster_centers_: float32 (K, D).
        labels_: int32 (N,).
        inertia_: the weighted sum of squared distances to the nearest centroid.
        n_iter_: iterations done.
        n_features_in_: D.

    Examples:
        >>> import numpy as np
        >>> from pipeline.clustering.kmeans import KMeans
        >>> x = np.array([[1, 2], [1, 4], [1, 0], [10, 2], [10, 4], [10, 0]])
        >>> KMeans(2, random_state=0).fit(x).cluster_centers_.tolist()
        [[10.0, 2.0], [1.0, 2.0]]
    """

    def __init__(
        self,
        n_clusters: int = 8,
        *,
        init: str | npt.ArrayLike = "k-means++",
        init_size: int | None = None,
        n_init: int = 1,
        max_iter: int = 300,
        tol: float = 1e-4,
        spherical: bool = False,
        random_state: int | np.random.RandomState | None = None,
        n_jobs: int | None = None,
    ) -> None:
        self.n_clusters = n_clusters
        self.init = init
        self.init_size = init_size
        self.n_init = n_init
        self.max_iter = max_iter
        self.tol = tol
        self.spherical = spherical
        self.random_state = random_state
        self.n_jobs = n_jobs

    def fit(self, X: npt.ArrayLike, y: None = None, sample_weight: Any = None) -> Self:  # noqa: N803
        """Find the centroids.

        Args:
            X: (N, D), finite.
            y: ignored.
            sample_weight: (N,), 0 or more; 1 where not given.

        Raises:
            InputError: what is given cannot be clustered.
        """
        x = check_rows(self, X, fitting=True)
        weights = check_weights(sample_weight, len(x))
        check_clusters(self.n_clusters, weights)
        x = unit_rows(x) if self.spherical else x
        with Threads(self.n_jobs) as threads:
            rows = Rows(x, weights, find_directions(x, self.n_clusters), threads)
            best, self.labels_ = fit_rows(self, rows, self.n_clusters, self.random_state, self.init)
        self.cluster_centers_, self.inertia_, self.n_iter_ = best
        return self

    def predict(self, X: npt.ArrayLike) -> npt.NDArray[np.int32]:  # noqa: N803
        """The nearest centroid of each row (N, D): int32 (N,)."""
        check_is_fitted(self)
        x = check_rows(self, X, fitting=False)
        return nearest(unit_rows(x) if self.spherical else x, self.cluster_centers_, self.n_jobs)[0]

    def transform(self, X: npt.ArrayLike) -> Floats:  # noqa: N803
        """The distance of each row (N, D) from each centroid: (N, K), not squared."""
        check_is_fitted(self)
        x = check_rows(self, X, fitting=False)
        made = euclidean_distances(unit_rows(x) if self.spherical else x, self.cluster_centers_)
        return np.asarray(made, np.float32)

    def score(self, X: npt.ArrayLike, y: None = None, sample_weight: Any = None) -> float:  # noqa: N803
        """Minus the weighted sum of squared distances of rows (N, D) to their nearest centroid."""
        check_is_fitted(self)
        x = check_rows(self, X, fitting=False)
        weights = check_weights(sample_weight, len(x))
        x = unit_rows(x) if self.spherical else x
        near = nearest(x, self.cluster_centers_, self.n_jobs)[1]
        return -float(np.dot(near.astype(np.float64), weights))

    @property
    def _n_features_out(self) -> int:
        return len(self.cluster_centers_)


def fit_rows(
    options: Any, rows: Rows, clusters: int, random_state: Any, init: Any
) -> tuple[Result, npt.NDArray[np.int32]]:
    """Cluster rows as the parameters of an estimator say; also their labels."""
    random = check_random_state(random_state)
    limits = {
        "max_iter": options.max_iter,
        "tol": options.tol * spread(rows.x),
        "spherical": options.spherical,
    }
    if not isinstance(init, str):
        first = check_centroids(init, clusters, rows.x.shape[1])
        return lloyd(rows, first, **limits), rows.labels
    size = getattr(options, "init_size", None)
    tries = []
    for _ in range(options.n_init):
        first, assigned = seed(init, rows, clusters, random, size)
        result = lloyd(rows, first, assigned=assigned, **limits)
        tries.append((result, rows.labels.copy()))
    return min(tries, key=lambda made: made[0].inertia)


def nearest(
    x: Floats, centroids: Floats, n_jobs: int | None = None
) -> tuple[npt.NDArray[np.int32], Floats]:
    """The nearest centroid of each row, the first of several, and the squared distance to it.

    The N x K matrix is not made.

    Args:
        x: float32 (N, D), contiguous and finite.
        centroids: float32 (K, D).
        n_jobs: threads; as many as there are cores where not given.

    Returns:
        int32 (N,) and float32 (N,).
    """
    if not len(x):
        return np.empty(0, np.int32), np.empty(0, np.float32)
    with Threads(n_jobs) as threads:
        directions = find_directions(x, len(centroids))
        rows = Rows(x, np.ones(len(x), np.float32), directions, threads)
        rows.assign(centroids)
        return rows.labels, rows.near
