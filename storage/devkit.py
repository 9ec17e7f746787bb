"""The classes in the devkit of ILSVRC: ``meta.mat``, a file of MATLAB 5.

Readers of such files in other libraries crash on damaged ones, so the little that is needed of the
format is read here. https://www.mathworks.com/help/pdf_doc/matlab/matfile_format.pdf
"""

from __future__ import annotations

import math
import struct
import zlib
from collections.abc import Iterator

MATRIX, COMPRESSED = 14, 15
STRUCT = 2
MAX_BYTES = 64 * 2**20
NUMBERS = {1: "<b", 2: "<B", 3: "<h", 4: "<H", 5: "<i", 6: "<I", 7: "<f", 9: "<d"}
TEXTS = {1: "latin-1", 2: "latin-1", 4: "utf-16-le", 16: "utf-8", 17: "utf-16-le"}
"""How elements of each type hold a number and text."""

Element = tuple[int, bytes]


def read_synsets(data: bytes) -> dict[int, str]:
    """WordNet ids by ILSVRC number: the fields ``WNID`` and ``ILSVRC2012_ID`` of ``synsets``.

    Args:
        data: the whole file.

    Raises:
        ValueError: it is damaged or holds no such variable.
    """
    if data[124:128] != b"\0\1IM":
        raise ValueError("it is no MATLAB 5 file")
    try:
        for kind, body in _elements(data[128:]):
            unpacked = _elements(_decompress(body)) if kind == COMPRESSED else [(kind, body)]
            for inner, content in unpacked:
                if inner == MATRIX and (found := _synsets(content)):
                    return found
    except (struct.error, zlib.error, IndexError, KeyError, OverflowError) as error:
        raise ValueError(f"it is damaged: {error}") from error
    raise ValueError("it holds no 'synsets'")


def _decompress(data: bytes) -> bytes:
    unpacker = zlib.decompressobj()
    found = unpacker.decompress(data, MAX_BYTES)
    if not unpacker.eof:
        raise ValueError("it is cut short or too large")
    return found


def _elements(data: bytes) -> Iterator[Element]:
    """Type and content of each element; small ones lie in their own header."""
    place = 0
    while place < len(data):
        kind, size = struct.unpack_from("<II", data, place)
        start = place + 8
        if kind >> 16:
            start, size, kind = place + 4, kind >> 16, kind & 0xFFFF
        if start + size > len(data):
            raise ValueError("it breaks off")
        yield kind, data[start : start + size]
        place = start + size + (0 if kind == COMPRESSED else -(start + size) % 8)


def _synsets(data: bytes) -> dict[int, str] | None:
    (_, flags), (_, shape), (_, name), *rest = _elements(data)
    if bytes(name) != b"synsets" or flags[0] != STRUCT:
        return None
    (_, width), (_, names), *values = rest
    step = struct.unpack("<i", width)[0]
    if step < 1:
        raise ValueError("its fields have no names")
    fields = [names[at : at + step].split(b"\0")[0] for at in range(0, len(names), step)]
    rows = math.prod(struct.unpack(f"<{len(shape) // 4}i", shape))
    if rows * len(fields) != len(values):
        raise ValueError("its fields are not whole")
    numbers = values[fields.index(b"ILSVRC2012_ID") :: len(fields)]
    wnids = values[fields.index(b"WNID") :: len(fields)]
    return {int(_number(n)): _text(w) for n, w in zip(numbers, wnids, strict=True)}


def _number(element: Element) -> float:
    kind, data = list(_elements(element[1]))[3]
    return float(struct.unpack_from(NUMBERS[kind], data)[0])


def _text(element: Element) -> str:
    kind, data = list(_elements(element[1]))[3]
    return data.decode(TEXTS[kind])
