"""Loops of hidden trees, compiled: expectation, and coding in integers alone. None holds the GIL.

Nodes are numbered so that each comes after its parent and with all that is below it (depth first).
"""

# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import numpy as np

from pipeline.clustering.compiled import compiled
from pipeline.codecs.tables import MOST_DIGITS

BITS = 30
"""Of the largest number of a message."""
PRECISION = 24
"""Of what a symbol is coded from."""

_SMALL = 1e-15
_U = np.uint64
_LEAST = np.uint64(2**31)
_WORD = np.uint64(0xFFFFFFFF)
_SLOT = np.uint64(2**PRECISION - 1)


@compiled
def _raise(values):
    """Divide numbers by the largest, and return its logarithm."""
    most = values.max()
    for z in range(len(values)):
        values[z] /= most
    return np.log(most)


@compiled
def expect(  # noqa: C901, PLR0912
    samples, parent, root, transition, emission, to_transition, to_emission
):
    """Add what is expected of hidden states to counts, and return the samples' log-likelihood.

    Args:
        samples: (n, D), symbols in the order of nodes.
        parent: (D,), of each node; the root's counts for nothing.
        root: (K,), probabilities of the root's states.
        transition: (D, K, K), of a node's state (last) where the parent's is given.
        emission: (D, V, K), of a symbol where the state is given.
        to_transition: counts; node 0, row 0 has the root's.
        to_emission: counts.
    """
    nodes, states = len(parent), len(root)
    inside, message = np.empty((nodes, states), root.dtype), np.empty((nodes, states), root.dtype)
    state, row = np.empty((nodes, states), root.dtype), np.empty(states, root.dtype)
    total = 0.0
    for n in range(len(samples)):
        sample = samples[n]
        for i in range(nodes):
            for z in range(states):
                inside[i, z] = emission[i, sample[i], z]
        for i in range(nodes - 1, 0, -1):
            # The largest is made 1, and again where a node has so many children that all get small.
            total += _raise(inside[i])
            up = parent[i]
            for y in range(states):
                value = root.dtype.type(0)
                for z in range(states):
                    value += transition[i, y, z] * inside[i, z]
                message[i, y] = value
                inside[up, y] *= value
            if inside[up].max() < _SMALL:
                total += _raise(inside[up])
        size = root.dtype.type(0)
        for z in range(states):
            state[0, z] = root[z] * inside[0, z]
            size += state[0, z]
        total += np.log(size)
        for z in range(states):
            state[0, z] /= size
            to_transition[0, 0, z] += state[0, z]
            to_emission[0, sample[0], z] += state[0, z]
        for i in range(1, nodes):
            up = parent[i]
            row[:] = 0
            for y in range(states):
                share = state[up, y] / message[i, y]
                for z in range(states):
                    value = share * transition[i, y, z] * inside[i, z]
                    to_transition[i, y, z] += value
                    row[z] += value
            for z in range(states):
                state[i, z] = row[z]
                to_emission[i, sample[i], z] += row[z]
    return total


@compiled
def _settle(wide, message):
    """Cut numbers to 30 bits of the largest, none to 0."""
    most = _U(0)
    for z in range(len(wide)):
        most = max(most, wide[z])
    shift = _U(0)
    while most >> shift >= _U(2**BITS):
        shift += _U(1)
    for z in range(len(wide)):
        message[z] = max(np.uint32(wide[z] >> shift), np.uint32(1))


@compiled
def _seen(i, v, alpha, emission, parent, last, transition, down, inside, wide, message):
    """Take in the symbol of node i: what its state is, and what follows for those above it."""
    states = len(wide)
    for z in range(states):
        wide[z] = _U(alpha[z]) * _U(emission[i, v, z])
        inside[i, z] = emission[i, v, z]
    _settle(wide, down[i])
    done = i
    while i > 0 and last[i] == done:
        up = parent[i]
        _up(i, up, transition, inside, wide, message)
        if last[up] > done:  # what its other children are given
            for z in range(states):
                wide[z] = _U(down[up, z]) * _U(message[z])
            _settle(wide, down[up])
        i = up


@compiled
def _up(i, up, transition, inside, wide, message):
    """Multiply what node i says into what is known from below of its parent."""
    states = len(wide)
    for y in range(states):
        value = _U(0)
        for z in range(states):
            value += _U(transition[i, y, z]) * _U(inside[i, z])
        wide[y] = value
    _settle(wide, message)
    for z in range(states):
        wide[z] = _U(inside[up, z]) * _U(message[z])
    _settle(wide, inside[up])


@compiled
def _state(i, parent, root, transition, down, wide, alpha):
    """What node i's state is likely to be, before its symbol is seen."""
    states = len(wide)
    if i == 0:
        for z in range(states):
            alpha[z] = root[z]
        return
    up = parent[i]
    for z in range(states):
        wide[z] = 0
    for y in range(states):
        weight = _U(down[up, y])
        for z in range(states):
            wide[z] += weight * _U(transition[i, y, z])
    _settle(wide, alpha)


@compiled
def _below(i, v, alpha, cumulative):
    """Weight of the symbols below v."""
    value = _U(0)
    for z in range(len(alpha)):
        value += _U(alpha[z]) * _U(cumulative[i, v, z])
    return value


@compiled
def _place(weight, shift, whole, v, symbols):
    """The first of the 2^24 slots of symbol v: every symbol has one, whatever its weight."""
    share = (weight >> shift) * (_U(2**PRECISION) - _U(symbols)) // whole
    return share + _U(v)


@compiled
def _whole(alpha):
    """Weight of all symbols in no more than 32 bits, and what it was shifted by."""
    total = _U(0)
    for z in range(len(alpha)):
        total += _U(alpha[z])
    total <<= _U(16)
    shift = _U(0)
    while total >> shift >= _U(2**32):
        shift += _U(1)
    return total >> shift, shift


@compiled
def slots(samples, parent, last, root, transition, emission, cumulative, low, size):
    """Slots of all symbols.

    Args:
        samples: (n, D), in the order of nodes, from 0 to V - 1, the escape.
        parent: (D,).
        last: (D,), the last node below each, itself where it has none.
        root: uint32 (K,).
        transition: uint16 (D, K, K).
        emission: uint16 (D, V, K).
        cumulative: uint32 (D, V + 1, K), of emission.
        low: uint32 (n, D), to be filled.
        size: uint32 (n, D), to be filled.
    """
    nodes, states, symbols = len(parent), len(root), emission.shape[1]
    down, inside = np.empty((nodes, states), np.uint32), np.empty((nodes, states), np.uint32)
    alpha, message = np.empty(states, np.uint32), np.empty(states, np.uint32)
    wide = np.empty(states, np.uint64)
    for n in range(len(samples)):
        for i in range(nodes):
            v = samples[n, i]
            _state(i, parent, root, transition, down, wide, alpha)
            whole, shift = _whole(alpha)
            first = _place(_below(i, v, alpha, cumulative), shift, whole, v, symbols)
            end = _place(_below(i, v + 1, alpha, cumulative), shift, whole, v + 1, symbols)
            low[n, i], size[n, i] = first, end - first
            _seen(i, v, alpha, emission, parent, last, transition, down, inside, wide, message)


@compiled
def push(low, size, state, words):
    """Code slots (m,) into words from their end; the place of the first, and the state."""
    x, at = _U(state), len(words)
    for t in range(len(low) - 1, -1, -1):
        f = _U(size[t])
        if x >= f << _U(63 - PRECISION):
            at -= 1
            words[at] = np.uint32(x & _WORD)
            x >>= _U(32)
        quotient = x // f
        x = (quotient << _U(PRECISION)) + (x - quotient * f) + _U(low[t])
    return at, x


@compiled
def pull(  # noqa: C901, PLR0912
    words, x, parent, last, root, transition, emission, cumulative, samples
):
    """Fill ``samples``, int64 (n, D), from words.

    Returns:
        the place after the last word that was read, beyond all where a number is none; the state.
    """
    nodes, states, symbols = len(parent), len(root), emission.shape[1]
    down, inside = np.empty((nodes, states), np.uint32), np.empty((nodes, states), np.uint32)
    alpha, message = np.empty(states, np.uint32), np.empty(states, np.uint32)
    wide = np.empty(states, np.uint64)
    at, end = 0, len(words)
    for n in range(len(samples)):
        for i in range(nodes):
            _state(i, parent, root, transition, down, wide, alpha)
            whole, shift = _whole(alpha)
            slot = x & _SLOT
            v, above = 0, symbols
            first, after = _U(0), _U(2**PRECISION)
            while above - v > 1:
                middle = (v + above) // 2
                place = _place(_below(i, middle, alpha, cumulative), shift, whole, middle, symbols)
                if place <= slot:
                    v, first = middle, place
                else:
                    above, after = middle, place
            x = (after - first) * (x >> _U(PRECISION)) + slot - first
            if x < _LEAST:
                if at < end:
                    x = x << _U(32) | _U(words[at])
                at += 1
            samples[n, i] = v
            if v == symbols - 1:  # the escape, whose digits follow
                raw, count, digit = np.int64(0), np.int64(0), 0
                while digit <= count:
                    slot = np.int64(x & _SLOT) >> np.int64(PRECISION - 4)
                    first = _U(slot << np.int64(PRECISION - 4))
                    x = _U(2 ** (PRECISION - 4)) * (x >> _U(PRECISION)) + (x & _SLOT) - first
                    if x < _LEAST:
                        if at < end:
                            x = x << _U(32) | _U(words[at])
                        at += 1
                    if digit == 0:
                        count = slot
                        if count > MOST_DIGITS:
                            return end + 1, x
                    else:
                        raw |= slot << np.int64(4 * (digit - 1))
                    digit += 1
                samples[n, i] = -(raw >> 1) - 1 if raw & 1 else (raw >> 1) + v
            _seen(i, v, alpha, emission, parent, last, transition, down, inside, wide, message)
    return at, x
