"""Which samples the recipe ``prune`` keeps, and why."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from pipeline.orchestration.fit import Fit
from pipeline.pruning.budget import Budget, select
from pipeline.pruning.pool import Pool
from pipeline.pruning.selectors import selectors
from pipeline.recipes.prune_scores import Material
from pipeline.recipes.teacher import teacher_task
from pipeline.stages.select import in_test
from pipeline.storage.artifact import ArtifactSource
from pipeline.storage.parquet import ParquetFormat
from pipeline.storage.selected import SelectedSource
from pipeline.storage.source import TableSource

Rows = npt.NDArray[np.int64]
SHARD_ROWS = 2**16
"""Rows of a shard of the selection."""


@dataclass(frozen=True)
class Pilot:
    """A short training on what a selector keeps.

    Attributes:
        selector: whose choice it learned from.
        images: that it learned from.
        accuracy: on images that were held out, percent.
        tested: images held out.
    """

    selector: str
    images: int
    accuracy: float
    tested: int


def pilots(material: Material, pool: Pool, budget: Budget, seed: int) -> tuple[Pilot, Pilot]:
    """Train on the hard and on the easy samples of four fifths of the pool, try on the last fifth.

    Whether hard or easy samples are worth more depends on how many there are (Sorscher et al.,
    "Beyond neural scaling laws", 2022), so both pilots take the share that is to be kept. The test
    split is not looked at.
    """
    run, config = material.run, material.config
    held = np.array([in_test(key) for key in pool.keys.to_pylist()])
    train = pool.take(np.flatnonzero(~held))
    share = budget.share(pool)
    test = _keys(material, "pilot-test", pool.take(np.flatnonzero(held)))
    proxy = config.proxy
    epochs = proxy.train.model_copy(update={"epochs": config.pilot_epochs})
    task = teacher_task(
        proxy.model_copy(update={"train": epochs, "weights": None}),
        config.image,
        len(material.data.train.classes),
    )
    fits, sizes = {}, {}
    for name in ("hard", "easy"):
        rows = select(
            train, selectors.get(name), Budget.of_share(share), balance=config.balance, seed=seed
        )
        chosen = _keys(material, f"pilot-{name}", train.take(rows))
        images = SelectedSource(material.images, chosen.artifact)
        tested = SelectedSource(material.images, test.artifact)
        fits[name], sizes[name] = Fit(task, {"train": images, "test": tested}), len(rows)
    found = {record["name"]: record["metrics"] for record in run.fit_each("pilots", fits).records()}
    hard, easy = (
        Pilot(name, sizes[name], found[name]["accuracy"], found[name]["images"]) for name in fits
    )
    return hard, easy


def decide(hard: Pilot, easy: Pilot) -> tuple[str, str]:
    """The selector whose pilot did better, and why in words."""
    better = max((hard, easy), key=lambda pilot: pilot.accuracy)
    shares = [pilot.accuracy / 100 for pilot in (hard, easy)]
    error = 100 * math.sqrt(sum(p * (1 - p) for p in shares) / hard.tested)
    gap = abs(hard.accuracy - easy.accuracy)
    why = (
        f"A network trained on the hardest {hard.images:,} samples was right on "
        f"{hard.accuracy:.1f}% of {hard.tested:,} others, one trained on the easiest on "
        f"{easy.accuracy:.1f}%: {better.selector} samples are kept."
    )
    if gap < 2 * error:
        why += f" The difference is within chance (standard error {error:.1f} points)."
    return better.selector, why


def _keys(material: Material, name: str, pool: Pool) -> ArtifactSource:
    """The keys of a pool as the output of a step."""
    columns = {"key": pool.keys}
    if pool.labels is not None:
        columns["label"] = pa.array(pool.labels, pa.int64())
    table = pa.table(columns)
    parts = tuple(
        (f"{start // SHARD_ROWS:05d}", table.slice(start, SHARD_ROWS))
        for start in range(0, len(table), SHARD_ROWS)
    )
    source = TableSource(parts, material.data.train.classes)
    return material.run.map(name, source, [], to=ParquetFormat())
