"""Lloyd's iteration (1957/1982), wherever the rows lie."""

from __future__ import annotations

from typing import Any, NamedTuple, Protocol


class Labelled(Protocol):
    """Rows with labels. Centroids are arrays (K, D) of NumPy or torch, as the rows are."""

    def assign(self, centroids: Any) -> int:
        """Label each row with its nearest centroid; how many labels changed."""

    def means(self, centroids: Any, spherical: bool) -> tuple[Any, float]:
        """The weighted mean of each cluster, and the sum of the squared distances they moved."""

    def inertia(self, centroids: Any) -> float:
        """The weighted sum of squared distances to the centroids rows are labelled with."""


class Result(NamedTuple):
    """Where the iteration ended, with rows labelled by these centroids."""

    centroids: Any
    inertia: float
    iterations: int


def lloyd(
    rows: Labelled,
    centroids: Any,
    *,
    max_iter: int,
    tol: float,
    spherical: bool = False,
    assigned: bool = False,
) -> Result:
    """Assign and average until no label changes or the centroids rest.

    Args:
        rows: what to cluster.
        centroids: to begin with, (K, D).
        max_iter: the most iterations.
        tol: end where the squared distances that centroids moved come to no more than this.
        spherical: put centroids back on the unit sphere.
        assigned: the rows are labelled with their nearest of ``centroids``.
    """
    done = 0
    for number in range(max_iter):
        moved = 1 if assigned and not number else rows.assign(centroids)
        done = number + 1
        if number and not moved:
            break
        centroids, shift = rows.means(centroids, spherical)
        if shift <= tol:
            rows.assign(centroids)
            break
    else:
        rows.assign(centroids)
    return Result(centroids, rows.inertia(centroids), done)
