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
from pipeline.clustering.tile import LANES, PANELS, ROWS, best, distance, lowest_bit, mark, products

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
def project(
    x: Any, mean: Any, basis: Any, lo: int, hi: int, head: Any, square: Any, error: Any
) -> None:
    """Write the leading coordinates of rows lo to hi, and the length of what these leave out.

    Args:
        x: float32 (N, D).
        mean: float32 (1, D).
        basis: float32 (P, D, LANES), see :mod:`pipeline.clustering.tile`.
        lo: first row to do.
        hi: the row after the last.
        head: float32 (N, depth), written.
        square: float32 (N,), squared norms of ``head``, written.
        error: float32 (N,), how far coordinates may be from the true ones, written.
    """
    columns, depth = x.shape[1], head.shape[1] - 1
    rows = np.zeros((ROWS, columns), np.float32)
    made = np.empty((ROWS, basis.shape[0] * LANES), np.float32)
    # A sum of D products in float32 is off by up to D units: by that much where they are alike, as
    # in a flat picture, and not by the square root that chance would leave. Of a short tail it is
    # much.
    part = (columns + 16.0) * _EPS
    for start in range(lo, hi, ROWS):
        count = min(ROWS, hi - start)
        for r in range(count):
            row = x[start + r]
            for c in range(columns):
                rows[r, c] = row[c] - mean[0, c]
        for panel in range(0, basis.shape[0], PANELS):
            products(rows, basis, panel, made)
        for r in range(count):
            i = start + r
            total, inside = np.float64(distance(x, i, mean, 0)), 0.0
            for k in range(depth):
                head[i, k] = made[r, k]
                inside += np.float64(made[r, k]) * np.float64(made[r, k])
            tail, blur = max(total - inside, 0.0), 2.0 * part * total
            root = math.sqrt(tail)
            over, under = math.sqrt(tail + blur), math.sqrt(max(total - inside - blur, 0.0))
            head[i, depth] = root
            square[i] = inside + root * root
            error[i] = part * math.sqrt(total) + max(over - root, root - under)


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
    settled: bool,
    first: int,
    labels: Any,
    near: Any,
    far: Any,
) -> int:
    """Label rows with their nearest centroid, the first of several at equal distance.

    A row's distance from its own centroid is no more than it was, and what that one moved. Where no
    other can be as near as that, the row itself is not read, and ``near`` stays what it was. A row
    whose centroid did not move is compared with those that did.

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
        drift: float64 (K,), how far each centroid moved since ``far`` was written; of no centroid
            with ``first``.
        settled: labels were those of the nearest then.
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
    inside, bound = head[lo:hi], np.empty(hi - lo, np.float32)
    edge = np.zeros((ROWS, depth), np.float32)
    limit = np.full(ROWS, -np.inf, np.float32)
    words = -(-panels.shape[0] // 4)
    bits = np.zeros((ROWS, words * 4), np.uint16)
    wide = bits.view(np.uint64)
    asked = _asked(drift, words)
    moved = 0
    for start in range(0, hi - lo, ROWS):
        end = min(start + ROWS, hi - lo)
        for r in range(start, end):
            i = lo + r
            own = labels[i] - first
            if first == 0 and drift[own] > _LOOSE * far[i]:
                near[i] = distance(x, i, centroids, own)
                far[i] = radius_of(near[i], columns) * (1.0 + 4.0 * _EPS)
            elif first == 0:
                far[i] = (far[i] + drift[own]) * (1.0 + 4.0 * _EPS)
            bound[r] = bound_of(far[i] + error[i] + blur, square[i], depth, reach)
        if end - start == ROWS:
            mark_all(inside, start, panels, half, bound, bits)
        else:
            edge[: end - start], limit[: end - start] = inside[start:], bound[start:]
            mark_all(edge, 0, panels, half, limit, bits)
        for r in range(end - start):
            i = lo + start + r
            own = labels[i] - first
            if own >= 0:
                wide[r, own // 64] &= ~(np.uint64(1) << np.uint64(own % 64))
            # Infinite: its label is not that of the nearest.
            rests = int(settled and drift[own] == 0.0 and far[i] < np.inf)
            found = np.uint64(0)
            for w in range(words):
                wide[r, w] &= asked[rests, w]
                found |= wide[r, w]
            if found and _nearest_marked(x, i, centroids, wide, r, first, labels, near, far):
                moved += 1
    return moved


@compiled
def _asked(drift: Any, words: int) -> Any:
    """Bits of all centroids, and of those that moved: uint64 (2, words)."""
    asked = np.full((2, words), ~np.uint64(0))
    asked[1] = 0
    for j in range(drift.shape[0]):
        asked[1, j // 64] |= np.uint64(drift[j] > 0.0) << np.uint64(j % 64)
    return asked


@compiled
def _nearest_marked(
    x: Any,
    i: int,
    centroids: Any,
    bits: Any,
    r: int,
    first: int,
    labels: Any,
    near: Any,
    far: Any,
) -> bool:
    """Compare row i with the centroids whose bits r are set; whether its label changed."""
    own = labels[i]
    label = own - first
    least = near[i] if first else distance(x, i, centroids, own)
    for w in range(bits.shape[1]):
        word = bits[r, w]
        while word:
            j = np.int32(w * 64 + lowest_bit(word))
            word &= word - np.uint64(1)
            d = distance(x, i, centroids, j)
            if d < least or (d == least and j < label):
                label, least = j, d
    near[i] = least
    far[i] = radius_of(least, x.shape[1]) * (1.0 + 4.0 * _EPS)
    labels[i] = first + label
    return bool(labels[i] != own)


@compiled
def measure(x: Any, centroids: Any, lo: int, hi: int, labels: Any, near: Any, far: Any) -> None:
    """Write the squared distances ``near`` of rows lo to hi from their centroids, and ``far``."""
    for i in range(lo, hi):
        near[i] = distance(x, i, centroids, labels[i])
        far[i] = radius_of(near[i], x.shape[1]) * (1.0 + 4.0 * _EPS)


@compiled
def lay_out(centred: Any, inside: Any, numbers: Any, panels: Any, half: Any) -> None:
    """Write centroids as panels of their leading coordinates.

    Args:
        centred: float64 (M, D), from the mean.
        inside: float64 (M, depth - 1), along the directions; of no column where there are none.
        numbers: int64 (M,), theirs.
        panels: float32 (P, depth, LANES).
        half: float32 (P, LANES).
    """
    depth = inside.shape[1]
    for k in range(centred.shape[0]):
        p, lane = numbers[k] // LANES, numbers[k] % LANES
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
def _square(values: Any) -> float:
    """The sum of squares of float64 (D,), as four sums of which none waits for another."""
    a, b, c, d = 0.0, 0.0, 0.0, 0.0
    whole = values.shape[0] - values.shape[0] % 4
    for i in range(0, whole, 4):
        a += values[i] * values[i]
        b += values[i + 1] * values[i + 1]
        c += values[i + 2] * values[i + 2]
        d += values[i + 3] * values[i + 3]
    for i in range(whole, values.shape[0]):
        a += values[i] * values[i]
    return (a + b) + (c + d)


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
    apart = np.empty(sums.shape[1])
    for k in range(lo, hi):
        total, old, new = sums[k], before[k], after[k]
        scale = weight[k]
        if spherical:
            square = _square(total)
            # Rows that point against one another have a mean that points nowhere.
            scale = math.sqrt(square) if square > 1e-12 * weight[k] * weight[k] else 0.0
        if scale > 0.0:
            scale = 1.0 / scale
            for c in range(total.shape[0]):
                new[c] = total[c] * scale
        else:
            new[:] = old
        for c in range(total.shape[0]):
            apart[c] = np.float64(new[c]) - np.float64(old[c])
        drift[k] = math.sqrt(_square(apart)) * (1.0 + 4.0 * _EPS)


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
        centroids: float32 (K, D), that rows are labelled with, empty clusters refilled; changed.
        state: labels, ``near`` and ``far`` as for :func:`assign`; clusters whose sums hold rows,
            int32 (N,); sums, float64 (K, D); drift, float64 (K,); changed.

    Returns:
        Iterations done, and 0 where a cluster is empty and rows are labelled, 1 where the labels
        stay as they are, 2 where they may change once more.
    """
    labels, near, far, summed, sums, drift = state
    weight, after = np.empty(centroids.shape[0]), np.empty_like(centroids)
    assigned, laid = True, False
    while number < limit:
        if not assigned:
            # Panels of the others are as they were.
            numbers = np.flatnonzero(drift) if laid else np.arange(centroids.shape[0])
            laid = True
            centred = np.empty((numbers.shape[0], mean.shape[0]))
            for k in range(numbers.shape[0]):
                centred[k] = centroids[numbers[k]] - mean
            lay_out(centred, np.dot(centred, basis), numbers, panels, half)
            most = np.float32(0.0)
            for k in range(centroids.shape[0]):
                most = max(most, half[k // LANES, k % LANES])
            reach = math.sqrt(2.0 * most) * (1.0 + 4.0 * _EPS)
            blur = 2.0 * _EPS * reach if basis.shape[1] else 0.0
            table = (centroids, panels, half, reach, blur)
            moved = assign(x, lead, 0, x.shape[0], table, drift, True, 0, labels, near, far)
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
