"""Loops of k-means++, compiled: as many rows are tried at a time as a tile has lanes for."""

from __future__ import annotations

from typing import Any

import numpy as np

from pipeline.clustering.compiled import compiled
from pipeline.clustering.kernels import bound_of, mark_all, radius_of
from pipeline.clustering.tile import LANES, ROWS, distance, lowest_bit, prefetch


@compiled
def _uniform(seed: int, number: int) -> float:
    """A number in [0, 1) for each (seed, number): SplitMix64 (Steele, Lea and Flood, 2014)."""
    z = np.uint64(seed) + np.uint64(number + 1) * np.uint64(0x9E3779B97F4A7C15)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return np.float64((z ^ (z >> np.uint64(31))) >> np.uint64(11)) * 2.0**-53


@compiled
def draw_seeds(state: Any, chunk: int, seed: int, turn: int, lanes: int, trial: Any) -> None:
    """Draw rows to try as seeds, with probability proportional to ``weights * near``.

    Args:
        state: of the rows: leading coordinates ``head`` and ``square`` and ``weights`` as for
            :func:`assign`, squared distances ``near`` to the nearest seed until now, ``bound`` on
            scores of nearer ones, labels, and the potentials of chunks, float64 (C,): the sum of
            ``weights * near``.
        chunk: rows of a chunk.
        seed: of the draws.
        turn: number of these draws.
        lanes: how many rows.
        trial: numbers of the rows int64 (L,), their ``near`` float32 (L,), panels float32
            (L / LANES, depth, LANES) and half float32 (L / LANES, LANES); written.
    """
    head, square, weights, near, _, _, potentials = state
    numbers, before, panels, half = trial
    total = potentials.sum()
    half[:] = np.inf
    count = numbers.shape[0]
    for j in range(lanes):
        target, c = _uniform(seed, turn * count + j) * total, 0
        while c + 1 < potentials.shape[0] and target >= potentials[c]:
            target -= potentials[c]
            c += 1
        i = _draw(near, weights, c * chunk, min((c + 1) * chunk, near.shape[0]), target)
        numbers[j], before[j] = i, near[i]
        for k in range(head.shape[1]):
            panels[j // LANES, k, j % LANES] = -head[i, k]
        half[j // LANES, j % LANES] = square[i] / 2


@compiled
def _draw(near: Any, weights: Any, lo: int, hi: int, target: float) -> int:
    """The row at which the running sum exceeds ``target``, or the last that adds to it."""
    total, last = 0.0, lo
    for i in range(lo, hi):
        part = np.float64(weights[i]) * np.float64(near[i])
        if part > 0.0:
            total += part
            last = i
            if total > target:
                break
    return last


@compiled
def set_bounds(
    near: Any, square: Any, columns: int, depth: int, reach: float, blur: float, bound: Any
) -> None:
    """The largest scores of rows that could be nearer than ``near``, written to ``bound``."""
    for i in range(near.shape[0]):
        bound[i] = bound_of(radius_of(near[i], columns) + blur, square[i], depth, reach)


@compiled
def find_hits(x: Any, state: Any, chunk: int, lo: int, hi: int, trial: Any, hits: Any) -> None:
    """Rows of chunks lo to hi that are nearer to a row that is tried than to their seed.

    Args:
        x: float32 (N, D).
        state: as for :func:`draw_seeds`.
        chunk: rows of a chunk.
        trial: as for :func:`draw_seeds`.
        lo: first chunk to do.
        hi: the one after the last.
        hits: how many each chunk has int64 (C,); from a chunk's first row times L on, rows and
            lanes int32 (N * L, 2), and squared distances float32 (N * L,); written.
    """
    head, _, _, near, bound, _, _ = state
    numbers, _, panels, half = trial
    counts, pairs, found = hits
    edge = np.zeros((ROWS, head.shape[1]), np.float32)
    limit = np.full(ROWS, -np.inf, np.float32)
    bits = np.zeros((ROWS, panels.shape[0]), np.uint16)
    for c in range(lo, hi):
        begin, end = c * chunk, min((c + 1) * chunk, x.shape[0])
        first = begin * numbers.shape[0]
        last = first
        for start in range(begin, end, ROWS):
            size = min(ROWS, end - start)
            if size == ROWS:
                mark_all(head, start, panels, half, bound, bits)
            else:
                edge[:size], limit[:size] = head[start:end], bound[start:end]
                mark_all(edge, 0, panels, half, limit, bits)
            for r in range(size):
                for p in range(panels.shape[0]):
                    word = np.uint64(bits[r, p])
                    while word:
                        pairs[last, 0] = start + r
                        pairs[last, 1] = p * LANES + lowest_bit(word)
                        word &= word - np.uint64(1)
                        last += 1
        kept = first
        for h in range(first, last):
            # Rows are far apart in memory: the next ones are on their way meanwhile.
            if h + 12 < last:
                prefetch(x, pairs[h + 12, 0])
            i, j = pairs[h, 0], pairs[h, 1]
            d = distance(x, i, x, numbers[j])
            if d < near[i]:
                pairs[kept, 0], pairs[kept, 1], found[kept] = i, j, d
                kept += 1
        counts[c] = kept - first


@compiled
def _add_gains(weights: Any, near: Any, chunk: int, lanes: int, hits: Any, gains: Any) -> None:
    """What the sum of squared distances would fall by with each row tried; negative: left out."""
    counts, pairs, found = hits
    for c in range(counts.shape[0]):
        first = c * chunk * lanes
        for h in range(first, first + counts[c]):
            i, j = pairs[h, 0], pairs[h, 1]
            if gains[j] >= 0.0 and found[h] < near[i]:
                fall = np.float64(near[i]) - np.float64(found[h])
                gains[j] += np.float64(weights[i]) * fall


@compiled
def take_seeds(
    scale: Any,
    state: Any,
    chunk: int,
    trials: int,
    seed: int,
    turn: int,
    lanes: int,
    trial: Any,
    hits: Any,
    seeds: Any,
    taken: int,
) -> int:
    """Of each ``trials`` rows that were tried make the one a seed that brings distances down most.

    A row was drawn by the distances of then. So that it is one drawn by those of now, after the
    seeds before it, it is left out with the probability that it would not have been drawn.

    Args:
        scale: columns, reach and blur, as for :func:`assign`, over all rows.
        state: as for :func:`draw_seeds`; changed.
        chunk: rows of a chunk.
        trials: tries for a seed.
        seed: of the draws.
        turn: number of these draws.
        lanes: how many rows were drawn.
        trial: as for :func:`draw_seeds`.
        hits: as for :func:`find_hits`.
        seeds: int64 (K,), numbers of rows, written.
        taken: how many there are.

    Returns:
        How many there are now.
    """
    columns, reach, blur = scale
    head, square, weights, near, bound, labels, potentials = state
    numbers, before = trial[0], trial[1]
    counts, pairs, found = hits
    total = numbers.shape[0]
    gains = np.empty(total)
    j = 0
    while taken < seeds.shape[0]:
        gains[:] = -1.0
        kept = 0
        while kept < trials and j < lanes:
            # Nothing has changed for the first ones.
            now = near[numbers[j]]
            if j < trials or now > _uniform(~seed, turn * total + j) * before[j]:
                gains[j] = 0.0
                kept += 1
            j += 1
        if kept < trials:
            break
        _add_gains(weights, near, chunk, total, hits, gains)
        lane = np.argmax(gains)
        for c in range(counts.shape[0]):
            first = c * chunk * total
            fall = 0.0
            for h in range(first, first + counts[c]):
                i = pairs[h, 0]
                if pairs[h, 1] == lane and found[h] < near[i]:
                    fall += np.float64(weights[i]) * (np.float64(near[i]) - np.float64(found[h]))
                    near[i], labels[i] = found[h], taken
                    radius = radius_of(near[i], columns) + blur
                    bound[i] = bound_of(radius, square[i], head.shape[1], reach)
            potentials[c] = max(potentials[c] - fall, 0.0)
        seeds[taken] = numbers[lane]
        taken += 1
    return taken


@compiled
def lanes_for(taken: int, trials: int, most: int) -> int:
    """How many rows to try at a time.

    With few seeds a new one changes the distances of many rows: others drawn with it would be left
    out mostly.
    """
    return min(most, trials * max(1, taken // 2))


@compiled
def add_seeds(
    x: Any,
    scale: Any,
    state: Any,
    chunk: int,
    trials: int,
    seed: int,
    trial: Any,
    hits: Any,
    seeds: Any,
) -> None:
    """Draw, try and take seeds after the first by one thread; see :func:`take_seeds`."""
    taken, turn = 1, 0
    while taken < seeds.shape[0]:
        lanes = lanes_for(taken, trials, trial[0].shape[0])
        draw_seeds(state, chunk, seed, turn, lanes, trial)
        find_hits(x, state, chunk, 0, hits[0].shape[0], trial, hits)
        taken = take_seeds(
            scale, state, chunk, trials, seed, turn, lanes, trial, hits, seeds, taken
        )
        turn += 1
