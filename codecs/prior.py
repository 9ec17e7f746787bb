"""How likely latents are: a density of each channel that is learned, and its tables."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import cast

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipeline.codecs.gdn import lower_bound
from pipeline.codecs.tables import Tables

WIDTHS = (1, 3, 3, 3, 3, 1)
SCALE = 10.0
"""Of the density before training."""
TAIL = 1e-5
"""Mass that a table leaves to the escape on either side."""
MOST_ENTRIES = 256
_LEAST = 1e-9
_FAR = 1e5


class FactorizedPrior(nn.Module):
    """A cumulative distribution for each channel: a small monotone network of one number.

    Source: Balle et al., "Variational image compression with a scale hyperprior", 2018, 6.1.

    Args:
        channels: C.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        scale = SCALE ** (1 / (len(WIDTHS) - 1))
        self.matrices, self.biases, self.gates = (nn.ParameterList() for _ in range(3))
        for number, (before, after) in enumerate(pairwise(WIDTHS)):
            start = math.log(math.expm1(1 / (scale * after)))
            self.matrices.append(nn.Parameter(torch.full((channels, after, before), start)))
            self.biases.append(nn.Parameter(torch.rand(channels, after, 1) - 0.5))
            if number < len(WIDTHS) - 2:
                self.gates.append(nn.Parameter(torch.zeros(channels, after, 1)))

    def logits(self, x: Tensor) -> Tensor:
        """Logits of the cumulative distribution at x (C, n)."""
        v = x[:, None]
        for number, (matrix, bias) in enumerate(zip(self.matrices, self.biases, strict=True)):
            v = F.softplus(matrix.to(x.dtype)) @ v + bias.to(x.dtype)
            if number < len(self.gates):
                v = v + self.gates[number].to(x.dtype).tanh() * v.tanh()
        return v[:, 0]

    def likelihood(self, x: Tensor) -> Tensor:
        """Mass of the unit intervals around x (C, n), at least 1e-9."""
        upper, lower = self.logits(x + 0.5), self.logits(x - 0.5)
        # On the side where both are small, so that no digits are lost.
        sign = -(upper + lower).sign().detach()
        mass = ((sign * upper).sigmoid() - (sign * lower).sigmoid()).abs()
        return lower_bound(mass, _LEAST)

    def bits(self, latents: Tensor) -> Tensor:
        """Bits of latents (N, C, h, w), all together."""
        flat = latents.transpose(0, 1).flatten(1)
        return -self.likelihood(flat).log2().sum()

    @torch.no_grad()
    def tables(self, *, tail: float = TAIL, most: int = MOST_ENTRIES) -> Tables:
        """Integer tables of whole numbers, one a channel, with ends that are found by bisection.

        Args:
            tail: mass that is left to the escape on either side.
            most: symbols of a table; of a longer one, both ends are cut.
        """
        channels = len(self.matrices[0])
        ends = [self._quantile(math.log(q / (1 - q))) for q in (tail, 1 - tail)]
        first, last = (end.round().long() for end in ends)
        middle = self._quantile(0.0).round().long().clamp(first, last)
        first = torch.maximum(first, middle - (most - 1) // 2)
        last = torch.minimum(last, first + most - 1)
        found: list[npt.NDArray[np.float64]] = []
        for channel in range(channels):
            edges = torch.arange(int(first[channel]), int(last[channel]) + 2).double() - 0.5
            below = self.logits(edges.expand(channels, -1))[channel].sigmoid()
            inside = below.diff()
            outside = below[0] + (1 - below[-1])
            found.append(torch.cat([inside, outside[None]]).clamp(min=0).numpy())
        return Tables.of(found, cast("list[int]", first.tolist()))

    def _quantile(self, logit: float) -> Tensor:
        """Where each channel's logits are a number: float64 (C,)."""
        low = torch.full((len(self.matrices[0]), 1), -_FAR, dtype=torch.float64)
        high = -low
        for _ in range(60):
            middle = (low + high) / 2
            below = self.logits(middle) < logit
            low, high = torch.where(below, middle, low), torch.where(below, high, middle)
        return high[:, 0]
