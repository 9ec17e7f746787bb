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
        defaults: values for a data set, laid under what the user gives.
        run: does it, and returns a summary of plain JSON types.
    """

    config: type[Config]
    defaults: Callable[[Dataset], Mapping[str, Any]]
    run: Callable[[Run, Dataset, Any], dict[str, Any]]


recipes: Registry[Recipe] = Registry(
    "recipe",
    {
        "convert": "pipeline.recipes.convert:RECIPE",
        "distill": "pipeline.recipes.distill:RECIPE",
        "prune": "pipeline.recipes.prune:RECIPE",
    },
)
