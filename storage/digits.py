"""The 1,797 handwritten digits (8 x 8, 17 levels) that scikit-learn carries."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from pipeline.digest import digest
from pipeline.storage.source import Shard, Source
from pipeline.tensors import tensor_column

SHARD_ROWS = 256


@lru_cache(maxsize=1)
def _digits() -> tuple[npt.NDArray[Any], npt.NDArray[Any]]:
    from sklearn.datasets import load_digits

    bunch = load_digits()
    images = np.rint(bunch.images * (255 / 16)).astype(np.uint8)[..., None]
    return images, bunch.target.astype(np.int64)


@dataclass(frozen=True)
class DigitsSource(Source):
    """Shards of 256 digits; the key is ``digit-<row>``."""

    @property
    def classes(self) -> tuple[str, ...]:
        return tuple("0123456789")

    @cached_property
    def shards(self) -> tuple[Shard, ...]:
        images, labels = _digits()
        return tuple(
            Shard(
                f"{start // SHARD_ROWS:05d}",
                digest(
                    images[start : start + SHARD_ROWS].tobytes().hex(),
                    labels[start : start + SHARD_ROWS].tolist(),
                ),
                len(labels[start : start + SHARD_ROWS]),
                {"start": start},
            )
            for start in range(0, len(labels), SHARD_ROWS)
        )

    def read(self, shard: Shard) -> pa.Table:
        images, labels = _digits()
        rows = slice(shard.location["start"], shard.location["start"] + SHARD_ROWS)
        return pa.table(
            {
                "key": [f"digit-{row:04d}" for row in range(len(labels))[rows]],
                "image": tensor_column(images[rows]),
                "label": pa.array(labels[rows]),
            }
        )
