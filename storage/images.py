"""Encoded images: what counts as one, and writing them losslessly."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

EXTENSIONS = frozenset({"jpg", "jpeg", "png", "webp", "bmp", "gif", "tif", "tiff", "ppm", "pgm"})


ALLOWED = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM")
"""The kinds of file that are ever decoded, as Pillow names them."""


def encode_png(image: npt.NDArray[Any]) -> bytes:
    """A uint8 image H x W x C, with C = 1 or 3, as PNG bytes without metadata."""
    buffer = io.BytesIO()
    Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image).save(buffer, "PNG")
    return buffer.getvalue()


def decode_png(data: bytes) -> npt.NDArray[np.uint8]:
    """The pixels of a PNG written by :func:`encode_png`, H x W x C."""
    pixels = np.asarray(Image.open(io.BytesIO(data)))
    return pixels[..., None] if pixels.ndim == 2 else pixels
