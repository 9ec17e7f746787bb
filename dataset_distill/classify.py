"""Labelled images in memory, and how well a classifier does on them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import torch
from torch import Tensor, nn

from pipeline.dataset_distill.config import ImageConfig
from pipeline.dataset_distill.views import Pictures
from pipeline.device import in_batches
from pipeline.draws import batch_rows
from pipeline.tensors import to_numpy


@dataclass(frozen=True)
class LabelledImages:
    """N images and labels (N,) int64, on one device."""

    images: Pictures
    labels: Tensor

    @classmethod
    def of(cls, table: pa.Table, image: ImageConfig, device: torch.device) -> LabelledImages:
        """From a table with a uint8 tensor column ``image`` and an int column ``label``."""
        labels = torch.from_numpy(to_numpy(table["label"]).astype("int64"))
        return cls(Pictures.of(to_numpy(table["image"]), image, device), labels.to(device))

    def __len__(self) -> int:
        return len(self.labels)

    def steps(self, batch_size: int) -> int:
        """Batches an epoch; a last, smaller batch is left out unless it is the only one."""
        return max(1, len(self) // batch_size)

    def rows(self, seed: int, epoch: int, index: int, batch_size: int) -> Tensor:
        """Rows of one batch of an epoch, in which each is in at most one."""
        return batch_rows(len(self), batch_size, seed, epoch, index, self.labels.device)


def accuracy(model: nn.Module, data: LabelledImages) -> dict[str, Any]:
    """Top-1 accuracy in percent, and the number of images it was measured on."""

    def hits(rows: Tensor) -> Tensor:
        answers: Tensor = model(data.images.take(rows)).argmax(1)
        return answers == data.labels[rows]

    rows = torch.arange(len(data), device=data.labels.device)
    correct = int(in_batches(hits, rows).sum())
    return {"accuracy": 100 * correct / len(data), "images": len(data)}
