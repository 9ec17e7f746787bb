"""NumPy archives: ``x_train``, ``y_train``, ``x_test``, ``y_test`` and ``class_names``."""

from __future__ import annotations

import zipfile
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from pipeline.digest import digest
from pipeline.errors import UsageError
from pipeline.storage.source import Shard, Source
from pipeline.tensors import tensor_column

SHARD_ROWS = 1000


def _checksums(path: Path) -> dict[str, int]:
    """CRC-32 of every array, from the archive's directory."""
    try:
        with zipfile.ZipFile(path) as archive:
            return {i.filename.removesuffix(".npy"): i.CRC for i in archive.infolist()}
    except (zipfile.BadZipFile, OSError) as error:
        raise _damaged(path, str(error)) from error


def _damaged(path: Path, what: str) -> UsageError:
    return UsageError(
        f"The archive cannot be used: {what}.",
        hint="Save plain numeric arrays x_train (N x H x W or N x H x W x C, uint8) and y_train "
        "(N integers) with numpy.savez; pickled objects are never loaded.",
        code="damaged-npz",
        where=str(path),
    )


@lru_cache(maxsize=8)
def _member(path: Path, name: str, _checksum: int) -> npt.NDArray[Any]:
    # The checksum is part of the cache's key, so that a replaced file is read again.
    try:
        with np.load(path, allow_pickle=False) as archive:
            array: npt.NDArray[Any] = archive[name]
            return array
    except (ValueError, zipfile.BadZipFile) as error:
        raise _damaged(path, f"array '{name}': {error}") from error


@dataclass(frozen=True)
class NpzSource(Source):
    """One split of an archive: images N x H x W or N x H x W x C in uint8, labels N.

    Shards are runs of 1,000 rows; the key is ``<split>-<row>``.
    """

    path: Path
    split: str

    @staticmethod
    def splits(path: Path) -> set[str]:
        """The splits that the archive holds."""
        names = _checksums(path)
        return {n[2:] for n in names if n.startswith("x_") and f"y_{n[2:]}" in names}

    @cached_property
    def _checksums(self) -> dict[str, int]:
        return _checksums(self.path)

    def _array(self, name: str) -> npt.NDArray[Any]:
        return _member(self.path, name, self._checksums[name])

    @cached_property
    def classes(self) -> tuple[str, ...]:
        if "class_names" in self._checksums:
            return tuple(str(name) for name in self._array("class_names"))
        return tuple(str(label) for label in range(int(self._array(f"y_{self.split}").max()) + 1))

    @cached_property
    def shards(self) -> tuple[Shard, ...]:
        labels = self._array(f"y_{self.split}")
        rows = len(self._array(f"x_{self.split}"))
        if labels.shape != (rows,) or labels.dtype.kind not in "iu":
            found = f"{labels.shape} of {labels.dtype}"
            raise _damaged(self.path, f"{rows} images have labels of shape {found}")
        checksums = [self._checksums[f"{part}_{self.split}"] for part in "xy"]
        return tuple(
            Shard(
                f"{self.split}-{start // SHARD_ROWS:05d}",
                digest("npz", checksums, start),
                min(SHARD_ROWS, rows - start),
                {"start": start},
            )
            for start in range(0, rows, SHARD_ROWS)
        )

    def read(self, shard: Shard) -> pa.Table:
        start = shard.location["start"]
        stop = start + (shard.rows or 0)
        images = self._array(f"x_{self.split}")[start:stop]
        labels = self._array(f"y_{self.split}")[start:stop]
        if images.dtype != np.uint8:
            raise UsageError(
                f"The images of the split '{self.split}' are {images.dtype}, not uint8.",
                hint="Save them as numbers from 0 to 255 in uint8.",
                code="bad-dtype",
                where=str(self.path),
            )
        images = images[..., None] if images.ndim == 3 else images
        return pa.table(
            {
                "key": [f"{self.split}-{row:08d}" for row in range(start, stop)],
                "image": tensor_column(images),
                "label": pa.array(labels.astype(np.int64)),
            }
        )
