"""What every selector promises, whatever it goes by."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

from pipeline.testing.pickled import pickled

Rows = npt.NDArray[np.int64]


def check_selector(selector: Any, pool: Any, select: Callable[[Any, Any, int, int], Rows]) -> None:
    """Run every check of this module.

    Args:
        selector: a frozen dataclass with ``name``, ``per_class``, ``needs`` and
            ``rank(pool, count, seed)``.
        pool: some hundred samples of three classes or more: ``keys``, ``labels``, ``take``.
        select: takes pool, selector, a number of samples and a seed; gives the rows kept.

    Raises:
        AssertionError: a promise is broken; the message says which.
    """
    check_identity(selector)
    size = len(pool)
    counts = (size, size // 2, size // 10, len(set(pool.labels.tolist())))
    for count in counts:
        rows = select(pool, selector, count, 0)
        assert len(rows) == count, f"{len(rows)} samples were chosen and not {count}"
        assert len(set(rows.tolist())) == count, "a sample was chosen twice"
        assert (np.diff(rows) > 0).all(), "rows are not in order"
        check_classes(pool, rows)
        again = select(pool, pickled(selector), count, 0)
        assert np.array_equal(rows, again), "a second choice is another"
        check_order(selector, pool, select, count)
    check_ranking(selector, pool)


def check_identity(selector: Any) -> None:
    """It is a frozen dataclass of plain values, with all that its contract names."""
    assert dataclasses.is_dataclass(type(selector)), "a selector is a dataclass"
    assert isinstance(selector.per_class, bool), "it says whether it is asked for each class"
    assert isinstance(selector.name, str), "a selector has a name"
    assert set(selector.needs) <= {"scores", "labels", "features"}, "it names what it needs"


def check_classes(pool: Any, rows: Rows) -> None:
    """Each class keeps half of an equal part, or all that it has."""
    had, kept = (np.bincount(labels) for labels in (pool.labels, pool.labels[rows]))
    floor = np.minimum(0.5 * len(rows) / np.count_nonzero(had), had)
    kept = np.pad(kept, (0, len(had) - len(kept)))
    assert (kept >= np.floor(floor)).all(), f"a class keeps too little: {kept} of {had}"


def check_order(selector: Any, pool: Any, select: Callable[..., Rows], count: int) -> None:
    """The same keys are chosen in whatever order the pool is given."""
    chosen = set(pool.keys.take(select(pool, selector, count, 0)).to_pylist())
    for seed in range(3):
        other = pool.take(np.random.default_rng(seed).permutation(len(pool)))
        found = set(other.keys.take(select(other, selector, count, 0)).to_pylist())
        assert found == chosen, "the choice depends on the order of the samples"


def check_ranking(selector: Any, pool: Any) -> None:
    """A ranking names samples once, and as many as it is asked for."""
    for count in (1, len(pool) // 3, len(pool)):
        ranked = selector.rank(pool, count, 0)
        least = count if selector.per_class else len(pool)
        assert len(ranked) >= least, "fewer samples were ranked than are needed"
        assert len(set(ranked.tolist())) == len(ranked), "a sample was ranked twice"
        assert ranked.min() >= 0, "a row is out of range"
        assert ranked.max() < len(pool), "a row is out of range"
