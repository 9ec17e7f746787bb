"""Recipes: each reads like its paper."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from pipeline.config import Config
from pipeline.datasets import Dataset
from pipeline.orchestration.run import Run
from pipeline.registry import Registry


@dataclass(frozen=True)
class Recipe:
    """A named job.

    Attributes:
        config: the type of its configuration.
        defaults: values for a data set, laid under what the user gives, which it is given too.
        run: does it, and returns a summary of plain JSON types.
        estimate: what it would cost, on the device at hand or on a GPU by its name.
    """

    config: type[Config]
    defaults: Callable[[Dataset, Mapping[str, Any]], Mapping[str, Any]]
    run: Callable[[Run, Dataset, Any], dict[str, Any]]
    estimate: Callable[[Dataset, Any, str | None], dict[str, Any]] | None = None


recipes: Registry[Recipe] = Registry(
    "recipe",
    {
        "codebook": "pipeline.recipes.codebook:RECIPE",
        "compress-features": "pipeline.recipes.compress_features:RECIPE",
        "compress-model": "pipeline.recipes.compress_model:RECIPE",
        "convert": "pipeline.recipes.convert:RECIPE",
        "distill": "pipeline.recipes.distill:RECIPE",
        "prune": "pipeline.recipes.prune:RECIPE",
        "tokenize": "pipeline.recipes.tokenize:RECIPE",
        "train-tokenizer": "pipeline.recipes.train_tokenizer:RECIPE",
    },
)
