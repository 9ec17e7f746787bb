"""A classifier that a recipe trains, or takes with its weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pipeline.config import Config
from pipeline.dataset_distill.config import SqueezeConfig
from pipeline.dataset_distill.squeeze import Squeeze
from pipeline.labelled_images import ImageConfig
from pipeline.storage.weights import WeightsFile


def teacher_task(config: SqueezeConfig, image: ImageConfig, classes: int) -> Squeeze:
    """The classifier's task; a file of weights counts by its content, not by where it lies."""
    if config.weights is None or config.weights == "pretrained":
        return Squeeze(config, image, classes)
    file = WeightsFile(Path(config.weights))
    return Squeeze(config.model_copy(update={"weights": file.name}), image, classes, file)


def portable(config: Config, *sections: str) -> dict[str, Any]:
    """A configuration as a manifest holds it: a path on one machine says nothing on another.

    Args:
        config: of a recipe.
        sections: those that may name a file of weights, or are lists of such.
    """
    values = config.model_dump(mode="json")
    for section in sections:
        found = values[section]
        for teacher in found if isinstance(found, list) else [found]:
            if teacher["weights"]:
                teacher["weights"] = Path(teacher["weights"]).name
    return values
