"""k-means of numbers, to the optimum."""

from __future__ import annotations

from typing import Any, Self

import numpy as np
import numpy.typing as npt
from sklearn.base import BaseEstimator, ClusterMixin, TransformerMixin
from sklearn.utils.validation import check_is_fitted

from pipeline.clustering.checks import InputError, check_clusters, check_weights
from pipeline.clustering.compiled import compiled
from pipeline.clustering.directions import Doubles
from pipeline.clustering.threads import Threads

_DISTINCT = 2**16
"""Distinct values up to which each is a cell of its own."""

_FEW = 2048
_CELLS = 2**14
_SHARE = 1e-3
"""A cell is cut where its own sum of squares is more than this share of a cluster's."""

_STEPS = 64
_ROUNDS = 8
_PARTS = 8
"""Parts of the values that are summed apart: fixed, so that sums do not depend on threads."""


class KMeans1D(ClusterMixin, TransformerMixin, BaseEstimator):  # type: ignore[misc]
    """k-means in one dimension: nothing is drawn, and values are read once or little more.

    Clusters of numbers are intervals, so the best partition is found by dynamic programming (Wang
    and Song, 2011), in O(K M log M) for M places where a border may lie. Of up to 131,072 values
    with no more than 65,536 distinct ones these are all places, and the result is the optimum.
    Otherwise the sums of 16,384 cells of equal width are taken in one pass (16 cells a cluster
    where that is more), those that hold much are cut into smaller ones, the optimum over borders
    between cells is found, and Lloyd's iteration takes it to where it rests, for which only values
    in cells with a border are read again.

    Args:
        n_clusters: K.
        max_iter: the most of Lloyd's iterations.
        compute_labels: find the cluster of each value at the end.
        n_jobs: threads; as many as there are cores where not given.

    Attributes:
        cluster_centers_: float64 (K, 1), ascending.
        borders_: float64 (K - 1,); a value on a border belongs to the cluster below.
        labels_: int32 (N,), ascending with the values; where ``compute_labels``.
        inertia_: the weighted sum of squared distances.
        n_iter_: Lloyd's iterations done.

    Examples:
        >>> from pipeline.clustering.kmeans_1d import KMeans1D
        >>> made = KMeans1D(2).fit([1.0, 7.0, 2.0, 8.0, 9.0])
        >>> made.cluster_centers_.tolist(), made.labels_.tolist()
        ([[1.5], [8.0]], [0, 1, 0, 1, 1])
    """

    def __init__(
        self,
        n_clusters: int = 8,
        *,
        max_iter: int = 300,
        compute_labels: bool = True,
        n_jobs: int | None = None,
    ) -> None:
        self.n_clusters = n_clusters
        self.max_iter = max_iter
        self.compute_labels = compute_labels
        self.n_jobs = n_jobs

    def fit(self, X: npt.ArrayLike, y: None = None, sample_weight: Any = None) -> Self:  # noqa: N803
        """Find the clusters.

        Args:
            X: (N,) or (N, 1), finite.
            y: ignored.
            sample_weight: (N,), 0 or more; 1 where not given.

        Raises:
            InputError: what is given cannot be clustered.
        """
        values = _values(X)
        if sample_weight is None:
            # One number that is read for each value.
            weights = np.broadcast_to(np.ones(1, np.float32), len(values))
        else:
            weights = check_weights(sample_weight, len(values))
        check_clusters(self.n_clusters, weights)
        with Threads(self.n_jobs) as threads:
            few = _distinct(values, weights) if len(values) <= 2 * _DISTINCT else None
            if few is not None:
                sums, middle = few
                means, self.inertia_ = _means(sums[_best_cuts(sums, self.n_clusters)])
                means, self.n_iter_ = means + middle, 0
            else:
                cells = _Cells(values, weights, max(_CELLS, 16 * self.n_clusters), threads)
                means, self.inertia_, self.n_iter_ = cells.fit(self.n_clusters, self.max_iter)
        # Fewer distinct values than clusters: the last ones stand on the last centroid.
        missing = self.n_clusters - len(means)
        centers = np.concatenate([means, np.repeat(means[-1:], missing)])
        self.cluster_centers_ = centers[:, None]
        self.borders_ = (centers[1:] + centers[:-1]) / 2
        self.n_features_in_ = 1
        if self.compute_labels:
            self.labels_ = self._label(values)
        return self

    def predict(self, X: npt.ArrayLike) -> npt.NDArray[np.int32]:  # noqa: N803
        """The cluster of each value (N,) or (N, 1): int32 (N,)."""
        check_is_fitted(self)
        return self._label(_values(X))

    def transform(self, X: npt.ArrayLike) -> Doubles:  # noqa: N803
        """The distance of each value from each centroid: (N, K)."""
        check_is_fitted(self)
        apart: Doubles = np.abs(_values(X)[:, None] - self.cluster_centers_[:, 0])
        return apart

    def _label(self, values: npt.NDArray[np.floating[Any]]) -> npt.NDArray[np.int32]:
        labels = np.empty(len(values), np.int32)
        borders = self.borders_
        if values.dtype == np.float32:
            # Above a border is above the largest float32 that is not.
            near = borders.astype(np.float32)
            over = near.astype(np.float64) > borders
            borders = np.where(over, np.nextafter(near, np.float32(-np.inf)), near)
        with Threads(self.n_jobs) as threads:
            threads.split(
                lambda lo, hi: _label(values, borders, lo, hi, labels), len(values), 2**16
            )
        return labels

    @property
    def _n_features_out(self) -> int:
        return self.n_clusters


def _values(x: Any) -> npt.NDArray[np.floating[Any]]:
    """Numbers (N,), of float32 or float64."""
    made = np.asarray(x)
    if made.dtype != np.float32:
        try:
            made = made.astype(np.float64)
        except (TypeError, ValueError) as error:
            raise InputError(
                f"Values of type {made.dtype} are not numbers.",
                hint="Give an array of numbers.",
                code="bad-rows",
            ) from error
    if made.ndim == 2 and made.shape[1] == 1:
        made = made[:, 0]
    if made.ndim != 1:
        raise InputError(
            f"An array of shape {made.shape} is not one of single values.",
            hint="Give an array (N,) or (N, 1); rows of more columns are for KMeans.",
            code="bad-rows",
        )
    with np.errstate(over="ignore", invalid="ignore"):
        # Finite where the sum is; it may overflow where no value does.
        doubtful = not np.isfinite(made.sum()) and not np.isfinite(made).all()
    if doubtful:
        first = int(np.flatnonzero(~np.isfinite(made))[0])
        raise InputError(
            f"The values hold NaN or infinity, first at {first}.",
            hint="Leave them out: a distance to them says nothing.",
            code="not-finite",
        )
    return np.ascontiguousarray(made)


def _distinct(values: Any, weights: Any) -> tuple[Doubles, float] | None:
    """Running sums at each distinct value, float64 (M + 1, 3), and the value they are counted from.

    They are of weight, value and square; None where there are too many.
    """
    kept = weights > 0.0
    found, which = np.unique(values[kept].astype(np.float64), return_inverse=True)
    if len(found) > _DISTINCT:
        return None
    # Far from 0 squares would say little.
    middle = float(found[len(found) // 2])
    weight, above = np.bincount(which, weights[kept]), found - middle
    parts = np.column_stack([weight, weight * above, weight * above * above])
    return np.concatenate([np.zeros((1, 3)), np.cumsum(parts, 0)]), middle


def _means(at: Doubles) -> tuple[Doubles, float]:
    """Means of clusters between running sums (K + 1, 3), and the sum of squared distances."""
    inside = np.diff(at, axis=0)
    return inside[:, 1] / inside[:, 0], float(_costs(at).sum())


def _costs(at: Doubles) -> Doubles:
    """The sums of squared distances from their means of what lies between running sums."""
    inside = np.diff(at, axis=0)
    weight = np.where(inside[:, 0] > 0.0, inside[:, 0], 1.0)
    costs: Doubles = np.maximum(inside[:, 2] - inside[:, 1] ** 2 / weight, 0.0)
    return costs


class _Cells:
    """Values in cells of equal width; those that lie far out are in the first and the last.

    Args:
        values: (N,).
        weights: float32 (N,).
        count: cells.
        threads: for ranges of values.
    """

    def __init__(self, values: Any, weights: Any, count: int, threads: Threads) -> None:
        self.values, self.weights, self.threads = values, weights, threads
        some = values[np.random.default_rng(0).integers(len(values), size=2**14)]
        low, high = float(some.min()), float(some.max())
        # Sums are of what values are above the middle.
        self.middle = float(np.median(some))
        self.low, self.scale = low, (count - 1) / (high - low) if high > low else 1.0
        parts = np.zeros((_PARTS, count, 3))
        edges = np.linspace(0, len(values), _PARTS + 1).astype(np.int64)
        threads.each(
            lambda part: _fill(
                values, weights, edges[part], edges[part + 1], *self._map(), parts[part]
            ),
            _PARTS,
        )
        whole = parts.sum(0)
        self.sums = np.concatenate([np.zeros((1, 3)), np.cumsum(whole, 0)])
        self.open: dict[int, tuple[Any, Doubles]] = {}
        self.reach = 4
        self.near: set[int] = set()

    def _map(self) -> tuple[float, float, float]:
        return self.low, self.scale, self.middle

    def fit(self, clusters: int, limit: int) -> tuple[Doubles, float, int]:
        """Means, sum of squared distances, and iterations done."""
        places: dict[int, npt.NDArray[np.int64]] = {}
        for _ in range(_ROUNDS):
            sums = self._edges(places)
            at = sums[_best_cuts(sums, clusters)]
            means, inertia = _means(at)
            self.near = self._near((means[1:] + means[:-1]) / 2)
            if not self._refine(places, _SHARE * inertia / clusters):
                break
        for done in range(limit):
            borders = (means[1:] + means[:-1]) / 2
            self._open(borders)
            cut = np.array([self._below(border) for border in borders]).reshape(-1, 3)
            moved = np.concatenate([at[:1], cut, at[-1:]])
            # No cluster is without values: its mean lies between two of them, or on one.
            if (moved == at).all() or (np.diff(moved[:, 0]) <= 0.0).any():
                return means + self.middle, inertia, done
            at = moved
            means, inertia = _means(at)
        return means + self.middle, inertia, limit

    def _edges(self, places: dict[int, npt.NDArray[np.int64]]) -> Doubles:
        """Running sums where a border may lie: between cells, and at places within some."""
        inside = [self.sums[c] + self.open[c][1][at] for c, at in places.items()]
        sums = np.concatenate([self.sums, *inside])
        # By weight, which never falls; what adds none is no place of its own.
        return sums[np.unique(sums[:, 0], return_index=True)[1]]

    def _refine(self, places: dict[int, npt.NDArray[np.int64]], most: float) -> bool:
        """Add places within cells whose own sum of squares is more than ``most``."""
        costs = _costs(self.sums)
        coarse = [int(c) for c in np.flatnonzero(costs > most)]
        if coarse:
            self._read(({*coarse} | self.near) - self.open.keys())
        added = False
        for c in coarse:
            above, sums = self.open[c]
            at = places.get(c, np.array([0, len(above)]))
            wide = np.flatnonzero((_costs(sums[at]) > most) & (np.diff(at) > 1))
            new = [at]
            for lo, hi in zip(at[wide].tolist(), at[wide + 1].tolist(), strict=True):
                steps = np.linspace(above[lo], above[hi - 1], _STEPS)
                new.append(lo + np.searchsorted(above[lo:hi], steps))
            merged = np.unique(np.concatenate(new))
            added |= len(merged) > len(at)
            places[c] = merged
        return added

    def _cell(self, border: float) -> int:
        return _cell(border + self.middle, self.low, self.scale, len(self.sums) - 1)

    def _open(self, borders: Doubles) -> None:
        """Read the values of cells that borders lie in, and of those beside them."""
        if not {self._cell(border) for border in borders} <= self.open.keys():
            self._read(self._near(borders) - self.open.keys())
            # Borders go on moving: each time more is read, so that this is seldom done.
            self.reach *= 2

    def _near(self, borders: Doubles) -> set[int]:
        """Cells of borders and those beside them; all, where these are many."""
        last, reach = len(self.sums) - 2, self.reach
        cells = {self._cell(border) for border in borders}
        cells = {near for c in cells for near in range(max(c - reach, 0), min(c + reach, last) + 1)}
        return cells if len(cells | self.open.keys()) <= last // 4 else set(range(last + 1))

    def _read(self, cells: set[int]) -> None:
        """Read the values of cells, and put them in order."""
        if not cells:
            return
        last = len(self.sums) - 2
        wanted = np.zeros(last + 1, np.bool_)
        wanted[list(cells)] = True
        found = np.concatenate(
            self.threads.split(
                lambda lo, hi: _pick(self.values, lo, hi, self.low, self.scale, wanted),
                len(self.values),
                2**16,
            )
        )
        # Cells never fall as values rise, so that values in order are cells in order.
        found = found[np.argsort(self.values[found])]
        above = self.values[found].astype(np.float64) - self.middle
        weight = self.weights[found].astype(np.float64)
        parts = np.column_stack([weight, weight * above, weight * above * above])
        where = _cell_of(self.values[found], self.low, self.scale, last + 1)
        ordered = sorted(cells)
        starts = np.searchsorted(where, np.array([*ordered, last + 1], np.int32)).tolist()
        for c, lo in zip(ordered, starts, strict=False):
            hi = int(np.searchsorted(where[lo:], np.int32(c), "right")) + lo
            sums = np.concatenate([np.zeros((1, 3)), np.cumsum(parts[lo:hi], 0)])
            self.open[c] = above[lo:hi], sums

    def _below(self, border: float) -> Doubles:
        """Running sums of values up to ``border``: float64 (3,)."""
        c = self._cell(border)
        above, parts = self.open[c]
        below: Doubles = self.sums[c] + parts[np.searchsorted(above, border, "right")]
        return below


@compiled
def _cell(value: float, low: float, scale: float, count: int) -> int:
    """The cell of a value; it never falls as the value rises."""
    return int(min(max((value - low) * scale, 0.0), count - 1.0))


@compiled
def _cell_of(values: Any, low: float, scale: float, count: int) -> Any:
    """The cells of values, int32."""
    cells = np.empty(values.shape[0], np.int32)
    for i in range(values.shape[0]):
        cells[i] = _cell(np.float64(values[i]), low, scale, count)
    return cells


@compiled
def _fill(
    values: Any, weights: Any, lo: int, hi: int, low: float, scale: float, middle: float, sums: Any
) -> None:
    """Add weight, value and square of values lo to hi to the sums of their cells, (C, 3)."""
    for i in range(lo, hi):
        value, weight = np.float64(values[i]), np.float64(weights[i])
        c = _cell(value, low, scale, sums.shape[0])
        above = value - middle
        sums[c, 0] += weight
        sums[c, 1] += weight * above
        sums[c, 2] += weight * above * above


@compiled
def _pick(values: Any, lo: int, hi: int, low: float, scale: float, wanted: Any) -> Any:
    """Which of values lo to hi lie in cells that are wanted: int64."""
    found = np.empty(hi - lo, np.int64)
    count = 0
    for i in range(lo, hi):
        found[count] = i
        count += wanted[_cell(np.float64(values[i]), low, scale, wanted.shape[0])]
    return found[:count].copy()


@compiled
def _best_cuts(sums: Any, clusters: int) -> Any:
    """Edges int64 (K + 1,) between clusters of cells, so that the sum of their costs is least."""
    cells = sums.shape[0] - 1
    clusters = min(clusters, cells)
    weight, value, square = sums[:, 0].copy(), sums[:, 1].copy(), sums[:, 2].copy()
    least = np.zeros(cells + 1)
    for m in range(1, cells + 1):
        least[m] = max(square[m] - value[m] * value[m] / weight[m], 0.0)
    choice = np.zeros((clusters, cells + 1), np.int32)
    following, costs = np.empty(cells + 1), np.empty(cells + 1)
    # Ranges of ends still to do, and of begins where their best may lie: best begins never fall.
    todo = np.empty((64, 4), np.int64)
    for k in range(1, clusters):
        following[:] = np.inf
        size = 1
        todo[0] = (k + 1, cells, k, cells - 1)
        while size:
            size -= 1
            lo, hi, first, last = todo[size]
            m = (lo + hi) // 2
            end, at = min(last + 1, m), first
            for begin in range(first, end):
                inside = value[m] - value[begin]
                apart = square[m] - square[begin] - inside * inside / (weight[m] - weight[begin])
                costs[begin] = least[begin] + max(apart, 0.0)
            for begin in range(first, end):
                if costs[begin] < costs[at]:
                    at = begin
            following[m], choice[k, m] = costs[at], at
            if lo < m:
                todo[size] = (lo, m - 1, first, at)
                size += 1
            if m < hi:
                todo[size] = (m + 1, hi, at, last)
                size += 1
        least, following = following, least
    cuts = np.empty(clusters + 1, np.int64)
    cuts[clusters] = cells
    for k in range(clusters - 1, 0, -1):
        cuts[k] = choice[k, cuts[k + 1]]
    cuts[0] = 0
    return cuts


@compiled
def _label(values: Any, borders: Any, lo: int, hi: int, labels: Any) -> None:
    """Write how many borders lie below each of values lo to hi."""
    if borders.shape[0] > 32:
        for i in range(lo, hi):
            labels[i] = np.searchsorted(borders, values[i], "left")
        return
    # A few values at a time and one border after the other, which fills vectors.
    for start in range(lo, hi, _FEW):
        end = min(start + _FEW, hi)
        some, made = values[start:end], labels[start:end]
        made[:] = 0
        for border in borders:
            for i in range(some.shape[0]):
                made[i] += np.int32(some[i] > border)
