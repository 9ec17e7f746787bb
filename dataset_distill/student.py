"""The student: trained from scratch on a small labelled set, scored on real images."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipeline import backbones
from pipeline.backbones import ModelSpec, Teachers
from pipeline.config import TrainConfig
from pipeline.dataset_distill.config import StudentConfig
from pipeline.dataset_distill.label_codec import LabelCodec
from pipeline.dataset_distill.relabel import mean_logits
from pipeline.dataset_distill.views import Views, ViewSampler, render
from pipeline.digest import seed_for
from pipeline.labelled_images import ImageConfig, LabelledImages, accuracy
from pipeline.tensors import is_tensor, to_numpy


@dataclass(frozen=True)
class Student:
    """Learn soft labels of views of ``train``, and be scored on ``test``.

    Labels are those stored in ``labels``, row by row of ``train``; epoch e sees view e mod V of
    every image. With ``online`` they are what these teachers say of view e, and ``labels`` holds
    the seeds alone. With ``shuffled`` the labels of a batch are dealt to its images at random: a
    student that still learns has seen what it should not. With ``views`` only the first of the
    stored views are used.

    The loss is the KL divergence of temperature-scaled outputs, times the squared temperature
    (Hinton et al., 2015).
    """

    config: StudentConfig
    backbone: str
    classes: int
    sampler: ViewSampler
    codec: LabelCodec
    online: Teachers | None = None
    shuffled: bool = False
    views: int | None = None

    version: ClassVar[int] = 3

    @property
    def workers(self) -> int:
        return self.config.train.workers

    @property
    def image(self) -> ImageConfig:
        return self.sampler.image

    def prepare(
        self, inputs: Mapping[str, pa.Table], seed: int, device: torch.device
    ) -> StudentTraining:
        model = backbones.build(self.backbone, self.classes, self.image.channels).to(device)
        train = LabelledImages.of(inputs["train"], self.image, device)
        test = LabelledImages.of(inputs["test"], self.image, device)
        labels = SoftLabels.of(inputs["labels"], self.codec, self.classes)
        if inputs["labels"]["key"].to_pylist() != inputs["train"]["key"].to_pylist():
            raise ValueError("labels and images are not of the same samples in the same order")
        teachers = tuple(self.online.networks(device)) if self.online else ()
        views = EpochViews(self.sampler, labels.seeds)
        return StudentTraining(
            model, self.config.train, self, train, labels, teachers, test, views, seed
        )


@dataclass(frozen=True)
class SoftLabels:
    """The label store in memory, as it is coded: any (image, view) by itself, in any order.

    Attributes:
        seeds: (N,) int64 of the images' views.
        arrays: what the codec made of the logits, each (N, V, ...); empty where none are stored.
        codec: decodes them.
        classes: C.
    """

    seeds: npt.NDArray[np.int64]
    arrays: Mapping[str, npt.NDArray[Any]]
    codec: LabelCodec
    classes: int

    @classmethod
    def of(cls, table: pa.Table, codec: LabelCodec, classes: int) -> SoftLabels:
        """From a table that :class:`~pipeline.stages.relabel.Relabel` made."""
        names = [n for n in table.column_names if is_tensor(table[n].type)]
        arrays = {name: np.array(to_numpy(table[name])) for name in names}
        return cls(np.array(to_numpy(table["seed"])), arrays, codec, classes)

    def __len__(self) -> int:
        return len(self.seeds)

    @property
    def views(self) -> int:
        """Views of each image, V; 0 where no logits are stored."""
        return self.arrays["logits"].shape[1] if self.arrays else 0

    def logits(self, rows: Any, view: int) -> npt.NDArray[np.float32]:
        """Logits (B, C) of some rows' view with that number, or (C,) of a single row's."""
        return self.codec.decode({n: a[rows, view] for n, a in self.arrays.items()}, self.classes)


class EpochViews:
    """The views of all images with one number, kept while they are asked for."""

    def __init__(self, sampler: ViewSampler, seeds: npt.NDArray[np.int64]) -> None:
        self._sampler, self._seeds = sampler, seeds
        self._number: int | None = None
        self._views: Views | None = None

    def of(self, number: int, device: torch.device) -> Views:
        """Views number ``number``, with a second axis of length 1."""
        if self._views is None or number != self._number:
            self._views = self._sampler.draw(self._seeds, [number]).to(device)
            self._number = number
        return self._views


@dataclass(frozen=True)
class StudentTraining:
    """A student's training."""

    model: nn.Module
    config: TrainConfig
    task: Student
    train: LabelledImages
    labels: SoftLabels
    teachers: tuple[nn.Module, ...]
    test: LabelledImages
    views: EpochViews
    seed: int

    @property
    def spec(self) -> ModelSpec:
        return self.task.image.model_spec(self.task.backbone, self.task.classes)

    @property
    def steps(self) -> int:
        return self.train.steps(self.config.batch_size)

    def batch(self, epoch: int, index: int) -> tuple[Tensor, Tensor]:
        rows = self.train.rows(self.seed, epoch, index, self.config.batch_size)
        counts = [count for count in (self.task.views, self.labels.views) if count]
        number = epoch % min(counts) if counts else epoch
        views = self.views.of(number, rows.device)
        x = render(self.train.images, views, rows, torch.zeros_like(rows))
        if self.teachers:
            with torch.inference_mode():
                target = mean_logits(self.teachers, x)
            target = target.clone()
        else:
            target = torch.from_numpy(self.labels.logits(rows.cpu().numpy(), number)).to(x.device)
        if self.task.shuffled:
            generator = torch.Generator().manual_seed(seed_for(self.seed, "shuffle", epoch, index))
            target = target[torch.randperm(len(target), generator=generator).to(x.device)]
        return x, target

    def loss(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        x, target = batch
        output = self.model(x)
        heat = self.task.config.temperature
        student, teacher = F.log_softmax(output / heat, 1), F.log_softmax(target / heat, 1)
        return heat**2 * F.kl_div(student, teacher, reduction="batchmean", log_target=True)

    def evaluate(self) -> dict[str, Any]:
        return accuracy(self.model, self.test)
