"""Labelled images in memory, what is done to them, and how well a classifier does on them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from pipeline.backbones import ModelSpec
from pipeline.config import Config
from pipeline.device import in_batches
from pipeline.digest import seed_for
from pipeline.draws import batch_rows
from pipeline.tensors import to_numpy


class ImageConfig(Config):
    """The pictures: shape, normalisation and what may be done to them without changing a label."""

    size: int = Field(default=224, ge=4, description="side of the square images, in pixels")
    channels: Literal[1, 3] = 3
    mean: tuple[float, ...] = Field(
        default=(0.485, 0.456, 0.406), description="per channel, of [0, 1]"
    )
    std: tuple[float, ...] = (0.229, 0.224, 0.225)
    flip: bool = Field(default=True, description="whether a mirrored image keeps its label")

    def model_spec(self, backbone: str, classes: int) -> ModelSpec:
        """The specification of a classifier of such images."""
        return ModelSpec(backbone, classes, self.channels, self.mean, self.std)


@dataclass(frozen=True)
class Pictures:
    """Images as they are stored, normalised when they are taken: a quarter of the memory.

    Attributes:
        pixels: (N, C, S, S) uint8.
        mean: (1, C, 1, 1) of pixels in [0, 1].
        std: likewise.
    """

    pixels: Tensor
    mean: Tensor
    std: Tensor

    @classmethod
    def of(cls, pixels: npt.NDArray[Any], image: ImageConfig, device: torch.device) -> Pictures:
        """From uint8 images (N, S, S, C)."""
        mean, std = (
            torch.tensor(v, device=device).view(1, -1, 1, 1) for v in (image.mean, image.std)
        )
        x = torch.from_numpy(np.array(pixels.transpose(0, 3, 1, 2), order="C"))
        return cls(x.to(device), mean, std)

    def __len__(self) -> int:
        return len(self.pixels)

    def take(self, rows: Tensor | slice) -> Tensor:
        """Some of them, (B, C, S, S) float32, as (x / 255 - mean) / std."""
        return (self.pixels[rows].float() / 255 - self.mean) / self.std


def normalise(pixels: npt.NDArray[Any], image: ImageConfig, device: torch.device) -> Tensor:
    """uint8 images (N, S, S, C) as float32 (N, C, S, S), (x / 255 - mean) / std."""
    return Pictures.of(pixels, image, device).take(slice(None))


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


def augmented_batch(
    data: LabelledImages, image: ImageConfig, size: int, seed: int, epoch: int, index: int
) -> tuple[Tensor, Tensor]:
    """Batch ``index`` of an epoch as a classifier is trained on: images, normalised, and labels."""
    rows = data.rows(seed, epoch, index, size)
    own = seed_for(seed, "augment", epoch, index)
    return augmented(data.images.take(rows), image, own), data.labels[rows]


def accuracy(model: nn.Module, data: LabelledImages) -> dict[str, Any]:
    """Top-1 accuracy in percent, and the number of images it was measured on."""

    def hits(rows: Tensor) -> Tensor:
        answers: Tensor = model(data.images.take(rows)).argmax(1)
        return answers == data.labels[rows]

    rows = torch.arange(len(data), device=data.labels.device)
    correct = int(in_batches(hits, rows).sum())
    return {"accuracy": 100 * correct / len(data), "images": len(data)}


def augmented(x: Tensor, image: ImageConfig, seed: int) -> Tensor:
    """Images (B, C, S, S) shifted by up to an eighth, and mirrored where that keeps the label."""
    generator = torch.Generator().manual_seed(seed)
    x = shifted(x, image.size // 8, generator)
    if image.flip:
        mirrored = torch.rand(len(x), generator=generator).to(x.device) < 0.5
        x = torch.where(mirrored[:, None, None, None], x.flip(3), x)
    return x


def shifted(x: Tensor, most: int, generator: torch.Generator) -> Tensor:
    """Each image (B, C, S, S) moved by up to ``most`` pixels; its border is repeated."""
    batch, _, size, _ = x.shape
    offsets = torch.randint(-most, most + 1, (2, batch, 1), generator=generator).to(x.device)
    line = (torch.arange(size, device=x.device) + offsets).clamp(0, size - 1)
    image = torch.arange(batch, device=x.device)[:, None, None]
    return x.permute(0, 2, 3, 1)[image, line[0][:, :, None], line[1][:, None, :]].permute(
        0, 3, 1, 2
    )


def task_loss(
    answers: Tensor, labels: Tensor, teacher: nn.Module, x: Tensor, share: float
) -> Tensor:
    """Cross-entropy of labels, and with ``share`` the divergence from a teacher's logits of x."""
    loss = (1 - share) * F.cross_entropy(answers, labels)
    if share:
        with torch.no_grad():
            wanted = F.log_softmax(teacher(x), 1)
        given = F.log_softmax(answers, 1)
        loss = loss + share * F.kl_div(given, wanted, reduction="batchmean", log_target=True)
    return loss
