"""k-means over rows in memory."""

from __future__ import annotations

from functools import partial
from importlib.util import find_spec
from typing import Any, Self

import numpy as np
import numpy.typing as npt
from sklearn.base import BaseEstimator, ClusterMixin, TransformerMixin
from sklearn.metrics import euclidean_distances
from sklearn.utils import check_random_state
from sklearn.utils.validation import check_is_fitted

from pipeline.clustering.checks import (
    InputError,
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
from pipeline.clustering.seeding import sample, seed
from pipeline.clustering.threads import Threads

Labels = npt.NDArray[np.int32]

BACKENDS = ("auto", "cpu", "triton", "flash-kmeans", "cuml")

_MUCH = 2**36
"""Multiply-adds of an iteration that are worth the way to a GPU."""


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
        backend: ``"cpu"``; on a GPU ``"triton"``, or ``"flash-kmeans"`` and ``"cuml"`` where these
            packages are installed; ``"auto"`` takes Triton for much work where there is a GPU that
            holds the rows. First centroids are the same on all of them. On a GPU products are
            float32 in another order: the inertia is the same to 1e-5, and a row between two
            centroids at distances that differ by less than rounding may go to either.

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
        backend: str = "auto",
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
        self.backend = backend

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
        fit = self._fit_on_gpu if self._backend(x) != "cpu" else self._fit_on_cpu
        best, self.labels_ = fit(x, weights)
        self.cluster_centers_, self.inertia_, self.n_iter_ = best
        return self

    def _backend(self, x: Floats) -> str:
        return choose(self.backend, len(x), x.shape[1], self.n_clusters)

    def _fit_on_cpu(self, x: Floats, weights: Floats) -> tuple[Result, Labels]:
        with Threads(self.n_jobs) as threads:
            rows = Rows(x, weights, find_directions(x, self.n_clusters), threads)
            return fit_rows(self, rows, self.n_clusters, self.random_state, self.init)

    def _fit_on_gpu(self, x: Floats, weights: Floats) -> tuple[Result, Labels]:
        from pipeline.clustering import cuda

        rows = cuda.open_rows(self._backend(x), cuda.to_device(x), cuda.to_device(weights))
        random = check_random_state(self.random_state)
        tol, tries = self.tol * spread(x), []
        for _ in range(self.n_init if isinstance(self.init, str) else 1):
            first = cuda.to_device(self._first(x, weights, random))
            made = lloyd(rows, first, max_iter=self.max_iter, tol=tol, spherical=self.spherical)
            centroids = made.centroids.cpu().numpy()
            tries.append((made._replace(centroids=centroids), rows.labels.cpu().numpy().copy()))
        return min(tries, key=lambda made: made[0].inertia)

    def _first(self, x: Floats, weights: Floats, random: np.random.RandomState) -> Floats:
        """First centroids, which the host finds among a sample of the rows."""
        if not isinstance(self.init, str):
            return check_centroids(self.init, self.n_clusters, x.shape[1])
        some = sample(weights, self.n_clusters, random, self.init_size)
        part, heavy = (x, weights) if some is None else (x[some], weights[some])
        with Threads(self.n_jobs) as threads:
            rows = Rows(part, heavy, find_directions(part, self.n_clusters), threads)
            return seed(self.init, rows, self.n_clusters, random, len(part))[0]

    def predict(self, X: npt.ArrayLike) -> Labels:  # noqa: N803
        """The nearest centroid of each row (N, D): int32 (N,)."""
        check_is_fitted(self)
        x = check_rows(self, X, fitting=False)
        x = unit_rows(x) if self.spherical else x
        return nearest(x, self.cluster_centers_, self.n_jobs, self.backend)[0]

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
        near = nearest(x, self.cluster_centers_, self.n_jobs, self.backend)[1]
        return -float(np.dot(near.astype(np.float64), weights))

    @property
    def _n_features_out(self) -> int:
        return len(self.cluster_centers_)


def choose(backend: str, rows: int, columns: int, clusters: int) -> str:
    """The back end that is meant: ``"auto"`` is a GPU for work that is worth the way there.

    Raises:
        InputError: there is no such back end, or its compiler is not installed.
    """
    if backend not in BACKENDS:
        raise InputError(
            f"There is no back end {backend!r}.",
            hint=f"It is one of {', '.join(BACKENDS)}.",
            code="unknown-backend",
        )
    compiler = find_spec("triton")
    if backend not in ("auto", "cpu") and compiler is None:
        raise InputError(
            f"The back end {backend!r} needs the package triton, which is not installed.",
            hint="Take backend='cpu', or install PyTorch for CUDA, which brings it.",
            code="no-triton",
        )
    if backend != "auto":
        return backend
    if rows * columns * clusters < _MUCH or compiler is None:
        return "cpu"
    import torch

    # Twice the rows: they are gathered when they are summed.
    fits = torch.cuda.is_available() and torch.cuda.mem_get_info()[0] > 8 * rows * columns
    return "triton" if fits else "cpu"


def fit_rows(
    options: Any, rows: Rows, clusters: int, random_state: Any, init: Any
) -> tuple[Result, Labels]:
    """Cluster rows as the parameters of an estimator say; also their labels."""
    random = check_random_state(random_state)
    limits = {
        "max_iter": options.max_iter,
        "tol": options.tol * spread(rows.x),
        "spherical": options.spherical,
    }
    run = partial(lloyd, rows) if rows.threads.count > 1 else rows.run
    if not isinstance(init, str):
        first = check_centroids(init, clusters, rows.x.shape[1])
        return run(first, assigned=False, **limits), rows.labels
    size = getattr(options, "init_size", None)
    tries = []
    for _ in range(options.n_init):
        first, assigned = seed(init, rows, clusters, random, size)
        result = run(first, assigned=assigned, **limits)
        tries.append((result, rows.labels.copy()))
    return min(tries, key=lambda made: made[0].inertia)


def nearest(
    x: Floats, centroids: Floats, n_jobs: int | None = None, backend: str = "cpu"
) -> tuple[Labels, Floats]:
    """The nearest centroid of each row, the first of several, and the squared distance to it.

    The N x K matrix is not made.

    Args:
        x: float32 (N, D), contiguous and finite.
        centroids: float32 (K, D).
        n_jobs: threads; as many as there are cores where not given.
        backend: as for :class:`KMeans`.

    Returns:
        int32 (N,) and float32 (N,).
    """
    if not len(x):
        return np.empty(0, np.int32), np.empty(0, np.float32)
    backend = choose(backend, len(x), x.shape[1], len(centroids))
    if backend != "cpu":
        from pipeline.clustering import cuda

        weights = cuda.to_device(np.ones(len(x), np.float32))
        held = cuda.open_rows(backend, cuda.to_device(x), weights)
        held.assign(cuda.to_device(centroids))
        return held.labels.cpu().numpy(), held.near.cpu().numpy()
    with Threads(n_jobs) as threads:
        directions = find_directions(x, len(centroids))
        rows = Rows(x, np.ones(len(x), np.float32), directions, threads)
        rows.assign(centroids)
        return rows.labels, rows.near
