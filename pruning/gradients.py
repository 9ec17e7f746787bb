"""Norms of the gradients of single samples."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap

_NUMBERS = 2**26
"""Numbers of gradients that are held at a time."""


def grand(model: nn.Module, x: Tensor, labels: Tensor) -> Tensor:
    """Euclidean norm of the gradient of each sample's cross-entropy by all weights: (N,).

    Source: Paul et al., "Deep Learning on a Data Diet", 2021. The model is in evaluation mode, so
    that a sample's gradient does not depend on the others.

    Args:
        model: a classifier.
        x: (N, channels, H, W).
        labels: int64 (N,).
    """
    model.eval()
    weights = {name: p.detach() for name, p in model.named_parameters()}
    buffers = dict(model.named_buffers())

    def loss(given: Any, image: Tensor, label: Tensor) -> Tensor:
        output = functional_call(model, (given, buffers), (image[None],))
        return F.cross_entropy(output, label[None])

    each = vmap(grad(loss), in_dims=(None, 0, 0))
    rows = max(_NUMBERS // sum(p.numel() for p in weights.values()), 1)
    norms = []
    for images, some in zip(torch.split(x, rows), torch.split(labels, rows), strict=True):
        squares = [
            g.flatten(1).double().square().sum(1) for g in each(weights, images, some).values()
        ]
        norms.append(torch.stack(squares).sum(0).sqrt())
    return torch.cat(norms)
