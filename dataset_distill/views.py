"""Views of images: a random resized crop, a flip and a CutMix box, drawn once and replayed."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor

from pipeline.dataset_distill.config import ImageConfig

RATIO = (3 / 4, 4 / 3)


def sample_crop(
    rng: np.random.Generator, size: int, scale: tuple[float, float]
) -> tuple[int, int, int, int]:
    """A random resized crop of a square image as (top, left, height, width) in pixels.

    Area share uniform in ``scale``, log of the aspect ratio uniform in 3/4 to 4/3; after ten draws
    that do not fit, the whole image.
    """
    for _ in range(10):
        area = rng.uniform(*scale) * size * size
        ratio = math.exp(rng.uniform(math.log(RATIO[0]), math.log(RATIO[1])))
        width, height = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < width <= size and 0 < height <= size:
            top = int(rng.integers(0, size - height + 1))
            left = int(rng.integers(0, size - width + 1))
            return top, left, height, width
    return 0, 0, size, size


def sample_box(rng: np.random.Generator, size: int, alpha: float) -> tuple[int, int, int, int]:
    """A CutMix box as (top, left, bottom, right) in pixels; empty where ``alpha`` is 0.

    Source: Yun et al., "CutMix", 2019: side sqrt(1 - lambda), centre uniform, clipped.
    """
    if alpha == 0:
        return 0, 0, 0, 0
    half = math.sqrt(1 - rng.beta(alpha, alpha)) * size / 2
    y, x = rng.integers(0, size, 2)
    low = [int(max(0, round(c - half))) for c in (y, x)]
    high = [int(min(size, round(c + half))) for c in (y, x)]
    return low[0], low[1], high[0], high[1]


@dataclass(frozen=True)
class Views:
    """Parameters of V views of each of N images.

    Attributes:
        crop: (N, V, 4) int, top, left, height, width in source pixels.
        flip: (N, V) 0 or 1.
        partner: (N, V) int, row of the image that fills the box, seen in its own view v.
        box: (N, V, 4) int, top, left, bottom, right in the view.
    """

    crop: Any
    flip: Any
    partner: Any
    box: Any

    NAMES = ("crop", "flip", "partner", "box")

    def to(self, device: torch.device) -> Views:
        """The same with tensors on ``device``."""
        arrays = (torch.from_numpy(np.array(getattr(self, name))) for name in self.NAMES)
        return Views(*(array.to(device, torch.int64) for array in arrays))


def sample_views(
    rngs: list[np.random.Generator],
    image: ImageConfig,
    views: int,
    crop_floor: float,
    cutmix: float,
) -> Views:
    """Draw ``views`` views of every image of a group, each from the image's own generator.

    Partners are other images of the same group, so that a group can be labelled alone.
    """
    rows, size = len(rngs), image.size
    crop = np.zeros((rows, views, 4), np.uint16)
    flip = np.zeros((rows, views), np.uint8)
    partner = np.zeros((rows, views), np.int32)
    box = np.zeros((rows, views, 4), np.uint16)
    for row, rng in enumerate(rngs):
        for view in range(views):
            crop[row, view] = sample_crop(rng, size, (crop_floor, 1.0))
            flip[row, view] = image.flip and rng.random() < 0.5
            partner[row, view] = (row + rng.integers(1, max(rows, 2))) % rows
            box[row, view] = sample_box(rng, size, cutmix)
    return Views(crop, flip, partner, box)


def render(images: Tensor, views: Views, rows: Tensor, view: Tensor) -> Tensor:
    """The pictures a network sees: (B, C, S, S) for B pairs of row and view.

    Args:
        images: (N, C, S, S) float, normalised.
        views: parameters on the same device.
        rows: (B,) int64 rows of ``images``.
        view: (B,) int64 view numbers.
    """
    own = _crop(images, views, rows, view)
    partner = views.partner[rows, view]
    top, left, bottom, right = views.box[rows, view].unbind(1)
    line = torch.arange(images.shape[-1], device=images.device)
    inside_y = (line >= top[:, None]) & (line < bottom[:, None])
    inside_x = (line >= left[:, None]) & (line < right[:, None])
    inside = (inside_y[:, None, :, None]) & (inside_x[:, None, None, :])
    return torch.where(inside, _crop(images, views, partner, view), own)


def _crop(images: Tensor, views: Views, rows: Tensor, view: Tensor) -> Tensor:
    """Bilinear resize of each crop to the full size, mirrored where its flip is 1."""
    size = images.shape[-1]
    top, left, height, width = views.crop[rows, view].to(images.dtype).unbind(1)
    sign = 1 - 2 * views.flip[rows, view].to(images.dtype)
    theta = images.new_zeros(len(rows), 2, 3)
    theta[:, 0, 0] = sign * width / size
    theta[:, 0, 2] = (2 * left + width) / size - 1
    theta[:, 1, 1] = height / size
    theta[:, 1, 2] = (2 * top + height) / size - 1
    grid = F.affine_grid(theta, [len(rows), images.shape[1], size, size], align_corners=False)
    return F.grid_sample(images[rows], grid, padding_mode="border", align_corners=False)


def normalise(pixels: npt.NDArray[Any], image: ImageConfig, device: torch.device) -> Tensor:
    """uint8 images (N, H, W, C) as float32 (N, C, H, W), (x / 255 - mean) / std."""
    mean, std = (torch.tensor(v, device=device).view(1, -1, 1, 1) for v in (image.mean, image.std))
    x = torch.from_numpy(np.array(pixels)).to(device).permute(0, 3, 1, 2)
    return ((x.float() / 255 - mean) / std).contiguous()
