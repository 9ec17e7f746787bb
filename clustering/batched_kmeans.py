"""Many problems of k-means at once."""

from __future__ import annotations

from typing import Any, Self

import numpy as np
import numpy.typing as npt
from sklearn.base import BaseEstimator, ClusterMixin
from sklearn.utils import check_random_state
from sklearn.utils.validation import check_is_fitted
from threadpoolctl import threadpool_limits

from pipeline.clustering.checks import (
    InputError,
    check_centroids,
    check_clusters,
    check_offsets,
    check_rows,
    check_weights,
    unit_rows,
)
from pipeline.clustering.cpu import Rows
from pipeline.clustering.directions import find_directions
from pipeline.clustering.kmeans import fit_rows, nearest
from pipeline.clustering.lloyd import Result
from pipeline.clustering.threads import Threads

Offsets = npt.NDArray[np.int64]


class BatchedKMeans(ClusterMixin, BaseEstimator):  # type: ignore[misc]
    """Problems of k-means that do not touch one another, each of its own size, all together.

    Rows of all problems lie one after the other; ``offsets`` say where each problem begins. Threads
    take a problem each, and what can be prepared for all rows is prepared once. The result for a
    problem is that of :class:`~pipeline.clustering.kmeans.KMeans` with the random state in
    ``random_states_``, bit for bit.

    Args:
        n_clusters: K of each problem, or of all.
        init: ``"k-means++"``, ``"k-means||"``, ``"random"``, or an array (sum of K, D).
        n_init: how often to begin anew; the result of least inertia is kept.
        max_iter: the most iterations.
        tol: as for ``KMeans``.
        spherical: cluster directions: rows are made of length 1, and so are centroids.
        random_state: an integer for results that can be repeated.
        n_jobs: threads; as many as there are cores where not given.

    Attributes:
        cluster_centers_: float32 (sum of K, D), those of a problem after those of the one before.
        center_offsets_: int64 (P + 1,), where each problem's centroids begin, and their number.
        labels_: int32 (N,), counted from 0 in each problem.
        inertia_: float64 (P,).
        n_iter_: int64 (P,).
        random_states_: int64 (P,).
        n_features_in_: D.

    Examples:
        >>> import numpy as np
        >>> from pipeline.clustering.batched_kmeans import BatchedKMeans
        >>> x = np.array([[0.0], [1.0], [9.0], [5.0], [5.0], [7.0]])
        >>> made = BatchedKMeans(2, random_state=0).fit(x, offsets=[0, 3, 6])
        >>> made.inertia_.tolist()
        [0.5, 0.0]
    """

    def __init__(
        self,
        n_clusters: int | npt.ArrayLike = 8,
        *,
        init: str | npt.ArrayLike = "k-means++",
        n_init: int = 1,
        max_iter: int = 300,
        tol: float = 1e-4,
        spherical: bool = False,
        random_state: int | np.random.RandomState | None = None,
        n_jobs: int | None = None,
    ) -> None:
        self.n_clusters = n_clusters
        self.init = init
        self.n_init = n_init
        self.max_iter = max_iter
        self.tol = tol
        self.spherical = spherical
        self.random_state = random_state
        self.n_jobs = n_jobs

    def fit(
        self,
        X: npt.ArrayLike,  # noqa: N803
        y: None = None,
        sample_weight: Any = None,
        *,
        offsets: npt.ArrayLike | None = None,
    ) -> Self:
        """Find the centroids of each problem.

        Args:
            X: (N, D), finite; the rows of one problem after those of another.
            y: ignored.
            sample_weight: (N,), 0 or more; 1 where not given.
            offsets: (P + 1,), rising from 0 to N; one problem where not given.

        Raises:
            InputError: what is given cannot be clustered.
        """
        x = check_rows(self, X, fitting=True)
        weights = check_weights(sample_weight, len(x))
        edges = check_offsets(offsets, len(x))
        problems = len(edges) - 1
        clusters = np.broadcast_to(np.asarray(self.n_clusters, np.int64), problems)
        for p in range(problems):
            part = weights[edges[p] : edges[p + 1]]
            check_clusters(int(clusters[p]), part, where=f"problem {p}")
        first = np.concatenate([[0], np.cumsum(clusters)])
        named = isinstance(self.init, str)
        if not named:
            centroids = check_centroids(self.init, int(first[-1]), x.shape[1])
        x = unit_rows(x) if self.spherical else x
        random = check_random_state(self.random_state)
        self.random_states_ = random.randint(2**31, size=problems, dtype=np.int64)
        with Threads(1) as one, Threads(self.n_jobs) as threads:
            directions = find_directions(x, int(clusters.mean()))

            def fit(p: int) -> tuple[Result, npt.NDArray[np.int32]]:
                part = slice(edges[p], edges[p + 1])
                rows = Rows(x[part], weights[part], directions, one)
                init = self.init if named else centroids[first[p] : first[p + 1]]
                state = int(self.random_states_[p])
                return fit_rows(self, rows, int(clusters[p]), state, init)

            # A thread has a problem of its own; those of a library would be in the way.
            with threadpool_limits(1):
                made = threads.each(fit, problems)
        results = [result for result, _ in made]
        self.cluster_centers_ = np.concatenate([result.centroids for result in results])
        self.center_offsets_ = first
        self.labels_ = np.concatenate([labels for _, labels in made])
        self.inertia_ = np.array([result.inertia for result in results])
        self.n_iter_ = np.array([result.iterations for result in results])
        return self

    def predict(
        self,
        X: npt.ArrayLike,  # noqa: N803
        *,
        offsets: npt.ArrayLike | None = None,
    ) -> npt.NDArray[np.int32]:
        """The nearest centroid of each row, of those of its problem: int32 (N,), counted from 0.

        Args:
            X: (N, D), finite; the rows of one problem after those of another.
            offsets: (P + 1,), as many problems as were fitted.

        Raises:
            InputError: it is another number of problems, or rows that have no distance.
        """
        check_is_fitted(self)
        x = check_rows(self, X, fitting=False)
        x = unit_rows(x) if self.spherical else x
        edges = check_offsets(offsets, len(x), empty=True)
        first = self.center_offsets_
        if len(edges) != len(first):
            raise InputError(
                f"offsets are of {len(edges) - 1} problems, and {len(first) - 1} were fitted.",
                hint="Give where each problem that was fitted begins; one may be without rows.",
                code="bad-offsets",
            )

        def label(p: int) -> npt.NDArray[np.int32]:
            centroids = self.cluster_centers_[first[p] : first[p + 1]]
            return nearest(x[edges[p] : edges[p + 1]], centroids, 1)[0]

        with Threads(self.n_jobs) as threads, threadpool_limits(1):
            return np.concatenate(threads.each(label, len(edges) - 1))
