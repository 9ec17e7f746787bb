"""What the ranks of a training tell one another."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, distributed


def all_ranks(rows: Any, losses: Any) -> tuple[Tensor, Tensor]:
    """Rows and losses of all ranks, in the order of ranks: what a sampler is updated with.

    Without ``torch.distributed`` they are those given. Ranks may give unequal numbers.

    Args:
        rows: integers (n,).
        losses: (n,), of any float type.

    Returns:
        int64 (M,) and float32 (M,), on the device of ``losses``.
    """
    losses = torch.as_tensor(losses).detach().to(torch.float32)
    rows = torch.as_tensor(rows).to(losses.device, torch.int64)
    if not (distributed.is_available() and distributed.is_initialized()):
        return rows, losses
    world = distributed.get_world_size()
    sizes = [torch.zeros(1, dtype=torch.int64, device=losses.device) for _ in range(world)]
    distributed.all_gather(sizes, torch.tensor([len(rows)], device=losses.device))
    most = int(torch.stack(sizes).max())
    return _gathered(rows, most, sizes), _gathered(losses, most, sizes)


def _gathered(own: Tensor, most: int, sizes: list[Tensor]) -> Tensor:
    padded = torch.zeros(most, dtype=own.dtype, device=own.device)
    padded[: len(own)] = own
    parts = [torch.empty_like(padded) for _ in sizes]
    distributed.all_gather(parts, padded)
    return torch.cat([part[: int(size)] for part, size in zip(parts, sizes, strict=True)])
