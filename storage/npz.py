"""NumPy archives: ``x_train``, ``y_train``, ``x_test``, ``y_test`` and ``class_names``."""

from __future__ import annotations

import zipfile
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt

from pipeline.errors import UsageError
from pipeline.storage.arrays import ArraySource
from pipeline.storage.classes import Names, agreed
from pipeline.storage.store import Store


def splits(store: Store, name: str) -> set[str]:
    """The splits that an archive holds."""
    names = _checksums(store, name)
    return {n[2:] for n in names if n.startswith("x_") and f"y_{n[2:]}" in names}


def open_npz(store: Store, name: str, split: str, classes: Names = ()) -> ArraySource:
    """One split of an archive: images N x H x W or N x H x W x C in uint8, labels N."""
    where = f"{store}/{name}"
    checksums = _checksums(store, name)
    parts = NpzParts(store, name, split, tuple(sorted(checksums.items())))
    identity = [checksums[f"{part}_{split}"] for part in "xy"]
    own: Names = ()
    if "class_names" in checksums:
        own = tuple(map(str, _member(store, name, "class_names", checksums["class_names"]).flat))
    return ArraySource(parts, split, identity, where, agreed(own, classes, where))


@dataclass(frozen=True)
class NpzParts:
    """Reads images and labels of one split when they are asked for."""

    store: Store
    name: str
    split: str
    checksums: tuple[tuple[str, int], ...]

    def __call__(self) -> tuple[npt.NDArray[Any], npt.NDArray[Any]]:
        return self._part("x"), self._part("y")

    @cached_property
    def _by_name(self) -> dict[str, int]:
        return dict(self.checksums)

    def _part(self, part: str) -> npt.NDArray[Any]:
        name = f"{part}_{self.split}"
        return _member(self.store, self.name, name, self._by_name[name])


def _checksums(store: Store, name: str) -> dict[str, int]:
    """CRC-32 of every array, from the archive's directory."""
    try:
        with store.open(name) as file, zipfile.ZipFile(file) as archive:
            return {i.filename.removesuffix(".npy"): i.CRC for i in archive.infolist()}
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError) as error:
        raise _damaged(store, name, str(error)) from error


@lru_cache(maxsize=4)
def _member(store: Store, file_name: str, name: str, _checksum: int) -> npt.NDArray[Any]:
    # The checksum is part of the cache's key, so that a replaced file is read again.
    try:
        with store.open(file_name) as file, np.load(file, allow_pickle=False) as archive:
            array = archive[name]
            if not isinstance(array, np.ndarray):
                raise TypeError("it is no array")
            return array
    except Exception as error:  # damaged, it raises anything
        raise _damaged(store, file_name, f"array '{name}': {error}") from error


def _damaged(store: Store, name: str, what: str) -> UsageError:
    return UsageError(
        f"The archive cannot be used: {what}.",
        hint="Save plain numeric arrays x_train (N x H x W or N x H x W x C, uint8) and y_train "
        "(N integers) with numpy.savez; pickled objects are never loaded.",
        code="damaged-npz",
        where=f"{store}/{name}",
    )
