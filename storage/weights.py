"""Model weights as plain arrays: safetensors and NumPy archives, nothing that runs code."""

from __future__ import annotations

import hashlib
import zipfile
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError
from safetensors.numpy import load_file

from pipeline.errors import UsageError


def read_weights(path: Path) -> dict[str, npt.NDArray[Any]]:
    """The arrays of a ``.safetensors`` or ``.npz`` state dict by name.

    Raises:
        UsageError: the file is missing, damaged or of another kind.
    """
    try:
        if path.suffix == ".safetensors":
            return dict(load_file(path))
        if path.suffix == ".npz":
            with np.load(path, allow_pickle=False) as archive:
                return {name: archive[name] for name in archive.files}
    except (OSError, ValueError, zipfile.BadZipFile, SafetensorError) as error:
        raise UsageError(
            f"The weights cannot be read: {error}.",
            hint="Give an existing .safetensors file or an .npz archive of plain arrays.",
            code="bad-weights",
            where=str(path),
        ) from error
    raise UsageError(
        f"Weights in '{path.suffix or 'a file without extension'}' are not read.",
        hint="Convert them to .safetensors, or to an .npz archive of plain arrays.",
        code="bad-weights",
        where=str(path),
    )


@dataclass(frozen=True)
class WeightsFile:
    """A file of weights; its content, not its path, is its identity."""

    path: Path

    @property
    def name(self) -> str:
        return self.path.name

    @cached_property
    def identity(self) -> str:
        """SHA-256 (hex) of the file.

        Raises:
            UsageError: the file cannot be read.
        """
        try:
            with self.path.open("rb") as file:
                return hashlib.file_digest(file, "sha256").hexdigest()
        except OSError as error:
            raise UsageError(
                f"The weights cannot be read: {error.strerror or error}.",
                hint="Check the path.",
                code="bad-weights",
                where=str(self.path),
            ) from error

    def arrays(self) -> dict[str, npt.NDArray[Any]]:
        """The arrays by name, as :func:`read_weights` gives them."""
        return read_weights(self.path)
