"""Samples that are there more than once: the same pixels, or almost."""

from __future__ import annotations

from functools import partial
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from pipeline.clustering.compiled import compiled
from pipeline.clustering.threads import Threads

Rows = npt.NDArray[np.int64]
Hashes = npt.NDArray[np.uint64]


def exact_duplicates(digests: pa.Array, keys: pa.Array) -> Rows:
    """For each sample the first by key with the same digest, and -1 where that is it itself.

    Args:
        digests: of pixels, of one length (N,).
        keys: strings (N,).

    Returns:
        int64 (N,), rows.
    """
    order = np.asarray(pc.sort_indices(keys), np.int64)
    codes = np.asarray(pc.dictionary_encode(digests).indices)[order]
    first = np.full(int(codes.max()) + 1 if len(codes) else 0, -1, np.int64)
    # Written from the last to the first, so that the first is what stays.
    first[codes[::-1]] = order[::-1]
    of = np.empty(len(keys), np.int64)
    of[order] = first[codes]
    return np.where(of == np.arange(len(keys)), -1, of)


def near_duplicates(
    hashes: Hashes,
    keys: pa.Array,
    bits: int,
    *,
    mirrored: Hashes | None = None,
    told: npt.NDArray[np.bool_] | None = None,
    n_jobs: int | None = None,
) -> tuple[Rows, npt.NDArray[np.int32]]:
    """For each sample an earlier one, by key, whose hash differs in few bits: the least, the first.

    No pair is missed: hashes that differ in at most b of 64 bits are alike in one of b + 1 parts,
    so those that share a part are compared, and no others.

    Args:
        hashes: uint64 (N,).
        keys: strings (N,).
        bits: by which hashes differ at most, 0 to 16.
        mirrored: hashes of the mirrored pictures; a pair may be alike that way too.
        told: whether a hash says anything; those that do not are duplicates of none.
        n_jobs: threads; as many as there are cores where not given.

    Returns:
        int64 (N,), rows, or -1; and by how many bits they differ, int32 (N,), or -1.
    """
    order = np.asarray(pc.sort_indices(keys), np.int64)
    if told is not None:
        order = order[told[order]]
    own = hashes[order]
    sides = [own] if mirrored is None else [own, mirrored[order]]
    best = np.full(len(own), 65, np.int32)
    of = np.full(len(own), -1, np.int64)
    edges = np.linspace(0, 64, bits + 2).astype(np.int64)
    with Threads(n_jobs) as threads:
        for low, high in pairwise(edges):
            mask = np.uint64((1 << int(high - low)) - 1)
            parts = (own >> np.uint64(low)) & mask
            by_part = np.argsort(parts, kind="stable")
            ordered = parts[by_part]
            for other in sides:
                wanted = (other >> np.uint64(low)) & mask
                starts = np.searchsorted(ordered, wanted, "left")
                ends = np.searchsorted(ordered, wanted, "right")
                found = (bits, best, of)
                compare = partial(_compare, own, other, by_part, starts, ends, found)
                threads.split(compare, len(own), 1024)
    rows, apart = np.full(len(hashes), -1, np.int64), np.full(len(hashes), -1, np.int32)
    rows[order] = np.where(of >= 0, order[of], -1)
    apart[order] = np.where(of >= 0, best, -1)
    return rows, apart


@compiled
def _compare(
    own: Any,
    other: Any,
    members: Any,
    starts: Any,
    ends: Any,
    found: Any,
    lo: int,
    hi: int,
) -> None:
    """Hold samples lo to hi, or their mirror images, against earlier ones that share a part."""
    bits, best, of = found
    for i in range(lo, hi):
        for place in range(starts[i], ends[i]):
            j = members[place]
            # Members of a part are in order of key.
            if j >= i:
                break
            apart = _count(other[i] ^ own[j])
            if apart <= bits and (apart < best[i] or (apart == best[i] and j < of[i])):
                best[i], of[i] = apart, j


@compiled
def _count(x: Any) -> int:
    """How many bits of a uint64 are set."""
    x -= (x >> np.uint64(1)) & np.uint64(0x5555555555555555)
    x = (x & np.uint64(0x3333333333333333)) + ((x >> np.uint64(2)) & np.uint64(0x3333333333333333))
    x = (x + (x >> np.uint64(4))) & np.uint64(0x0F0F0F0F0F0F0F0F)
    return int((x * np.uint64(0x0101010101010101)) >> np.uint64(56))
