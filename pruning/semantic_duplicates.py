"""Samples whose features point almost the same way (SemDeDup).

Source: Abbas et al., "SemDeDup: Data-efficient learning at web-scale through semantic
deduplication", 2023. Samples are put in order, those far from their cluster's centre first; one is
a duplicate at epsilon where its cosine with an earlier one is above 1 - epsilon. The largest such
cosine of each sample is kept, so that one pass serves every epsilon. Samples are compared within
their two nearest clusters, and the order is one for all clusters.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from pipeline.clustering.checks import unit_rows
from pipeline.pruning.pool import key_places
from pipeline.tensors import to_numpy

Floats = npt.NDArray[np.float32]
Rows = npt.NDArray[np.int64]


def order_of(distances: Floats, keys: pa.Array) -> Rows:
    """Rows in the order of the whole set: the furthest from its centre first, then by key."""
    return np.lexsort((key_places(keys), -distances))


def earlier_similarity(x: Floats, block: int = 1024) -> tuple[Floats, Rows]:
    """Of rows in order, the largest cosine with an earlier one, and which that is: the first.

    N x ``block`` products are held at a time.

    Args:
        x: float32 (N, D), of any length but 0.
        block: rows that are compared with all before them at a time.

    Returns:
        float32 (N,), -1 for the first row; int64 (N,), -1 for the first.
    """
    unit = unit_rows(np.ascontiguousarray(x, np.float32))
    best, of = np.full(len(x), -1.0, np.float32), np.full(len(x), -1, np.int64)
    for start in range(0, len(x), block):
        part = unit[start : start + block]
        products = part @ unit[: start + len(part)].T
        rows = np.arange(len(part))
        products[:, start:][np.triu_indices(len(part))] = -np.inf
        found = products.argmax(1)
        # A product rounds; half the squared distance is exact for equal rows.
        apart = part - unit[found]
        value = 1 - np.einsum("ij,ij->i", apart, apart) / 2
        some = products[rows, found] > -np.inf
        best[start + rows[some]] = value[some]
        of[start + rows[some]] = found[some]
    return best, of


@dataclass(frozen=True)
class Similarities:
    """Of each sample the largest cosine with an earlier one.

    Attributes:
        keys: strings (N,).
        values: float32 (N,), -1 where there is no earlier one to compare with.
        of: string (N,), the earlier sample, null where there is none.
    """

    keys: pa.Array
    values: Floats
    of: pa.Array

    @classmethod
    def merge(cls, tables: Iterable[pa.Table]) -> Similarities:
        """From what was found in clusters: of a sample that lay in several, the largest cosine.

        Args:
            tables: with ``sample``, ``similarity`` and ``of``.
        """
        table = pa.concat_tables(tables)
        order = [("sample", "ascending"), ("similarity", "descending"), ("of", "ascending")]
        table = table.take(pc.sort_indices(table, sort_keys=order))
        keys = table["sample"].combine_chunks()
        first = np.ones(len(table), np.bool_)
        if len(table) > 1:
            first[1:] = np.asarray(pc.not_equal(keys[1:], keys[:-1]))
        table = table.filter(pa.array(first))
        return cls(
            table["sample"].combine_chunks(),
            np.asarray(table["similarity"], np.float32),
            table["of"].combine_chunks(),
        )

    def removed(self, epsilon: float) -> npt.NDArray[np.bool_]:
        """Which samples are duplicates at ``epsilon``: bool (N,)."""
        return self.values > np.float32(1 - epsilon)


@dataclass(frozen=True)
class Recall:
    """How many of the duplicates among some samples were found.

    Attributes:
        samples: that were compared with all others.
        duplicates: of these, by comparing with all.
        found: of these, in clusters.
    """

    samples: int
    duplicates: int
    found: int

    def __str__(self) -> str:
        if not self.duplicates:
            return f"None of {self.samples:,} samples that were compared with all is a duplicate."
        return (
            f"Of {self.samples:,} samples that were compared with all others, "
            f"{self.duplicates:,} are duplicates; {self.found:,} of these were found in clusters "
            f"({100 * self.found / self.duplicates:.1f}%)."
        )


def estimate_recall(
    found: Similarities,
    epsilon: float,
    tables: Callable[[], Iterable[pa.Table]],
    samples: int = 500,
    seed: int = 0,
) -> Recall:
    """Compare some samples with all others, and see how many duplicates clusters have missed.

    Args:
        found: in clusters.
        epsilon: as for :meth:`Similarities.removed`.
        tables: called twice, gives tables with ``key``, ``feature`` and ``distance``.
        samples: how many are drawn.
        seed: of the draw.
    """
    rng = np.random.default_rng(seed)
    drawn = rng.choice(len(found.keys), min(samples, len(found.keys)), replace=False)
    wanted = found.keys.take(pa.array(np.sort(drawn)))
    x, distances, keys = _rows_of(tables(), wanted)
    best = np.full(len(keys), -1.0, np.float32)
    for table in tables():
        others = unit_rows(np.ascontiguousarray(_features(table)))
        far, names = np.asarray(table["distance"]), table["key"].combine_chunks()
        # Earlier: further from its centre, or as far with an earlier key.
        places = key_places(pa.concat_arrays([keys, names]))
        own, theirs = places[: len(keys)], places[len(keys) :]
        same = np.asarray(pc.index_in(keys, names).fill_null(-1), np.int64)
        earlier = (far[None] > distances[:, None]) | (
            (far[None] == distances[:, None]) & (theirs[None] < own[:, None])
        )
        earlier[np.flatnonzero(same >= 0), same[same >= 0]] = False
        products = np.where(earlier, x @ others.T, -1.0)
        top = products.argmax(1)
        apart = x - others[top]
        value = 1 - np.einsum("ij,ij->i", apart, apart) / 2
        some = earlier[np.arange(len(x)), top]
        best = np.maximum(best, np.where(some, value, -1.0).astype(np.float32))
    true = best > np.float32(1 - epsilon)
    rows = np.asarray(pc.index_in(keys, found.keys), np.int64)
    seen = found.removed(epsilon)[rows]
    return Recall(len(keys), int(true.sum()), int((true & seen).sum()))


def _rows_of(tables: Iterable[pa.Table], wanted: pa.Array) -> tuple[Floats, Floats, pa.Array]:
    """Unit features, distances and keys of the samples that are wanted."""
    parts = [table.filter(pc.is_in(table["key"], wanted)) for table in tables]
    x = np.concatenate([_features(part) for part in parts if len(part)])
    table = pa.concat_tables([part.select(["key", "distance"]) for part in parts])
    distances = np.asarray(table["distance"], np.float32)
    return unit_rows(np.ascontiguousarray(x)), distances, table["key"].combine_chunks()


def _features(table: pa.Table) -> Floats:
    return np.asarray(to_numpy(table["feature"]), np.float32)
