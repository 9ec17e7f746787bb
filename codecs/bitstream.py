"""Samples as bytes that say what they are; ``docs/bitstream.md`` is the specification."""

from __future__ import annotations

import math
import struct
from collections.abc import Callable
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import google_crc32c
import numpy as np
import numpy.typing as npt

from pipeline.codecs.entropy import EntropyModel
from pipeline.codecs.rans import CorruptError
from pipeline.errors import RunError

MAGIC = b"VPBS"
VERSION = 1
TYPES = {1: "uint8", 2: "int8", 3: "uint16", 4: "int16", 5: "int32"}
"""Types of symbols by their number."""
RAW = b"\0"
"""First byte of a group whose symbols are as they are; that of a coded one is not 0."""
MOST_SYMBOLS = 2**28
"""Of what is decoded at once, unless more is asked for: 1 GiB."""
MOST_DIMENSIONS = 8
MOST_HEADER = 2**26
"""Bytes."""
GROUP_BYTES = 2048
"""Of a group that is large enough: what it takes for itself is less than a two-hundredth."""
_FIXED = struct.Struct("<4sBBBBI8s")

Read = Callable[[int, int], bytes]
"""Bytes from a place to another."""


class BitstreamError(RunError):
    """A bitstream is damaged, cut off, or not what it is taken for; ``code`` says what is wrong."""


@dataclass(frozen=True)
class Header:
    """What a bitstream says of itself.

    Attributes:
        codec: kind of entropy model.
        dtype: of symbols.
        model: first 8 bytes of the model's digest, in hexadecimal digits.
        shape: of a sample.
        samples: N.
        group: samples of each group; the last may have fewer.
        starts: where each group begins, and where the last one ends.
    """

    codec: int
    dtype: str
    model: str
    shape: tuple[int, ...]
    samples: int
    group: int
    starts: tuple[int, ...]


def compress(symbols: npt.NDArray[Any], model: EntropyModel, *, group: int | None = None) -> bytes:
    """A bitstream of samples.

    Args:
        symbols: (N, *shape), of one of five integer types.
        model: of a sample of that shape.
        group: samples that are coded together, so that one is read with all of them; as many as
            take 2 KiB where not given.

    Raises:
        ValueError: the symbols are of another shape or type.
    """
    code = {name: number for number, name in TYPES.items()}.get(symbols.dtype.name)
    if code is None or symbols.shape[1:] != model.shape:
        raise ValueError(f"symbols {symbols.dtype} {symbols.shape} for a model of {model.shape}")
    count = len(symbols)
    if group is None:
        tried = symbols[:64]
        each = max(1, len(encode_group(tried, model)) // max(1, len(tried)))
        group = max(1, -(-GROUP_BYTES // each))
    groups = [encode_group(symbols[i : i + group], model) for i in range(0, count, group)]
    numbers = [*symbols.shape[1:], count, group, *map(len, groups)]
    varied = b"".join(map(_varint, numbers))
    size = _FIXED.size + len(varied) + 4
    digest = bytes.fromhex(model.digest)[:8]
    fixed = _FIXED.pack(MAGIC, VERSION, model.codec, code, symbols.ndim - 1, size, digest)
    head = fixed + varied
    return head + _checksum(head) + b"".join(groups)


def encode_group(symbols: npt.NDArray[Any], model: EntropyModel) -> bytes:
    """Some samples (n, *shape) that are decoded together: as they are, where that takes less."""
    flat = symbols.reshape(len(symbols), math.prod(model.shape))
    values = np.ascontiguousarray(flat, np.int32)
    raw = np.ascontiguousarray(flat, flat.dtype.newbyteorder("<")).tobytes()
    coded = model.encode(values)
    if len(coded) > len(raw) + 5:
        return RAW + raw + _checksum(raw)
    return coded


def decode_group(
    data: bytes, count: int, model: EntropyModel, dtype: str, *, where: str | None = None
) -> npt.NDArray[Any]:
    """Samples (count, *shape) of a group.

    Raises:
        BitstreamError: it is damaged, or of another model.
    """
    try:
        if not data:
            raise CorruptError
        if data[:1] == RAW:
            kind = np.dtype(dtype).newbyteorder("<")
            raw = data[1:-4]
            if len(raw) != count * math.prod(model.shape) * kind.itemsize:
                raise CorruptError
            if _checksum(raw) != data[-4:]:
                raise CorruptError
            found = np.frombuffer(raw, kind)
        else:
            found = model.decode(data, count)
            info = np.iinfo(dtype)
            if found.size and not info.min <= int(found.min()) <= int(found.max()) <= info.max:
                raise CorruptError
    except CorruptError:
        raise BitstreamError(
            "A group of samples of a bitstream is damaged.",
            hint="Fetch the file again; other groups can still be read.",
            code="bitstream-group",
            where=where,
        ) from None
    return found.reshape(count, *model.shape).astype(dtype)


class Bitstream:
    """A bitstream that is read as it is asked: one sample is one range of bytes.

    Args:
        data: all of it, or a function that gives the bytes from a place to another (fewer, where it
            ends before).
        model: that it was made with.
        most: symbols that may be decoded at once.

    Raises:
        BitstreamError: a field of the header is damaged, or not of this model.
    """

    def __init__(
        self, data: bytes | Read, model: EntropyModel, *, most: int = MOST_SYMBOLS
    ) -> None:
        self._read: Read = data if callable(data) else lambda lo, hi: data[lo:hi]
        self.model = model
        self.header = read_header(self._read, most=most)
        _check_model(self.header, model)

    def __len__(self) -> int:
        return self.header.samples

    def __getitem__(self, row: int) -> npt.NDArray[Any]:
        """Sample ``row``, of its shape.

        Raises:
            IndexError: there is none.
            BitstreamError: its group is damaged.
        """
        if not 0 <= row < len(self):
            raise IndexError(f"sample {row} of {len(self)}")
        number, place = divmod(row, self.header.group)
        found: npt.NDArray[Any] = self._group(number)[place]
        return found

    def all(self) -> npt.NDArray[Any]:
        """All samples (N, *shape).

        Raises:
            BitstreamError: a group is damaged, or bytes follow the last one.
        """
        end = self.header.starts[-1]
        if self._read(end, end + 1):
            raise _error("length", "Bytes follow its last group.")
        groups = [self._group(number) for number in range(len(self.header.starts) - 1)]
        empty = np.zeros((0, *self.header.shape), self.header.dtype)
        return np.concatenate([empty, *groups])

    def _group(self, number: int) -> npt.NDArray[Any]:
        start, stop = self.header.starts[number : number + 2]
        count = min(self.header.group, len(self) - number * self.header.group)
        data = self._read(start, stop)
        if len(data) < stop - start:
            raise _error("length", "It ends before its last group does.")
        where = f"group {number}"
        return decode_group(data, count, self.model, self.header.dtype, where=where)


def decompress(data: bytes, model: EntropyModel, *, most: int = MOST_SYMBOLS) -> npt.NDArray[Any]:
    """Samples (N, *shape) of a bitstream.

    Raises:
        BitstreamError: it is damaged, or not of this model.
    """
    return Bitstream(data, model, most=most).all()


def webdataset_handler(
    model: EntropyModel, extension: str = "vpbs"
) -> Callable[[str, bytes], npt.NDArray[Any] | None]:
    """Decodes members of a WebDataset: ``dataset.decode(webdataset_handler(model))``.

    Args:
        model: of the samples; a member holds one or several.
        extension: of the members.
    """

    def handle(name: str, data: bytes) -> npt.NDArray[Any] | None:
        return decompress(data, model) if name.rpartition(".")[2] == extension else None

    return handle


def read_header(data: bytes | Read, *, most: int = MOST_SYMBOLS) -> Header:
    """What a bitstream says of itself; nothing is allocated for what it only claims.

    Raises:
        BitstreamError: a field is damaged, or claims more than ``most`` symbols.
    """
    read: Read = data if callable(data) else lambda lo, hi: data[lo:hi]
    fixed = read(0, _FIXED.size)
    if len(fixed) < 4 or fixed[:4] != MAGIC:
        raise _error("magic", f"It does not begin with {MAGIC!r}.")
    if len(fixed) < _FIXED.size:
        raise _error("length", "It ends within its header.")
    _, version, codec, code, dimensions, size, digest = _FIXED.unpack(fixed)
    if version != VERSION:
        raise _error("version", f"It is of version {version}, and {VERSION} is read here.")
    numbers = _numbers(read, size)
    if code not in TYPES:
        raise _error("dtype", f"There is no type of symbols with the number {code}.")
    if dimensions > MOST_DIMENSIONS:
        raise _error("shape", f"A sample has {dimensions} dimensions, {MOST_DIMENSIONS} at most.")
    if len(numbers) < dimensions + 2:
        raise _error("index", "Its header has too few numbers.")
    shape = tuple(numbers[:dimensions])
    samples, group, *lengths = numbers[dimensions:]
    if 0 in shape or math.prod(shape) * max(samples, 1) > most:
        raise _error(
            "size",
            f"It claims {samples} samples of {shape}.",
            hint=f"More than {most:,} symbols are decoded only where 'most' allows it.",
        )
    if group < 1 or len(lengths) != -(-samples // group):
        raise _error("index", f"{samples} samples are not in {len(lengths)} groups of {group}.")
    starts = tuple(accumulate(lengths, initial=size))
    return Header(codec, TYPES[code], digest.hex(), shape, samples, group, starts)


def _numbers(read: Read, size: int) -> list[int]:
    """The varints of a header of so many bytes."""
    if not _FIXED.size + 6 <= size <= MOST_HEADER:
        raise _error("header", f"Its header cannot have {size} bytes.")
    head = read(0, size)
    if len(head) < size:
        raise _error("length", "It ends within its header.")
    if _checksum(head[:-4]) != head[-4:]:
        raise _error("header", "The header's checksum is not that of its bytes.")
    return _varints(head[_FIXED.size : -4])


def _checksum(data: bytes) -> bytes:
    return int(google_crc32c.value(data)).to_bytes(4, "little")


def _check_model(header: Header, model: EntropyModel) -> None:
    if header.codec != model.codec:
        raise _error("codec", f"Its codec has the number {header.codec}, not {model.codec}.")
    if header.shape != model.shape:
        raise _error("shape", f"Its samples are of {header.shape}, the model's of {model.shape}.")
    if header.model != model.digest[:16]:
        raise _error(
            "model",
            f"It was made with another model ({header.model}, this one is {model.digest[:16]}).",
            hint="Load the model that lies beside the data.",
        )


def _varint(number: int) -> bytes:
    """Seven bits a byte, low ones first, the upper bit where more follow."""
    parts = []
    while number >= 128:
        parts.append(number & 127 | 128)
        number >>= 7
    return bytes([*parts, number])


def _varints(data: bytes) -> list[int]:
    found, value, shift = [], 0, 0
    for byte in data:
        value |= (byte & 127) << shift
        shift += 7
        if byte < 128:
            found.append(value)
            value = shift = 0
        elif shift > 56:
            raise _error("index", "A number of its header is too large.")
    if shift:
        raise _error("index", "The last number of its header is cut off.")
    return found


def _error(field: str, message: str, hint: str = "") -> BitstreamError:
    return BitstreamError(
        f"This is no whole bitstream. {message}",
        hint=hint or "Fetch the file again, or check what wrote it.",
        code=f"bitstream-{field}",
    )
