"""Hashes of pictures that change little where the picture does."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
from PIL import Image
from scipy.fft import dctn

Image8 = npt.NDArray[np.uint8]
SIDE = 32
"""Side that pictures are scaled to, pixels."""
_LOW = 8
_FLAT = 1.0
"""Mean size of the frequencies below which a picture has nothing to tell it by."""


def thumbnail(image: Image8) -> npt.NDArray[np.float32]:
    """Luminance (32, 32) of a picture H x W x C, from 0 to 255."""
    picture = Image.fromarray(image[..., 0] if image.shape[2] == 1 else image).convert("L")
    scaled = picture.resize((SIDE, SIDE), Image.Resampling.BOX)
    return np.asarray(scaled, np.float32)


def perceptual_hashes(
    luminance: npt.NDArray[np.float32],
) -> tuple[npt.NDArray[np.uint64], npt.NDArray[np.uint64], npt.NDArray[np.bool_]]:
    """Hashes of pictures and of their mirror images, and whether they say anything.

    The 64 lowest frequencies of the discrete cosine transform but the mean, each above or below
    their median. A mirrored picture has the odd ones across with the other sign.

    Args:
        luminance: (N, 32, 32).

    Returns:
        Two of uint64 (N,); bool (N,), False for pictures that are almost of one colour: their
        hashes are of noise.
    """
    frequencies = dctn(np.asarray(luminance, np.float64), axes=(1, 2), norm="ortho")
    low = frequencies[:, : _LOW + 1, :_LOW].copy()
    mirrored = low * np.where(np.arange(_LOW) % 2, -1.0, 1.0)
    # Without the mean there are eight too many: the last row is left out but for one.
    hashes = [_bits(part) for part in (low, mirrored)]
    told = np.abs(low.reshape(len(low), -1)[:, 1:65]).mean(1) > _FLAT
    return hashes[0], hashes[1], told


def _bits(low: npt.NDArray[np.float64]) -> npt.NDArray[np.uint64]:
    values = low.reshape(len(low), -1)[:, 1:65]
    above = values > np.median(values, axis=1, keepdims=True)
    powers = np.uint64(1) << np.arange(64, dtype=np.uint64)
    made: npt.NDArray[np.uint64] = (above * powers).sum(1, dtype=np.uint64)
    return made
