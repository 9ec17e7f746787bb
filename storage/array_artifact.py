"""Artifacts that hold arrays by name, such as centroids."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt
from safetensors.numpy import load, save

from pipeline.storage.artifact import Artifact
from pipeline.storage.store import Store

Arrays = Mapping[str, npt.NDArray[Any]]
FILE = "arrays.safetensors"


def to_bytes(arrays: Arrays) -> bytes:
    """Arrays as safetensors."""
    return bytes(save({name: np.ascontiguousarray(value) for name, value in arrays.items()}))


def read_arrays(artifact: Artifact) -> Arrays:
    """The arrays of an artifact by name; one copy a process.

    Raises:
        RunError: they are missing or damaged.
    """
    return _read(artifact.store, artifact.files[FILE].sha256)


@dataclass(frozen=True)
class FittedArrays:
    """Some arrays of an artifact, as a task's input that counts by its content."""

    artifact: Artifact
    names: tuple[str, ...]

    @property
    def name(self) -> str:
        return self.artifact.name

    @property
    def identity(self) -> str:
        return self.artifact.identity

    def arrays(self) -> dict[str, npt.NDArray[Any]]:
        """The arrays by name."""
        found = read_arrays(self.artifact)
        return {name: found[name] for name in self.names}


@lru_cache(maxsize=2)
def _read(store: Store, _sha256: str) -> Arrays:
    return dict(load(Artifact.open(store).read(FILE)))
