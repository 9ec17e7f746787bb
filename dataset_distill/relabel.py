"""Relabel: the teacher's logits for every stored view of every image."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from pipeline.dataset_distill.views import Views, render

BATCH = 256


def soft_labels(teacher: nn.Module, images: Tensor, views: Views) -> npt.NDArray[np.float16]:
    """Raw logits (N, V, classes) in float16, on the mixed views.

    Args:
        teacher: frozen network in evaluation mode.
        images: (N, C, S, S) float, normalised.
        views: parameters of V views of each image, on the same device.

    Source: Shen and Xing, "A Fast Knowledge Distillation Framework", 2022; here a label belongs to
    (image, view), not to a position in a batch.
    """
    rows, count = len(images), int(views.flip.shape[1])
    pairs = torch.cartesian_prod(torch.arange(rows), torch.arange(count)).to(images.device)
    with torch.inference_mode():
        logits = [
            teacher(render(images, views, part[:, 0], part[:, 1])).half()
            for part in torch.split(pairs, BATCH)
        ]
    array: npt.NDArray[Any] = torch.cat(logits).view(rows, count, -1).cpu().numpy()
    return array
