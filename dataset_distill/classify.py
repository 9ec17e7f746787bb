"""Labelled images in memory, and how well a classifier does on them."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import pyarrow as pa
import torch
from torch import Tensor, nn

from pipeline.dataset_distill.config import ImageConfig
from pipeline.dataset_distill.views import normalise
from pipeline.digest import seed_for
from pipeline.tensors import to_numpy

EVAL_BATCH = 500


@dataclass(frozen=True)
class LabelledImages:
    """Images (N, C, S, S) float32, normalised, and labels (N,) int64, on one device."""

    images: Tensor
    labels: Tensor

    @classmethod
    def of(cls, table: pa.Table, image: ImageConfig, device: torch.device) -> LabelledImages:
        """From a table with a uint8 tensor column ``image`` and an int column ``label``."""
        labels = torch.from_numpy(to_numpy(table["label"]).astype("int64"))
        return cls(normalise(to_numpy(table["image"]), image, device), labels.to(device))

    def __len__(self) -> int:
        return len(self.labels)

    def steps(self, batch_size: int) -> int:
        """Batches an epoch; a last, smaller batch is left out unless it is the only one."""
        return max(1, len(self) // batch_size)

    def rows(self, seed: int, epoch: int, index: int, batch_size: int) -> Tensor:
        """Rows of one batch of an epoch, in which each is in at most one."""
        order = _order(len(self), seed, epoch, self.labels.device)
        return order[index * batch_size : (index + 1) * batch_size]


@lru_cache(maxsize=1)  # of the epoch in progress
def _order(rows: int, seed: int, epoch: int, device: torch.device) -> Tensor:
    generator = torch.Generator().manual_seed(seed_for(seed, "order", epoch))
    return torch.randperm(rows, generator=generator).to(device)


def accuracy(model: nn.Module, data: LabelledImages) -> dict[str, Any]:
    """Top-1 accuracy in percent, and the number of images it was measured on."""
    batches = zip(
        torch.split(data.images, EVAL_BATCH), torch.split(data.labels, EVAL_BATCH), strict=True
    )
    hits = [(model(x).argmax(1) == y).sum() for x, y in batches]
    correct = int(torch.stack(hits).sum())
    return {"accuracy": 100 * correct / len(data), "images": len(data)}
