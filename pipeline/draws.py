"""Random numbers from a counter: the same for a seed, whoever draws them and in what order."""

from __future__ import annotations

from typing import Any

import numpy as np

_STEP = np.uint64(0x9E3779B97F4A7C15)
_FIRST = np.uint64(0xBF58476D1CE4E5B9)
_SECOND = np.uint64(0x94D049BB133111EB)


def uniform(seed: Any, counter: Any) -> Any:
    """Numbers in [0, 1) from two uint64 or arrays of them; SplitMix64 (Steele et al., 2014).

    ``seed`` should come from a digest: seeds that lie close to one another give shifted numbers.
    """
    x = seed + (counter + np.uint64(1)) * _STEP
    x = (x ^ (x >> np.uint64(30))) * _FIRST
    x = (x ^ (x >> np.uint64(27))) * _SECOND
    x = x ^ (x >> np.uint64(31))
    return np.float64(x >> np.uint64(11)) * 2.0**-53
