"""Which sample of one data set is which of another, by digests alone."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

Digests = npt.NDArray[np.uint64]
WHOLE, KEY, IMAGE, LABEL, OTHER = range(5)
"""Columns of digests: of all that a sample is, and of its parts."""
PARTS = {"image": IMAGE, "label": LABEL, "other": OTHER}
SHOWN = 5  # keys
ODD = 0x9E3779B97F4A7C15  # 2 ** 64 over the golden ratio: its multiples lie far apart


@dataclass
class SampleIndex:
    """The digests of one side, to which those of the other are held table by table.

    Samples that are alike in everything are taken off both sides at once. What is left at the end
    is paired by key; of several with one key, in the order of their digests.
    """

    keys: pa.ChunkedArray
    digests: Digests
    other_rows: int = 0
    other_keys: list[pa.ChunkedArray] = field(default_factory=list)
    others: list[Digests] = field(default_factory=list)

    @classmethod
    def of(cls, tables: Iterable[tuple[pa.ChunkedArray, Digests]]) -> SampleIndex:
        """Of the keys and digests (N x 5) of several tables."""
        chunks, parts = [], [np.empty((0, 5), np.uint64)]
        for keys, digests in tables:
            chunks += keys.chunks
            parts.append(digests)
        return cls(pa.chunked_array(chunks, pa.string()), np.concatenate(parts))

    def __post_init__(self) -> None:
        self.order = np.argsort(self.digests[:, WHOLE], kind="stable")
        self.whole = self.digests[self.order, WHOLE]
        # How many of those that are alike are taken, where the first of them stands.
        self.taken = np.zeros(len(self.whole) + 1, np.uint32)

    @property
    def rows(self) -> int:
        return len(self.digests)

    def match(self, keys: pa.ChunkedArray, digests: Digests) -> None:
        """Take off the samples that are on this side too, and keep the others."""
        order = np.argsort(digests[:, WHOLE], kind="stable")
        whole = digests[order, WHOLE]
        low, high = (np.searchsorted(self.whole, whole, side) for side in ("left", "right"))
        free = low + self.taken[low] + _occurrence(whole) < high
        np.add.at(self.taken, low[free], 1)
        rows = np.sort(order[~free])
        self.other_rows += len(digests)
        self.other_keys.append(keys.take(pa.array(rows)))
        self.others.append(digests[rows])

    def compare(self) -> dict[str, Any]:
        """Number and first keys of the samples of one side and of those that differ, by part."""
        first = np.searchsorted(self.whole, self.whole)
        alike = _occurrence(self.whole) < self.taken[first]
        rows = np.sort(self.order[~alike])
        left, right = (
            self.digests[rows],
            np.concatenate([np.empty((0, 5), np.uint64), *self.others]),
        )
        keys = self.keys.take(pa.array(rows))
        chunks = [chunk for part in self.other_keys for chunk in part.chunks]
        other_keys = pa.chunked_array(chunks, pa.string())
        _, mine, theirs = np.intersect1d(_slots(left), _slots(right), return_indices=True)
        found = {
            "only_a": _named(keys, np.setdiff1d(np.arange(len(left)), mine)),
            "only_b": _named(other_keys, np.setdiff1d(np.arange(len(right)), theirs)),
        }
        for name, part in PARTS.items():
            found[name] = _named(keys, np.sort(mine[left[mine, part] != right[theirs, part]]))
        return found


def _occurrence(ordered: Digests) -> npt.NDArray[np.intp]:
    """How many equal values stand before each, in an ordered array."""
    return np.arange(len(ordered)) - np.searchsorted(ordered, ordered)


def _slots(digests: Digests) -> Digests:
    """A number for each sample from its key, and from its place among those with the same key."""
    order = np.lexsort([digests[:, part] for part in (OTHER, IMAGE, LABEL, KEY)])
    keys = digests[order, KEY]
    slots: Digests = np.empty_like(keys)
    slots[order] = keys + _occurrence(keys).astype(np.uint64) * np.uint64(ODD)
    return slots


def _named(keys: pa.ChunkedArray, rows: npt.NDArray[np.intp]) -> dict[str, Any]:
    shown = keys.take(pa.array(rows[:SHOWN])).to_pylist()
    return {"count": len(rows), "keys": shown}
