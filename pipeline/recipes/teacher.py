"""A classifier that a recipe trains, or takes with its weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pipeline.config import Config
from pipeline.dataset_distill.config import ImageConfig, SqueezeConfig
from pipeline.dataset_distill.squeeze import Squeeze
from pipeline.storage.weights import WeightsFile


def teacher_task(config: SqueezeConfig, image: ImageConfig, classes: int) -> Squeeze:
    """The classifier's task; a file of weights counts by its content, not by where it lies."""
    if config.weights is None or config.weights == "pretrained":
        return Squeeze(config, image, classes)
    file = WeightsFile(Path(config.weights))
    return Squeeze(config.model_copy(update={"weights": file.name}), image, classes, file)


def portable(config: Config, section: str) -> dict[str, Any]:
    """A configuration as a manifest holds it: a path on one machine says nothing on another.

    Args:
        config: of a recipe.
        section: the one that may name a file of weights.
    """
    values = config.model_dump(mode="json")
    if values[section]["weights"]:
        values[section]["weights"] = Path(values[section]["weights"]).name
    return values
