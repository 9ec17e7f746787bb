"""DetailFlow's schedule: how much resolution the first tokens of an image are to carry."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def resolution(tokens: int, most: int, size: int, alpha: float = 1.5) -> int:
    """Side, in pixels, of what the first ``tokens`` of ``most`` are to show of an image.

    Source: Liu et al., "DetailFlow", 2025.
    """
    if most == 1:
        return size
    share = ((most - tokens) / (most - 1)) ** alpha
    return min(max(int(size - (size - 1) * share), 1), size)


def lowered(images: Tensor, lengths: Tensor, most: int, alpha: float) -> Tensor:
    """Images (n, C, S, S) at the resolution of their lengths (n,), resized back to their size."""
    size = images.shape[-1]
    result = images.clone()
    for length in sorted(set(lengths.tolist())):
        side = resolution(length, most, size, alpha)
        if side < size:
            rows = lengths == length
            small = F.adaptive_avg_pool2d(images[rows], side)
            result[rows] = F.interpolate(small, (size, size), mode="bicubic", align_corners=False)
    return result
