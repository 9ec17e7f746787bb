"""Codebooks: the nearest code of each vector, and how much of a codebook is used."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

_DISTANCES = 2**24
"""That are in memory at a time."""


def nearest_code(vectors: Tensor, codes: Tensor) -> Tensor:
    """Id of the nearest code of each vector, the lowest of equal ones; int64 (...).

    Distances are of float32, and the matrix of all of them is never made: beside arguments and
    result there are 64 MiB at most. On a CPU and on CUDA it is the search of k-means.

    Args:
        vectors: (..., d), finite.
        codes: (K, d).
    """
    flat, codes = vectors.detach().reshape(-1, vectors.shape[-1]).float(), codes.detach().float()
    if torch.compiler.is_exporting():
        # A graph for any number of vectors cannot be cut into parts.
        return _least(flat, codes).view(vectors.shape[:-1])
    if flat.device.type == "cpu":
        from pipeline.clustering.kmeans import nearest

        x, c = (np.ascontiguousarray(part.numpy()) for part in (flat, codes))
        found = torch.from_numpy(nearest(x, c, torch.get_num_threads())[0]).to(torch.int64)
    elif flat.device.type == "cuda":
        from pipeline.clustering import triton_kernels

        found = triton_kernels.nearest(flat.contiguous(), codes, codes.mean(0)).to(torch.int64)
    else:
        parts = torch.split(flat, max(1, _DISTANCES // len(codes)))
        found = torch.cat([_least(part, codes) for part in parts])
    return found.view(vectors.shape[:-1])


def _least(vectors: Tensor, codes: Tensor) -> Tensor:
    lengths = codes.square().sum(1)
    return torch.addmm(lengths, vectors, codes.T, alpha=-2).argmin(1)


def usage(counts: npt.ArrayLike) -> dict[str, float]:
    """How evenly codes are used.

    Args:
        counts: (K,) how often each code occurs.

    Returns:
        ``used``, the share of codes that occur; ``perplexity``, how many codes in even use would
        have the same entropy.
    """
    total = np.asarray(counts, np.float64)
    share: npt.NDArray[Any] = total[total > 0] / max(total.sum(), 1.0)
    return {
        "used": len(share) / len(total),
        "perplexity": float(np.exp(-(share * np.log(share)).sum())),
    }
