"""Choose the samples of a data set that are worth keeping."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipeline.config import TrainConfig, merge
from pipeline.datasets import Dataset
from pipeline.errors import RunError
from pipeline.orchestration.run import Run
from pipeline.pruning.pool import Pool
from pipeline.recipes import Recipe
from pipeline.recipes.convert import ConvertConfig, write_split
from pipeline.recipes.distill_config import UNKNOWN
from pipeline.recipes.prune_choice import SMALL_NETWORK, Plan, choose, write_keys
from pipeline.recipes.prune_config import PruneConfig
from pipeline.recipes.prune_duplicates import find_duplicates
from pipeline.recipes.prune_report import Told, report
from pipeline.recipes.prune_scores import SCORES, Material
from pipeline.recipes.teacher import portable
from pipeline.stages.fingerprint import Fingerprint, Sizes
from pipeline.storage.artifact import Artifact, ArtifactSource
from pipeline.storage.parquet import ParquetFormat
from pipeline.storage.selected import SelectedSource
from pipeline.storage.source import Source, TableSource
from pipeline.tensors import to_numpy

SIDE = 64
"""Largest side, in pixels, of the images that are scored where nothing else is said."""


def prune(run: Run, data: Dataset, config: PruneConfig) -> dict[str, Any]:
    """Leave out duplicates, score, select; publish what is kept as keys, scores and duplicates."""
    material, classes = Material(run, data, config), data.train.classes
    plan = Plan.of(config, bool(classes))
    if plan.score:
        material.check(plan.score)
    if plan.features or "semantic" in config.dedup:
        material.check("prototypes")

    pixels = {"exact", "near"} & set(config.dedup)
    look = Fingerprint() if pixels else Sizes()
    facts = run.map("facts", data.train, [look], to=ParquetFormat())
    # A budget that the data do not hold is refused now, and not when networks have been trained.
    if plan.budget.kind == "count":
        run.require(lambda: plan.budget.count(facts.artifact.manifest["counts"]["out"]))
    products, scored, model = dict[str, Artifact](), None, None
    if plan.score:
        scored, model = material.scores(plan.score)
        products["scores"] = scored.artifact
    table = _read(facts)
    duplicates = find_duplicates(material, table)
    if config.dedup:
        table_of = TableSource((("duplicates", duplicates.table),))
        products["duplicates"] = run.map("duplicates", table_of, [], to=ParquetFormat()).artifact

    told = _told(table, scored, plan, duplicates.table, data.train, facts)
    pool = _pool(material, plan, told)
    choice = choose(material, plan, pool, len(table))
    kept = pool.take(choice.rows)
    selection = write_keys(material, "selection", kept)
    products["selection"] = selection.artifact
    if config.materialize:
        source = SelectedSource(data.train, selection.artifact)
        form = ConvertConfig(format=config.materialize)
        products["train"] = write_split(run, "train-kept", source, [], form).artifact

    told.kept[np.asarray(pc.index_in(kept.keys, told.keys), np.int64)] = True
    kinds = duplicates.table["kind"].to_pylist()
    counts = {
        "samples": len(table),
        "duplicates": {kind: kinds.count(kind) for kind in config.dedup},
        "pool": len(pool),
        "kept": len(kept),
        "bytes": int(told.bytes.sum()),
        "bytes_kept": int(told.bytes[told.kept].sum()),
    }
    about = {
        "dataset": data.name,
        "classes": list(classes),
        "score": plan.score,
        "model": model.identity if isinstance(model, Artifact) else model,
        "why": choice.why,
        "pilots": choice.pilots,
        "recall": duplicates.recall,
        "sweep": duplicates.sweep,
        "counts": counts,
        "config": portable(config, "proxy"),
        "seed": run.seed,
    }
    if not run.published("pruned", products):
        steps = [facts, *([scored] if scored else []), selection]
        identities = {role: artifact.identity for role, artifact in products.items()}
        run.publish(
            "pruned", products, about, report(about, told, data.train, config, identities, steps)
        )
    return {
        **{name: about[name] for name in ("dataset", "counts", "why")},
        "products": {role: str(artifact.store) for role, artifact in products.items()},
        "report": f"{run.out}/report.html",
    }


def _read(facts: ArtifactSource) -> pa.Table:
    """All facts, with the number of the shard that each sample lies in.

    Raises:
        RunError: there are none.
    """
    tables = [
        table.append_column("shard", pa.array(np.full(len(table), number)))
        for number, table in enumerate(facts.tables())
    ]
    if not tables:
        raise RunError(
            "The data set has no sample that can be used.",
            hint="See the quarantine of the step 'facts', or give another data set.",
            code="no-samples",
        )
    return pa.concat_tables(tables)


def _told(
    table: pa.Table,
    scored: ArtifactSource | None,
    plan: Plan,
    duplicates: pa.Table,
    source: Source,
    facts: ArtifactSource,
) -> Told:
    """Every sample with its score, where it has one, and what it is a duplicate of."""
    keys = table["key"].combine_chunks()
    scores = None
    if scored is not None and plan.score:
        column = SCORES[plan.score].column
        tables = [part.select(["key", column]) for part in scored.tables()]
        found = pa.concat_tables(tables)
        place = pc.index_in(keys, found["key"].combine_chunks())
        taken = found[column].take(place.fill_null(0)).to_numpy().astype(np.float64)
        scores = np.where(np.asarray(pc.is_valid(place)), taken, np.nan)
    numbers = {shard.name: number for number, shard in enumerate(source.shards)}
    # Samples that were taken up from quarantine lie in shards of their own.
    lies_in = np.array([numbers.get(shard.name, -1) for shard in facts.shards], np.int64)
    return Told(
        keys,
        to_numpy(table["label"]).astype(np.int64) if "label" in table.column_names else None,
        scores,
        np.zeros(len(keys), np.bool_),
        to_numpy(table["bytes"]),
        lies_in[to_numpy(table["shard"])],
        duplicates,
    )


def _pool(material: Material, plan: Plan, told: Told) -> Pool:
    """What can be chosen from: samples with a score that are no duplicates."""
    good = ~np.asarray(pc.is_in(told.keys, told.duplicates["key"].combine_chunks()))
    if told.scores is not None:
        good &= ~np.isnan(told.scores)
    features = None
    if plan.features:
        parts = list(material.features.tables())
        names = pa.concat_tables([part.select(["key"]) for part in parts])["key"].combine_chunks()
        place = pc.index_in(told.keys, names)
        good &= np.asarray(pc.is_valid(place))
        every = np.concatenate([to_numpy(part["feature"]) for part in parts])
        features = every[np.asarray(place.filter(pa.array(good)), np.int64)]
    rows = np.flatnonzero(good)
    return Pool(
        told.keys.take(pa.array(rows)),
        np.zeros(len(rows)) if told.scores is None else told.scores[rows],
        None if told.labels is None else told.labels[rows],
        features,
        told.bytes[rows],
    )


def defaults(data: Dataset, _: Mapping[str, Any]) -> dict[str, Any]:
    """Settings for a data set: images as it has them, and no larger than a small network needs."""
    image = data.info.image if data.info else UNKNOWN
    train = TrainConfig(epochs=30).model_dump()
    return {
        "image": merge(image, {"size": min(image["size"], SIDE)}),
        "proxy": {"backbone": SMALL_NETWORK, "train": train},
    }


RECIPE = Recipe(PruneConfig, defaults, prune)
