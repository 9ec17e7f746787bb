"""Compression of a classifier: low-rank weights, then codes, both trained to do what it did."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

import pyarrow as pa
import torch
from safetensors.torch import load
from torch import Tensor, nn

from pipeline.backbones import Teachers
from pipeline.codecs.coded_model import to_codes, to_empty_codes, to_low_rank
from pipeline.codecs.low_rank_vq import CodedLayer
from pipeline.config import TrainConfig
from pipeline.digest import seed_for
from pipeline.labelled_images import (
    ImageConfig,
    LabelledImages,
    accuracy,
    augmented_batch,
    task_loss,
)


class Files(Protocol):
    """The two files of a fitted model; ``identity`` is their digest."""

    @property
    def identity(self) -> str: ...
    def read(self) -> tuple[bytes, bytes]:
        """Specification and weights."""


@dataclass(frozen=True)
class CompressSpec:
    """What a network in compression is made of: not enough to build it without its teacher."""

    layers: tuple[CodedLayer, ...]
    coded: bool


@dataclass(frozen=True)
class Compress:
    """Train a network with low-rank weights, or with codes, on ``train``; measure it on ``test``.

    Source: Zhu, Zhou and Zhong, "Learning Low-Rank Representations for Model Compression", 2023.

    Args:
        teacher: the network that is compressed.
        image: what it expects.
        layers: how its weights are coded.
        train: of this stage.
        distillation: weight of the divergence from the teacher's answers, beside the labels'
            cross-entropy with the rest of 1.
        low_rank: the trained network with low-rank weights; with it, these are clustered and codes
            are trained.
    """

    teacher: Teachers
    image: ImageConfig
    layers: tuple[CodedLayer, ...]
    train: TrainConfig
    distillation: float
    low_rank: Files | None = None

    version: ClassVar[int] = 1

    @property
    def workers(self) -> int:
        return self.train.workers

    def prepare(
        self, inputs: Mapping[str, pa.Table], seed: int, device: torch.device
    ) -> CompressTraining:
        (teacher,) = self.teacher.networks(device)
        model = self._copy(teacher)
        to_low_rank(model, self.layers)
        if self.low_rank is not None:
            model.load_state_dict(load(self.low_rank.read()[1]))
            to_codes(model, self.layers, seed_for(seed, "codes") % 2**32, torch.get_num_threads())
        sets = {name: LabelledImages.of(t, self.image, device) for name, t in inputs.items()}
        return CompressTraining(model.to(device), teacher, self, sets, seed)

    def restored(self, coded: Files) -> nn.Module:
        """The network with trained codes from its files, on the CPU."""
        (teacher,) = self.teacher.networks(torch.device("cpu"))
        model = to_empty_codes(self._copy(teacher), self.layers)
        model.load_state_dict(load(coded.read()[1]))
        return model.eval()

    def _copy(self, teacher: nn.Module) -> nn.Module:
        return copy.deepcopy(teacher).cpu().requires_grad_(requires_grad=True)


@dataclass(frozen=True)
class CompressTraining:
    """The training of a network in compression."""

    model: nn.Module
    teacher: nn.Module
    task: Compress
    sets: Mapping[str, LabelledImages]
    seed: int

    @property
    def spec(self) -> CompressSpec:
        return CompressSpec(self.task.layers, self.task.low_rank is not None)

    @property
    def config(self) -> TrainConfig:
        return self.task.train

    @property
    def steps(self) -> int:
        return self.sets["train"].steps(self.config.batch_size)

    def batch(self, epoch: int, index: int) -> tuple[Tensor, Tensor]:
        size, image = self.config.batch_size, self.task.image
        return augmented_batch(self.sets["train"], image, size, self.seed, epoch, index)

    def loss(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        x, labels = batch
        return task_loss(self.model(x), labels, self.teacher, x, self.task.distillation)

    def evaluate(self) -> dict[str, Any]:
        return accuracy(self.model, self.sets["test"])
