"""First centroids: greedy k-means++ (Arthur and Vassilvitskii, 2007), k-means|| (Bahmani and
others, 2012), or rows drawn at random.
"""

from __future__ import annotations

import itertools
import math

import numpy as np
import numpy.typing as npt

from pipeline.clustering import seed_kernels as kernels
from pipeline.clustering.checks import InputError
from pipeline.clustering.cpu import CHUNK, Rows
from pipeline.clustering.directions import Floats
from pipeline.clustering.lloyd import lloyd
from pipeline.clustering.tile import LANES

WIDTH = 2 * LANES
"""Rows that are tried at a time, on each kind of processor."""

INITS = ("k-means++", "k-means||", "random")

_ROUNDS = 5
_OVERSAMPLING = 2


def seed(
    how: str, rows: Rows, clusters: int, random: np.random.RandomState, size: int | None
) -> tuple[Floats, bool]:
    """First centroids (K, D), and whether rows are labelled with their nearest of them.

    Args:
        how: one of :data:`INITS`.
        rows: what to cluster.
        clusters: K.
        random: what to draw with.
        size: rows to seek them among; 64 a cluster, and at least 16,384, where not given.

    Raises:
        InputError: ``how`` is none of them.
    """
    if how not in INITS:
        raise InputError(
            f"init={how!r} is no way to find first centroids.",
            hint=f"It is one of {', '.join(INITS)}, or an array of centroids.",
            code="bad-init",
        )
    rows.forget()
    if how == "random":
        return rows.x[_draw(rows.weights, clusters, random)], False
    drawn = sample(rows.weights, clusters, random, size)
    some = rows if drawn is None else rows.part(drawn)
    if how == "k-means||":
        made = scalable(some, clusters, random)
        rows.forget()
        return made, False
    return some.x[plus_plus(some, clusters, random)], some is rows


def sample(
    weights: Floats, clusters: int, random: np.random.RandomState, size: int | None
) -> npt.NDArray[np.int64] | None:
    """Rows to seek first centroids among, in order; None for all of them."""
    few = max(size or max(64 * clusters, 2**14), clusters)
    return np.sort(_draw(weights, few, random)) if few < len(weights) else None


def _draw(weights: Floats, count: int, random: np.random.RandomState) -> npt.NDArray[np.int64]:
    """Distinct rows with weight, all equally likely where there are more than ``count``."""
    found = np.flatnonzero(weights)
    return found if len(found) <= count else random.choice(found, count, replace=False)


def scalable(rows: Rows, clusters: int, random: np.random.RandomState) -> Floats:
    """k-means||: in few rounds draw twice K rows by squared distance, then cluster what was drawn.

    Args:
        rows: what to cluster.
        clusters: K.
        random: what to draw with.

    Returns:
        float32 (K, D).
    """
    x, weights = rows.x, rows.weights
    drawn = x[random.choice(len(x), 1, p=weights / weights.sum(dtype=np.float64))]
    rows.labels[:] = 0
    rows.measure(drawn)
    for _ in range(_ROUNDS):
        share = rows.near.astype(np.float64) * weights
        # The first of exponential arrivals: draws without replacement by these shares.
        with np.errstate(divide="ignore"):
            arrival = random.standard_exponential(len(x)) / share
        count = min(_OVERSAMPLING * clusters, int(np.count_nonzero(share)))
        if not count:
            break
        new = x[np.sort(np.argpartition(arrival, count - 1)[:count])]
        rows.assign(new, len(drawn))
        drawn = np.concatenate([drawn, new])
    if len(drawn) <= clusters:
        return x[plus_plus(rows, clusters, random)]
    weight = np.bincount(rows.labels, weights, len(drawn)).astype(np.float32)
    return reduce(Rows(drawn, weight, rows.directions, rows.threads), clusters, random)


def reduce(
    drawn: Rows, clusters: int, random: np.random.RandomState, *, spherical: bool = False
) -> Floats:
    """First centroids float32 (K, D) from weighted candidates: k-means of these."""
    first = drawn.x[plus_plus(drawn, clusters, random)]
    made = lloyd(drawn, first, max_iter=20, tol=0.0, spherical=spherical, assigned=True)
    centroids: Floats = made.centroids
    return centroids


def plus_plus(rows: Rows, clusters: int, random: np.random.RandomState) -> npt.NDArray[np.int64]:
    """Rows to begin with: each next one drawn by squared distance, the best of 2 + ln K tries.

    Leaves each row labelled with its nearest seed.

    Args:
        rows: what to cluster.
        clusters: how many seeds.
        random: what to draw with.

    Returns:
        int64 (clusters,), numbers of rows.
    """
    x, weights, threads = rows.x, rows.weights, rows.threads
    lead = rows.leading
    trials = min(2 + int(math.log(clusters)), WIDTH)
    seeds = np.empty(clusters, np.int64)
    seeds[0] = random.choice(len(x), p=weights / weights.sum(dtype=np.float64))
    seed = int(random.randint(2**31))
    rows.labels[:] = 0
    rows.measure(x[seeds[:1]])
    depth = lead.head.shape[1]
    reach = math.sqrt(float(lead.square.max())) * (1.0 + 2.0**-20)
    blur = 2.0 * float(lead.error.max())
    bound = np.empty(len(x), np.float32)
    kernels.set_bounds(rows.near, lead.square, x.shape[1], depth, reach, blur, bound)
    scale = (x.shape[1], reach, blur)
    potentials = rows.chunk_sums()
    chunks = len(potentials)
    state = (lead.head, lead.square, weights, rows.near, bound, rows.labels, potentials)
    trial = (
        np.empty(WIDTH, np.int64),
        np.empty(WIDTH, np.float32),
        np.zeros((WIDTH // LANES, depth, LANES), np.float32),
        np.empty((WIDTH // LANES, LANES), np.float32),
    )
    hits = (
        np.empty(chunks, np.int64),
        np.empty((len(x) * WIDTH, 2), np.int32),
        np.empty(len(x) * WIDTH, np.float32),
    )
    taken = 1
    if threads.count == 1 or chunks == 1:
        kernels.add_seeds(x, scale, state, CHUNK, trials, seed, trial, hits, seeds)
        taken = clusters
    for turn in itertools.count():
        if taken == clusters:
            break
        lanes = kernels.lanes_for(taken, trials, WIDTH)
        kernels.draw_seeds(state, CHUNK, seed, turn, lanes, trial)
        threads.split(
            lambda lo, hi: kernels.find_hits(x, state, CHUNK, lo, hi, trial, hits), chunks
        )
        taken = kernels.take_seeds(
            scale, state, CHUNK, trials, seed, turn, lanes, trial, hits, seeds, taken
        )
    rows.measure(x[seeds])
    return seeds
