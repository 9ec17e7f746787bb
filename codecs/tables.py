"""Frequency tables of integers, from which an entropy coder codes."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt

from pipeline.errors import RunError

PRECISION = 16
TOTAL = 2**PRECISION
"""What the frequencies of a table sum to."""
NIBBLE = 4
"""Bits of the digits in which a symbol is written that has no entry."""
MOST_DIGITS = 9
"""Of the largest number that a symbol of 32 bits can leave to an escape."""
MOST_TABLES = 2**16
TAIL = 1e-4
"""Share of symbols that a counted table may leave to the escape."""
MOST_ENTRIES = 4096
SMOOTHING = 0.3
"""Added to each count, so that what was not seen has a place."""
_GUIDES = 2**20
"""Entries of all guides together, at most (or 16 a table, where that is more)."""

Ints = npt.NDArray[np.integer[Any]]


@dataclass(frozen=True, eq=False)
class Tables:
    """T tables of integer frequencies, each with an escape for symbols that it does not hold.

    Table t has an entry for every symbol from ``offsets[t]`` to ``offsets[t] + lengths[t] - 1``,
    and the escape behind these. Its frequencies are at least 1 and sum to 65,536; no float is left,
    so a table codes the same on every machine.

    Attributes:
        lengths: int32 (T,), symbols of each table, 1 to 65,535.
        offsets: int32 (T,), the least symbol of each.
        frequencies: uint32 (sum of lengths + T,), table after table, the escape last.
    """

    lengths: npt.NDArray[np.int32]
    offsets: npt.NDArray[np.int32]
    frequencies: npt.NDArray[np.uint32]

    def __post_init__(self) -> None:
        lengths, offsets = self.lengths.astype(np.int64), self.offsets.astype(np.int64)
        if not 1 <= len(lengths) <= MOST_TABLES or offsets.shape != lengths.shape:
            raise _bad(f"there are {len(lengths)} tables and {len(offsets)} offsets")
        if lengths.min() < 1 or lengths.max() >= TOTAL:
            raise _bad("a table has no symbols, or more than 65,535")
        if (offsets + lengths).max() > 2**31:
            raise _bad("a symbol is larger than 32 bits hold")
        if len(self.frequencies) != self.first[-1]:
            raise _bad(f"{self.first[-1]} frequencies are expected, there are not")
        sums = np.add.reduceat(self.frequencies.astype(np.int64), self.first[:-1])
        if self.frequencies.min() < 1 or (sums != TOTAL).any():
            raise _bad(f"the frequencies of a table are not positive with the sum {TOTAL:,}")

    def __len__(self) -> int:
        return len(self.lengths)

    @classmethod
    def of(cls, probabilities: Sequence[npt.NDArray[np.float64]], offsets: Sequence[int]) -> Tables:
        """Tables from probabilities, the escape's last in each; they need not sum to 1.

        A frequency is 1 and its share of what is left, rounded down; the units that remain go to
        the largest remainders, the first of equal ones.
        """
        parts = [frequencies(np.asarray(p, np.float64)) for p in probabilities]
        lengths = np.array([len(part) - 1 for part in parts], np.int32)
        return cls(lengths, np.array(offsets, np.int32), np.concatenate(parts))

    @classmethod
    def counted(cls, symbols: Ints, pattern: Ints) -> Tables:
        """Tables of what symbols are, by count.

        A table goes from the first to the last symbol that it needs to leave no more than one in
        ten thousand to the escape, and has 4,096 entries at most.

        Args:
            symbols: (N, D).
            pattern: (D,), the table of each column; every number up to the largest is in it.
        """
        order = np.argsort(pattern, kind="stable")
        edges = np.searchsorted(pattern[order], np.arange(int(pattern.max()) + 2))
        found, offsets = [], []
        for lo, hi in pairwise(edges):
            values, counts = np.unique(symbols[:, order[lo:hi]], return_counts=True)
            first, last = _needed(values.astype(np.int64), counts)
            inside = (values >= first) & (values <= last)
            table = np.full(last - first + 2, SMOOTHING)
            table[values[inside].astype(np.int64) - first] += counts[inside]
            table[-1] += counts[~inside].sum()
            found.append(table)
            offsets.append(first)
        return cls.of(found, offsets)

    def bits(self, symbols: Ints, pattern: Ints) -> float:
        """What symbols (N, D) take under tables ``pattern`` (D,), were there no rounding."""
        entry, raw = self._entries(symbols, pattern)
        used = np.bincount(entry.ravel(), minlength=len(self.frequencies))
        cost = float(used @ (PRECISION - np.log2(self.frequencies)))
        outside = raw[raw >= 0]
        digits = sum(int((outside >> (NIBBLE * n) > 0).sum()) for n in range(9))
        return cost + NIBBLE * (len(outside) + digits)

    def modes(self) -> npt.NDArray[np.int32]:
        """The likeliest symbol of each table (T,), the first of equal ones."""
        ends = zip(self.first[:-1], self.lengths, strict=True)
        places = [int(self.frequencies[lo : lo + length].argmax()) for lo, length in ends]
        return self.offsets + np.array(places, np.int32)

    def escapes(self, symbols: Ints, pattern: Ints) -> int:
        """How many symbols (N, D) have no entry."""
        return int((self._entries(symbols, pattern)[1] >= 0).sum())

    def _entries(
        self, symbols: Ints, pattern: Ints
    ) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        """The entry of each symbol, and the number that follows an escape, -1 if there is none."""
        place = symbols.astype(np.int64) - self.offsets[pattern]
        length = self.lengths[pattern].astype(np.int64)
        inside = (place >= 0) & (place < length)
        entry = self.first[:-1][pattern] + np.where(inside, place, length)
        raw = np.where(place < 0, -2 * place - 1, 2 * (place - length))
        return entry, np.where(inside, -1, raw)

    @cached_property
    def first(self) -> npt.NDArray[np.int64]:
        """(T + 1,): where each table's entries begin."""
        return np.concatenate([[0], np.cumsum(self.lengths.astype(np.int64) + 1)])

    @cached_property
    def low(self) -> npt.NDArray[np.uint32]:
        """(entries,): sum of the frequencies before an entry, within its table."""
        before = np.cumsum(self.frequencies.astype(np.int64)) - self.frequencies
        own = np.repeat(np.arange(len(self)), self.lengths + 1)
        return np.asarray(before - own * TOTAL, np.uint32)

    @cached_property
    def guide(self) -> npt.NDArray[np.int32]:
        """(T, 2^G): the entry in which a slot begins that is cut from the 65,536 of a table."""
        bits = min(10, max(4, (_GUIDES // len(self)).bit_length() - 1))
        starts = np.arange(2**bits, dtype=np.int64) << (PRECISION - bits)
        whole = self.low + np.repeat(np.arange(len(self)), self.lengths + 1) * TOTAL
        asked = starts + np.arange(len(self))[:, None] * TOTAL
        return np.asarray(np.searchsorted(whole, asked, "right") - 1, np.int32)

    @cached_property
    def digest(self) -> str:
        """SHA-256 of all that the tables are."""
        parts = [self.lengths.astype("<i4"), self.offsets.astype("<i4")]
        parts.append(self.frequencies.astype("<u4"))
        return hashlib.sha256(b"tables" + b"".join(p.tobytes() for p in parts)).hexdigest()

    def to_arrays(self) -> dict[str, npt.NDArray[Any]]:
        """Arrays by name, for a file; frequencies less 1, which 16 bits hold."""
        less = (self.frequencies - 1).astype(np.uint16)
        return {"lengths": self.lengths, "offsets": self.offsets, "frequencies": less}

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, npt.NDArray[Any]]) -> Tables:
        """What :meth:`to_arrays` gave.

        Raises:
            RunError: they are no tables.
        """
        try:
            lengths, offsets = (arrays[n].astype(np.int32) for n in ("lengths", "offsets"))
            return cls(lengths, offsets, arrays["frequencies"].astype(np.uint32) + 1)
        except KeyError as error:
            raise _bad(f"there is no array {error}") from error


def escape_digits(place: int, length: int) -> list[int]:
    """What follows the escape of a table for a symbol that lies ``place`` behind its first one.

    Their number, and digits of four bits, low ones first, of a number that is even for a symbol
    above the table and odd for one below.
    """
    raw = -2 * place - 1 if place < 0 else 2 * (place - length)
    digits = []
    while raw:
        digits.append(raw % 2**NIBBLE)
        raw >>= NIBBLE
    return [len(digits), *digits]


def frequencies(p: npt.NDArray[np.float64]) -> npt.NDArray[np.uint32]:
    """Integers of at least 1 that sum to 65,536, near to the shares ``p``."""
    if p.ndim != 1 or not 2 <= len(p) <= TOTAL:
        raise _bad("a table has no symbols, or more than 65,535")
    if not np.isfinite(p).all() or p.min() < 0 or p.max() <= 0:
        raise _bad("probabilities are not finite, negative, or all 0")
    share = p / p.max()
    share = share / share.sum() * (TOTAL - len(p))
    whole = np.floor(share)
    rest = TOTAL - len(p) - int(whole.sum())
    order = np.argsort(-(share - whole), kind="stable")
    whole[order[:rest]] += 1
    return np.asarray(whole + 1, np.uint32)


def _needed(values: npt.NDArray[np.int64], counts: npt.NDArray[np.int64]) -> tuple[int, int]:
    """The first and last symbol of a table of what was counted."""
    below = np.cumsum(counts)
    room = TAIL / 2 * below[-1]
    first = values[np.searchsorted(below, room, "right")]
    last = values[np.searchsorted(below, below[-1] - room)]
    if last - first >= MOST_ENTRIES:
        # The stretch of as many symbols as there may be that holds most of what was counted.
        ends = np.searchsorted(values, values + MOST_ENTRIES)
        held = below[ends - 1] - below + counts
        first = values[int(held.argmax())]
        last = first + MOST_ENTRIES - 1
    return int(first), int(last)


def _bad(why: str) -> RunError:
    return RunError(
        f"These are no frequency tables: {why}.",
        hint="Make them with Tables.of or Tables.counted, or fetch the file again.",
        code="bad-tables",
    )
