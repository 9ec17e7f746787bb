"""How many samples are kept, and that no class is lost."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from pipeline.clustering.threads import Threads
from pipeline.errors import UsageError
from pipeline.pruning.pool import Pool, Rows
from pipeline.pruning.selectors import Selector
from pipeline.terminal import parse_bytes


@dataclass(frozen=True)
class Budget:
    """A share of the samples, a number of them, or bytes.

    Attributes:
        kind: which of these.
        amount: the share in (0, 1], the number, or the bytes.
    """

    kind: Literal["share", "count", "bytes"]
    amount: float

    @classmethod
    def parse(cls, text: str) -> Budget:
        """From ``0.7``, ``70%``, ``35000`` or ``2GB``.

        Raises:
            UsageError: it is none of these.
        """
        found = re.fullmatch(r"\s*([0-9]*\.?[0-9]+)\s*(%|[kmgt]?b)?\s*", text.lower())
        if found:
            number, unit = float(found[1]), found[2]
            if unit == "%" and 0 < number <= 100:
                return cls("share", number / 100)
            if unit and unit != "%":
                return cls("bytes", parse_bytes(text))
            if not unit and "." in found[1] and 0 < number <= 1:
                return cls("share", number)
            if not unit and "." not in found[1] and number >= 1:
                return cls("count", number)
        raise UsageError(
            f"'{text}' is no budget.",
            hint="Write a share such as 0.7 or 70%, a number of samples such as 35000, or bytes "
            "such as 2GB.",
            code="bad-budget",
        )

    def count(self, samples: int, sizes: Rows | None = None) -> int:
        """How many of so many samples are kept; of a budget in bytes, by their mean size.

        Raises:
            UsageError: it is a number, and larger than that of the samples.
        """
        if self.kind == "share":
            return min(max(round(self.amount * samples), 1), samples)
        if self.kind == "bytes":
            if sizes is None:
                raise UsageError(
                    "The sizes of the samples are not known.",
                    hint="Give a share or a number of samples.",
                    code="no-sizes",
                )
            mean = max(float(sizes.mean()), 1.0)
            return min(max(math.floor(self.amount / mean), 1), samples)
        if self.amount > samples:
            raise UsageError(
                f"{self.amount:,.0f} samples are to be kept, and there are {samples:,}.",
                hint="Keep fewer, or a share such as 0.7.",
                code="budget-above-data",
            )
        return int(self.amount)


def select(
    pool: Pool,
    selector: Selector,
    budget: Budget,
    *,
    balance: float = 0.5,
    seed: int = 0,
    classes: Sequence[str] = (),
) -> Rows:
    """The rows that are kept, ascending.

    Each of C classes keeps at least ``balance`` times the C-th part of the budget, or all it has
    (Sorscher et al., "Beyond neural scaling laws", 2022, with a ratio of 0.5). Budgets in bytes are
    filled in the order of the selector with what fits.

    Args:
        pool: what can be chosen from.
        selector: of :data:`~pipeline.pruning.selectors.selectors`.
        budget: how much.
        balance: 0 to 1.
        seed: of selectors that draw.
        classes: names by label, for messages.

    Raises:
        UsageError: a class would be without samples, the budget is larger than the pool, or the
            pool lacks what the selector needs.
    """
    pool.check()
    _check_needs(pool, selector)
    count = budget.count(len(pool), pool.bytes)
    groups = pool.classes()
    floors = [min(math.ceil(balance * count / len(groups)), len(rows)) for rows in groups]
    if sum(floors) > count:
        # Only where classes outnumber the budget.
        raise _vanishing(pool, groups[count:], classes, count)
    if selector.per_class:
        ranked = _by_class(pool, selector, groups, floors, count, seed)
    else:
        ranked = _floors_first(pool, selector.rank(pool, count, seed), groups, floors)
    if budget.kind == "bytes" and pool.bytes is not None:
        ranked = _fitting(pool.bytes, ranked, sum(floors), budget.amount)
    else:
        ranked = ranked[:count]
    if pool.labels is not None:
        left = np.bincount(pool.labels[ranked], minlength=int(pool.labels.max()) + 1)
        gone = [rows for rows in groups if not left[pool.labels[rows[0]]]]
        if gone:
            raise _vanishing(pool, gone, classes, len(ranked))
    return np.sort(ranked)


def class_counts(sizes: Sequence[int], floors: Sequence[int], count: int) -> list[int]:
    """How many of ``count`` each class gives: in proportion to its size, and its floor at least."""
    given = np.array(floors, np.int64)
    room = np.array(sizes, np.int64)
    share = room * (count / max(int(room.sum()), 1))
    # One after the other to the class that is furthest below its share, all at once.
    while (left := count - int(given.sum())) > 0:
        lack = np.where(given < room, share - given, -np.inf)
        below = np.flatnonzero(lack >= 1)
        if len(below) and np.floor(lack[below]).sum() <= left:
            given[below] += np.floor(lack[below]).astype(np.int64)
            continue
        order = np.argsort(-lack, kind="stable")
        order = order[np.isfinite(lack[order])][:left]
        given[order] += 1
    return [int(n) for n in given]


def _by_class(
    pool: Pool,
    selector: Selector,
    groups: Sequence[Rows],
    floors: Sequence[int],
    count: int,
    seed: int,
) -> Rows:
    """Each class's own ranking: first all floors, then class after class what is left."""
    counts = class_counts([len(rows) for rows in groups], floors, count)

    def ranked(c: int) -> Rows:
        best: Rows = groups[c][selector.rank(pool.take(groups[c]), counts[c], seed)][: counts[c]]
        return best

    with Threads() as threads:
        every = threads.each(ranked, len(groups))
    first = [rows[:floor] for rows, floor in zip(every, floors, strict=True)]
    rest = [rows[floor:] for rows, floor in zip(every, floors, strict=True)]
    return np.concatenate([*first, *rest])


def _floors_first(pool: Pool, ranked: Rows, groups: Sequence[Rows], floors: Sequence[int]) -> Rows:
    """A ranking of all with what classes keep at least before everything else."""
    number = np.zeros(len(pool), np.int64)
    for index, rows in enumerate(groups):
        number[rows] = index
    own = number[ranked]
    # The place of each in its class's ranking.
    order = np.argsort(own, kind="stable")
    starts = np.searchsorted(own[order], np.arange(len(groups)))
    place = np.empty(len(ranked), np.int64)
    place[order] = np.arange(len(ranked)) - starts[own[order]]
    first = place < np.array(floors)[own]
    return np.concatenate([ranked[first], ranked[~first]])


def _fitting(sizes: Rows, ranked: Rows, least: int, most: float) -> Rows:
    """As many in order of rank as fit into ``most`` bytes, and no fewer than ``least``."""
    fits = int(np.searchsorted(np.cumsum(sizes[ranked]), most, "right"))
    if fits < least:
        raise UsageError(
            f"{most:,.0f} bytes hold {fits:,} samples, and classes are to keep {least:,} at least.",
            hint="Keep more bytes, or set balance lower.",
            code="class-vanishes",
        )
    return ranked[:fits]


def _check_needs(pool: Pool, selector: Selector) -> None:
    missing = [name for name in selector.needs if getattr(pool, name) is None]
    if missing:
        raise UsageError(
            f"The selector '{selector.name}' needs {' and '.join(missing)}, which are not there.",
            hint="Give them, or take another selector.",
            code="selector-needs",
        )


def _vanishing(
    pool: Pool, groups: Sequence[Rows], classes: Sequence[str], count: int
) -> UsageError:
    labels = [] if pool.labels is None else [int(pool.labels[rows[0]]) for rows in groups]
    names = [classes[label] if label < len(classes) else str(label) for label in labels[:5]]
    more = ", ..." if len(labels) > 5 else ""
    return UsageError(
        f"Of {count:,} samples that are kept, none would be of {len(labels):,} classes: "
        f"{', '.join(names)}{more}.",
        hint="Keep more samples, or set balance above 0, so that every class keeps some.",
        code="class-vanishes",
    )
