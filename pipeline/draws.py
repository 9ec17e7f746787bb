"""Random numbers that are the same for a seed, whoever draws them and in what order."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pipeline.digest import seed_for

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


def batch_rows(
    rows: int, size: int, seed: int, epoch: int, index: int, device: torch.device
) -> Tensor:
    """Rows int64 of batch ``index`` of an epoch, in which each of ``rows`` is in at most one."""
    return _order(rows, seed, epoch, device)[index * size : (index + 1) * size]


@lru_cache(maxsize=1)  # of the epoch in progress
def _order(rows: int, seed: int, epoch: int, device: torch.device) -> Tensor:
    generator = torch.Generator().manual_seed(seed_for(seed, "order", epoch))
    return torch.randperm(rows, generator=generator).to(device)
