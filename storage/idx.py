"""IDX files, the form in which MNIST and its relatives are published."""

from __future__ import annotations

import gzip
import io
import math
import struct
import zlib

import numpy as np
import numpy.typing as npt

MAX_BYTES = 2**30
"""Most bytes of an array; the largest in use (EMNIST by class) has 2**29."""
MAX_DIMENSIONS = 4
UINT8 = 0x08
CHUNK_BYTES = 2**20


def read_idx(data: bytes) -> npt.NDArray[np.uint8]:
    """The array in an IDX file of unsigned bytes: N x H x W images or N labels.

    Args:
        data: the whole file, compressed by gzip or not.

    Returns:
        uint8, of the shape that the file gives; it may be read-only.

    Raises:
        ValueError: it is no such file, of another element type, cut short, too long or too large.
    """
    if data.startswith(b"\x1f\x8b"):
        data = _decompress(data)
    if len(data) < 4 or data[:2] != b"\0\0":
        raise ValueError("this is no IDX file: it does not start with two zero bytes")
    kind, dimensions = data[2], data[3]
    if kind != UINT8:
        raise ValueError(f"the IDX file has element type 0x{kind:02x}; only 0x08 (uint8) is read")
    if not 1 <= dimensions <= MAX_DIMENSIONS:
        raise ValueError(f"the IDX file has {dimensions} dimensions, not 1 to {MAX_DIMENSIONS}")
    start = 4 + 4 * dimensions
    if len(data) < start:
        raise ValueError(f"the IDX file breaks off in its header, at byte {len(data)}")
    shape = struct.unpack(f">{dimensions}I", data[4:start])
    size = math.prod(shape)
    if len(data) - start != size:
        raise ValueError(
            f"the IDX file has {len(data) - start} bytes where its shape {shape} needs {size}"
        )
    return np.frombuffer(data, np.uint8, offset=start).reshape(shape)


def _decompress(data: bytes) -> bytes:
    parts = []
    left = MAX_BYTES
    try:
        with gzip.GzipFile(fileobj=io.BytesIO(data)) as file:
            while part := file.read(CHUNK_BYTES):
                parts.append(part)
                left -= len(part)
                if left < 0:
                    raise ValueError(f"the IDX file has more than {MAX_BYTES} bytes decompressed")
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise ValueError(f"the compressed IDX file is damaged: {error}") from error
    return b"".join(parts)
