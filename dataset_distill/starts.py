"""Which real images a synthesis starts from."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

Rows = npt.NDArray[np.int64]


def rank_starts(
    kind: str,
    labels: npt.NDArray[Any],
    losses: npt.NDArray[Any],
    features: npt.NDArray[np.float32],
    classes: int,
    count: int,
    seed: int,
) -> Rows:
    """Rows of ``count`` candidates of each class, (classes, count); few candidates are used again.

    ``random``: in random order. ``confident``: of least loss (RDED, Sun et al., 2024). ``median``:
    around the median loss (DELT, Shen et al., 2025). ``prototypes``: the candidate next to each of
    ``count`` centres that k-means finds in the class's features.

    Args:
        kind: one of these.
        labels: (N,) of the candidates; every class has one at least.
        losses: (N,) of a teacher.
        features: (N, D) of a teacher.
        classes: C.
        count: of each class.
        seed: of the random choice and of k-means.
    """
    rng = np.random.default_rng(seed)
    members = [rng.permutation(np.flatnonzero(labels == label)) for label in range(classes)]
    if kind == "prototypes":
        chosen = _prototypes(members, features, count, seed)
    else:
        chosen = [_ranked(kind, rows, losses, count) for rows in members]
    return np.stack([np.resize(rows, count) for rows in chosen]).astype(np.int64)


def _ranked(kind: str, rows: Rows, losses: npt.NDArray[Any], count: int) -> Rows:
    if kind == "random":
        return rows
    ordered = rows[np.argsort(losses[rows], kind="stable")]
    first = max(len(ordered) // 2 - count // 2, 0) if kind == "median" else 0
    first = min(first, max(len(ordered) - count, 0))
    return ordered[first : first + count]


def _prototypes(
    members: list[Rows], features: npt.NDArray[np.float32], count: int, seed: int
) -> list[Rows]:
    """Candidates next to the centres, those of the largest clusters first."""
    from pipeline.clustering.batched_kmeans import BatchedKMeans

    offsets = np.concatenate([[0], np.cumsum([len(rows) for rows in members])]).astype(np.int64)
    numbers = [min(count, len(rows)) for rows in members]
    x = features[np.concatenate(members)]
    found = BatchedKMeans(numbers, n_init=4, random_state=seed).fit(x, offsets=offsets)
    chosen = []
    for label, rows in enumerate(members):
        lo, hi = found.center_offsets_[label : label + 2]
        centres, own = found.cluster_centers_[lo:hi], x[offsets[label] : offsets[label + 1]]
        sizes = np.bincount(found.labels_[offsets[label] : offsets[label + 1]], minlength=hi - lo)
        free = np.ones(len(rows), np.bool_)
        nearest = []
        for centre in centres[np.argsort(-sizes, kind="stable")]:
            away = np.where(free, np.square(own - centre).sum(1, dtype=np.float64), np.inf)
            nearest.append(int(away.argmin()))
            free[nearest[-1]] = False
        chosen.append(rows[nearest])
    return chosen
