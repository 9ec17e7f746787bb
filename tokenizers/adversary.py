"""An adversary that tells decoded images from real ones."""

from __future__ import annotations

from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

NAME = "adversary"
"""Under which a tokenizer holds it while it is trained."""


class Adversary(nn.Module):
    """How real each patch of an image looks: three convolutions, (n, C, H, W) to (n, 1, h, w).

    Source: Isola et al., "Image-to-Image Translation with Conditional Adversarial Networks", 2017,
    without its normalisation.
    """

    def __init__(self, channels: int, width: int = 64) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(channels, width, 4, 2, 1),
            nn.LeakyReLU(0.2),
            nn.Conv2d(width, 2 * width, 4, 2, 1),
            nn.LeakyReLU(0.2),
            nn.Conv2d(2 * width, 1, 3, 1, 1),
        )

    def forward(self, images: Tensor) -> Tensor:
        return cast("Tensor", self.layers(images))


def adversarial_loss(adversary: Adversary, decoded: Tensor, real: Tensor, weight: float) -> Tensor:
    """The hinge losses of both sides as one.

    The adversary's gradient is that of telling ``decoded`` from ``real``; that of ``decoded`` is of
    being taken for real, times ``weight``: one optimiser serves both.
    """
    own = F.relu(1 - adversary(real)).mean() + F.relu(1 + adversary(decoded.detach())).mean()
    frozen = {name: value.detach() for name, value in adversary.named_parameters()}
    judged = torch.func.functional_call(adversary, frozen, (decoded,))
    return cast("Tensor", own - weight * judged.mean())
