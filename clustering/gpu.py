"""Whether there is a GPU to take work to."""

from __future__ import annotations

from importlib.util import find_spec


def fits(size: int) -> bool:
    """Whether a CUDA device with Triton has so many bytes of memory to spare."""
    if find_spec("triton") is None:
        return False
    import torch

    return torch.cuda.is_available() and torch.cuda.mem_get_info()[0] > size
