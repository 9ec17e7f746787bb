"""The nearest neighbours of rows, exactly, a block at a time."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float32]
_BLOCK = 2**22
"""Distances that are held at a time: 16 MB."""


def nearest_neighbours(x: Floats, count: int) -> tuple[npt.NDArray[np.int64], Floats]:
    """The ``count`` nearest other rows of each row.

    Args:
        x: float32 (N, D), finite.
        count: neighbours, at most N - 1.

    Returns:
        int64 (N, count), nearest first, of rows as far the first; and their distances, float32.
    """
    size = len(x)
    count = min(count, size - 1)
    near = np.empty((size, count), np.int64)
    apart = np.empty((size, count), np.float32)
    # Distances survive a shift, and are more exact near 0.
    x = x - x.mean(0, dtype=np.float64).astype(np.float32)
    squares = np.einsum("ij,ij->i", x, x)
    rows = max(_BLOCK // size, 1)
    for start in range(0, size if count else 0, rows):
        block = x[start : start + rows]
        own = np.arange(len(block))
        d = squares[start : start + rows, None] + squares - 2 * (block @ x.T)
        d[own, start + own] = np.inf
        # A few more than wanted, told apart by true distances: products round.
        some = min(2 * count + 8, size - 1)
        found = np.argpartition(d, some - 1, axis=1)[:, :some]
        gap = x[found] - block[:, None]
        true = np.einsum("ijk,ijk->ij", gap, gap, dtype=np.float64)
        order = np.lexsort((found, true), axis=1)[:, :count]
        near[start : start + rows] = np.take_along_axis(found, order, 1)
        apart[start : start + rows] = np.sqrt(np.take_along_axis(true, order, 1))
    return near, apart
