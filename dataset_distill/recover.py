"""Recover: images that the teacher classifies well and whose BatchNorm statistics look real."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipeline.dataset_distill.config import ImageConfig, RecoverConfig
from pipeline.dataset_distill.curriculum import min_scale
from pipeline.dataset_distill.views import sample_crop
from pipeline.errors import UsageError

TRACE_EVERY = 50


class BatchNormMatching:
    """Distance of a batch's statistics from those that a network's BatchNorm layers remember.

    For the input a_l of each layer, with mean and biased variance over batch and space:
    r_l = ||running_var - var||_2 + ||running_mean - mean||_2; the sum of r_l, the first layer
    times ``first_multiplier``. Source: SRe2L (Yin et al., 2023), equation 5, as CDA uses it.

    Raises:
        UsageError: the network has no BatchNorm2d layer.
    """

    def __init__(self, model: nn.Module, first_multiplier: float) -> None:
        layers = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
        if not layers:
            raise UsageError(
                "The teacher has no BatchNorm layers, and the synthesis matches their statistics.",
                hint="Choose a network with BatchNorm, such as a ResNet.",
                code="no-batchnorm",
            )
        self._terms: list[Tensor] = []
        self._first_multiplier = first_multiplier
        self._handles = [layer.register_forward_pre_hook(self._measure) for layer in layers]

    def _measure(self, layer: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        # In float32: under autocast the inputs come in bfloat16, too coarse for a variance.
        variance, mean = torch.var_mean(_at_least_float32(inputs[0]), dim=(0, 2, 3), correction=0)
        self._terms.append(
            torch.linalg.vector_norm(layer.running_var - variance)  # type: ignore[operator]
            + torch.linalg.vector_norm(layer.running_mean - mean)  # type: ignore[operator]
        )

    def loss(self) -> Tensor:
        """The weighted sum for the forward pass just done, a scalar."""
        terms, self._terms = self._terms, []
        return self._first_multiplier * terms[0] + torch.stack(terms)[1:].sum()

    def close(self) -> None:
        """Take the hooks off the network."""
        for handle in self._handles:
            handle.remove()


def _at_least_float32(x: Tensor) -> Tensor:
    return x.float() if x.dtype in {torch.bfloat16, torch.float16} else x


@dataclass(frozen=True)
class Recovered:
    """Synthetic images and how their optimisation went.

    Attributes:
        images: (B, S, S, C) uint8.
        trace: rows (iteration, cross-entropy, BatchNorm loss) on the cropped batch.
        final: the same two losses on the whole, final images.
    """

    images: npt.NDArray[np.uint8]
    trace: list[list[float]]
    final: dict[str, float]


def recover(
    teacher: nn.Module,
    labels: Tensor,
    noise: Tensor,
    rng: np.random.Generator,
    config: RecoverConfig,
    image: ImageConfig,
) -> Recovered:
    """Optimise one batch of images.

    Args:
        teacher: frozen network in evaluation mode.
        labels: (B,) int64 class of each image.
        noise: (B, C, S, S) float32, where the images start, in normalised space.
        rng: draws the crops, flips and shifts, one of each for the whole batch an iteration.
        config: number of iterations and weights of the losses.
        image: the images' size and normalisation.

    Source: CDA, algorithm of the recover stage; SRe2L where ``config.milestone`` is 0.
    """
    device = noise.device
    x = noise.clone().requires_grad_()
    mean, std = (torch.tensor(v, device=device).view(1, -1, 1, 1) for v in (image.mean, image.std))
    low, high = (0 - mean) / std, (1 - mean) / std
    optimizer = torch.optim.Adam([x], config.lr, betas=(0.5, 0.9))
    matching = BatchNormMatching(teacher, config.first_bn_multiplier)
    trace = []
    try:
        for step in range(config.iterations):
            for group in optimizer.param_groups:
                group["lr"] = config.lr * 0.5 * (1 + math.cos(math.pi * step / config.iterations))
            view = _augment(x, step, rng, config, image)
            with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
                logits = teacher(view)
            ce = F.cross_entropy(logits.float(), labels)
            bn = matching.loss().float()
            optimizer.zero_grad(set_to_none=True)
            (ce + config.r_bn * bn).backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            with torch.no_grad():
                torch.clamp(x, low, high, out=x)
            if step % TRACE_EVERY == 0:
                trace.append(torch.stack([ce.detach(), bn.detach()]))
        with torch.no_grad():
            ce = F.cross_entropy(teacher(x).float(), labels)
            bn = matching.loss()
    finally:
        matching.close()
    pixels = (x.detach() * std + mean).clamp(0, 1).mul(255).round().to(torch.uint8)
    numbers = torch.stack(trace).cpu().tolist()
    return Recovered(
        pixels.permute(0, 2, 3, 1).contiguous().cpu().numpy(),
        [[float(index * TRACE_EVERY), *row] for index, row in enumerate(numbers)],
        {"cross_entropy": float(ce), "batchnorm": float(bn)},
    )


def _augment(
    x: Tensor, step: int, rng: np.random.Generator, config: RecoverConfig, image: ImageConfig
) -> Tensor:
    floor = min_scale(
        step,
        config.iterations,
        kind=config.curriculum,
        milestone=config.milestone,
        floor=config.crop_floor,
    )
    size = image.size
    top, left, height, width = sample_crop(rng, size, (floor, 1.0))
    view = x[:, :, top : top + height, left : left + width]
    if (height, width) != (size, size):
        view = F.interpolate(view, (size, size), mode="bilinear", align_corners=False)
    if image.flip and rng.random() < 0.5:
        view = view.flip(3)
    shift = [int(rng.integers(0, config.jitter + 1)) for _ in range(2)]
    return torch.roll(view, shift, (2, 3))
