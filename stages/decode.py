"""Encoded bytes to pixels."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy as np
import numpy.typing as npt
import pyarrow as pa
from PIL import Image

from pipeline.stage import ShardContext
from pipeline.storage.images import (
    MAX_PIXELS,
    SECONDS,
    TimeLimit,
    TooLargeError,
    TooSlowError,
    decode,
    load_resize,
    resize,
)
from pipeline.tensors import is_tensor, tensor_column, to_numpy

Pixels = npt.NDArray[np.uint8]


@dataclass(frozen=True)
class Decode:
    """Decode, turn upright, convert to ``channels`` and resize to ``size`` x ``size``.

    The largest square in the middle, at whole pixels, is scaled to ``size``, so that one shard
    becomes one uint8 tensor. :func:`~pipeline.storage.images.decode` says what becomes of which
    kind of image. Tensors of pixels are taken as well.

    One bad image never stops a shard. It is quarantined as ``too-large`` (more than
    ``max_pixels``, or a JPEG of too many scans), as ``too-slow`` (more than ``seconds``), and
    as ``decode-error`` whatever else is the matter.
    """

    size: int
    channels: Literal[1, 3]
    max_pixels: int = MAX_PIXELS
    seconds: float = SECONDS

    version: ClassVar[int] = 2

    def __call__(self, table: pa.Table, context: ShardContext) -> pa.Table:
        kept, pixels = self.pixels(table, context)
        return with_images(table, kept, tensor_column(pixels))

    def pixels(self, table: pa.Table, context: ShardContext) -> tuple[list[int], Pixels]:
        """Rows of the images that went well, and their pixels (n, size, size, channels)."""
        load_resize()
        square = (self.size, self.size)
        pixels = np.empty((len(table), *square, self.channels), np.uint8)

        def put(image: bytes | Pixels, place: int) -> None:
            found = pixels_of(image, self.channels, self.size, self.max_pixels)
            resize(_middle(found), square, pixels[place])

        kept = each_image(table, context, put, self.seconds)
        return kept, pixels[: len(kept)]


def each_image(
    table: pa.Table,
    context: ShardContext,
    use: Callable[[bytes | Pixels, int], None],
    seconds: float,
) -> list[int]:
    """Do something with every image of a table, and quarantine those with which it fails.

    Args:
        table: with ``key`` and ``image`` (binary, or a tensor of pixels H x W x C a row).
        context: what is quarantined is reported to.
        use: takes an image and its place among those that went well.
        seconds: longest that one image may take.

    Returns:
        Rows of the images that went well, in order.
    """
    kept: list[int] = []
    with TimeLimit(seconds) as limited:
        for row, image in enumerate(_images(table["image"])):
            try:
                if image is None:
                    raise ValueError("the sample has no image")
                limited(use, image, len(kept))
                kept.append(row)
            except Exception as error:  # noqa: BLE001 - damaged files make decoders raise anything
                detail = str(error) or type(error).__name__
                context.quarantine(table["key"][row].as_py(), _reason(error), detail)
    return kept


def with_images(table: pa.Table, rows: list[int], images: pa.Array) -> pa.Table:
    """The given rows of a table with other images."""
    index = table.schema.get_field_index("image")
    others = table.remove_column(index)
    if len(rows) < len(table):
        others = others.take(pa.array(rows, pa.int64()))
    return others.add_column(index, "image", images)


def pixels_of(
    image: bytes | Pixels, channels: Literal[1, 3] | None, shorter: int | None, max_pixels: int
) -> Pixels:
    """The pixels H x W x C of an image that is encoded or already an array.

    Args as of :func:`~pipeline.storage.images.decode`; of an array with 2 or 4 channels the last
    is transparency, which is left off.
    """
    if isinstance(image, bytes):
        return decode(image, channels, shorter=shorter, max_pixels=max_pixels)
    if image.dtype != np.uint8 or image.ndim != 3 or not 1 <= image.shape[2] <= 4:
        raise ValueError(f"not pixels H x W x C of 8 bits: {image.dtype} {image.shape}")
    if image.shape[2] in {2, 4}:
        image = image[..., :-1]
    if channels == 1 and image.shape[2] == 3:
        return np.asarray(Image.fromarray(image).convert("L"))[..., None]
    return image.repeat(3, 2) if channels == 3 and image.shape[2] == 1 else image


def _reason(error: Exception) -> str:
    if isinstance(error, TooLargeError):
        return "too-large"
    return "too-slow" if isinstance(error, TooSlowError) else "decode-error"


def _images(column: pa.ChunkedArray) -> Iterator[Any]:
    if not is_tensor(column.type):
        for first in range(0, len(column), 64):  # a shard's bytes are never there twice
            yield from column.slice(first, 64).to_pylist()
    elif column.null_count:
        yield from (scalar.to_numpy() if scalar.is_valid else None for scalar in column)
    else:
        yield from to_numpy(column)


def _middle(image: Pixels) -> Pixels:
    height, width = image.shape[:2]
    side = min(height, width)
    top, left = (height - side) // 2, (width - side) // 2
    return image[top : top + side, left : left + side]
