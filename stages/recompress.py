"""Images as an image codec leaves them."""

from __future__ import annotations

import io
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, ClassVar, Literal

import numpy as np
import pyarrow as pa
from PIL import Image

from pipeline.stage import ShardContext
from pipeline.storage.images import Image8
from pipeline.tensors import tensor_column, to_numpy

ImageCodec = Literal["jpeg", "webp", "avif"]
OPTIONS: dict[ImageCodec, dict[str, Any]] = {
    "jpeg": {"format": "JPEG", "optimize": True},
    "webp": {"format": "WEBP", "method": 6},
    "avif": {"format": "AVIF", "speed": 4, "max_threads": 1},
}
"""For the smallest files."""


@dataclass(frozen=True)
class Recompress:
    """Code ``image``, a uint8 tensor, and decode it again.

    New columns: ``bytes``, int32, of the file, and ``payload``, int32, those that are left without
    what all files of this size have in common: of a JPEG, its scan with the standard's tables, and
    otherwise the file without the bytes of a gray image's.

    Args:
        codec: of the files.
        quality: 0 to 100.
    """

    codec: ImageCodec
    quality: int

    version: ClassVar[int] = 1

    def __call__(self, table: pa.Table, context: ShardContext) -> pa.Table:
        images = to_numpy(table["image"])
        files = [file_of(image, self.codec, self.quality) for image in images]
        seen = [_pixels(file, image.shape[2]) for file, image in zip(files, images, strict=True)]
        payloads = [
            payload(file, image, self.codec, self.quality)
            for file, image in zip(files, images, strict=True)
        ]
        place = table.schema.get_field_index("image")
        table = table.set_column(place, "image", tensor_column(np.array(seen, np.uint8)))
        for name, sizes in (("bytes", list(map(len, files))), ("payload", payloads)):
            table = table.append_column(name, pa.array(sizes, pa.int32()))
        return table


def file_of(image: Image8, codec: ImageCodec, quality: int, **options: Any) -> bytes:
    """A file of an image H x W x C."""
    buffer = io.BytesIO()
    picture = Image.fromarray(image[..., 0] if image.shape[2] == 1 else image)
    picture.save(buffer, quality=quality, **{**OPTIONS[codec], **options})
    return buffer.getvalue()


def payload(file: bytes, image: Image8, codec: ImageCodec, quality: int) -> int:
    """Bytes of a file without those that all files of its size have."""
    if codec != "jpeg":
        return max(0, len(file) - _least(codec, quality, image.shape))
    plain = file_of(image, "jpeg", quality, optimize=False)
    start = plain.index(b"\xff\xda")
    return len(plain) - start - 2 - int.from_bytes(plain[start + 2 : start + 4]) - 2


@lru_cache
def _least(codec: ImageCodec, quality: int, shape: tuple[int, ...]) -> int:
    return len(file_of(np.full(shape, 128, np.uint8), codec, quality))


def _pixels(file: bytes, channels: int) -> Image8:
    with Image.open(io.BytesIO(file)) as picture:
        pixels = np.asarray(picture.convert("L" if channels == 1 else "RGB"))
    return pixels.reshape(*pixels.shape[:2], channels)
