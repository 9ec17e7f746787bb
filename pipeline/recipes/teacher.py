"""A classifier that a recipe trains, or takes with its weights."""

from __future__ import annotations

from pathlib import Path

from pipeline.dataset_distill.config import ImageConfig, SqueezeConfig
from pipeline.dataset_distill.squeeze import Squeeze
from pipeline.storage.weights import WeightsFile


def teacher_task(config: SqueezeConfig, image: ImageConfig, classes: int) -> Squeeze:
    """The classifier's task; a file of weights counts by its content, not by where it lies."""
    if config.weights is None or config.weights == "pretrained":
        return Squeeze(config, image, classes)
    file = WeightsFile(Path(config.weights))
    return Squeeze(config.model_copy(update={"weights": file.name}), image, classes, file)
