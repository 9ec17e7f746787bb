"""The real images that a synthesis starts from, as a source."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from functools import cached_property

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from pipeline.digest import digest
from pipeline.storage.artifact import ArtifactSource
from pipeline.storage.regroup import ChosenSource
from pipeline.storage.source import Shard, Source, TableSource
from pipeline.tensors import tensor_column, to_numpy


@dataclass(frozen=True)
class StartSource(Source):
    """The images to make, each with the tiles that it starts from, put together.

    Adds ``image`` (uint8, S x S x C) and ``origin``, the keys of the real images in it.

    Args:
        plan: keys and labels of the images to make.
        tiles: for each image in the plan's order so many by so many tiles, row by row.
        count: tiles of an image along one side.
        size: S; where tiles do not fill it, their last rows and columns are repeated.
    """

    plan: TableSource
    tiles: ChosenSource
    count: int
    size: int

    @property
    def classes(self) -> tuple[str, ...]:
        return self.plan.classes

    @cached_property
    def shards(self) -> tuple[Shard, ...]:
        pairs = zip(self.plan.shards, self.tiles.shards, strict=True)
        return tuple(
            Shard(
                shard.name,
                digest(shard.identity, tiles.identity, self.count, self.size),
                shard.rows,
                {"tiles": asdict(tiles)},
            )
            for shard, tiles in pairs
        )

    def lean(self) -> StartSource:
        return replace(self, tiles=self.tiles.lean())

    def read(self, shard: Shard) -> pa.Table:
        plan = self.plan.read(shard)
        found = self.tiles.read(Shard(**shard.location["tiles"]))
        tiles, side = to_numpy(found["image"]), self.count
        height, channels = tiles.shape[1], tiles.shape[3]
        grid = tiles.reshape(-1, side, side, height, height, channels).transpose(0, 1, 3, 2, 4, 5)
        whole = grid.reshape(-1, side * height, side * height, channels)
        missing = self.size - side * height
        whole = np.pad(whole, ((0, 0), (0, missing), (0, missing), (0, 0)), mode="edge")
        keys = np.array(found["key"].to_pylist(), object).reshape(-1, side * side)
        origin = pa.array([row.tolist() for row in keys], pa.list_(pa.string()))
        return plan.append_column("image", tensor_column(whole)).append_column("origin", origin)


def tiles_of(
    candidates: ArtifactSource, rows: npt.NDArray[np.int64], shard_tiles: tuple[int, ...]
) -> ChosenSource:
    """Candidates by their rows, in shards of so many tiles each.

    Args:
        candidates: a table.
        rows: in the order of the images that they make.
        shard_tiles: tiles of each shard.
    """
    ends = np.cumsum([shard.rows or 0 for shard in candidates.shards])
    number = np.searchsorted(ends, rows, side="right")
    first = np.concatenate([[0], ends])[number]
    places = tuple(zip(number.tolist(), (rows - first).tolist(), strict=True))
    return ChosenSource(candidates, places, shard_tiles)
