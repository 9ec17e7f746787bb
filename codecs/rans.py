"""Entropy coding with asymmetric numeral systems, fast; :mod:`pipeline.codecs.rans_plain` says how.

A symbol is coded without a division, by a reciprocal of its frequency that is made once, and
without a branch where a word is due or not. Four states take turns in long streams, so that one
need not wait for the other. All tables have a guide: the entry in which a 1,024th part of the slots
begins, from which few steps are left.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import google_crc32c
import numpy as np
import numpy.typing as npt
from llvmlite import ir
from numba import njit, types
from numba.extending import intrinsic

from pipeline.clustering.compiled import compiled
from pipeline.codecs.tables import MOST_DIGITS, PRECISION, Tables

Ints = npt.NDArray[np.integer[Any]]

_U = np.uint64
_LEAST = np.uint64(2**31)
_SLOT = np.uint64(0xFFFF)


class CorruptError(Exception):
    """A stream is damaged, or was made with other tables."""


def encode(symbols: Ints, which: Ints, tables: Tables, *, lanes: int = 1) -> bytes:
    """Code symbols, the last one first.

    Args:
        symbols: integers of 32 bits (n,).
        which: (n,), the table of each.
        tables: that are coded from.
        lanes: 1, or 4 for speed, which takes some 20 bytes more.

    Returns:
        the stream; neither n nor the tables are in it.
    """
    values, tokens = checked(symbols, which, tables)
    states = np.full(4, _LEAST)
    states[0] |= _U(check(values))
    # A word a symbol, two for an escape's ten digits, and four for branches not taken.
    words = np.empty(_room(values, tokens, tables) + 4, np.uint32)
    at = _encode(values, tokens, _kernel(tables), _dividers(tables), states, words, lanes == 4)
    if lanes == 1:
        return to_bytes(int(states[0]), words[at:])
    return bytes(states.astype("<u8").tobytes() + words[at:].astype("<u4").tobytes())


def decode(data: bytes, which: Ints, tables: Tables, *, lanes: int = 1) -> npt.NDArray[np.int32]:
    """Symbols (n,) of a stream.

    Args:
        data: what :func:`encode` gave.
        which: (n,), the table of each symbol.
        tables: that it was coded from.
        lanes: as it was coded.

    Raises:
        CorruptError: the stream is damaged, or of other tables.
    """
    states = np.full(4, _LEAST)
    if lanes == 1:
        states[0], read = from_bytes(data)
    elif lanes == 4 and len(data) >= 32 and len(data) % 4 == 0:
        states[:] = np.frombuffer(data, "<u8", 4)
        read = np.frombuffer(data, "<u4", offset=32)
    else:
        raise CorruptError
    if (states < _LEAST).any() or (states >= _U(2**63)).any():
        raise CorruptError
    # One more, for the branch not taken.
    words = np.append(read.astype(np.uint32), np.uint32(0))
    out = np.empty(len(which), np.int32)
    tokens = np.ascontiguousarray(which, np.uint16)
    shift = np.uint32(PRECISION - (tables.guide.shape[1].bit_length() - 1))
    own = _kernel(tables), _slots(tables), tables.guide, shift
    at = _decode(words, tokens, *own, states, out, lanes == 4)
    whole = int(at) == len(words) - 1 and (states[1:] == _LEAST).all()
    if not whole or int(states[0]) != 2**31 | check(out):
        raise CorruptError
    return out


def check(symbols: npt.ArrayLike) -> int:
    """31 bits of the CRC-32C of symbols as integers of 32 bits: a stream carries them for free."""
    data = np.ascontiguousarray(symbols, "<i4").tobytes()
    return int(google_crc32c.value(data)) >> 1


def checked(
    symbols: Ints, which: Ints, tables: Tables
) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.uint16]]:
    """Symbols and tables in the types of the coder.

    Raises:
        ValueError: they do not fit each other.
    """
    if symbols.ndim != 1 or symbols.shape != which.shape:
        raise ValueError(f"symbols {symbols.shape} and tables {which.shape} are not of one length")
    if len(symbols) and not 0 <= int(which.min()) <= int(which.max()) < len(tables):
        raise ValueError(f"there are {len(tables)} tables, and others are asked for")
    values = np.ascontiguousarray(symbols, np.int32)
    if values.dtype != symbols.dtype and (values != symbols).any():
        raise ValueError("symbols are integers of 32 bits")
    return values, np.ascontiguousarray(which, np.uint16)


def to_bytes(state: int, words: npt.NDArray[np.uint32]) -> bytes:
    """One coder's last state, in as few bytes as hold it, and its words in the order of reading.

    A state of 8 bytes is cut by a word, so that 4 to 7 are left: how many the length tells.
    """
    rest = words.astype("<u4").tobytes()
    if state >= 2**56:
        rest = (state & 0xFFFFFFFF).to_bytes(4, "little") + rest
        state >>= 32
    return bytes(state.to_bytes(max(4, -(-state.bit_length() // 8)), "little") + rest)


def from_bytes(data: bytes) -> tuple[int, npt.NDArray[np.uint32]]:
    """What :func:`to_bytes` was given.

    Raises:
        CorruptError: there is no state.
    """
    head = 4 + len(data) % 4
    if len(data) < head:
        raise CorruptError
    state, words = int.from_bytes(data[:head], "little"), np.frombuffer(data, "<u4", offset=head)
    if state < 2**31 and len(words):
        state, words = state << 32 | int(words[0]), words[1:]
    if not 2**31 <= state < 2**63:
        raise CorruptError
    return state, words


def _room(values: Ints, which: Ints, tables: Tables) -> int:
    """Words that a stream has at most."""
    least = tables.offsets.astype(np.int64).max()
    most = (tables.offsets.astype(np.int64) + tables.lengths).min()
    if len(values) and (values.min() < least or values.max() >= most):
        return len(values) + 3 * tables.escapes(values[:, None].T, which)
    return len(values)


@lru_cache(maxsize=16)
def _kernel(tables: Tables) -> npt.NDArray[np.int64]:
    """Of each table: offset, number of symbols, and where its entries begin."""
    return np.stack([tables.offsets, tables.lengths, tables.first[:-1]], 1).astype(np.int64)


@lru_cache(maxsize=16)
def _dividers(tables: Tables) -> npt.NDArray[np.uint64]:
    """Of each entry: a factor that divides by its frequency; and frequency, shift and addend.

    For a frequency f of more than 1 and s = ceil(log2 f), the quotient of x < 2^63 is
    x * ceil(2^(63 + s) / f) >> 63 + s (Granlund and Montgomery, "Division by invariant integers
    using multiplication", 1994). For f = 1 the factor 2^64 - 1 gives x - 1, which the addend makes
    good.
    """
    f = tables.frequencies
    known = {int(v): (max(int(v) - 1, 1)).bit_length() for v in np.unique(f)}
    factors = {v: 2**64 - 1 if v == 1 else -(-(1 << s + 63) // v) for v, s in known.items()}
    one = f == 1
    factor = np.array([factors[int(v)] for v in f], np.uint64)
    shift = np.array([0 if v == 1 else known[int(v)] - 1 for v in f], np.uint64)
    addend = tables.low.astype(np.uint64) + np.where(one, _SLOT, _U(0))
    return np.stack([factor, f.astype(np.uint64) << _U(40) | shift << _U(32) | addend], 1)


@lru_cache(maxsize=16)
def _slots(tables: Tables) -> npt.NDArray[np.uint32]:
    """Of each entry: its slots, from and to; whether it is an escape; its symbol."""
    low, own = tables.low, np.repeat(np.arange(len(tables)), tables.lengths + 1)
    place = np.arange(len(low)) - tables.first[:-1][own]
    symbol = (place + tables.offsets[own]).astype(np.int32).view(np.uint32)
    escape = place == tables.lengths[own]
    return np.stack([low, low + tables.frequencies, escape, symbol], 1).astype(np.uint32)


@intrinsic  # type: ignore[untyped-decorator]
def _upper(_: Any, a: Any, b: Any) -> Any:  # noqa: ARG001
    """Upper 64 bits of a product of two unsigned integers of 64."""

    def build(_: Any, builder: Any, __: Any, args: Any) -> Any:
        wide = ir.IntType(128)
        product = builder.mul(*(builder.zext(arg, wide) for arg in args))
        return builder.trunc(builder.lshr(product, ir.Constant(wide, 64)), ir.IntType(64))

    return types.uint64(types.uint64, types.uint64), build


_inline: Any = njit(nogil=True, cache=True, error_model="numpy", inline="always")


@_inline
def _push(x, words, at, factor, packed):  # type: ignore[no-untyped-def]
    frequency = packed >> _U(40)
    words[at - _U(1)] = np.uint32(x)
    due = _U(x >= frequency << _U(47))
    at -= due
    x >>= due << _U(5)
    quotient = _upper(x, factor) >> ((packed >> _U(32)) & _U(31))
    return x + (packed & _U(0x1FFFF)) + quotient * (_U(65536) - frequency), at


@compiled
def _push_digit(x, words, at, digit):  # type: ignore[no-untyped-def]
    if x >= _U(2**59):
        at -= _U(1)
        words[at] = np.uint32(x)
        x >>= _U(32)
    return ((x >> _U(12)) << _U(16)) + (_U(digit) << _U(12)) + (x & _U(4095)), at


@compiled
def _put(states, lane, words, at, value, table, entries):  # type: ignore[no-untyped-def]
    """Code one symbol, and before it, as all is coded from its end, what follows an escape."""
    x, place, length = states[lane], value - table[0], table[1]
    if place < 0 or place >= length:
        raw = -2 * place - 1 if place < 0 else 2 * (place - length)
        count = 0
        while raw >> (4 * count):
            count += 1
        for n in range(count - 1, -1, -1):
            x, at = _push_digit(x, words, at, (raw >> (4 * n)) & 15)
        x, at = _push_digit(x, words, at, count)
        place = length
    entry = table[2] + place
    states[lane], at = _push(x, words, at, entries[entry, 0], entries[entry, 1])
    return at


@compiled
def _encode(values, which, tables, entries, states, words, four):  # type: ignore[no-untyped-def]
    # Unsigned indices: of signed ones each would be asked whether it counts from the end.
    at, turns, x = _U(len(words)), len(values) // 4 * 4 if four else 0, states[0]
    if four:
        for n in range(len(values) - 1, turns - 1, -1):
            at = _put(states, n % 4, words, at, np.int64(values[n]), tables[which[n]], entries)
    else:
        for n in range(len(values) - 1, -1, -1):
            t = _U(n)
            w = _U(which[t])
            place = _U(values[t] - tables[w, 0])
            if place < _U(tables[w, 1]):
                e = _U(tables[w, 2]) + place
                x, at = _push(x, words, at, entries[e, 0], entries[e, 1])
            else:
                states[0] = x
                at = _put(states, 0, words, at, np.int64(values[t]), tables[w], entries)
                x = states[0]
        states[0] = x
    a, b, c, d = states
    for n in range(turns - 4, -1, -4):
        t = _U(n)
        wa, wb = _U(which[t]), _U(which[t + _U(1)])
        wc, wd = _U(which[t + _U(2)]), _U(which[t + _U(3)])
        pa, pb = _U(values[t] - tables[wa, 0]), _U(values[t + _U(1)] - tables[wb, 0])
        pc, pd = _U(values[t + _U(2)] - tables[wc, 0]), _U(values[t + _U(3)] - tables[wd, 0])
        inside = (pa < _U(tables[wa, 1])) & (pb < _U(tables[wb, 1]))
        if inside & (pc < _U(tables[wc, 1])) & (pd < _U(tables[wd, 1])):
            e = _U(tables[wd, 2]) + pd
            d, at = _push(d, words, at, entries[e, 0], entries[e, 1])
            e = _U(tables[wc, 2]) + pc
            c, at = _push(c, words, at, entries[e, 0], entries[e, 1])
            e = _U(tables[wb, 2]) + pb
            b, at = _push(b, words, at, entries[e, 0], entries[e, 1])
            e = _U(tables[wa, 2]) + pa
            a, at = _push(a, words, at, entries[e, 0], entries[e, 1])
        else:
            states[0], states[1], states[2], states[3] = a, b, c, d
            for lane in range(3, -1, -1):
                value, table = np.int64(values[n + lane]), tables[which[n + lane]]
                at = _put(states, lane, words, at, value, table, entries)
            a, b, c, d = states
    states[0], states[1], states[2], states[3] = a, b, c, d
    return at


@_inline
def _pull(x, words, at, last, low, frequency):  # type: ignore[no-untyped-def]
    x = _U(frequency) * (x >> _U(16)) + (x & _SLOT) - _U(low)
    due = x < _LEAST
    word = _U(words[min(at, last)])
    return (x << _U(32) | word if due else x), at + _U(due)


@_inline
def _find(x, table, shift, guide, entries):  # type: ignore[no-untyped-def]
    slot = np.uint32(x & _SLOT)
    entry = _U(guide[table, _U(slot >> shift)])
    while entries[entry, 1] <= slot:
        entry += _U(1)
    return entry


@compiled
def _get(states, lane, words, at, last, entry, table, entries):  # type: ignore[no-untyped-def]
    """The symbol of an entry, or what follows an escape; all words count as read if it is none."""
    low = entries[entry, 0]
    x, at = _pull(states[lane], words, at, last, low, entries[entry, 1] - low)
    place = np.int64(entry) - table[2]
    if place == table[1]:
        count = np.int64(x & _SLOT) >> 12
        x, at = _pull(x, words, at, last, count << 12, 4096)
        raw = np.int64(0)
        for n in range(min(count, np.int64(MOST_DIGITS))):
            digit = np.int64(x & _SLOT) >> 12
            x, at = _pull(x, words, at, last, digit << 12, 4096)
            raw |= digit << (4 * n)
        place = -(raw >> 1) - 1 if raw & 1 else (raw >> 1) + place
        if count > MOST_DIGITS or not -(2**31) <= place + table[0] < 2**31:
            at = last + _U(1)
    states[lane] = x
    return place + table[0], at


@compiled
def _decode(words, which, tables, entries, guide, shift, states, out, four):  # type: ignore[no-untyped-def]
    at, last, turns = _U(0), _U(len(words) - 1), len(out) // 4 * 4 if four else 0
    a, b, c, d = states
    for n in range(0, turns, 4):
        t = _U(n)
        wa, wb = _U(which[t]), _U(which[t + _U(1)])
        wc, wd = _U(which[t + _U(2)]), _U(which[t + _U(3)])
        ea, eb = _find(a, wa, shift, guide, entries), _find(b, wb, shift, guide, entries)
        ec, ed = _find(c, wc, shift, guide, entries), _find(d, wd, shift, guide, entries)
        if (entries[ea, 2] | entries[eb, 2] | entries[ec, 2] | entries[ed, 2]) == 0:
            low = entries[ea, 0]
            a, at = _pull(a, words, at, last, low, entries[ea, 1] - low)
            low = entries[eb, 0]
            b, at = _pull(b, words, at, last, low, entries[eb, 1] - low)
            low = entries[ec, 0]
            c, at = _pull(c, words, at, last, low, entries[ec, 1] - low)
            low = entries[ed, 0]
            d, at = _pull(d, words, at, last, low, entries[ed, 1] - low)
            out[t] = np.int32(entries[ea, 3])
            out[t + _U(1)] = np.int32(entries[eb, 3])
            out[t + _U(2)] = np.int32(entries[ec, 3])
            out[t + _U(3)] = np.int32(entries[ed, 3])
        else:
            states[0], states[1], states[2], states[3] = a, b, c, d
            for lane in range(4):
                w = which[n + lane]
                e = _find(states[lane], _U(w), shift, guide, entries)
                out[n + lane], at = _get(states, lane, words, at, last, e, tables[w], entries)
            a, b, c, d = states
    states[0], states[1], states[2], states[3] = a, b, c, d
    if four:
        for n in range(turns, len(out)):
            w = which[n]
            e = _find(states[n % 4], _U(w), shift, guide, entries)
            out[n], at = _get(states, n % 4, words, at, last, e, tables[w], entries)
        return at
    for n in range(len(out)):
        t = _U(n)
        w = _U(which[t])
        e = _find(a, w, shift, guide, entries)
        if entries[e, 2]:
            states[0] = a
            out[t], at = _get(states, 0, words, at, last, e, tables[w], entries)
            a = states[0]
        else:
            low = entries[e, 0]
            a, at = _pull(a, words, at, last, low, entries[e, 1] - low)
            out[t] = np.int32(entries[e, 3])
    states[0] = a
    return at
