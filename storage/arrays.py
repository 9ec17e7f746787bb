"""Images that are pixels already, with their labels, in two arrays."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from pipeline.digest import digest
from pipeline.errors import UsageError
from pipeline.storage.classes import numbered
from pipeline.storage.source import Shard, Source
from pipeline.tensors import tensor_column

Arrays = tuple[npt.NDArray[Any], npt.NDArray[Any]]


@dataclass(frozen=True)
class ArraySource(Source):
    """Runs of rows of two arrays; the key is ``<split>-<row>``.

    Args:
        load: gives images (N x H x W or N x H x W x C, uint8) and labels (N integers); picklable,
            and cheap when it is called again.
        split: what the keys and shards are named after.
        content: what the arrays' content is told by, such as checksums.
        where: path or URL, for messages.
        names: class names by label; the numbers up to the highest label where not given.
        shard_rows: rows of every shard but the last.
        key_digits: to how many digits a key's row number is filled up.
    """

    load: Callable[[], Arrays]
    split: str
    content: Any
    where: str
    names: tuple[str, ...] = ()
    shard_rows: int = 1000
    key_digits: int = 8

    @cached_property
    def classes(self) -> tuple[str, ...]:
        if self.names:
            return self.names
        labels = self._arrays[1]
        return numbered(int(labels.max()) if len(labels) else -1, self.where)

    @property
    def _arrays(self) -> Arrays:
        images, labels = self.load()
        if images.dtype != np.uint8 or images.ndim not in {3, 4}:
            raise self._wrong(f"images of {images.dtype} and shape {images.shape}")
        if labels.shape != (len(images),) or labels.dtype.kind not in "iu":
            raise self._wrong(
                f"{len(images)} images with labels of {labels.dtype} and shape {labels.shape}"
            )
        return images, labels

    def _wrong(self, found: str) -> UsageError:
        return UsageError(
            f"The split '{self.split}' has {found}.",
            hint="It needs images N x H x W or N x H x W x C of numbers from 0 to 255 in uint8, "
            "and N whole-numbered labels.",
            code="bad-arrays",
            where=self.where,
        )

    @cached_property
    def shards(self) -> tuple[Shard, ...]:
        images, _ = self._arrays
        shards = []
        for start in range(0, len(images), self.shard_rows):
            part = images[start : start + self.shard_rows]
            name = f"{self.split}-{start // self.shard_rows:05d}"
            identity = digest("arrays", self.content, start)
            shards.append(Shard(name, identity, len(part), {"start": start}, part.nbytes))
        return tuple(shards)

    def read(self, shard: Shard) -> pa.Table:
        start = shard.location["start"]
        stop = start + (shard.rows or 0)
        images, labels = (array[start:stop] for array in self._arrays)
        return pa.table(
            {
                "key": [f"{self.split}-{row:0{self.key_digits}d}" for row in range(start, stop)],
                "image": tensor_column(images[..., None] if images.ndim == 3 else images),
                "label": pa.array(labels.astype(np.int64)),
            }
        )
