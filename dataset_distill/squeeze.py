"""Squeeze: the teacher, trained on the real data or taken with its weights."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import pyarrow as pa
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipeline import backbones
from pipeline.backbones import ModelSpec, Weights
from pipeline.config import TrainConfig
from pipeline.dataset_distill.config import SqueezeConfig
from pipeline.errors import UsageError
from pipeline.labelled_images import ImageConfig, LabelledImages, accuracy, augmented_batch


@dataclass(frozen=True)
class Squeeze:
    """Train a classifier on ``train`` and score it on ``test``.

    With ``weights`` it is not trained: the given ones are loaded and scored.
    """

    config: SqueezeConfig
    image: ImageConfig
    classes: int
    weights: Weights | None = None

    version: ClassVar[int] = 2

    @property
    def given(self) -> bool:
        """Whether the weights are given, so that there is nothing to train."""
        return bool(self.weights or self.config.weights)

    @property
    def workers(self) -> int:
        return 1 if self.given else self.config.train.workers

    def network(self) -> nn.Module:
        """The network before training, with its weights where some were given.

        Raises:
            UsageError: it cannot be made, or does not map these images to these classes.
        """
        name, channels, size = self.config.backbone, self.image.channels, self.image.size
        pretrained = self.config.weights == "pretrained"
        model = backbones.build(name, self.classes, channels, pretrained=pretrained)
        if self.weights:
            backbones.load_weights(model, self.weights.arrays(), self.weights.name)
        with torch.inference_mode():
            outputs = model.eval()(torch.zeros(1, channels, size, size)).shape[1]
        if outputs != self.classes:
            raise UsageError(
                f"The network '{name}' has {outputs} outputs, and the data set {self.classes} "
                "classes.",
                hint="Give weights that were trained on this data set, or let a teacher be "
                "trained.",
                code="weights-mismatch",
            )
        return model

    def prepare(
        self, inputs: Mapping[str, pa.Table], seed: int, device: torch.device
    ) -> SqueezeTraining:
        model = self.network()
        train = self.config.train
        if self.given:
            train = train.model_copy(update={"epochs": 0})
        sets = {name: LabelledImages.of(t, self.image, device) for name, t in inputs.items()}
        return SqueezeTraining(model.to(device), train, self, sets, seed)


@dataclass(frozen=True)
class SqueezeTraining:
    """A teacher's training: cross-entropy on images shifted by up to an eighth, and mirrored."""

    model: nn.Module
    config: TrainConfig
    task: Squeeze
    sets: Mapping[str, LabelledImages]
    seed: int

    @property
    def spec(self) -> ModelSpec:
        return self.task.image.model_spec(self.task.config.backbone, self.task.classes)

    @property
    def steps(self) -> int:
        return self.sets["train"].steps(self.config.batch_size) if "train" in self.sets else 0

    def batch(self, epoch: int, index: int) -> tuple[Tensor, Tensor]:
        size, image = self.config.batch_size, self.task.image
        return augmented_batch(self.sets["train"], image, size, self.seed, epoch, index)

    def loss(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        x, labels = batch
        return F.cross_entropy(self.model(x), labels)

    def evaluate(self) -> dict[str, Any]:
        return accuracy(self.model, self.sets["test"])
