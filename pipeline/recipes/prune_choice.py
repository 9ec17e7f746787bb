"""Which samples the recipe ``prune`` keeps, and why."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any, cast

import numpy as np
import pyarrow as pa

from pipeline.dataset_distill.config import SqueezeConfig
from pipeline.errors import UsageError
from pipeline.orchestration.fit import Fit
from pipeline.pruning.budget import Budget, select
from pipeline.pruning.pool import Pool, Rows
from pipeline.pruning.selectors import Selector, selectors
from pipeline.recipes.prune_config import PruneConfig
from pipeline.recipes.prune_scores import Material
from pipeline.recipes.teacher import teacher_task
from pipeline.stages.select import in_test
from pipeline.storage.artifact import ArtifactSource
from pipeline.storage.parquet import ParquetFormat
from pipeline.storage.selected import SelectedSource
from pipeline.storage.source import TableSource

SHARD_ROWS = 2**16
"""Rows of a shard of the selection."""
AUTO = "auto"
SMALL_NETWORK = "convnet3"
"""What pilots train, and what scores where nothing else is said."""


@dataclass(frozen=True)
class Plan:
    """What is to be done, as the configuration says.

    Attributes:
        budget: how much is kept.
        selector: name of a selector, or ``auto``.
        score: name of a score; None where nothing is scored.
        features: whether the selector needs features.
    """

    budget: Budget
    selector: str
    score: str | None
    features: bool

    @classmethod
    def of(cls, config: PruneConfig, labelled: bool) -> Plan:
        """The plan of a configuration.

        Raises:
            UsageError: the budget is none, or pilot runs are asked for without labels.
        """
        keep, selector = config.keep, cast("str | None", config.selector)
        if keep == AUTO:
            keep, selector = PruneConfig.model_fields["keep"].default, AUTO
        # Of 1 and 1.0 the first is a number of samples, the second a share.
        budget = Budget.parse(f"{keep:.12f}" if isinstance(keep, float) else str(keep))
        if selector is None:
            selector = "band" if config.score == "moderate" else AUTO if labelled else "hard"
        all_of_it = budget == Budget("share", 1.0)
        if all_of_it:
            selector = "hard"  # they all keep the same
        if selector == AUTO and not labelled:
            raise UsageError(
                "Whether hard or easy samples are kept is found by training on labels, and the "
                "data set has none.",
                hint="Choose with --selector hard or --selector easy.",
                code="no-labels",
            )
        needs = () if all_of_it else ("scores",) if selector == AUTO else make(selector).needs
        score = config.score
        if score is None and "scores" in needs:
            score = "el2n" if labelled else "prototypes"
        return cls(budget, selector, score, "features" in needs)


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


@dataclass(frozen=True)
class Choice:
    """What is kept.

    Attributes:
        rows: of the pool, ascending.
        why: in words.
        pilots: as plain JSON types; none where the selector was given.
    """

    rows: Rows
    why: str
    pilots: list[dict[str, Any]]


def make(name: str) -> Selector:
    """A selector by name."""
    return selectors.get(name)()


def choose(material: Material, plan: Plan, pool: Pool, samples: int) -> Choice:
    """Choose from a pool.

    Args:
        material: of the recipe.
        plan: what to do.
        pool: the samples that are no duplicates.
        samples: how many there were with duplicates: shares are of these.

    Raises:
        UsageError: a class would be without samples, or the pool lacks what the selector needs.
    """
    config, seed = material.config, material.run.seed
    if plan.budget.kind == "bytes":
        budget = plan.budget
    else:
        budget = Budget("count", min(plan.budget.count(samples), len(pool)))
    name, why, told = plan.selector, "", list[dict[str, Any]]()
    if name == AUTO:
        pilots = run_pilots(material, pool, budget, seed)
        name, why = decide(*pilots)
        told = [asdict(pilot) for pilot in pilots]
    rows = select(
        pool,
        make(name),
        budget,
        balance=config.balance,
        seed=seed,
        classes=material.data.train.classes,
    )
    if len(rows) == len(pool):
        why = "All that is no duplicate is kept." if config.dedup else "All samples are kept."
    return Choice(rows, why or f"They are chosen by the selector '{name}'.", told)


def run_pilots(material: Material, pool: Pool, budget: Budget, seed: int) -> tuple[Pilot, Pilot]:
    """Train on the hard and on the easy samples of four fifths of the pool, try on the last fifth.

    Whether hard or easy samples are worth more depends on how many there are (Sorscher et al.,
    "Beyond neural scaling laws", 2022), so both pilots take the share that is to be kept. The test
    split is not looked at.
    """
    run, config, classes = material.run, material.config, material.data.train.classes
    held = np.array([in_test(key) for key in pool.keys.to_pylist()])
    train = pool.take(np.flatnonzero(~held))
    test = write_keys(material, "pilot-test", pool.take(np.flatnonzero(held)))
    share = Budget("share", max(budget.count(len(pool), pool.bytes) / len(pool), 1e-9))
    epochs = config.proxy.train.model_copy(update={"epochs": config.pilot_epochs})
    pilot = SqueezeConfig(backbone=SMALL_NETWORK, train=epochs)
    task = teacher_task(pilot, config.image, len(classes))
    fits, sizes = {}, {}
    for name in ("hard", "easy"):
        rows = select(train, make(name), share, balance=config.balance, seed=seed, classes=classes)
        chosen = write_keys(material, f"pilot-{name}", train.take(rows))
        inputs = {
            "train": SelectedSource(material.images, chosen.artifact),
            "test": SelectedSource(material.images, test.artifact),
        }
        fits[name], sizes[name] = Fit(task, inputs), len(rows)
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
    why = (
        f"A network trained on the {hard.images:,} hardest samples was right on "
        f"{hard.accuracy:.1f}% of {hard.tested:,} others, one trained on as many easy ones on "
        f"{easy.accuracy:.1f}%: {better.selector} samples are kept."
    )
    if abs(hard.accuracy - easy.accuracy) < 2 * error:
        why += f" The difference is within chance (standard error {error:.1f} points)."
    return better.selector, why


def write_keys(material: Material, name: str, pool: Pool) -> ArtifactSource:
    """The keys and labels of a pool, as the output of a step."""
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
