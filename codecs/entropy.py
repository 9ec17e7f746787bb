"""Models of symbols, from which bits are made."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar, Protocol

import numpy as np
import numpy.typing as npt

from pipeline.codecs import rans
from pipeline.codecs.tables import MOST_TABLES, Ints, Tables
from pipeline.errors import RunError

FOUR_FROM = 2**15
"""Bytes from which four coders take turns."""
Symbols = npt.NDArray[np.int32]


class EntropyModel(Protocol):
    """How likely the symbols of a sample are, in integers alone.

    Attributes:
        codec: number of the kind of model in a bitstream.
        shape: of the symbols of one sample, of D numbers.
        digest: SHA-256 of all that decides about bytes.
    """

    codec: ClassVar[int]

    @property
    def shape(self) -> tuple[int, ...]: ...
    @property
    def digest(self) -> str: ...
    def to_arrays(self) -> dict[str, npt.NDArray[Any]]:
        """All of it as arrays by name, for a file."""

    def encode(self, symbols: Symbols) -> bytes:
        """A stream of symbols (n, D), whose first byte is not 0."""

    def decode(self, data: bytes, count: int) -> Symbols:
        """Symbols (count, D) of a stream.

        Raises:
            CorruptError: it is damaged, or of another model.
        """

    def bits(self, symbols: Ints) -> float:
        """What symbols (n, D) take, were there no rounding."""

    def typical(self) -> Symbols:
        """The likeliest symbol of each place (D,)."""

    def escapes(self, symbols: Ints) -> int:
        """How many symbols (n, D) the model does not know: more than 1 in 1,000, and it is old."""


@dataclass(frozen=True, eq=False)
class StaticModel:
    """Symbols that do not depend on one another, each with a table of its own or of its channel.

    Attributes:
        tables: T of them.
        pattern: uint16 (D,), the table of each symbol of a sample.
        shape: of a sample.
    """

    tables: Tables
    pattern: npt.NDArray[np.uint16]
    shape: tuple[int, ...]

    codec: ClassVar[int] = 1

    def __post_init__(self) -> None:
        if math.prod(self.shape) != len(self.pattern) or not len(self.pattern):
            raise _bad(f"a sample of {self.shape} has not {len(self.pattern)} symbols")
        if self.pattern.max() >= len(self.tables):
            raise _bad("a symbol has a table that is not there")

    @classmethod
    def counted(cls, symbols: Ints, *, positions: bool = False) -> StaticModel:
        """Tables of symbols (N, C, ...), by count: one a channel, or one a position.

        Raises:
            RunError: there are more than 65,536 of these.
        """
        shape = tuple(symbols.shape[1:])
        pattern = cls.pattern_of(shape, positions=positions)
        return cls(Tables.counted(symbols.reshape(len(symbols), -1), pattern), pattern, shape)

    @staticmethod
    def pattern_of(shape: tuple[int, ...], *, positions: bool = False) -> npt.NDArray[np.uint16]:
        """The table of each symbol, where each channel (or position) has one.

        Raises:
            RunError: there are more than 65,536 of these.
        """
        size, channels = math.prod(shape), shape[0] if shape else 1
        count = size if positions else channels
        if count > MOST_TABLES:
            raise _bad(f"there are {count:,} tables, 65,536 at most")
        return (np.arange(size) // (size // count)).astype(np.uint16)

    @cached_property
    def digest(self) -> str:
        about = f"static {self.shape} {self.tables.digest}".encode()
        return hashlib.sha256(about + self.pattern.astype("<u2").tobytes()).hexdigest()

    def encode(self, symbols: Symbols) -> bytes:
        flat, which = symbols.reshape(-1), np.tile(self.pattern, len(symbols))
        lanes, data = 1, rans.encode(flat, which, self.tables)
        if len(data) >= FOUR_FROM:
            lanes, data = 4, rans.encode(flat, which, self.tables, lanes=4)
        return bytes([lanes]) + data

    def decode(self, data: bytes, count: int) -> Symbols:
        which = np.tile(self.pattern, count)
        return rans.decode(data[1:], which, self.tables, lanes=data[0]).reshape(count, -1)

    def bits(self, symbols: Ints) -> float:
        return self.tables.bits(symbols, self.pattern)

    def typical(self) -> Symbols:
        return self.tables.modes()[self.pattern]

    def escapes(self, symbols: Ints) -> int:
        return self.tables.escapes(symbols, self.pattern)

    def to_arrays(self) -> dict[str, npt.NDArray[Any]]:
        """Arrays by name, for a file."""
        shape = np.array(self.shape, np.int64)
        return {**self.tables.to_arrays(), "pattern": self.pattern, "shape": shape}

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, npt.NDArray[Any]]) -> StaticModel:
        """What :meth:`to_arrays` gave.

        Raises:
            RunError: they are no such model.
        """
        try:
            shape, pattern = tuple(arrays["shape"].tolist()), arrays["pattern"]
        except KeyError as error:
            raise _bad(f"there is no array {error}") from error
        return cls(Tables.from_arrays(arrays), pattern.astype(np.uint16), shape)


def _bad(why: str) -> RunError:
    return RunError(
        f"These are no tables of samples: {why}.",
        hint="Count them with StaticModel.counted, or fetch the file again.",
        code="bad-tables",
    )
