"""Relabel: the teachers' logits for views of images."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from pipeline.dataset_distill.views import Views, render
from pipeline.device import in_batches
from pipeline.labelled_images import Pictures


def mean_logits(teachers: Sequence[nn.Module], x: Tensor) -> Tensor:
    """Mean over teachers of their logits (B, classes) for images (B, C, S, S)."""
    return torch.stack([teacher(x) for teacher in teachers]).mean(0)


def soft_labels(
    teachers: Sequence[nn.Module], pictures: Pictures, views: Views
) -> npt.NDArray[np.float32]:
    """Raw logits (N, V, classes), on the mixed views.

    Args:
        teachers: frozen networks in evaluation mode.
        pictures: N images.
        views: parameters of V views of each image, on the same device.

    Source: Shen and Xing, "A Fast Knowledge Distillation Framework", 2022; here a label belongs to
    (image, view), not to a position in a batch.
    """
    rows, count = len(pictures), int(views.flip.shape[1])

    def of(places: Tensor) -> Tensor:
        row, view = places // count, places % count
        return mean_logits(teachers, render(pictures, views, row, view))

    places = torch.arange(rows * count, device=pictures.pixels.device)
    found = in_batches(of, places).view(rows, count, -1)
    return found.cpu().numpy()
