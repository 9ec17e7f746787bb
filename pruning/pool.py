"""What samples can be chosen from."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from pipeline.clustering.compiled import compiled
from pipeline.errors import UsageError

Rows = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Pool:
    """Samples and what is known of them, a row each.

    Attributes:
        keys: strings (N,), distinct. Ties are broken by them, so that the order of rows is of no
            consequence.
        scores: float64 (N,), finite; higher is harder.
        labels: int64 (N,), 0 or more; None where there are none.
        features: float32 (N, D), where a selector needs them.
        bytes: int64 (N,), the size of each sample; for budgets in bytes.
    """

    keys: pa.Array
    scores: npt.NDArray[np.float64]
    labels: Rows | None = None
    features: npt.NDArray[np.float32] | None = None
    bytes: Rows | None = None

    def __len__(self) -> int:
        return len(self.keys)

    def take(self, rows: Rows) -> Pool:
        """The given rows alone."""

        def part(values: Any) -> Any:
            return None if values is None else values[rows]

        return Pool(
            self.keys.take(pa.array(rows)),
            self.scores[rows],
            part(self.labels),
            part(self.features),
            part(self.bytes),
        )

    @cached_property
    def by_key(self) -> Rows:
        """The place of each row in the order of keys: int64 (N,)."""
        return key_places(self.keys)

    def classes(self) -> list[Rows]:
        """The rows of each class that has some, by label; all where there are no labels."""
        if self.labels is None:
            return [np.arange(len(self))]
        order = np.argsort(self.labels, kind="stable")
        edges = np.flatnonzero(np.diff(self.labels[order])) + 1
        return [rows for rows in np.split(order, edges) if len(rows)]

    def check(self) -> None:
        """Raise UsageError where this is nothing to choose from."""
        columns = (self.scores, self.labels, self.features, self.bytes)
        if not len(self) or any(v is not None and len(v) != len(self) for v in columns):
            raise UsageError(
                f"There are {len(self)} keys and "
                f"{[len(v) for v in columns if v is not None]} values to choose by.",
                hint="Give at least one sample, and each column one value a sample.",
                code="bad-pool",
            )
        bad = np.flatnonzero(~np.isfinite(self.scores))
        if len(bad):
            raise UsageError(
                f"{len(bad)} of {len(self)} scores are not finite, that of "
                f"'{self.keys[int(bad[0])]}' the first of them.",
                hint="Leave these samples out, or score them anew: a training that diverged gives "
                "such scores.",
                code="score-not-finite",
            )
        if self.labels is not None and self.labels.min() < 0:
            raise UsageError(
                f"The label of '{self.keys[int(self.labels.argmin())]}' is {self.labels.min()}.",
                hint="Labels count from 0; give labels=None where there are none.",
                code="bad-label",
            )
        if pc.count_distinct(self.keys).as_py() < len(self):
            raise UsageError(
                "Some keys are there more than once.",
                hint="Give every sample a key of its own.",
                code="duplicate-keys",
            )


def key_places(keys: pa.Array) -> Rows:
    """The place of each key among all in order: int64 (N,)."""
    places = np.empty(len(keys), np.int64)
    places[np.asarray(pc.sort_indices(keys), np.int64)] = np.arange(len(keys))
    return places


def key_numbers(keys: pa.Array, seed: int) -> npt.NDArray[np.float64]:
    """A number in [0, 1) for each key, that looks random: of key and seed alone, float64 (N,)."""
    array = pa.array(keys, pa.large_string()) if len(keys) else pa.array([], pa.large_string())
    _, offsets, data = array.buffers()
    ends = np.frombuffer(offsets, np.int64)[array.offset : array.offset + len(array) + 1]
    given = np.frombuffer(data, np.uint8) if data and data.size else np.empty(0, np.uint8)
    made = np.empty(len(array))
    _hash(given, ends, np.uint64(seed), made)
    return made


@compiled
def _hash(data: Any, ends: Any, seed: Any, made: Any) -> None:
    # FNV-1a, and the finaliser of SplitMix64, which spreads its last bytes over all bits.
    for i in range(made.shape[0]):
        x = np.uint64(0xCBF29CE484222325) ^ seed
        for j in range(ends[i], ends[i + 1]):
            x = (x ^ np.uint64(data[j])) * np.uint64(0x100000001B3)
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        made[i] = np.float64((x ^ (x >> np.uint64(31))) >> np.uint64(11)) * 2.0**-53
