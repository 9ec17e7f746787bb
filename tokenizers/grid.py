"""The tokenizer whose tokens are places of a grid."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise
from typing import Any, ClassVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipeline.config import build
from pipeline.tokenizers.config import GridConfig
from pipeline.tokenizers.quantizers import Shape
from pipeline.tokenizers.tokenizer import QuantizedTokenizer


def _norm(channels: int) -> nn.GroupNorm:
    return nn.GroupNorm(min(32, channels // 4), channels)


class _Residual(nn.Module):
    """Two 3 x 3 convolutions, each after normalisation and SiLU, and a shortcut."""

    def __init__(self, before: int, after: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = _norm(before), _norm(after)
        self.conv1 = nn.Conv2d(before, after, 3, padding=1)
        self.conv2 = nn.Conv2d(after, after, 3, padding=1)
        self.shortcut = nn.Conv2d(before, after, 1) if before != after else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv1(F.silu(self.norm1(x)))
        return cast("Tensor", self.shortcut(x) + self.conv2(F.silu(self.norm2(y))))


class _Attention(nn.Module):
    """Each place looks at all places."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = _norm(width)
        self.project = nn.Conv2d(width, 3 * width, 1)
        self.join = nn.Conv2d(width, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        parts = self.project(self.norm(x)).flatten(2).transpose(1, 2).chunk(3, -1)
        seen = F.scaled_dot_product_attention(*parts).transpose(1, 2).view_as(x)
        return cast("Tensor", x + self.join(seen))


def _middle(config: GridConfig, width: int) -> list[nn.Module]:
    between = [_Attention(width)] if config.attention else []
    return [_Residual(width, width), *between, _Residual(width, width)]


def _level(before: int, after: int, blocks: int) -> list[nn.Module]:
    return [_Residual(after if number else before, after) for number in range(blocks)]


class GridEncoder(nn.Module):
    """Images (n, C, H, W) in [-1, 1] to vectors (n, N, D), row by row, and a summary (n, 2 D)."""

    def __init__(self, config: GridConfig) -> None:
        super().__init__()
        widths = [config.width * m for m in config.multipliers]
        channels = config.channels * config.patch**2
        layers: list[nn.Module] = [nn.PixelUnshuffle(config.patch)]
        layers.append(nn.Conv2d(channels, widths[0], 3, padding=1))
        for number, (before, after) in enumerate(pairwise([widths[0], *widths])):
            if number:
                layers.append(nn.Conv2d(before, before, 3, 2, padding=1))
            layers += _level(before, after, config.blocks)
        layers += [*_middle(config, widths[-1]), _norm(widths[-1]), nn.SiLU()]
        self.layers = nn.Sequential(*layers, nn.Conv2d(widths[-1], config.latent, 3, padding=1))

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        vectors = self.layers(images).flatten(2).transpose(1, 2)
        centre = vectors.mean(1)
        spread = (vectors - centre[:, None]).square().mean(1)
        return vectors, torch.cat([centre, spread], 1)


class GridDecoder(nn.Module):
    """Vectors (n, N, D), row by row, to images (n, C, H, W), about in [-1, 1].

    Of each resolution it has one block more than the encoder, as its source has. A token that was
    dropped is replaced by a vector that says so.
    """

    def __init__(self, config: GridConfig) -> None:
        super().__init__()
        self.factor = config.factor
        widths = [config.width * m for m in reversed(config.multipliers)]
        self.dropped = nn.Parameter(torch.zeros(config.latent))
        layers: list[nn.Module] = [nn.Conv2d(config.latent, widths[0], 3, padding=1)]
        layers += _middle(config, widths[0])
        for number, (before, after) in enumerate(pairwise([widths[0], *widths])):
            if number:
                layers += [nn.Upsample(scale_factor=2.0), nn.Conv2d(before, before, 3, padding=1)]
            layers += _level(before, after, config.blocks + 1)
        channels = config.channels * config.patch**2
        layers += [_norm(widths[-1]), nn.SiLU(), nn.Conv2d(widths[-1], channels, 3, padding=1)]
        self.layers = nn.Sequential(*layers, nn.PixelShuffle(config.patch))

    def forward(self, vectors: Tensor, kept: Tensor, size: tuple[int, int]) -> Tensor:
        vectors = torch.where(kept[..., None], vectors, self.dropped.to(vectors.dtype))
        rows, columns = (side // self.factor for side in size)
        maps = vectors.transpose(1, 2).reshape(vectors.shape[0], -1, rows, columns)
        return cast("Tensor", self.layers(maps))


class GridTokenizer(QuantizedTokenizer[GridConfig]):
    """A convolutional network, a token for each place of its coarsest map, and another network.

    Sources: Esser et al., "Taming Transformers for High-Resolution Image Synthesis", 2021 (VQGAN);
    Zhu et al., "Scaling the Codebook Size of VQGAN to 100,000 with a Utilization Rate of 99%",
    2024.
    """

    kind: ClassVar[str] = "grid"
    one_size: ClassVar[bool] = True

    def __init__(self, config: GridConfig) -> None:
        shape = Shape(1, config.latent, config.latent)
        super().__init__(config, GridEncoder, GridDecoder, shape)
        self.multiple = config.size

    @classmethod
    def build(cls, config: Mapping[str, Any]) -> GridTokenizer:
        return cls(build(GridConfig, config))
