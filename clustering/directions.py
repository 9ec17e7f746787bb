"""Leading directions: few coordinates of a row that bound its distance to a centroid from below.

With V a contraction and t(z)^2 = |z|^2 - |V'z|^2, the points (V'z, t(z)) are never further apart
than the z themselves: |x - c|^2 >= |V'(x - c)|^2 + (t(x) - t(c))^2. Features of images have most of
their variance in few directions; there a sixteenth of the columns leaves one to five of a thousand
centroids that could be nearest. Nothing is approximated: the others cannot be.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

from pipeline.clustering import kernels
from pipeline.clustering.threads import Threads
from pipeline.clustering.tile import LANES, PANELS

Floats = npt.NDArray[np.float32]
Doubles = npt.NDArray[np.float64]

_EPS = 2.0**-24
SMALL = 2**27
"""Multiply-adds of an iteration below which directions are not worth finding."""

_SAMPLE = 4096
_QUERIES = 512
_DEPTHS = (3, 7, 11, 15, 23, 31, 47, 63, 95, 127)
"""Numbers of directions to choose from: with the length of the rest, whole vectors mostly."""

_BLOCK = 4096


@dataclass(frozen=True)
class Directions:
    """An affine map to leading coordinates and the length of what they leave out.

    Attributes:
        mean: float32 (D,).
        basis: float32 (D, depth), a contraction.
    """

    mean: Floats
    basis: Floats

    @cached_property
    def exact(self) -> Doubles:
        """The basis in float64."""
        return self.basis.astype(np.float64)

    @cached_property
    def panels(self) -> Floats:
        """The basis as the innermost loop reads it: float32 (P, D, LANES)."""
        columns, depth = self.basis.shape
        made = np.zeros((-(-depth // (LANES * PANELS)) * PANELS, LANES, columns), np.float32)
        made.reshape(-1, columns)[:depth] = self.basis.T
        return np.ascontiguousarray(made.transpose(0, 2, 1))


@dataclass(frozen=True)
class Leading:
    """Leading coordinates of rows.

    Attributes:
        head: float32 (N, depth + 1); the rows themselves where there are no directions.
        square: float32 (N,), their squared norms.
        error: float32 (N,), how far they may be from the true ones.
    """

    head: Floats
    square: Floats
    error: Floats

    def part(self, rows: Any) -> Leading:
        """Those of some rows."""
        return Leading(self.head[rows], self.square[rows], self.error[rows])

    @classmethod
    def of(cls, x: Floats, directions: Directions | None, threads: Threads) -> Leading:
        """Of float32 rows (N, D)."""
        if directions is None:
            return cls(x, np.einsum("ij,ij->i", x, x), np.zeros(len(x), np.float32))
        head = np.empty((len(x), directions.basis.shape[1] + 1), np.float32)
        square, error = np.empty((2, len(x)), np.float32)
        mean, panels = directions.mean[None], directions.panels
        threads.split(
            lambda lo, hi: kernels.project(x, mean, panels, lo, hi, head, square, error),
            len(x),
            256,
        )
        return cls(head, square, error)


@dataclass(frozen=True)
class Panels:
    """Centroids as the innermost loop reads them.

    Attributes:
        rows: float32 (K, D), the centroids.
        panels: float32 (P, depth, LANES), leading coordinates with their sign changed.
        half: float32 (P, LANES), half of their squared norms; infinite beyond K.
        reach: the largest norm.
        blur: how far the coordinates may be from the true ones.
    """

    rows: Floats
    panels: Floats
    half: Floats
    reach: float
    blur: float

    @classmethod
    def of(cls, rows: Floats, directions: Directions | None, threads: Threads) -> Panels:
        """Of float32 centroids (K, D)."""
        count = len(rows)
        panels, half = empty_panels(count, rows.shape[1], directions)

        def lay_out(lo: int, hi: int) -> None:
            for start in range(lo, hi, _BLOCK):
                block = slice(start, min(start + _BLOCK, hi))
                centred = rows[block].astype(np.float64)
                inside = np.empty((len(centred), 0))
                if directions:
                    centred -= directions.mean
                    inside = centred @ directions.exact
                numbers = np.arange(start, block.stop)
                kernels.lay_out(centred, inside, numbers, panels, half)

        threads.split(lay_out, count, 256)
        reach = math.sqrt(2.0 * float(half.ravel()[:count].max())) * (1.0 + 4.0 * _EPS)
        # Coordinates are rounded once, and a short tail is what float64 leaves of a difference.
        return cls(rows, panels, half, reach, 2.0 * _EPS * reach if directions else 0.0)


def empty_panels(count: int, columns: int, directions: Directions | None) -> tuple[Floats, Floats]:
    """Space for the panels of so many centroids, and for half of their squared norms."""
    depth = directions.basis.shape[1] + 1 if directions else columns
    number = -(-count // (LANES * PANELS)) * PANELS
    return (
        np.zeros((number, depth, LANES), np.float32),
        np.full((number, LANES), np.inf, np.float32),
    )


def find_directions(x: Floats, clusters: int, rows: int | None = None) -> Directions | None:
    """The directions that make the search for the nearest of so many centroids cheapest.

    They come from a sample of rows, and so does their number: rows stand for centroids, and it is
    counted how many could be the nearest. What is chosen changes the time alone.

    Args:
        x: float32 (N, D).
        clusters: how many centroids there will be.
        rows: how many there are, where ``x`` is a sample of them.

    Returns:
        None where the rows themselves do as well.
    """
    count, columns = x.shape
    if columns < 2 * _DEPTHS[0] or (rows or count) * clusters * columns < SMALL:
        return None
    rng = np.random.default_rng(0)
    sample = x[np.sort(rng.choice(count, min(count, _SAMPLE + _QUERIES), replace=False))]
    sample = rng.permutation(sample)
    mean = sample.mean(0, dtype=np.float64).astype(np.float32)
    sample = sample - mean
    basis = _leading(sample, min(_DEPTHS[-1], columns // 2), rng)
    queries, others = sample[:_QUERIES], sample[_QUERIES:][:clusters]
    if not len(others):
        return None
    depth = _cheapest(queries, others, basis, clusters)
    return Directions(mean, np.ascontiguousarray(basis[:, :depth])) if depth else None


def _leading(rows: Floats, count: int, rng: np.random.Generator) -> Floats:
    """Orthonormal directions of most variance, in order; shrunk by a hair, so that none expands."""
    found = rng.standard_normal((rows.shape[1], min(count + 8, rows.shape[1])), np.float32)
    for _ in range(2):
        found = np.linalg.qr(rows.T @ (rows @ found))[0]
    inside = rows @ found
    turn = np.linalg.eigh(inside.T @ inside)[1][:, ::-1]
    basis = (found @ turn[:, :count]).astype(np.float64)
    expands = np.linalg.norm(basis.T @ basis - np.eye(basis.shape[1]))
    shrunk: Floats = (basis * (1.0 - 2.0**-22) / (1.0 + expands)).astype(np.float32)
    return shrunk


def _cheapest(queries: Floats, others: Floats, basis: Floats, clusters: int) -> int:
    """The number of directions that takes least time; 0 for all columns."""
    columns = queries.shape[1]
    square, other_square = (np.einsum("ij,ij->i", z, z) for z in (queries, others))
    apart = square[:, None] - 2.0 * queries @ others.T + other_square
    nearest = apart.min(1, keepdims=True) * (1.0 + 1e-5)
    inside, other_inside = queries @ basis, others @ basis
    # In cycles for a row, as measured. Rows are further from one another than from centroids, so
    # that fewer centroids are candidates.
    each, share = 32 + columns / 4, 0.4 * clusters / len(others)
    best, least = 0, clusters / LANES * (columns + 1.5)
    for depth in (d for d in _DEPTHS if d <= basis.shape[1]):
        a, b = inside[:, :depth], other_inside[:, :depth]
        within, other_within = np.einsum("ij,ij->i", a, a), np.einsum("ij,ij->i", b, b)
        tail = np.sqrt(np.maximum(square - within, 0.0))
        other_tail = np.sqrt(np.maximum(other_square - other_within, 0.0))
        bound = within[:, None] - 2.0 * a @ b.T + other_within + (tail[:, None] - other_tail) ** 2
        candidates = float((bound <= nearest).sum(1).mean()) * share
        cost = clusters / LANES * (depth + 2.5) + candidates * each
        if cost < least:
            best, least = depth, cost
    return best
