"""The student: trained from scratch on a small labelled set, scored on real images."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import pyarrow as pa
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipeline import backbones
from pipeline.backbones import ModelSpec
from pipeline.config import TrainConfig
from pipeline.dataset_distill.classify import LabelledImages, accuracy
from pipeline.dataset_distill.config import ImageConfig, StudentConfig
from pipeline.dataset_distill.views import Views, render
from pipeline.tensors import to_numpy


@dataclass(frozen=True)
class Student:
    """Learn the stored logits of the stored views of ``train``, and be scored on ``test``.

    The loss is the KL divergence of temperature-scaled outputs, times the squared temperature
    (Hinton et al., 2015).
    """

    config: StudentConfig
    backbone: str
    image: ImageConfig
    classes: int

    version: ClassVar[int] = 2

    @property
    def workers(self) -> int:
        return self.config.train.workers

    def prepare(
        self, inputs: Mapping[str, pa.Table], seed: int, device: torch.device
    ) -> StudentTraining:
        model = backbones.build(self.backbone, self.classes, self.image.channels).to(device)
        table = inputs["train"]
        views = Views(*(to_numpy(table[name]) for name in Views.NAMES)).to(device)
        logits = torch.from_numpy(np.array(to_numpy(table["logits"]))).to(device)
        train = LabelledImages.of(table, self.image, device)
        test = LabelledImages.of(inputs["test"], self.image, device)
        return StudentTraining(model, self.config.train, self, train, views, logits, test, seed)


@dataclass(frozen=True)
class StudentTraining:
    """A student's training; epoch e sees view e mod V of every image."""

    model: nn.Module
    config: TrainConfig
    task: Student
    train: LabelledImages
    views: Views
    logits: Tensor
    test: LabelledImages
    seed: int

    @property
    def spec(self) -> ModelSpec:
        return self.task.image.model_spec(self.task.backbone, self.task.classes)

    @property
    def steps(self) -> int:
        return self.train.steps(self.config.batch_size)

    def batch(self, epoch: int, index: int) -> tuple[Tensor, Tensor]:
        rows = self.train.rows(self.seed, epoch, index, self.config.batch_size)
        view = torch.full_like(rows, epoch % self.logits.shape[1])
        x = render(self.train.images, self.views, rows, view)
        return x, self.logits[rows, view].float()

    def loss(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        x, target = batch
        output = self.model(x)
        heat = self.task.config.temperature
        student, teacher = F.log_softmax(output / heat, 1), F.log_softmax(target / heat, 1)
        return heat**2 * F.kl_div(student, teacher, reduction="batchmean", log_target=True)

    def evaluate(self) -> dict[str, Any]:
        return accuracy(self.model, self.test)
