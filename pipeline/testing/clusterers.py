"""What every estimator of k-means must do, whatever it runs on."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

Doubles = npt.NDArray[np.float64]

TOLERANCE = 1e-4
"""How far, relatively, an inertia may be from that of scikit-learn from the same start."""


def check_clusterer(make: Callable[..., Any]) -> None:
    """Run every check of this module.

    Args:
        make: called with ``n_clusters``, ``init`` (an array or a name), ``max_iter``, ``tol``,
            ``random_state`` and ``n_jobs``; an estimator with scikit-learn's contract.
    """
    check_against_scikit_learn(make)
    check_monotone(make)
    check_row_order(make)
    check_duplicates(make)
    check_weights(make)
    check_threads(make)
    check_labels(make)
    check_empty_clusters(make)
    check_constant_columns(make)
    check_few_distinct_rows(make)
    check_refusals(make)
    check_parameters(make)


def blobs(count: int, columns: int, clusters: int, seed: int = 0) -> Doubles:
    """Rows around centres, of unequal numbers and spreads: float64 (count, columns)."""
    rng = np.random.default_rng(seed)
    centres = rng.normal(scale=3.0, size=(clusters, columns))
    which = np.sort(rng.integers(clusters, size=count) * rng.integers(1, 3, count) // 2)
    spreads = rng.uniform(0.3, 1.5, clusters)
    return centres[which] + rng.normal(size=(count, columns)) * spreads[which, None]


def sum_of_squares(x: Any, centroids: Any, labels: Any) -> float:
    """Inertia in float64."""
    apart = np.asarray(x, np.float64) - np.asarray(centroids, np.float64)[labels]
    return float(np.einsum("ij,ij->", apart, apart))


def check_against_scikit_learn(make: Callable[..., Any]) -> None:
    """From one start, after any number of iterations, the inertia of scikit-learn."""
    from sklearn.cluster import KMeans

    for columns, clusters in ((2, 3), (17, 40), (64, 10)):
        x = blobs(1500, columns, clusters, seed=columns).astype(np.float32)
        init = x[:: 1500 // clusters][:clusters].copy()
        for iterations in (1, 4, 60):
            peer = KMeans(clusters, init=init, n_init=1, max_iter=iterations, tol=0.0).fit(x)
            ours = make(n_clusters=clusters, init=init, max_iter=iterations, tol=0.0).fit(x)
            for name, value in (("inertia_", ours.inertia_), ("rows", _true(x, ours))):
                expected = sum_of_squares(x, peer.cluster_centers_, peer.labels_)
                assert math.isclose(value, expected, rel_tol=TOLERANCE), (name, value, expected)


def _true(x: Any, fitted: Any) -> float:
    return sum_of_squares(x, fitted.cluster_centers_, fitted.labels_)


def check_monotone(make: Callable[..., Any]) -> None:
    """No iteration makes the inertia larger."""
    x = blobs(2000, 12, 30)
    before = math.inf
    for iterations in range(1, 12):
        made = make(n_clusters=30, init=x[:30], max_iter=iterations, tol=0.0).fit(x)
        assert made.inertia_ <= before * (1.0 + 1e-6), iterations
        before = made.inertia_


def check_row_order(make: Callable[..., Any]) -> None:
    """Rows in another order get the same labels, and the same inertia but for rounding."""
    x = blobs(1200, 9, 20)
    init = x[:: 1200 // 20][:20]
    order = np.random.default_rng(1).permutation(len(x))
    made = make(n_clusters=20, init=init, max_iter=50).fit(x)
    other = make(n_clusters=20, init=init, max_iter=50).fit(x[order])
    assert math.isclose(made.inertia_, other.inertia_, rel_tol=1e-6)
    assert np.mean(made.labels_[order] == other.labels_) > 0.999


def check_duplicates(make: Callable[..., Any]) -> None:
    """Equal rows are in one cluster, wherever they stand."""
    x = np.tile(blobs(400, 7, 12), (4, 1))
    x = np.concatenate([x, x[:37]])
    made = make(n_clusters=12, init="k-means++", max_iter=20, random_state=0).fit(x)
    first = made.labels_[:400]
    assert (made.labels_ == np.concatenate([first, first, first, first, first[:37]])).all()


def check_weights(make: Callable[..., Any]) -> None:
    """A weight of 3 is a row that is there three times; a weight of 0 one that is not there."""
    x = blobs(500, 6, 8)
    weight = np.random.default_rng(2).integers(0, 4, 500)
    init = x[weight > 0][:8]
    made = make(n_clusters=8, init=init, max_iter=40).fit(x, sample_weight=weight)
    other = make(n_clusters=8, init=init, max_iter=40).fit(np.repeat(x, weight, axis=0))
    assert math.isclose(made.inertia_, other.inertia_, rel_tol=1e-5)
    np.testing.assert_allclose(made.cluster_centers_, other.cluster_centers_, atol=1e-4)
    np.testing.assert_array_equal(np.repeat(made.labels_, weight), other.labels_)


def check_threads(make: Callable[..., Any]) -> None:
    """One thread and eight give the same bits."""
    x = blobs(9000, 24, 50)
    for init in ("k-means++", x[:50]):
        made = [
            make(n_clusters=50, init=init, max_iter=15, random_state=3, n_jobs=jobs).fit(x)
            for jobs in (1, 8)
        ]
        np.testing.assert_array_equal(made[0].labels_, made[1].labels_)
        np.testing.assert_array_equal(made[0].cluster_centers_, made[1].cluster_centers_)
        assert made[0].inertia_ == made[1].inertia_


def check_labels(make: Callable[..., Any]) -> None:
    """Labels are of the nearest centroid, when fitted, when predicted and when transformed."""
    x = blobs(1500, 20, 25)
    made = make(n_clusters=25, init="k-means++", max_iter=5, random_state=0).fit(x)
    new = blobs(700, 20, 25, seed=9)
    for rows, labels in ((x, made.labels_), (new, made.predict(new))):
        apart = np.linalg.norm(rows[:, None] - made.cluster_centers_.astype(np.float64), axis=2)
        chosen = apart[np.arange(len(rows)), labels]
        assert (chosen <= apart.min(1) * (1.0 + 1e-5)).all()
        np.testing.assert_allclose(made.transform(rows), apart, rtol=1e-3, atol=1e-3)
    np.testing.assert_array_equal(made.predict(x), made.labels_)
    assert math.isclose(made.inertia_, _true(x, made), rel_tol=1e-5)
    assert math.isclose(-made.score(x), made.inertia_, rel_tol=1e-5)


def check_empty_clusters(make: Callable[..., Any]) -> None:
    """A start far from every row ends with rows in each cluster, the furthest ones first."""
    x = blobs(600, 5, 6)
    init = np.concatenate([x[:3], x.max(0) + np.array([[1e3], [2e3], [3e3]])])
    made = make(n_clusters=6, init=init, max_iter=30).fit(x)
    assert set(made.labels_) == set(range(6))
    one = make(n_clusters=6, init=init, max_iter=1, tol=0.0).fit(x)
    apart = np.linalg.norm(x[:, None] - x[None, :3], axis=2).min(1)
    furthest = np.argsort(-apart)[:3]
    np.testing.assert_allclose(one.cluster_centers_[3:], x[furthest], atol=1e-4)


def check_constant_columns(make: Callable[..., Any]) -> None:
    """Columns of one value change nothing, however large it is; nor do rows that are all equal."""
    x = blobs(800, 4, 10)
    init = x[:10]
    wide = np.column_stack([x, np.full(800, 50.0), np.zeros(800)])
    made = make(n_clusters=10, init=init, max_iter=30).fit(x)
    other = make(n_clusters=10, init=wide[:10], max_iter=30).fit(wide)
    assert math.isclose(made.inertia_, other.inertia_, rel_tol=1e-4)
    flat = make(n_clusters=1, init="k-means++", max_iter=5).fit(np.full((40, 3), 7.5))
    assert flat.inertia_ == 0.0
    np.testing.assert_array_equal(flat.cluster_centers_, np.full((1, 3), 7.5))


def check_few_distinct_rows(make: Callable[..., Any]) -> None:
    """With fewer distinct rows than clusters every row lies on its centroid."""
    x = np.repeat(np.eye(3), 20, axis=0)
    made = make(n_clusters=5, init="k-means++", max_iter=10, random_state=0).fit(x)
    assert made.cluster_centers_.shape == (5, 3)
    assert made.inertia_ == 0.0
    np.testing.assert_array_equal(made.cluster_centers_[made.labels_], x)


def check_refusals(make: Callable[..., Any]) -> None:
    """What cannot be clustered is refused with one paragraph that says what to do."""
    x = blobs(50, 3, 4)
    bad = x.copy()
    bad[7, 1] = np.nan
    far = x.copy()
    far[4, 0] = np.inf
    for rows, options, says in (
        (bad, {}, "NaN"),
        (far, {}, "infinite"),
        (x, {"n_clusters": 51}, "n_samples=50"),
        (x, {"n_clusters": 0}, "n_clusters=0"),
        (x, {"init": x[:3]}, "init"),
        (x, {"init": "best"}, "init"),
        (x[:, 0], {}, "2D"),
        (x, {"sample_weight": np.ones(49)}, "sample_weight"),
        (x, {"sample_weight": -np.ones(50)}, "sample_weight"),
    ):
        told = dict(options)
        fitting = {key: told.pop(key) for key in ("sample_weight",) if key in told}
        error = _refused(make(**{"n_clusters": 4, "init": "k-means++", **told}), rows, fitting)
        assert says in str(error), (says, error)
        assert getattr(error, "hint", ""), error
        assert "\n" not in str(error), error


def _refused(estimator: Any, rows: Any, fitting: dict[str, Any]) -> ValueError:
    try:
        estimator.fit(rows, **fitting)
    except ValueError as error:
        return error
    raise AssertionError(f"{estimator} takes rows of shape {np.shape(rows)} with {fitting}")


def check_parameters(make: Callable[..., Any]) -> None:
    """Parameters are kept as they are given, and a clone has the same."""
    from sklearn.base import clone

    made = make(n_clusters=7, init="k-means++", max_iter=3, random_state=5)
    assert made.get_params()["n_clusters"] == 7
    copy = clone(made)
    assert copy.get_params() == made.get_params()
    assert not [name for name in vars(copy) if name.endswith("_")]
    x = blobs(300, 4, 7)
    first, second = made.fit(x), copy.fit(x)
    np.testing.assert_array_equal(first.labels_, second.labels_)
    assert {"cluster_centers_", "labels_", "inertia_", "n_iter_"} <= vars(first).keys()
