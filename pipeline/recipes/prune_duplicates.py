"""Which samples the recipe ``prune`` leaves out as duplicates of others."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from pipeline.pruning.duplicates import exact_duplicates, near_duplicates
from pipeline.pruning.semantic_duplicates import Similarities, estimate_recall
from pipeline.recipes.prune_scores import Material
from pipeline.stages.pairwise import Pairwise
from pipeline.stages.select import Columns
from pipeline.storage.array_artifact import read_arrays
from pipeline.storage.cluster_source import ClusterSource, cluster_ranges, count_members
from pipeline.storage.parquet import ParquetFormat
from pipeline.tensors import to_numpy

ROWS = 2**17
"""Members of the clusters of a shard that are compared."""
SWEEP = (0.001, 0.003, 0.01, 0.03, 0.1)
SCHEMA = pa.schema(
    {"key": pa.string(), "of": pa.string(), "kind": pa.string(), "likeness": pa.float64()}
)


@dataclass(frozen=True)
class Duplicates:
    """What was found.

    Attributes:
        table: ``key``, ``of`` (the sample that it is a duplicate of), ``kind`` and ``likeness``: 1
            for exact ones, of near ones the share of bits that agree, of semantic ones the cosine.
        recall: of semantic ones, in words.
        sweep: how many samples would be semantic duplicates, by epsilon.
    """

    table: pa.Table
    recall: str | None
    sweep: dict[str, int]


def find_duplicates(material: Material, facts: pa.Table) -> Duplicates:
    """Duplicates of each kind that is asked for; a sample counts with the first kind that has it.

    Args:
        material: of the recipe.
        facts: of :class:`~pipeline.stages.fingerprint.Fingerprint`, all samples.
    """
    config, keys = material.config, facts["key"].combine_chunks()
    found, recall, sweep = [SCHEMA.empty_table()], None, dict[str, int]()
    if "exact" in config.dedup:
        of = exact_duplicates(facts["pixels"].combine_chunks(), keys)
        found.append(_table(keys, of, "exact", np.ones(len(of))))
    if "near" in config.dedup:
        of, apart = near_duplicates(
            to_numpy(facts["hash"]),
            keys,
            config.near_bits,
            mirrored=to_numpy(facts["mirrored"]) if config.image.flip else None,
            told=to_numpy(facts["told"]),
        )
        found.append(_table(keys, of, "near", 1 - apart / 64))
    if "semantic" in config.dedup:
        similar, epsilon = _similar(material), material.epsilon
        removed = pa.array(similar.removed(epsilon))
        columns = [similar.keys, similar.of, pa.array(similar.values.astype(np.float64))]
        key, other, value = (column.filter(removed) for column in columns)
        kind = pa.repeat(pa.scalar("semantic"), len(key))
        found.append(pa.table([key, other, kind, value], schema=SCHEMA))
        tables = material.assigned.tables
        seed = material.run.seed
        recall = str(estimate_recall(similar, epsilon, tables, seed=seed))
        sweep = {str(e): int(similar.removed(e).sum()) for e in sorted({*SWEEP, epsilon})}
    return Duplicates(_first_of_each(pa.concat_tables(found)), recall, sweep)


def _similar(material: Material) -> Similarities:
    """Of each sample the one before it that is most like it, sought within clusters."""
    run, assigned = material.run, material.assigned
    names = Columns(("cluster", "second"))
    members = run.map("members", assigned, [names], to=ParquetFormat())
    clusters = len(read_arrays(material.prototypes)["centroids"])
    ranges = cluster_ranges(count_members(members.tables(), clusters), ROWS)
    pairs = run.map("pairs", ClusterSource(assigned, ranges), [Pairwise()], to=ParquetFormat())
    return Similarities.merge(pairs.tables())


def _table(keys: pa.Array, of: np.ndarray, kind: str, likeness: np.ndarray) -> pa.Table:
    rows = np.flatnonzero(of >= 0)
    return pa.table(
        [
            keys.take(pa.array(rows)),
            keys.take(pa.array(of[rows])),
            pa.repeat(pa.scalar(kind), len(rows)),
            pa.array(likeness[rows], pa.float64()),
        ],
        schema=SCHEMA,
    )


def _first_of_each(table: pa.Table) -> pa.Table:
    """One row a sample."""
    _, first = np.unique(np.asarray(table["key"], object), return_index=True)
    return table.take(pa.array(np.sort(first), pa.int64()))
