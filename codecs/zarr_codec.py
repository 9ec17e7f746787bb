"""Bitstreams as a codec of Zarr v3: integers of an array to bytes, by tables in its metadata."""

from __future__ import annotations

import asyncio
import base64
import zlib
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, ClassVar, Self

import numpy as np
from safetensors.numpy import load, save
from zarr.abc.codec import ArrayBytesCodec
from zarr.core.array_spec import ArraySpec
from zarr.core.buffer import Buffer, NDBuffer

from pipeline.codecs.bitstream import TYPES, compress, decompress
from pipeline.codecs.choose_model import model_from_arrays
from pipeline.codecs.entropy import EntropyModel
from pipeline.errors import RunError, UsageError

NAME = "vision_pipeline.bitstream"
VERSION = 1


@dataclass(frozen=True)
class BitstreamCodec(ArrayBytesCodec):
    """Chunks (rows, *shape) of integers as bitstreams, whose model lies in the array's metadata.

    An array that has it is read by ``zarr.open`` wherever this package is installed::

        codec = BitstreamCodec.of(StaticModel.counted(symbols))
        zarr.create_array(store, data=symbols, chunks=(100, 8, 7, 7), serializer=codec)

    Attributes:
        digest: of the model.
        model: its arrays as safetensors, compressed by zlib, in base 64.
    """

    digest: str
    model: str = field(repr=False)

    is_fixed_size: ClassVar[bool] = False  # type: ignore[misc]

    @classmethod
    def of(cls, model: EntropyModel) -> Self:
        """The codec of a model."""
        arrays = {n: np.ascontiguousarray(v) for n, v in sorted(model.to_arrays().items())}
        data = zlib.compress(save(arrays), 9)
        return cls(model.digest, base64.b64encode(data).decode())

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Self:
        about = data.get("configuration", {})
        if about.get("version") != VERSION:
            raise RunError(
                f"This array was written with version {about.get('version')} of the codec {NAME}, "
                f"and {VERSION} is read here.",
                hint="Install the version of this package that wrote it.",
                code="codec-version",
            )
        made = cls(about["digest"], about["model"])
        if made.entropy.digest != made.digest:
            raise RunError(
                "The tables in this array's metadata are not those that it was written with.",
                hint="Fetch zarr.json again.",
                code="bad-tables",
            )
        return made

    def to_dict(self) -> dict[str, Any]:
        about = {"version": VERSION, "digest": self.digest, "model": self.model}
        return {"name": NAME, "configuration": about}

    @cached_property
    def entropy(self) -> EntropyModel:
        """The model.

        Raises:
            RunError: there is none in the metadata.
        """
        try:
            arrays = load(zlib.decompress(base64.b64decode(self.model)))
        except Exception as error:
            raise RunError(
                f"The tables in this array's metadata are damaged: {error}.",
                hint="Fetch zarr.json again.",
                code="bad-tables",
            ) from error
        return model_from_arrays(arrays)

    def validate(self, *, shape: tuple[int, ...], dtype: Any, chunk_grid: Any) -> None:
        """Refuse arrays of other samples than the model's.

        Raises:
            UsageError: type or shape is another one.
        """
        name, own = dtype.to_native_dtype().name, self.entropy.shape
        chunk = getattr(chunk_grid, "chunk_shape", (0, *own))
        if name not in TYPES.values() or tuple(shape[1:]) != own or tuple(chunk[1:]) != own:
            raise UsageError(
                f"The codec codes integers of samples of {own}, whole in each chunk; this array is "
                f"{name} {tuple(shape)} in chunks of {tuple(chunk)}.",
                hint=f"Its types are {', '.join(TYPES.values())}; chunk the first dimension alone.",
                code="bad-codec",
            )

    async def _encode_single(self, chunk: NDBuffer, spec: ArraySpec) -> Buffer | None:
        data = await asyncio.to_thread(compress, chunk.as_numpy_array(), self.entropy)
        return spec.prototype.buffer.from_bytes(data)

    async def _decode_single(self, data: Buffer, spec: ArraySpec) -> NDBuffer:
        found = await asyncio.to_thread(decompress, data.to_bytes(), self.entropy)
        whole = found.astype(spec.dtype.to_native_dtype(), copy=False).reshape(spec.shape)
        return spec.prototype.nd_buffer.from_numpy_array(whole)

    def compute_encoded_size(self, _: int, __: ArraySpec) -> int:
        raise NotImplementedError
