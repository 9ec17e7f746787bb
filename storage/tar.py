"""Tar archives as a stream: what a member is called and what it holds, in the order of the file.

Reads USTAR, PAX (POSIX.1-2001), GNU and V7 archives with nothing but ``read``, so that pipes,
HTTP bodies and compressed streams do as well as files. Nothing is ever extracted or written.
Where common readers disagree about what an archive holds, it is an error rather than a guess.
"""

from __future__ import annotations

import gzip
import re
import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import BinaryIO, Protocol

MAX_MEMBER_BYTES = 256 * 2**20
MAX_ARCHIVE_BYTES = 8 * 2**30
"""Most bytes read of one archive, after decompression and with all headers."""
MAX_EXTENSION_BYTES = 2**20
"""Most bytes of one extended header or long name."""
CHUNK_BYTES = 2**20
BLOCK = 512
ZEROS = bytes(BLOCK)

# name, size, checksum, type, magic and version, prefix
FIELDS = struct.Struct("100s 24x 12s 12x 8s 1s 100x 8s 80x 155s 12x")
OCTAL = re.compile(rb" *([0-7]*)[ \0]*")
PAX_LENGTH = re.compile(rb"([1-9][0-9]{0,6}) ")
DECIMAL = re.compile(rb"[0-9]{1,19}")

FILES = frozenset((b"0", b"\0", b"7"))
NO_DATA = frozenset((b"1", b"2", b"3", b"4", b"5", b"6"))
EXTENSIONS = frozenset((b"x", b"X", b"g", b"L", b"K"))
DIRECTORY, GNU_SPARSE = b"5", b"S"


class TarError(ValueError):
    """The archive is damaged, cut short or beyond the limits."""


class Readable(Protocol):
    """A stream of bytes; short reads are allowed, none at all is the end."""

    def read(self, size: int, /) -> bytes: ...


@dataclass(frozen=True, slots=True)
class Member:
    """One member of an archive.

    Attributes:
        name: path as it was stored, never made safe; bytes that are no UTF-8 by their
            hexadecimal codes.
        data: contents of a regular file; ``None`` for links, devices, sparse files and whatever
            else has no plain contents.
    """

    name: str
    data: bytes | None


def open_tar(file: BinaryIO, name: str) -> Readable:
    """The stream to read members from: decompressed where ``name`` ends in .tar.gz or .tgz."""
    if name.lower().endswith((".tar.gz", ".tgz")):
        return gzip.GzipFile(fileobj=file, mode="rb")
    return file


def read_members(file: Readable, max_bytes: int = MAX_ARCHIVE_BYTES) -> Iterator[Member]:
    """The members of an archive in order; directories are left out.

    The stream is read to its end. An archive ends with two blocks of zeros (GNU tar, libarchive,
    Python and Go all write them), after which only zeros may follow: without that rule an archive
    cut between two members would be a shorter one, and the second of two archives joined by ``cat``
    would be lost. Contents have no checksum in a tar: damage in them is not seen here.

    Args:
        file: uncompressed stream, or one from ``open_tar``.
        max_bytes: most bytes to read of it.

    Raises:
        TarError: what is wrong and at which byte. Errors of the stream itself pass through.
    """
    stream = _Stream(file, max_bytes)
    shared: dict[str, bytes] = {}
    pending: dict[str, bytes] = {}
    while (block := stream.take(BLOCK)) != ZEROS:
        name, size, kind = _parse(block, stream)
        if kind in EXTENSIONS:
            _extend(kind, size, stream, shared, pending)
            continue
        if pending or shared:
            name, size, kind = _override(name, size, kind, shared | pending, stream)
            pending.clear()
        if size > MAX_MEMBER_BYTES or size > stream.left:
            raise stream.error(f"member {_short(name)} has {size} bytes, too many", back=BLOCK)
        if kind in FILES and not (kind == b"\0" and name.endswith(b"/")):
            yield Member(name.decode("utf-8", "backslashreplace"), stream.take(size))
            continue
        _skip(name, size, kind, block, stream)
        if kind not in (DIRECTORY, b"\0"):
            yield Member(name.decode("utf-8", "backslashreplace"), None)
    if pending:
        raise stream.error("an extended header belongs to no member")
    if stream.take(BLOCK) != ZEROS:
        raise stream.error("a lone block of zeros lies between members", back=BLOCK)
    stream.expect_zeros()


class _Stream:
    """Reads whole blocks out of large chunks."""

    __slots__ = ("_base", "_chunk", "_file", "_limit", "_place")

    def __init__(self, file: Readable, limit: int) -> None:
        self._file = file
        self._limit = limit
        self._chunk = b""
        self._place = 0
        self._base = 0  # offset of the chunk in the stream

    @property
    def left(self) -> int:
        """Bytes that may still be taken."""
        return self._limit - self._base - self._place

    def error(self, what: str, *, back: int = 0) -> TarError:
        """An error so many bytes before what comes next."""
        return TarError(f"{what} (at byte {self._base + self._place - back})")

    def take(self, size: int) -> bytes:
        """The next ``size`` bytes; what fills up their last block is passed over."""
        end = self._place + size
        after = end + (-size % BLOCK)
        if after > len(self._chunk):
            return self._gather(size)
        data = self._chunk[self._place : end]
        self._place = after
        return data

    def skip(self, size: int) -> None:
        """Pass over ``size`` bytes."""
        while size > (here := len(self._chunk) - self._place):
            self._place += here
            size -= here
            self._advance()
        self._place += size

    def expect_zeros(self) -> None:
        """Read to the end of the stream."""
        while True:
            rest = self._chunk[self._place :]
            if rest.count(0) != len(rest):
                self._place += len(rest) - len(rest.lstrip(b"\0"))
                raise self.error("data follow the end of the archive; joined archives are not read")
            if not self._next():
                return

    def _gather(self, size: int) -> bytes:
        # Chunk by chunk: a size that lies costs no more memory than there are bytes.
        parts = []
        missing = size
        while missing:
            part = self._chunk[self._place : self._place + missing]
            parts.append(part)
            self._place += len(part)
            missing -= len(part)
            if missing:
                self._advance()
        self.skip(-size % BLOCK)
        return b"".join(parts)

    def _advance(self) -> None:
        if not self._next():
            raise self.error("the archive breaks off" if self._base else "the file is empty")

    def _next(self) -> bool:
        self._base += len(self._chunk)
        self._place = 0
        try:
            self._chunk = self._file.read(CHUNK_BYTES)
        except (EOFError, zlib.error, gzip.BadGzipFile) as error:
            self._chunk = b""
            raise self.error(f"the compressed stream is damaged: {error}") from error
        if self._base + len(self._chunk) > self._limit:
            raise self.error(f"the archive has more than {self._limit} bytes")
        return bool(self._chunk)


def _parse(block: bytes, stream: _Stream) -> tuple[bytes, int, bytes]:
    """Name, size and type in a header block."""
    name, size_field, checksum, kind, magic, prefix = FIELDS.unpack(block)
    # For bytes below 128 the low half of Adler-32 is their sum and one, far faster than sum().
    total = zlib.adler32(block) & 0xFFFF if block.isascii() else sum(block) + 1
    wanted = _block_sum(checksum)
    if total - 1 != wanted:
        signed = total - 1 - 256 * sum(byte > 127 for byte in block)  # some old writers
        if wanted is None or signed != wanted:
            raise stream.error("a header is damaged: its checksum is wrong", back=BLOCK)
    size = _number(size_field)
    if size is None:
        raise stream.error("a header is damaged: its size is no number", back=BLOCK)
    name = name.partition(b"\0")[0]
    # GNU's own headers hold times and sparse maps where USTAR has a prefix.
    if prefix[0] and magic == b"ustar\x0000":
        name = prefix.partition(b"\0")[0] + b"/" + name
    return name, size, kind


@lru_cache(maxsize=2**14)
def _block_sum(field: bytes) -> int | None:
    """Sum of all bytes of a header whose checksum field is this; the field counts as spaces."""
    number = _number(field)
    return None if number is None else number + sum(field) - 8 * ord(" ")


@lru_cache(maxsize=2**14)
def _number(field: bytes) -> int | None:
    """A number in octal or, where the top bit is set, in base 256; ``None`` if it is none."""
    if field[0] & 0x80:
        negative = field[0] & 0x40
        return None if negative else int.from_bytes(field) - (0x80 << 8 * (len(field) - 1))
    match = OCTAL.fullmatch(field)
    return int(match[1] or b"0", 8) if match else None


def _extend(
    kind: bytes, size: int, stream: _Stream, shared: dict[str, bytes], pending: dict[str, bytes]
) -> None:
    """Read a header that speaks of the next member, or with ``g`` of all that follow."""
    if size > MAX_EXTENSION_BYTES:
        raise stream.error(f"an extended header has {size} bytes, too many", back=BLOCK)
    data = stream.take(size)
    if kind == b"g":
        shared.update(_pax_records(data, stream))
        return
    if kind in (b"x", b"X"):
        found = {"pax": b""} | _pax_records(data, stream)
    else:
        found = {"path" if kind == b"L" else "link": data.rstrip(b"\0")}
    # Which of two would count depends on the reader.
    if found.keys() & pending.keys():
        raise stream.error("a member has two names or two extended headers")
    pending.update(found)


def _pax_records(data: bytes, stream: _Stream) -> dict[str, bytes]:
    """What PAX records, each a length, ``key=value`` and a newline, say about name and size."""
    found = {}
    place = 0
    while place < len(data):
        match = PAX_LENGTH.match(data, place)
        end = place + int(match[1]) if match else 0
        if not match or not match.end() < end <= len(data) or data[end - 1] != ord("\n"):
            raise stream.error("a PAX header is damaged")
        key, equals, value = data[match.end() : end - 1].partition(b"=")
        if not equals:
            raise stream.error("a PAX header is damaged")
        if key in (b"path", b"size"):
            found[key.decode()] = value
        elif key.startswith(b"GNU.sparse."):
            found["sparse"] = b"yes"
            if key == b"GNU.sparse.name":
                found["sparse name"] = value
        place = end
    return found


def _override(
    name: bytes, size: int, kind: bytes, said: dict[str, bytes], stream: _Stream
) -> tuple[bytes, int, bytes]:
    """Name, size and type of a member after its extended headers; an empty value says nothing."""
    name = said.get("sparse name") or said.get("path") or name
    if b"\0" in name:
        raise stream.error("a name holds a NUL byte")
    if text := said.get("size"):
        if not DECIMAL.fullmatch(text):
            raise stream.error(f"member {_short(name)} has a size that is no number")
        size = int(text)
    return name, size, GNU_SPARSE if "sparse" in said and kind in FILES else kind


def _skip(name: bytes, size: int, kind: bytes, block: bytes, stream: _Stream) -> None:
    """Pass over what follows the header of a member without plain contents."""
    if size and (kind in NO_DATA or kind == b"\0"):
        # POSIX says that no data follow; several readers skip them all the same.
        raise stream.error(f"member {_short(name)} is no file and has {size} bytes", back=BLOCK)
    # A sparse map too long for GNU's header goes on in further blocks. Under PAX the header is
    # that of a plain file.
    if kind == GNU_SPARSE and block[156:157] == GNU_SPARSE and block[482]:
        while stream.take(BLOCK)[504]:
            pass
    stream.skip(size + (-size % BLOCK))


def _short(name: bytes) -> str:
    return repr(name[:80].decode("utf-8", "backslashreplace"))
