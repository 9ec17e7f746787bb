"""Slow, plain float64 versions of what the package does with tensors."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]


def bilinear(image: Array, y: float, x: float) -> Array:
    """The value of an image (C, S, S) between four pixels; its border goes on for ever."""
    size = image.shape[-1]
    y, x = min(max(y, 0.0), size - 1.0), min(max(x, 0.0), size - 1.0)
    top, left = int(y), int(x)
    bottom, right = min(top + 1, size - 1), min(left + 1, size - 1)
    down, across = y - top, x - left
    upper = image[:, top, left] * (1 - across) + image[:, top, right] * across
    lower = image[:, bottom, left] * (1 - across) + image[:, bottom, right] * across
    return upper * (1 - down) + lower * down


def crop_of(image: Array, crop: Any, flip: int) -> Array:
    """A crop (top, left, height, width) resized to the whole image's size, and mirrored."""
    size = image.shape[-1]
    top, left, height, width = (int(value) for value in crop)
    result = np.zeros_like(image)
    for row in range(size):
        for column in range(size):
            y = top + (row + 0.5) * height / size - 0.5
            x = left + (column + 0.5) * width / size - 0.5
            place = size - 1 - column if flip else column
            result[:, row, place] = bilinear(image, y, x)
    return result


def view_of(images: Array, views: Any, row: int, view: int) -> Array:
    """View ``view`` of image ``row``, its box filled from the partner's own view."""
    partner = int(views.partner[row, view])
    result = crop_of(images[row], views.crop[row, view], int(views.flip[row, view]))
    other = crop_of(images[partner], views.crop[partner, view], int(views.flip[partner, view]))
    top, left, bottom, right = (int(value) for value in views.box[row, view])
    result[:, top:bottom, left:right] = other[:, top:bottom, left:right]
    return result
