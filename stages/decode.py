"""Encoded bytes to pixels."""

from __future__ import annotations

import io
import warnings
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy as np
import numpy.typing as npt
import pyarrow as pa
from PIL import Image, ImageOps, UnidentifiedImageError

from pipeline.stage import ShardContext
from pipeline.storage.images import ALLOWED
from pipeline.tensors import is_tensor, tensor_column, to_numpy

MAX_PIXELS = 64_000_000


@dataclass(frozen=True)
class Decode:
    """Decode, turn upright, convert to ``channels`` and resize to ``size`` x ``size``.

    The shorter side is scaled to ``size`` and the middle cut out, so that one shard becomes one
    tensor. Pixels are counted in the header before they are decoded. A picture that cannot be
    read is quarantined as ``decode-error``, one over 64 megapixels as ``too-large``.
    """

    size: int
    channels: Literal[1, 3]

    version: ClassVar[int] = 1

    def __call__(self, table: pa.Table, context: ShardContext) -> pa.Table:
        column = table["image"]
        images: Any = to_numpy(column) if is_tensor(column.type) else column.to_pylist()
        pixels, kept = [], []
        for row, image in enumerate(images):
            key = table["key"][row].as_py()
            try:
                picture = _open(image)
                pixels.append(self._pixels(picture))
                kept.append(row)
            except _TooLargeError as error:
                context.quarantine(key, "too-large", str(error), bytes(image))
            except Exception as error:  # noqa: BLE001 - damaged files make decoders raise anything
                context.quarantine(key, "decode-error", str(error), bytes(image or b""))
        shape = (len(pixels), self.size, self.size, self.channels)
        tensor = tensor_column(np.array(pixels, np.uint8).reshape(shape))
        index = table.schema.get_field_index("image")
        return table.take(pa.array(kept, pa.int64())).set_column(index, "image", tensor)

    def _pixels(self, picture: Image.Image) -> npt.NDArray[np.uint8]:
        picture.draft("RGB", (self.size, self.size))
        upright = _eight_bits(ImageOps.exif_transpose(picture) or picture)
        converted = upright.convert("RGB" if self.channels == 3 else "L")
        square = (self.size, self.size)
        if converted.size != square:
            method = Image.Resampling.BICUBIC
            converted = ImageOps.fit(converted, square, method=method)
        return np.asarray(converted).reshape(self.size, self.size, self.channels)


def _eight_bits(picture: Image.Image) -> Image.Image:
    # Pillow cuts deeper gray levels off at 255 instead of scaling them.
    if not picture.mode.startswith(("I", "F")):
        return picture
    if picture.mode == "F":
        raise ValueError("floating-point pixels have no known range")
    levels = np.asarray(picture) >> 8
    return Image.fromarray(levels.clip(0, 255).astype(np.uint8))


class _TooLargeError(Exception):
    """More pixels than are ever decoded."""


def _open(image: npt.NDArray[np.uint8] | bytes | None) -> Image.Image:
    if image is None:
        raise ValueError("the sample has no image")
    if isinstance(image, np.ndarray):
        return Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image)
    with warnings.catch_warnings():
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        try:
            picture = Image.open(io.BytesIO(image), formats=ALLOWED)
        except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
            raise _TooLargeError(str(error)) from error
        except UnidentifiedImageError as error:
            raise ValueError("the bytes are not an image of an accepted kind") from error
    width, height = picture.size
    if width * height > MAX_PIXELS:
        raise _TooLargeError(f"{width} x {height} pixels; at most {MAX_PIXELS:,} are decoded")
    return picture
