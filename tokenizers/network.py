"""The transformer on both sides of a quantizer."""

from __future__ import annotations

from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipeline.tokenizers.config import LatentConfig, TransformerConfig

_FREQUENCIES = 6


class Block(nn.Module):
    """Attention and a perceptron of four times the width, each after a normalisation.

    With ``causal`` nothing is seen of what comes later.
    """

    def __init__(self, width: int, heads: int, *, causal: bool = False) -> None:
        super().__init__()
        self.heads, self.causal = heads, causal
        self.before_attention = nn.LayerNorm(width)
        self.project = nn.Linear(width, 3 * width)
        self.join = nn.Linear(width, width)
        self.before_mlp = nn.LayerNorm(width)
        self.grow = nn.Linear(width, 4 * width)
        self.shrink = nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        n, length, width = x.shape
        joined = self.project(self.before_attention(x))
        heads = joined.view(n, length, 3, self.heads, width // self.heads).permute(2, 0, 3, 1, 4)
        seen = F.scaled_dot_product_attention(heads[0], heads[1], heads[2], is_causal=self.causal)
        x = x + self.join(seen.transpose(1, 2).reshape(n, length, width))
        return cast("Tensor", x + self.shrink(F.gelu(self.grow(self.before_mlp(x)))))


class Positions(nn.Module):
    """Places in a picture, from 0 to 1 whatever its resolution, as vectors (1, rows * columns, D).

    So one tokenizer serves several resolutions, as the positions of Instella-T2I do.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.embed = nn.Linear(4 * _FREQUENCIES + 2, width)

    def forward(self, rows: int, columns: int) -> Tensor:
        like = self.embed.weight
        row, column = (
            (torch.arange(count, device=like.device, dtype=like.dtype) + 0.5) / count
            for count in (rows, columns)
        )
        places = torch.stack(torch.meshgrid(row, column, indexing="ij"), -1).view(1, -1, 2)
        scales = torch.pi * 2.0 ** torch.arange(_FREQUENCIES, device=like.device, dtype=like.dtype)
        angles = (places[..., None] * scales).flatten(2)
        return cast("Tensor", self.embed(torch.cat([places, angles.sin(), angles.cos()], -1)))


class Halve(nn.Module):
    """A map (n, D, h, w) at half its sides: a strided convolution beside means of neighbours."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        return cast("Tensor", self.conv(x) + F.avg_pool2d(x, 2))


class Double(nn.Module):
    """A map (n, D, h, w) at twice its sides: shuffled pixels of a convolution beside copies."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(width, 4 * width, 3, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        return F.pixel_shuffle(self.conv(x), 2) + F.interpolate(x, scale_factor=2.0)


class Tower(nn.Module):
    """Blocks over latent tokens and a grid of patches, which may change its resolution midway.

    Shapes: latents (n, N, D) and patches (n, h * w, D) to the same, with h and w halved or doubled
    where the configuration says so.
    """

    def __init__(self, config: TransformerConfig, resample: type[Halve | Double]) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block(config.width, config.heads) for _ in range(config.depth))
        self.after = config.resample_after
        self.resample = resample(config.width) if self.after else None

    def forward(
        self, latents: Tensor, patches: Tensor, grid: tuple[int, int]
    ) -> tuple[Tensor, Tensor]:
        count = latents.shape[1]
        x = torch.cat([latents, patches], 1)
        for number, block in enumerate(self.blocks, 1):
            x = block(x)
            if self.resample is not None and number == self.after:
                n, _, width = x.shape
                maps = x[:, count:].transpose(1, 2).reshape(n, width, *grid)
                x = torch.cat([x[:, :count], self.resample(maps).flatten(2).transpose(1, 2)], 1)
        return x[:, :count], x[:, count:]


class Encoder(nn.Module):
    """Images (n, C, H, W) in [-1, 1] to latents (n, N, D) and a summary (n, 2 D) of the picture."""

    def __init__(self, config: LatentConfig) -> None:
        super().__init__()
        width = config.encoder.width
        self.patches = nn.Conv2d(config.channels, width, config.patch, config.patch)
        self.positions = Positions(width)
        self.latents = nn.Parameter(torch.randn(1, config.tokens, width))
        self.tower = Tower(config.encoder, Halve)
        self.norm = nn.LayerNorm(width)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        maps = self.patches(images)
        rows, columns = maps.shape[2:]
        patches = maps.flatten(2).transpose(1, 2) + self.positions(rows, columns)
        latents = self.latents.expand(images.shape[0], -1, -1)
        latents, patches = self.tower(latents, patches, (rows, columns))
        latents = self.norm(latents)
        return latents, torch.cat([latents.mean(1), self.norm(patches).mean(1)], 1)


class Decoder(nn.Module):
    """Vectors of tokens (n, N, D) to images (n, C, H, W), about in [-1, 1].

    A token that was dropped is replaced by a vector that says so: lengths may differ within a
    batch, and what stood there cannot be seen.
    """

    def __init__(self, config: LatentConfig) -> None:
        super().__init__()
        width = config.decoder.width
        self.patch, self.channels = config.patch, config.channels
        self.divide = 2 if config.decoder.resample_after else 1
        self.places = nn.Parameter(torch.randn(1, config.tokens, width))
        self.dropped = nn.Parameter(torch.randn(1, 1, width))
        self.positions = Positions(width)
        self.tower = Tower(config.decoder, Double)
        self.norm = nn.LayerNorm(width)
        self.pixels = nn.Linear(width, config.patch**2 * config.channels)

    def forward(self, vectors: Tensor, kept: Tensor, size: tuple[int, int]) -> Tensor:
        latents = torch.where(kept[..., None], vectors, self.dropped.to(vectors.dtype))
        rows, columns = (side // self.patch for side in size)
        grid = rows // self.divide, columns // self.divide
        patches = self.positions(*grid).expand(vectors.shape[0], -1, -1)
        _, patches = self.tower(latents + self.places, patches, grid)
        pixels = self.pixels(self.norm(patches)).transpose(1, 2)
        maps = pixels.reshape(vectors.shape[0], -1, rows, columns)
        return F.pixel_shuffle(maps, self.patch)
