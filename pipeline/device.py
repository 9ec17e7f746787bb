"""Where tensors live, and how many threads work on them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

BATCH = 256


def default_device() -> torch.device:
    """The first CUDA device where there is one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@contextmanager
def reproducible(threads: int) -> Iterator[None]:
    """Fixed thread count and deterministic kernels: float sums depend on both.

    The caller's settings and random state are put back at the end.
    """
    before = torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()
    random_state = torch.get_rng_state()
    torch.set_num_threads(threads)
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.set_num_threads(before[0])
        torch.use_deterministic_algorithms(before[1])
        torch.set_rng_state(random_state)


@torch.inference_mode()
def in_batches(function: Callable[[Tensor], Tensor], items: Tensor) -> Tensor:
    """What a function makes of images (N, C, H, W) or rows (N,), some at a time, as float32.

    Images lie with their channels last, and on a GPU products are of bfloat16.
    """
    kind = items.device.type
    if items.ndim == 4:
        items = items.contiguous(memory_format=torch.channels_last)
    with torch.autocast(kind, torch.bfloat16, enabled=kind == "cuda"):
        return torch.cat([function(part).float() for part in torch.split(items, BATCH)])
