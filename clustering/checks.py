"""What estimators make sure of before they begin."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from pipeline.clustering import kernels
from pipeline.clustering.directions import Floats
from pipeline.errors import UsageError


class InputError(UsageError, ValueError):
    """Rows, weights or parameters that cannot be clustered; a ``ValueError`` for scikit-learn."""


def check_rows(estimator: Any, x: Any, *, fitting: bool) -> Floats:
    """Rows as float32 (N, D), contiguous; copied only where they are not.

    Raises:
        InputError: they are not a matrix of finite numbers, or not as wide as those of ``fit``.
    """
    from sklearn.utils.validation import validate_data

    try:
        made = validate_data(
            estimator,
            x.cpu() if getattr(x, "is_cuda", False) else x,
            reset=fitting,
            dtype=np.float32,
            order="C",
            accept_large_sparse=False,
            ensure_all_finite=False,
        )
    except ValueError as error:
        raise InputError(
            " ".join(str(error).split()).rstrip(".") + ".",
            hint="Give a matrix of numbers, one row a sample, of one width throughout.",
            code="bad-rows",
        ) from error
    check_finite(made)
    return np.require(made, np.float32, ["C", "A"])


def check_finite(x: Floats, *, where: str | None = None) -> None:
    """Make sure that rows float32 (N, D) can be told apart by distance.

    Raises:
        InputError: some hold NaN or infinity.
    """
    # A sum is finite where its terms are and do not overflow: one look instead of two.
    with np.errstate(over="ignore", invalid="ignore"):
        if np.isfinite(np.einsum("ij,ij->", x, x)):
            return
        bad = np.flatnonzero(~np.isfinite(np.einsum("ij,ij->i", x, x)))
    if len(bad):
        kind = "NaN" if np.isnan(x[bad]).any() else "values that are infinite or beyond 1e19"
        raise InputError(
            f"{len(bad)} of {len(x)} rows contain {kind}, row {bad[0]} the first of them.",
            hint="Leave these rows out, or put a number in their place: a distance to them says "
            "nothing.",
            code="not-finite",
            where=where,
        )


def check_weights(weights: Any, count: int) -> Floats:
    """Weights of rows, float32 (N,); 1 where none are given.

    Raises:
        InputError: they are not one finite number a row, or one is negative.
    """
    if weights is None:
        return np.ones(count, np.float32)
    made = np.asarray(weights, np.float32)
    if made.ndim == 0:
        made = np.full(count, made)
    if made.shape != (count,) or not np.isfinite(made).all() or (made < 0.0).any():
        raise InputError(
            f"sample_weight, of shape {made.shape}, is not one finite number of 0 or more for each "
            f"of {count} rows.",
            hint="Give one weight a row; 0 leaves a row out of the means.",
            code="bad-weights",
        )
    return np.ascontiguousarray(made)


def check_clusters(clusters: int, weights: Floats, *, where: str | None = None) -> None:
    """Make sure that there are rows enough.

    Raises:
        InputError: there are more clusters than rows that weigh something.
    """
    rows = int(np.count_nonzero(weights)) if weights.strides[0] else len(weights)
    if not rows:
        raise InputError(
            "The weights of all rows are zero.",
            hint="Give at least as many rows a weight above 0 as there are clusters.",
            code="bad-weights",
            where=where,
        )
    if not 1 <= clusters <= rows:
        raise InputError(
            f"n_clusters={clusters} clusters cannot be made of n_samples={rows} rows with weight.",
            hint="Ask for 1 or more clusters, and not for more than there are rows.",
            code="too-many-clusters",
            where=where,
        )


def check_centroids(init: Any, clusters: int, columns: int) -> Floats:
    """Centroids that are given to begin with, float32 (K, D).

    Raises:
        InputError: they are of another shape, or not finite.
    """
    made = np.array(init, np.float32, order="C")
    if made.shape != (clusters, columns) or not np.isfinite(made).all():
        raise InputError(
            f"init, of shape {made.shape}, is not a finite matrix of {clusters} x {columns}.",
            hint="Give one row for each cluster, as wide as the rows.",
            code="bad-init",
        )
    return made


def check_offsets(offsets: Any, count: int, *, empty: bool = False) -> npt.NDArray[np.int64]:
    """Where each of several problems begins, and where the last one ends: int64 (P + 1,).

    Args:
        offsets: what is given; None for one problem.
        count: rows.
        empty: a problem may be without rows.

    Raises:
        InputError: they do not rise from 0 to ``count``.
    """
    made = np.asarray([0, count] if offsets is None else offsets, np.int64)
    if made.ndim != 1 or len(made) < 2 or made[0] != 0 or made[-1] != count:
        raise InputError(
            f"offsets do not lead from 0 to the number of rows, which is {count}.",
            hint="Give where each problem begins, and the number of rows after the last.",
            code="bad-offsets",
        )
    short = np.flatnonzero(np.diff(made) < (0 if empty else 1))
    if len(short):
        p = int(short[0])
        raise InputError(
            f"The problem {p} has no row: offsets {made[p]} to {made[p + 1]}.",
            hint="Leave out problems without rows.",
            code="bad-offsets",
        )
    return made


def unit_rows(x: Floats) -> Floats:
    """Rows of length 1, float32.

    Raises:
        InputError: a row is zero, so that it points nowhere.
    """
    lengths = np.sqrt(np.einsum("ij,ij->i", x, x, dtype=np.float64))
    nowhere = np.flatnonzero(lengths == 0.0)
    if len(nowhere):
        raise InputError(
            f"{len(nowhere)} of {len(x)} rows are zero, row {nowhere[0]} the first of them, and "
            "have no direction.",
            hint="Leave them out, or cluster with spherical=False.",
            code="no-direction",
        )
    made: Floats = x / lengths[:, None].astype(np.float32)
    return made


def spread(x: Floats) -> float:
    """The mean of the columns' variances, of which ``tol`` is a share."""
    # A sample tells it well enough to stop by.
    some = x if len(x) <= 2**14 else x[np.random.default_rng(0).choice(len(x), 2**14)]
    return float(kernels.variance(some))
