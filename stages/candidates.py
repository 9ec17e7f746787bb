"""Real images, or the crops of them that a teacher knows best, as a stage."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import numpy as np
import pyarrow as pa
import torch
import torch.nn.functional as F
from torch import Tensor

from pipeline import backbones
from pipeline.device import default_device, in_batches
from pipeline.digest import seed_for
from pipeline.draws import uniform
from pipeline.labelled_images import ImageConfig, Pictures
from pipeline.stage import ShardContext
from pipeline.storage.artifact import Artifact
from pipeline.storage.models import read_model
from pipeline.tensors import tensor_column, to_numpy

SCALE = (0.25, 1.0)
"""Area shares of crops."""


@dataclass(frozen=True)
class Candidates:
    """Make each image a tile of ``size`` pixels, and say what a teacher makes of it.

    Of several square crops the one of least loss is taken (RDED, Sun et al., 2024); with one crop
    it is the whole image. New columns: ``loss``, the cross-entropy, and ``feature``, a tensor (D,),
    both float32 and of the tile scaled to the full size.

    Args:
        teachers: fitted classifiers.
        unit: which of them.
        image: size, channels and normalisation of the images.
        size: of the tile, pixels.
        crops: tried of each image.
    """

    teachers: Artifact
    unit: str
    image: ImageConfig
    size: int
    crops: int

    version: ClassVar[int] = 1
    model: ClassVar[bool] = True

    def __call__(self, table: pa.Table, context: ShardContext) -> pa.Table:
        device = default_device()
        teacher = read_model(self.teachers, device, self.unit)
        pictures = Pictures.of(to_numpy(table["image"]), self.image, device)
        labels = torch.from_numpy(to_numpy(table["label"]).astype(np.int64)).to(device)
        seeds = np.array([seed_for(context.seed, k) for k in table["key"].to_pylist()], np.uint64)

        def loss_of(tiles: Tensor) -> Tensor:
            logits = in_batches(teacher, self._seen(tiles, pictures))
            return F.cross_entropy(logits, labels, reduction="none")

        tiles = self._tiles(pictures.pixels, seeds, 0)
        losses = loss_of(tiles)
        for crop in range(1, self.crops):
            tried = self._tiles(pictures.pixels, seeds, crop)
            found = loss_of(tried)
            better = found < losses
            tiles = torch.where(better[:, None, None, None], tried, tiles)
            losses = torch.where(better, found, losses)
        features = in_batches(partial(backbones.embed, teacher), self._seen(tiles, pictures))
        columns = {
            "image": tensor_column(tiles.permute(0, 2, 3, 1).contiguous().cpu().numpy()),
            "loss": pa.array(losses.cpu().numpy()),
            "feature": tensor_column(features.cpu().numpy()),
        }
        table = table.select(["key", "label"])
        for name, column in columns.items():
            table = table.append_column(name, column)
        return table

    def _tiles(self, pixels: Tensor, seeds: np.ndarray, crop: int) -> Tensor:
        """One square crop of each image (N, C, S, S) uint8, or all of it, scaled to the tile."""
        side = pixels.shape[-1]
        if self.crops == 1:
            return _scaled(pixels, self.size)
        places = np.arange(3 * crop, 3 * crop + 3, dtype=np.uint64)
        draws = uniform(seeds[:, None], places)
        areas = SCALE[0] + (SCALE[1] - SCALE[0]) * draws[:, 0]
        sides = np.rint(np.sqrt(areas) * side).clip(1, side).astype(np.int64)
        starts = np.floor(draws[:, 1:] * (side - sides + 1)[:, None]).astype(np.int64)
        cut = [
            _scaled(image[None, :, top : top + n, left : left + n], self.size)
            for image, n, (top, left) in zip(pixels, sides.tolist(), starts.tolist(), strict=True)
        ]
        return torch.cat(cut)

    def _seen(self, tiles: Tensor, like: Pictures) -> Tensor:
        whole = Pictures(_scaled(tiles, self.image.size), like.mean, like.std)
        return whole.take(slice(None))


def _scaled(pixels: Tensor, size: int) -> Tensor:
    """uint8 images (N, C, H, W) at another size, smoothed where they shrink."""
    if pixels.shape[-1] == size == pixels.shape[-2]:
        return pixels
    scaled = F.interpolate(
        pixels.float(), (size, size), mode="bilinear", align_corners=False, antialias=True
    )
    return scaled.round().clamp(0, 255).to(torch.uint8)
