"""Loops over rows, compiled: nearest centroids, sums, the whole iteration. None holds the GIL.

Whatever is decided is decided by :func:`pipeline.clustering.tile.distance`, in float32 and in one
order of summing. Scores in the leading directions only tell which centroids need not be asked: they
are lower bounds, with all that rounding can do to them added. So a label depends on its row and the
centroids alone: not on the tile the row lies in, the thread, or the label it had before.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from pipeline.clustering.compiled import compiled
from pipeline.clustering.tile import LANES, PANELS, ROWS, best, distance, lowest_bit, mark

_EPS = 2.0**-24
"""Half a unit in the last place of float32, relative."""


_LOOSE = 0.01
"""A row is read again where its centroid moved more than this share of its distance: a wider reach
would bring in more of the others."""


@compiled
def radius_of(near: float, columns: int) -> float:
    """What a distance may be whose square, a sum of so many terms, came out as ``near``.

    Twice what rounding can do: once for it, and once for one that it is compared with.
    """
    return math.sqrt(near * (1.0 + 2.0 * (columns / LANES + 24.0) * _EPS))


@compiled
def bound_of(radius: float, square: float, depth: int, reach: float) -> float:
    """The largest score that a centroid within ``radius`` may have.

    Args:
        radius: distance, with what coordinates may be off.
        square: squared norm of the row's leading coordinates.
        depth: terms of a score.
        reach: largest norm of a centroid's leading coordinates.
    """
    rounding = (depth + 4.0) * _EPS * (math.sqrt(square) * reach + 0.5 * reach * reach)
    bound = 0.5 * (radius * radius - square) + rounding
    # What is stored is rounded once more.
    return bound + (abs(bound) + square) * 2.0 * _EPS


@compiled
def mark_all(rows: Any, row: int, panels: Any, half: Any, bound: Any, bits: Any) -> None:
    """Mark a tile of rows against all panels; see :func:`pipeline.clustering.tile.mark`."""
    for panel in range(0, panels.shape[0], PANELS):
        mark(rows, row, panels, half, panel, bound, bits)


@compiled
def nearest_head(head: Any, lo: int, hi: int, panels: Any, half: Any, labels: Any) -> None:
    """Label rows lo to hi by their leading coordinates alone: near the nearest, if not that.

    Args:
        head: float32 (N, depth).
        lo: first row to do.
        hi: the row after the last.
        panels: float32 (P, depth, LANES), see :mod:`pipeline.clustering.tile`.
        half: float32 (P, LANES).
        labels: int32 (N,), written.
    """
    depth = head.shape[1]
    rows = np.zeros((ROWS, depth), np.float32)
    score = np.empty((ROWS, LANES), np.float32)
    number = np.zeros((ROWS, LANES), np.int32)
    for start in range(lo, hi, ROWS):
        count = min(ROWS, hi - start)
        rows[:count] = head[start : start + count]
        score[:] = np.inf
        for panel in range(0, panels.shape[0], PANELS):
            best(rows, 0, panels, half, panel, score, number)
        for r in range(count):
            lane = 0
            for other in range(1, LANES):
                if score[r, other] < score[r, lane]:
                    lane = other
            labels[start + r] = number[r, lane] * LANES + lane


@compiled
def assign(
    x: Any,
    lead: Any,
    lo: int,
    hi: int,
    table: Any,
    drift: Any,
    first: int,
    labels: Any,
    near: Any,
    far: Any,
) -> int:
    """Label rows with their nearest centroid, the first of several at equal distance.

    A row's distance from its own centroid is no more than it was, and what that one moved. Where no
    other can be as near as that, the row itself is not read, and ``near`` stays what it was.

    With ``first``, the centroids come to others before them, whose nearest is known.

    Args:
        x: float32 (N, D).
        lead: the rows' leading coordinates, float32 (N, depth), their squared norms, float32 (N,),
            and how far they may be from the true ones, float32 (N,).
        lo: first row to do.
        hi: the row after the last.
        table: centroids float32 (K, D); their leading coordinates as panels, float32
            (P, depth, LANES), and half, float32 (P, LANES); the largest norm of these; how far they
            may be from the true ones.
        drift: float64 (K,), how far each centroid moved since ``far`` was written.
        first: number of the first centroid.
        labels: int32 (N,): any centroid, the nearer the better; written.
        near: float32 (N,): squared distance of rows that were read; written.
        far: float32 (N,): what the distance is at most; written.

    Returns:
        How many labels changed.
    """
    head, square, error = lead
    centroids, panels, half, reach, blur = table
    depth, columns = head.shape[1], x.shape[1]
    rows = np.zeros((ROWS, depth), np.float32)
    bound = np.full(ROWS, -np.inf, np.float32)
    words = -(-panels.shape[0] // 4)
    bits = np.zeros((ROWS, words * 4), np.uint16)
    wide = bits.view(np.uint64)
    moved = 0
    for start in range(lo, hi, ROWS):
        count = min(ROWS, hi - start)
        for r in range(count):
            i = start + r
            rows[r] = head[i]
            own = labels[i] - first
            if first == 0 and drift[own] > _LOOSE * far[i]:
                near[i] = distance(x, i, centroids, own)
                far[i] = radius_of(near[i], columns) * (1.0 + 4.0 * _EPS)
            elif first == 0:
                far[i] = (far[i] + drift[own]) * (1.0 + 4.0 * _EPS)
            bound[r] = bound_of(far[i] + error[i] + blur, square[i], depth, reach)
        mark_all(rows, 0, panels, half, bound, bits)
        for r in range(count):
            i = start + r
            own = labels[i] - first
            if own >= 0:
                wide[r, own // 64] &= ~(np.uint64(1) << np.uint64(own % 64))
            if _nearest_marked(x, i, centroids, wide[r], first, columns, labels, near, far):
                moved += 1
    return moved


@compiled
def _nearest_marked(
    x: Any,
    i: int,
    centroids: Any,
    words: Any,
    first: int,
    columns: int,
    labels: Any,
    near: Any,
    far: Any,
) -> bool:
    """Compare row i with the centroids whose bits are set; whether its label changed."""
    own = labels[i]
    label, least = own - first, near[i]
    read = False
    for w in range(words.shape[0]):
        word = words[w]
        while word:
            if not read and first == 0:
                least = distance(x, i, centroids, own)
            read = True
            j = np.int32(w * 64 + lowest_bit(word))
            word &= word - np.uint64(1)
            d = distance(x, i, centroids, j)
            if d < least or (d == least and j < label):
                label, least = j, d
    if read:
        near[i] = least
        far[i] = radius_of(least, columns) * (1.0 + 4.0 * _EPS)
        labels[i] = first + label
    return bool(labels[i] != own)


@compiled
def measure(x: Any, centroids: Any, lo: int, hi: int, labels: Any, near: Any, far: Any) -> None:
    """Write the squared distances ``near`` of rows lo to hi from their centroids, and ``far``."""
    for i in range(lo, hi):
        near[i] = distance(x, i, centroids, labels[i])
        far[i] = radius_of(near[i], x.shape[1]) * (1.0 + 4.0 * _EPS)


@compiled
def lay_out(centred: Any, inside: Any, first: int, panels: Any, half: Any) -> None:
    """Write centroids as panels of their leading coordinates.

    Args:
        centred: float64 (M, D), from the mean.
        inside: float64 (M, depth - 1), along the directions; of no column where there are none.
        first: number of the first of them.
        panels: float32 (P, depth, LANES).
        half: float32 (P, LANES).
    """
    depth = inside.shape[1]
    for k in range(centred.shape[0]):
        p, lane = (first + k) // LANES, (first + k) % LANES
        square = np.dot(centred[k], centred[k])
        half[p, lane] = 0.5 * square
        if depth:
            for d in range(depth):
                panels[p, d, lane] = -inside[k, d]
                square -= inside[k, d] * inside[k, d]
            panels[p, depth, lane] = -math.sqrt(max(square, 0.0))
        else:
            for d in range(centred.shape[1]):
                panels[p, d, lane] = -centred[k, d]


@compiled
def weighted_sum(values: Any, weights: Any, lo: int, hi: int) -> float:
    """The float64 sum of ``weights * values`` of rows lo to hi, in their order."""
    total = 0.0
    for i in range(lo, hi):
        total += np.float64(weights[i]) * np.float64(values[i])
    return total


@compiled
def move_rows(
    x: Any, weights: Any, rows: Any, before: Any, after: Any, lo: int, hi: int, sums: Any
) -> None:
    """Take rows out of the sums of one cluster and into those of another, for columns lo to hi.

    Each sum adds its rows in their order, whoever does which columns.

    Args:
        x: float32 (N, D).
        weights: float32 (N,).
        rows: int64 (M,), which rows.
        before: int32 (M,), clusters they are in; -1 for none.
        after: int32 (M,), clusters they come to.
        lo: first column to do.
        hi: the one after the last.
        sums: float64 (K, D), changed.
    """
    for m in range(rows.shape[0]):
        i, a, b = rows[m], before[m], after[m]
        w = np.float64(weights[i])
        row, into = x[i, lo:hi], sums[b, lo:hi]
        for c in range(row.shape[0]):
            into[c] += w * np.float64(row[c])
        if a >= 0:
            out = sums[a, lo:hi]
            for c in range(row.shape[0]):
                out[c] -= w * np.float64(row[c])


@compiled
def average(
    sums: Any, weight: Any, before: Any, spherical: bool, lo: int, hi: int, after: Any, drift: Any
) -> None:
    """Write the means of clusters lo to hi, and how far they are from what they were.

    Args:
        sums: float64 (K, D).
        weight: float64 (K,); a cluster without weight stays where it is.
        before: float32 (K, D).
        spherical: make them of length 1.
        lo: first cluster.
        hi: the one after the last.
        after: float32 (K, D), written.
        drift: float64 (K,), written.
    """
    columns = sums.shape[1]
    for k in range(lo, hi):
        scale = weight[k]
        if spherical:
            square = 0.0
            for c in range(columns):
                square += sums[k, c] * sums[k, c]
            # Rows that point against one another have a mean that points nowhere.
            scale = math.sqrt(square) if square > 1e-12 * weight[k] * weight[k] else 0.0
        apart = 0.0
        for c in range(columns):
            after[k, c] = sums[k, c] / scale if scale > 0.0 else before[k, c]
            moved = np.float64(after[k, c]) - np.float64(before[k, c])
            apart += moved * moved
        drift[k] = math.sqrt(apart) * (1.0 + 4.0 * _EPS)


@compiled
def variance(x: Any) -> float:
    """The mean of the variances of columns of float32 rows (N, D)."""
    rows, columns = x.shape
    total, square = np.zeros(columns), np.zeros(columns)
    for i in range(rows):
        for c in range(columns):
            # From the first row, so that little is lost where values lie far from 0.
            value = np.float64(x[i, c]) - np.float64(x[0, c])
            total[c] += value
            square[c] += value * value
    return float(np.sum(square - total * total / rows) / (rows * columns))


@compiled
def weigh(labels: Any, weights: Any, weight: Any) -> None:
    """Write the weight of each cluster, float64 (K,)."""
    weight[:] = 0.0
    for i in range(labels.shape[0]):
        weight[labels[i]] += np.float64(weights[i])


@compiled
def moved_rows(labels: Any, summed: Any) -> Any:
    """Rows that are in another cluster than that whose sum holds them, int64 in their order."""
    found = np.empty(labels.shape[0], np.int64)
    count = 0
    for i in range(labels.shape[0]):
        found[count] = i
        count += labels[i] != summed[i]
    return found[:count].copy()


@compiled
def update_sums(x: Any, weights: Any, labels: Any, summed: Any, sums: Any) -> None:
    """Bring the sums of clusters up to date with labels, by one thread; see :func:`move_rows`."""
    rows = moved_rows(labels, summed)
    if 2 * rows.shape[0] > x.shape[0]:
        sums[:] = 0.0
        summed[:] = -1
        rows = np.arange(x.shape[0])
    move_rows(x, weights, rows, summed[rows], labels[rows], 0, x.shape[1], sums)
    summed[rows] = labels[rows]


@compiled
def iterate(
    x: Any,
    lead: Any,
    weights: Any,
    mean: Any,
    basis: Any,
    panels: Any,
    half: Any,
    spherical: bool,
    number: int,
    limit: int,
    tol: float,
    assigned: bool,
    centroids: Any,
    state: Any,
) -> Any:
    """Lloyd's iteration by one thread: what ``Rows`` does step by step, without leaving the loop.

    Args:
        x: float32 (N, D).
        lead: as for :func:`assign`.
        weights: float32 (N,).
        mean: float64 (D,), of the directions.
        basis: float64 (D, depth - 1); of no column where there are no directions.
        panels: float32 (P, depth, LANES), space.
        half: float32 (P, LANES), infinite beyond K.
        spherical: make means of length 1.
        number: iterations done.
        limit: the most of them.
        tol: end where squared distances that centroids moved come to no more.
        assigned: rows are labelled with these centroids, and empty clusters are filled.
        centroids: float32 (K, D), changed.
        state: labels, ``near`` and ``far`` as for :func:`assign`; clusters whose sums hold rows,
            int32 (N,); sums, float64 (K, D); drift, float64 (K,); changed.

    Returns:
        Iterations done, and 0 where a cluster is empty and rows are labelled, 1 where the labels
        stay as they are, 2 where they may change once more.
    """
    labels, near, far, summed, sums, drift = state
    weight, after = np.empty(centroids.shape[0]), np.empty_like(centroids)
    while number < limit:
        if not assigned:
            centred = centroids.astype(np.float64) - mean
            inside = np.dot(centred, basis)
            lay_out(centred, inside, 0, panels, half)
            most = np.float32(0.0)
            for k in range(centroids.shape[0]):
                most = max(most, half[k // LANES, k % LANES])
            reach = math.sqrt(2.0 * most) * (1.0 + 4.0 * _EPS)
            blur = 2.0 * _EPS * reach if basis.shape[1] else 0.0
            table = (centroids, panels, half, reach, blur)
            moved = assign(x, lead, 0, x.shape[0], table, drift, 0, labels, near, far)
            drift[:] = 0.0
            if number and not moved:
                return number + 1, 1
        weigh(labels, weights, weight)
        if not assigned and not weight.all():
            return number, 0
        assigned = False
        update_sums(x, weights, labels, summed, sums)
        average(sums, weight, centroids, spherical, 0, centroids.shape[0], after, drift)
        centroids[:] = after
        number += 1
        if np.dot(drift, drift) <= tol:
            break
    return number, 2
