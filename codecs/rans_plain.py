"""The entropy coder in plain Python, as what a stream is; :mod:`pipeline.codecs.rans` is fast.

Asymmetric numeral systems (Duda, "Asymmetric numeral systems: entropy coding combining speed of
Huffman coding with compression rate of arithmetic coding", 2013) with a state of 2^31 to 2^63 - 1,
words of 32 bits and frequencies that sum to 2^16. ``docs/bitstream.md`` has the same in words.
"""

from __future__ import annotations

from pipeline.codecs.rans import CorruptError, Ints, check, checked
from pipeline.codecs.tables import MOST_DIGITS, NIBBLE, PRECISION, TOTAL, Tables, escape_digits

LEAST = 2**31
"""Of a state between two symbols."""


def encode(symbols: Ints, which: Ints, tables: Tables, *, lanes: int = 1) -> bytes:
    """What :func:`pipeline.codecs.rans.encode` does."""
    values, tokens = checked(symbols, which, tables)
    states = [LEAST] * lanes
    states[0] |= check(values)
    words: list[int] = []

    def push(lane: int, low: int, frequency: int) -> None:
        x = states[lane]
        if x >= frequency << 63 - PRECISION:
            words.append(x & 0xFFFFFFFF)
            x >>= 32
        states[lane] = (x // frequency << PRECISION) + low + x % frequency

    for t in reversed(range(len(values))):
        table, lane = int(tokens[t]), t % lanes
        place = int(values[t]) - int(tables.offsets[table])
        length = int(tables.lengths[table])
        if not 0 <= place < length:
            for digit in reversed(escape_digits(place, length)):
                push(lane, digit * (TOTAL // 2**NIBBLE), TOTAL // 2**NIBBLE)
            place = length
        entry = int(tables.first[table]) + place
        push(lane, int(tables.low[entry]), int(tables.frequencies[entry]))
    if lanes > 1:
        head = b"".join(x.to_bytes(8, "little") for x in states)
    else:
        x = states[0]
        if x >= 2**56:
            words.append(x & 0xFFFFFFFF)
            x >>= 32
        head = x.to_bytes(max(4, -(-x.bit_length() // 8)), "little")
    return head + b"".join(word.to_bytes(4, "little") for word in reversed(words))


def decode(data: bytes, which: Ints, tables: Tables, *, lanes: int = 1) -> list[int]:  # noqa: C901
    """What :func:`pipeline.codecs.rans.decode` does.

    Raises:
        CorruptError: the stream is damaged, or of other tables.
    """
    head = 8 * lanes if lanes > 1 else 4 + len(data) % 4
    if lanes not in {1, 4} or len(data) < head or (len(data) - head) % 4:
        raise CorruptError
    words = [int.from_bytes(data[i : i + 4], "little") for i in range(head, len(data), 4)]
    words.reverse()
    size = head // lanes
    states = [
        int.from_bytes(data[lane * size : (lane + 1) * size], "little") for lane in range(lanes)
    ]
    if lanes == 1 and states[0] < LEAST:
        if not words:
            raise CorruptError
        states[0] = states[0] << 32 | words.pop()
    if any(not LEAST <= x < 2**63 for x in states):
        raise CorruptError

    def pull(lane: int, low: int, frequency: int) -> None:
        x = states[lane]
        x = frequency * (x >> PRECISION) + x % TOTAL - low
        if x < LEAST:
            if not words:
                raise CorruptError
            x = x << 32 | words.pop()
        states[lane] = x

    def digit(lane: int) -> int:
        found: int = states[lane] % TOTAL // (TOTAL // 2**NIBBLE)
        pull(lane, found * (TOTAL // 2**NIBBLE), TOTAL // 2**NIBBLE)
        return found

    values = []
    for t, table in enumerate(which.tolist()):
        lane = t % lanes
        slot = states[lane] % TOTAL
        place, entry = 0, int(tables.first[table])
        while int(tables.low[entry]) + int(tables.frequencies[entry]) <= slot:
            place, entry = place + 1, entry + 1
        pull(lane, int(tables.low[entry]), int(tables.frequencies[entry]))
        length = int(tables.lengths[table])
        if place == length:
            count = digit(lane)
            if count > MOST_DIGITS:
                raise CorruptError
            raw = sum(digit(lane) << (NIBBLE * n) for n in range(count))
            place = -(raw >> 1) - 1 if raw % 2 else (raw >> 1) + length
        values.append(place + int(tables.offsets[table]))
    if any(not -(2**31) <= value < 2**31 for value in values):
        raise CorruptError
    if words or states[1:] != [LEAST] * (lanes - 1) or states[0] != LEAST | check(values):
        raise CorruptError
    return values
