"""The 1,797 handwritten digits (8 x 8, 17 levels) that scikit-learn carries."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt

from pipeline.storage.arrays import ArraySource


def open_digits() -> ArraySource:
    """The digits in their published order."""
    # The data never change: they come with the package.
    names = tuple("0123456789")
    return ArraySource(_digits, "digit", "scikit-learn digits", "scikit-learn", names, 256, 4)


@lru_cache(maxsize=1)
def _digits() -> tuple[npt.NDArray[Any], npt.NDArray[Any]]:
    from sklearn.datasets import load_digits

    bunch = load_digits()
    images = np.rint(bunch.images * (255 / 16)).astype(np.uint8)[..., None]
    return images, bunch.target.astype(np.int64)
