"""Random draws from a counter: the same for a seed, whoever makes them and how often."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from pipeline import draws as numbers
from pipeline.clustering.compiled import compiled

Flags = npt.NDArray[np.bool_]

uniform = compiled(numbers.uniform)
"""For one seed and one place at a time, compiled."""


def draw(flags: Flags, count: int, seed: int) -> None:
    """Leave ``count`` of the rows that are set, every such choice as likely as any other.

    Args:
        flags: bool (N,), changed in place.
        count: how many stay, no more than are set.
        seed: of the draw.
    """
    _draw(flags, int(np.count_nonzero(flags)), count, np.uint64(seed))


@compiled
def _draw(flags: Any, left: int, count: int, seed: Any) -> None:
    # Selection sampling (Knuth, volume 2, 3.4.2, algorithm S): one pass, exactly ``count``.
    for i in range(flags.shape[0]):
        if flags[i]:
            if uniform(seed, np.uint64(i)) * left < count:
                count -= 1
            else:
                flags[i] = False
            left -= 1


def shuffled(flags: Flags, seed: int) -> npt.NDArray[Any]:
    """The rows that are set, in random order: int32, or int64 where these do not reach.

    Args:
        flags: bool (N,).
        seed: of the order.
    """
    small = len(flags) <= np.iinfo(np.int32).max
    rows = np.empty(np.count_nonzero(flags), np.int32 if small else np.int64)
    _shuffle(flags, np.uint64(seed), rows)
    return rows


@compiled
def _shuffle(flags: Any, seed: Any, rows: Any) -> None:
    # Fisher and Yates, from the inside out.
    count = 0
    for i in range(flags.shape[0]):
        if flags[i]:
            at = int(uniform(seed, np.uint64(count)) * (count + 1))
            rows[count] = rows[at]
            rows[at] = i
            count += 1
