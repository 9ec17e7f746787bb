"""Model weights as plain arrays, from files that cannot run code."""

from __future__ import annotations

import hashlib
import pickle
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
    """The arrays of a state dict by name: ``.safetensors``, ``.npz``, or torch's ``.pt``, ``.pth``.

    Of what torch saved nothing but tensors and plain containers is read; a checkpoint that holds
    the state dict as ``state_dict`` or ``model`` will do, and so will ``module.`` before each name.

    Raises:
        UsageError: the file is missing, damaged or of another kind.
    """
    try:
        if path.suffix == ".safetensors":
            return dict(load_file(path))
        if path.suffix == ".npz":
            with np.load(path, allow_pickle=False) as archive:
                return {name: archive[name] for name in archive.files}
        if path.suffix in {".pt", ".pth"}:
            return _of_torch(path)
    except (
        OSError,
        ValueError,
        RuntimeError,
        EOFError,
        zipfile.BadZipFile,
        SafetensorError,
        pickle.UnpicklingError,
    ) as error:
        raise UsageError(
            f"The weights cannot be read: {str(error).partition(chr(10))[0]}.",
            hint="Give an existing .safetensors file, an .npz archive of plain arrays, or a .pth "
            "file with a state dict and nothing else.",
            code="bad-weights",
            where=str(path),
        ) from error
    raise UsageError(
        f"Weights in '{path.suffix or 'a file without extension'}' are not read.",
        hint="Give .safetensors, an .npz archive of plain arrays, or a .pth with a state dict.",
        code="bad-weights",
        where=str(path),
    )


def _of_torch(path: Path) -> dict[str, npt.NDArray[Any]]:
    import torch

    found = torch.load(path, map_location="cpu", weights_only=True)
    for name in ("state_dict", "model"):
        if isinstance(found, dict) and isinstance(found.get(name), dict):
            found = found[name]
    if not isinstance(found, dict) or not all(isinstance(v, torch.Tensor) for v in found.values()):
        raise ValueError("it holds no state dict")
    arrays = {str(name).removeprefix("module."): value for name, value in found.items()}
    return {
        name: (value.float() if value.dtype == torch.bfloat16 else value).numpy()
        for name, value in arrays.items()
    }


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
