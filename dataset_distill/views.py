"""Views of images: a random resized crop, a flip and a CutMix box, drawn from a seed and a number.

A view is a function of the image's seed and the view's number, so it takes no room on a disk and
can be drawn again anywhere, in any order.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor

from pipeline.draws import uniform
from pipeline.labelled_images import ImageConfig, Pictures

RATIO = (3 / 4, 4 / 3)
ATTEMPTS = 10
"""Draws of a crop that may fail to fit in the image."""
DRAWS = 64
"""Numbers that belong to one view of one image: more than are used."""
_FLIP, _PARTNER, _LAMBDA, _CENTRE = (4 * ATTEMPTS + n for n in range(4))


def crops(draws: npt.NDArray[Any], size: int, scale: tuple[float, float]) -> npt.NDArray[Any]:
    """Random resized crops of square images as (top, left, height, width) in pixels.

    Area share uniform in ``scale``, log of the aspect ratio uniform in 3/4 to 4/3; after ten draws
    that do not fit, the whole image.

    Args:
        draws: (..., 10, 4) uniform in [0, 1).
        size: side of the images, pixels.
        scale: smallest and largest share of the area.

    Returns:
        int64 (..., 4).
    """
    area = (scale[0] + (scale[1] - scale[0]) * draws[..., 0]) * size * size
    low, high = (math.log(r) for r in RATIO)
    ratio = np.exp(low + (high - low) * draws[..., 1])
    width, height = np.rint(np.sqrt(area * ratio)), np.rint(np.sqrt(area / ratio))
    fits = np.asarray((width > 0) & (width <= size) & (height > 0) & (height <= size))
    top = np.floor(draws[..., 2] * (size - height + 1))
    left = np.floor(draws[..., 3] * (size - width + 1))
    found = np.stack([top, left, height, width], -1)
    chosen = np.take_along_axis(found, fits.argmax(-1)[..., None, None], -2)[..., 0, :]
    whole = np.array([0, 0, size, size])
    return np.where(fits.any(-1, keepdims=True), chosen, whole).astype(np.int64)


def boxes(draws: npt.NDArray[Any], size: int, alpha: float) -> npt.NDArray[Any]:
    """CutMix boxes as (top, left, bottom, right) in pixels; empty where ``alpha`` is 0.

    Args:
        draws: (..., 3) uniform in [0, 1).
        size: side of the images, pixels.
        alpha: of the Beta distribution of lambda.

    Returns:
        int64 (..., 4).

    Source: Yun et al., "CutMix", 2019: side sqrt(1 - lambda), centre uniform, clipped.
    """
    if alpha == 0:
        return np.zeros((*draws.shape[:-1], 4), np.int64)
    share = draws[..., 0]
    if alpha != 1:
        from scipy.special import betaincinv

        share = betaincinv(alpha, alpha, share)
    half = np.sqrt(1 - share)[..., None] * size / 2
    centre = np.floor(draws[..., 1:] * size)
    low, high = np.maximum(np.rint(centre - half), 0), np.minimum(np.rint(centre + half), size)
    return np.concatenate([low, high], -1).astype(np.int64)


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

    def to(self, device: torch.device) -> Views:
        """The same with int64 tensors on ``device``."""
        arrays = (torch.from_numpy(np.array(value, np.int64)) for value in vars(self).values())
        return Views(*(array.to(device) for array in arrays))


@dataclass(frozen=True)
class ViewSampler:
    """How views are drawn.

    Attributes:
        image: size, and whether a mirrored image keeps its label.
        crop_floor: smallest area share of a crop.
        cutmix: alpha of the Beta distribution; 0 turns it off.
        group: so many neighbouring rows are partners of one another, and of no others.
    """

    image: ImageConfig
    crop_floor: float
    cutmix: float
    group: int

    def draw(self, seeds: npt.NDArray[Any], numbers: npt.ArrayLike) -> Views:
        """The views with some numbers of every image.

        Args:
            seeds: (N,) of the images, in order; the first one begins a group.
            numbers: (V,) of the views.
        """
        first_place = np.asarray(numbers, np.uint64)[:, None] * np.uint64(DRAWS)
        places: Any = first_place + np.arange(_CENTRE + 2, dtype=np.uint64)
        draws = uniform(np.asarray(seeds).astype(np.uint64)[:, None, None], places)
        tries: npt.NDArray[Any] = draws[..., : 4 * ATTEMPTS].reshape(*draws.shape[:2], ATTEMPTS, 4)
        size, rows = self.image.size, np.arange(len(draws))
        first = rows // self.group * self.group
        count = np.minimum(self.group, len(rows) - first)
        step = 1 + np.floor(draws[..., _PARTNER] * (count - 1)[:, None]).astype(np.int64)
        return Views(
            crops(tries, size, (self.crop_floor, 1.0)),
            (self.image.flip & (draws[..., _FLIP] < 0.5)).astype(np.int64),
            first[:, None] + ((rows - first)[:, None] + step) % count[:, None],
            boxes(draws[..., _LAMBDA : _CENTRE + 2], size, self.cutmix),
        )


def render(pictures: Pictures, views: Views, rows: Tensor, view: Tensor) -> Tensor:
    """What a network sees: (B, C, S, S) float32 for B pairs of row and view.

    Args:
        pictures: N images.
        views: their parameters, on the same device.
        rows: (B,) int64 rows of ``pictures``.
        view: (B,) int64 places in the second axis of ``views``.
    """
    own = _crop(pictures, views, rows, view)
    partner = views.partner[rows, view]
    top, left, bottom, right = views.box[rows, view].unbind(1)
    line = torch.arange(own.shape[-1], device=own.device)
    inside_y = (line >= top[:, None]) & (line < bottom[:, None])
    inside_x = (line >= left[:, None]) & (line < right[:, None])
    inside = (inside_y[:, None, :, None]) & (inside_x[:, None, None, :])
    return torch.where(inside, _crop(pictures, views, partner, view), own)


def _crop(pictures: Pictures, views: Views, rows: Tensor, view: Tensor) -> Tensor:
    """Bilinear resize of each crop to the full size, mirrored where its flip is 1."""
    images = pictures.take(rows)
    size = images.shape[-1]
    top, left, height, width = views.crop[rows, view].to(images.dtype).unbind(1)
    sign = 1 - 2 * views.flip[rows, view].to(images.dtype)
    theta = images.new_zeros(len(rows), 2, 3)
    theta[:, 0, 0] = sign * width / size
    theta[:, 0, 2] = (2 * left + width) / size - 1
    theta[:, 1, 1] = height / size
    theta[:, 1, 2] = (2 * top + height) / size - 1
    grid = F.affine_grid(theta, list(images.shape), align_corners=False)
    return F.grid_sample(images, grid, padding_mode="border", align_corners=False)
