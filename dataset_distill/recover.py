"""Recover: images that teachers classify well and whose BatchNorm statistics look real."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipeline.dataset_distill.batchnorm import BatchNormMatching, Targets
from pipeline.dataset_distill.config import RecoverConfig
from pipeline.dataset_distill.curriculum import min_scale
from pipeline.dataset_distill.views import ATTEMPTS, crops
from pipeline.digest import seed_for
from pipeline.labelled_images import ImageConfig
from pipeline.stage import StateKeeper

log = logging.getLogger(__name__)

TRACE_EVERY = 50


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
    teachers: Sequence[nn.Module],
    labels: Tensor,
    start: Tensor,
    seed: int,
    config: RecoverConfig,
    image: ImageConfig,
    *,
    targets: Sequence[Targets] | None = None,
    checkpoint: StateKeeper | None = None,
) -> Recovered:
    """Optimise one batch of images.

    What is random in an iteration comes from ``seed`` and the iteration's number, so that a
    ``checkpoint`` holds images, optimiser and trace, and no state of a generator.

    Args:
        teachers: frozen networks in evaluation mode; each iteration asks one of them, at random.
        labels: (B,) int64 class of each image.
        start: (B, C, S, S) float32, where the images start, in normalised space.
        seed: of the teachers asked and of crops, flips and shifts, one of each for the whole batch
            an iteration.
        config: number of iterations and weights of the losses.
        image: the images' size and normalisation.
        targets: of each teacher, statistics to match other than those it remembers.
        checkpoint: where the state is kept.

    Source: CDA, algorithm of the recover stage; SRe2L where ``config.milestone`` is 0. Several
    teachers: G-VBSM (Shao et al., 2024).
    """
    device = start.device
    x = start.clone().requires_grad_()
    mean, std = (torch.tensor(v, device=device).view(1, -1, 1, 1) for v in (image.mean, image.std))
    low, high = (0 - mean) / std, (1 - mean) / std
    optimizer = torch.optim.Adam([x], config.lr, betas=(0.5, 0.9))
    wanted: Sequence[Targets | None] = targets or [None] * len(teachers)
    matched = [
        BatchNormMatching(teacher, config.first_bn_multiplier, target)
        for teacher, target in zip(teachers, wanted, strict=True)
    ]
    weights = [_weight(match, x, seed, config) for match in matched]
    trace: list[Tensor] = []
    done = _resume(checkpoint, x, optimizer, trace)
    for step in range(done, config.iterations):
        rng = np.random.default_rng((seed, step))
        which = int(rng.integers(len(matched)))
        for group in optimizer.param_groups:
            group["lr"] = config.lr * 0.5 * (1 + math.cos(math.pi * step / config.iterations))
        logits, bn = matched[which](_augment(x, step, rng, config, image))
        ce = F.cross_entropy(logits, labels)
        optimizer.zero_grad(set_to_none=True)
        (ce + weights[which] * bn).backward()
        optimizer.step()
        with torch.no_grad():
            torch.clamp(x, low, high, out=x)
        if step % TRACE_EVERY == 0:
            trace.append(torch.stack([ce.detach(), bn.detach()]))
        if checkpoint and checkpoint.due:
            checkpoint.write(
                {
                    "done": step + 1,
                    "images": x.detach(),
                    "optimizer": optimizer.state_dict(),
                    "trace": trace,
                }
            )
            log.info("checkpoint at iteration %d of %d", step + 1, config.iterations)
    with torch.no_grad():
        torch.clamp(x, low, high, out=x)
        logits, bn = matched[0](x)
        ce = F.cross_entropy(logits, labels)
    pixels = (x.detach() * std + mean).clamp(0, 1).mul(255).round().to(torch.uint8)
    numbers = torch.stack(trace).cpu().tolist() if trace else []
    return Recovered(
        pixels.permute(0, 2, 3, 1).contiguous().cpu().numpy(),
        [[float(index * TRACE_EVERY), *row] for index, row in enumerate(numbers)],
        {"cross_entropy": float(ce), "batchnorm": float(bn)},
    )


def _weight(match: BatchNormMatching, x: Tensor, seed: int, config: RecoverConfig) -> Any:
    """What the BatchNorm loss of a teacher is multiplied with: a number, or a scalar tensor."""
    if not config.relative:
        return config.r_bn
    generator = torch.Generator().manual_seed(seed_for(seed, "noise"))
    noise = torch.randn(x.shape, generator=generator).to(x)
    with torch.no_grad():
        return config.r_bn / match(noise)[1]


def _resume(
    checkpoint: StateKeeper | None, x: Tensor, optimizer: torch.optim.Adam, trace: list[Tensor]
) -> int:
    """Take up what a checkpoint kept; the number of iterations that are done."""
    state = checkpoint.read() if checkpoint else None
    if state is None or state["images"].shape != x.shape:
        return 0
    with torch.no_grad():
        x.copy_(state["images"])
    optimizer.load_state_dict(state["optimizer"])
    trace += [pair.to(x.device) for pair in state["trace"]]
    log.info("synthesis goes on from iteration %d", state["done"] + 1)
    return int(state["done"])


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
    top, left, height, width = crops(rng.random((ATTEMPTS, 4)), size, (floor, 1.0)).tolist()
    view = x[:, :, top : top + height, left : left + width]
    if (height, width) != (size, size):
        view = F.interpolate(view, (size, size), mode="bilinear", align_corners=False)
    if image.flip and config.flip and rng.random() < 0.5:
        view = view.flip(3)
    shift = [int(rng.integers(0, config.jitter + 1)) for _ in range(2)]
    return torch.roll(view, shift, (2, 3))
