"""The mean, or the median, of the features of each class, over shards that stay where they are."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy as np
import numpy.typing as npt

from pipeline.clustering.checks import check_finite

Arrays = Mapping[str, npt.NDArray[Any]]
_BINS = 16
_ROUNDS = 7
"""So often is the range of a class and column cut into 16: to 4e-9 of it."""


@dataclass(frozen=True)
class ClassCentres:
    """A step in rounds that finds a centre for each class; its columns are features and labels.

    Means take one round. Medians, of each column by itself, take a round for the range and seven
    that count features in sixteen bins of what is left of it, so that no more than 16 C D numbers
    are held. The median of an even number is the lower one of the two in the middle.

    Args:
        kind: ``mean`` or ``median``.
        classes: C.
    """

    kind: Literal["mean", "median"]
    classes: int

    version: ClassVar[int] = 1

    def begin(self, seed: int) -> Arrays:
        """The state before the first round."""
        return {"round": np.array([0])}

    def done(self, state: Arrays) -> bool:
        """Whether nothing is left to do."""
        return int(state["round"][0]) > (0 if self.kind == "mean" else _ROUNDS)

    def result(self, state: Arrays) -> tuple[Arrays, dict[str, Any]]:
        """``centres`` float32 (C, D), NaN for a class without samples, and how many it has."""
        low = state["low"]
        centres = low if self.kind == "mean" else (low + state["high"]) / 2
        counts = state["count"]
        centres = np.where(counts[:, None] > 0, centres, np.nan).astype(np.float32)
        return {"centres": centres}, {"samples": [int(n) for n in counts]}

    def part(self, state: Arrays, shards: Iterable[tuple[Any, ...]], threads: int) -> Arrays:
        """What some shards, each a name, features (n, D) and labels (n,), say to a state."""
        found: dict[str, Any] = {}
        for name, features, labels in shards:
            x = np.asarray(features, np.float32)
            check_finite(x, where=name)
            if not found:
                found = self._empty(x.shape[1])
            for label in np.unique(labels).tolist():
                self._add(found, label, x[labels == label], state)
        return found or self._empty(0)

    def _empty(self, columns: int) -> dict[str, Any]:
        shape = (self.classes, columns)
        return {
            "count": np.zeros(self.classes, np.int64),
            "sum": np.zeros(shape),
            "least": np.full(shape, np.inf),
            "most": np.full(shape, -np.inf),
            "bins": np.zeros((*shape, _BINS), np.int64),
        }

    def _add(self, found: dict[str, Any], label: int, x: npt.NDArray[Any], state: Arrays) -> None:
        found["count"][label] += len(x)
        if not int(state["round"][0]):
            found["sum"][label] += x.sum(0, dtype=np.float64)
            found["least"][label] = np.minimum(found["least"][label], x.min(0))
            found["most"][label] = np.maximum(found["most"][label], x.max(0))
            return
        low, high = state["low"][label], state["high"][label]
        width = np.where(high > low, high - low, 1.0)
        bins = np.floor((x.astype(np.float64) - low) / width * _BINS)
        # The range is closed at its ends; what lies below or above was counted before.
        inside = (x >= low) & (x <= high)
        bins = np.clip(bins, 0, _BINS - 1).astype(np.int64)
        column = np.broadcast_to(np.arange(x.shape[1]), x.shape)
        flat = np.bincount((column * _BINS + bins)[inside], minlength=x.shape[1] * _BINS)
        found["bins"][label] += flat.reshape(-1, _BINS)
        found["sum"][label] += (x < low).sum(0)

    def join(self, state: Arrays, parts: Iterator[Arrays], threads: int) -> Arrays:
        """The state after a round, from what its parts returned, in order."""
        total: dict[str, Any] = {}
        for part in parts:
            if not part["sum"].shape[1]:
                continue
            if not total:
                total = {name: values.copy() for name, values in part.items()}
                continue
            for name in ("count", "sum", "bins"):
                total[name] += part[name]
            total["least"] = np.minimum(total["least"], part["least"])
            total["most"] = np.maximum(total["most"], part["most"])
        number, count = int(state["round"][0]), total["count"]
        after = {"round": np.array([number + 1]), "count": count}
        if number:
            return {**after, **self._narrowed(state, total)}
        if self.kind == "mean":
            return {**after, "low": total["sum"] / np.maximum(count, 1)[:, None]}
        full = count[:, None] > 0
        return {
            **after,
            "low": np.where(full, total["least"], 0.0),
            "high": np.where(full, total["most"], 0.0),
        }

    def _narrowed(self, state: Arrays, total: Mapping[str, Any]) -> Arrays:
        """The bin of each class and column that holds its median."""
        low, high = state["low"], state["high"]
        rank = (np.maximum(total["count"], 1) - 1)[:, None] // 2
        below = total["sum"][..., None] + np.cumsum(total["bins"], 2)
        chosen = np.minimum((below <= rank[..., None]).sum(2), _BINS - 1)
        step = (high - low) / _BINS
        return {"low": low + chosen * step, "high": low + (chosen + 1) * step}
