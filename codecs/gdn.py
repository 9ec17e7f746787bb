"""Generalised divisive normalisation, and bounds whose gradient leads back."""

from __future__ import annotations

from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

_PEDESTAL = 2.0**-36
_LEAST_BETA = 1e-6


class _Bound(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, least: float) -> Tensor:
        ctx.save_for_backward(x)
        ctx.least = least
        return x.clamp(min=least)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        (x,), gradient = ctx.saved_tensors, gradients[0]
        return gradient * ((x >= ctx.least) | (gradient < 0)), None


def lower_bound(x: Tensor, least: float) -> Tensor:
    """The larger of x and ``least``, with a gradient below it where that would raise x.

    A plain clamp has none there, so what once fell below would stay.
    """
    return cast("Tensor", _Bound.apply(x, least))  # type: ignore[no-untyped-call]


class GDN(nn.Module):
    """y_i = x_i / (beta_i + sum over j of gamma_ij |x_j|), or times that sum with ``inverse``.

    Source: Johnston et al., "Computationally Efficient Neural Image Compression", 2019.

    Args:
        channels: C.
        inverse: multiply.

    Shapes: (N, C, H, W) -> (N, C, H, W).
    """

    def __init__(self, channels: int, *, inverse: bool = False) -> None:
        super().__init__()
        self.inverse = inverse
        self.beta = nn.Parameter((torch.ones(channels) + _PEDESTAL).sqrt())
        self.gamma = nn.Parameter((0.1 * torch.eye(channels) + _PEDESTAL).sqrt())

    def forward(self, x: Tensor) -> Tensor:
        beta = lower_bound(self.beta, (_LEAST_BETA + _PEDESTAL) ** 0.5) ** 2 - _PEDESTAL
        gamma = lower_bound(self.gamma, _PEDESTAL**0.5) ** 2 - _PEDESTAL
        norm = F.conv2d(x.abs(), gamma[:, :, None, None], beta)
        return x * norm if self.inverse else x / norm
