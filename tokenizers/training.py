"""Training of a tokenizer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, cast

import numpy as np
import pyarrow as pa
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipeline import backbones
from pipeline.backbones import Weights
from pipeline.config import TrainConfig
from pipeline.digest import seed_for
from pipeline.draws import batch_rows
from pipeline.tensors import to_numpy
from pipeline.tokenizers.adversary import NAME, Adversary, adversarial_loss
from pipeline.tokenizers.config import (
    PerceptualConfig,
    TailDropConfig,
    TokenizerConfig,
    TokenizerTrainConfig,
)
from pipeline.tokenizers.quality import error_curves, grid, health, psnr
from pipeline.tokenizers.quantizers import VQ, decorrelation
from pipeline.tokenizers.resolution import lowered
from pipeline.tokenizers.tokenizer import (
    QuantizedTokenizer,
    TokenizerSpec,
    build_tokenizer,
    unit,
)

MEASURED = 1000
"""Test images that are measured in the course of a training."""
_PIXEL = {"l1": F.l1_loss, "l2": F.mse_loss, "smooth-l1": F.smooth_l1_loss}


@dataclass(frozen=True)
class TrainTokenizer:
    """Train a tokenizer on the images of ``train``, and measure it on those of ``test``."""

    config: TokenizerConfig
    training: TokenizerTrainConfig
    perceptual: Weights | None = None
    """Of the perceptual loss's network, where they come from a file."""
    codebook: Weights | None = None
    """One array (K, D): codes that stay as they are."""

    version: ClassVar[int] = 1

    @property
    def workers(self) -> int:
        return self.training.train.workers

    def prepare(
        self, inputs: Mapping[str, pa.Table], seed: int, device: torch.device
    ) -> TokenizerTraining:
        images = {name: pictures(table).to(device) for name, table in inputs.items()}
        model, critic = build_tokenizer(self.config), self._critic()
        if self.codebook is not None and isinstance(model.quantizer, VQ):
            (codes,) = self.codebook.arrays().values()
            model.quantizer.freeze(torch.from_numpy(codes.astype(np.float32)))
        if self.training.loss.adversarial_weight:
            model.add_module(NAME, Adversary(self.config.channels))
        critic = critic.to(device) if critic else None
        return TokenizerTraining(model.to(device), self, images, seed, critic)

    def _critic(self) -> Critic | None:
        settings, given = self.training.loss.perceptual, self.perceptual
        if settings is None:
            return None
        network = backbones.build(
            settings.backbone, settings.classes, self.config.channels, pretrained=given is None
        )
        if given:
            backbones.load_weights(network, given.arrays(), given.name)
        return Critic(network, settings)


class Critic(nn.Module):
    """The weighted mean squared difference of a frozen network's features of two images.

    Args:
        network: a classifier.
        settings: how pixels are normalised, and the weight.
    """

    def __init__(self, network: nn.Module, settings: PerceptualConfig) -> None:
        super().__init__()
        self.network = network.eval().requires_grad_(requires_grad=False)
        self.weight = settings.weight
        self.register_buffer("mean", torch.tensor(settings.mean)[:, None, None])
        self.register_buffer("std", torch.tensor(settings.std)[:, None, None])

    mean: Tensor
    std: Tensor

    def forward(self, decoded: Tensor, target: Tensor) -> Tensor:
        """Of images (n, C, H, W) in [-1, 1]; the gradient is that of ``decoded``."""
        with torch.no_grad():
            wanted = self._features(target)
        return self.weight * F.mse_loss(self._features(decoded), wanted)

    def _features(self, images: Tensor) -> Tensor:
        return backbones.embed(self.network, (images / 2 + 0.5 - self.mean) / self.std)


def pictures(table: pa.Table) -> Tensor:
    """The uint8 tensor column ``image`` (n, H, W, C) as a tensor (n, C, H, W)."""
    return torch.from_numpy(to_numpy(table["image"]).copy()).permute(0, 3, 1, 2)


@dataclass(frozen=True)
class TokenizerTraining:
    """Images seen through their first tokens are to be the images."""

    model: QuantizedTokenizer[Any]
    task: TrainTokenizer
    images: Mapping[str, Tensor]
    seed: int
    critic: Critic | None = None

    @property
    def spec(self) -> TokenizerSpec:
        return self.model.spec

    @property
    def config(self) -> TrainConfig:
        return self.task.training.train

    @property
    def steps(self) -> int:
        return max(1, len(self.images["train"]) // self.config.batch_size)

    def batch(self, epoch: int, index: int) -> tuple[Tensor, Tensor, Tensor]:
        images, size = self.images["train"], self.config.batch_size
        rows = batch_rows(len(images), size, self.seed, epoch, index, images.device)
        generator = torch.Generator().manual_seed(seed_for(self.seed, "draws", epoch, index))
        x = 2 * unit(images[rows]) - 1
        mirrored = torch.rand(len(x), generator=generator).to(x.device) < 0.5
        if self.task.training.flip:
            x = torch.where(mirrored[:, None, None, None], x.flip(3), x)
        if sizes := self.task.training.sizes:
            every = (self.task.config.size, *sizes)
            side = every[int(torch.randint(len(every), (), generator=generator))]
            x = F.interpolate(x, (side, side), mode="bilinear", align_corners=False, antialias=True)
        lengths = draw_lengths(
            self.task.config.tail_drop, self.task.config.tokens, len(x), generator
        )
        judged = epoch >= self.task.training.loss.adversarial_from * self.config.epochs
        return x, lengths.to(x.device), torch.full((len(x),), judged)

    def loss(self, batch: tuple[Tensor, Tensor, Tensor]) -> Tensor:
        x, lengths, judged = batch
        loss, drop = self.task.training.loss, self.task.config.tail_drop
        decoded, quantized = self.model(x, lengths)
        target = x
        if drop and drop.resolution_alpha:
            target = lowered(x, lengths, self.task.config.tokens, drop.resolution_alpha)
        total = _PIXEL[loss.pixel](decoded.float(), target)
        for term in quantized.losses.values():
            total = total + term
        if self.critic is not None:
            total = total + self.critic(decoded.float(), target)
        if loss.adversarial_weight and bool(judged.any()):
            adversary = cast("Adversary", self.model.get_submodule(NAME))
            total = total + adversarial_loss(
                adversary, decoded.float(), target, loss.adversarial_weight
            )
        if loss.decorrelation_weight and quantized.soft is not None:
            total = total + loss.decorrelation_weight * decorrelation(quantized.soft.float())
        return total

    def evaluate(self) -> dict[str, Any]:
        images = self.images["test"][:MEASURED]
        lengths = grid(self.task.config.tokens)
        errors = error_curves(self.model, images, lengths)
        tokens = self.model.encode(images)
        curve = psnr(errors.double().mean(0)).tolist()
        return {"psnr": dict(zip(map(str, lengths), curve, strict=True)), **health(tokens)}


def draw_lengths(
    drop: TailDropConfig | None, tokens: int, count: int, generator: torch.Generator
) -> Tensor:
    """How many tokens the decoder is to see of each of ``count`` images, int64 (count,)."""
    every = torch.full((count,), tokens)
    if drop is None:
        return every
    if drop.lengths == "uniform":
        drawn = torch.randint(1, tokens + 1, (count,), generator=generator)
    else:
        powers = torch.tensor([1 << n for n in range(tokens.bit_length()) if 1 << n <= tokens])
        drawn = powers[torch.randint(len(powers), (count,), generator=generator)]
    cut = torch.rand(count, generator=generator) < drop.share
    return torch.where(cut, drawn, every)
