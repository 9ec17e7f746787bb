"""The real sample that lies nearest to each of some images: what an audit looks at."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from pipeline.storage.artifact import ArtifactSource
from pipeline.tensors import to_numpy

Arrays = Mapping[str, npt.NDArray[Any]]
AUDITED = 1000
"""Images that are looked at, the first ones, which are of as many classes as can be."""


@dataclass(frozen=True)
class NearestReal:
    """A step in one round; its columns are features and keys of real samples.

    Args:
        images: features of the images.
    """

    images: ArtifactSource

    version: ClassVar[int] = 1

    def begin(self, seed: int) -> Arrays:
        """The state before the round."""
        return {"similarity": np.zeros(0, np.float32)}

    def done(self, state: Arrays) -> bool:
        """Whether the round is over."""
        return len(state["similarity"]) > 0

    def result(self, state: Arrays) -> tuple[Arrays, dict[str, Any]]:
        """``similarity``, the cosine, float32 (Q,), and ``key``, UTF-8 (Q, L) padded with 0."""
        return state, {"images": len(state["similarity"])}

    def part(self, state: Arrays, shards: Iterable[tuple[Any, ...]], threads: int) -> Arrays:
        """The nearest of some shards, each a name, features (n, D) and keys (n,)."""
        queries = _directions(self._features())
        best = np.full(len(queries), -np.inf, np.float32)
        keys = np.full(len(queries), "", object)
        for _, features, names in shards:
            similar = queries @ _directions(features).T
            row = similar.argmax(1)
            found = similar[np.arange(len(queries)), row]
            better = found > best
            best, keys = np.where(better, found, best), np.where(better, names[row], keys)
        return {"similarity": best, "key": _bytes(keys)}

    def join(self, state: Arrays, parts: Iterator[Arrays], threads: int) -> Arrays:
        """The nearest of all parts; of equal ones the first."""
        total = dict(next(parts))
        for part in parts:
            better = part["similarity"] > total["similarity"]
            width = max(part["key"].shape[1], total["key"].shape[1])
            new, old = (
                np.pad(p["key"], ((0, 0), (0, width - p["key"].shape[1]))) for p in (part, total)
            )
            total["key"] = np.where(better[:, None], new, old)
            total["similarity"] = np.where(better, part["similarity"], total["similarity"])
        return total

    def _features(self) -> npt.NDArray[np.float32]:
        tables, rows = [], 0
        for table in self.images.tables():
            tables.append(table.select(["feature"]))
            rows += table.num_rows
            if rows >= AUDITED:
                break
        return to_numpy(pa.concat_tables(tables)["feature"])[:AUDITED]


def nearest_keys(arrays: Arrays) -> list[str]:
    """The keys that :class:`NearestReal` found."""
    return [bytes(row).rstrip(b"\0").decode() for row in arrays["key"]]


def _bytes(keys: npt.NDArray[Any]) -> npt.NDArray[np.uint8]:
    texts = [key.encode() for key in keys.tolist()]
    width = max(1, *map(len, texts))
    flat = b"".join(text.ljust(width, b"\0") for text in texts)
    return np.frombuffer(flat, np.uint8).reshape(len(texts), width)


def _directions(x: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    return np.asarray(x / np.linalg.norm(x, axis=1, keepdims=True), np.float32)
