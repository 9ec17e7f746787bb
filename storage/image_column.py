"""The column ``image``: encoded bytes, or tensors of pixels."""

from __future__ import annotations

from collections.abc import Iterator

import pyarrow as pa

from pipeline.storage.images import encode_png
from pipeline.tensors import is_tensor, to_numpy

STARTS = {
    b"\x89PNG": "png",
    b"\xff\xd8": "jpg",
    b"GIF8": "gif",
    b"BM": "bmp",
    b"II*\0": "tif",
    b"MM\0*": "tif",
    b"P5": "pgm",
    b"P6": "ppm",
}


def encoded(images: pa.ChunkedArray) -> Iterator[bytes]:
    """The images as bytes: as they are, or pixels as PNG."""
    if is_tensor(images.type):
        yield from map(encode_png, to_numpy(images))
    else:
        yield from (image.as_py() for image in images)


def extension_of(data: bytes) -> str:
    """The extension that encoded images of this kind usually have; ``bin`` for other bytes."""
    if data[8:12] == b"WEBP":
        return "webp"
    return next((name for start, name in STARTS.items() if data.startswith(start)), "bin")
