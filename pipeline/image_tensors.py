"""Images as tensors."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from pipeline.epoch_order import Rows
from pipeline.errors import RunError, UsageError
from pipeline.labelled_images import ImageConfig
from pipeline.loaders import TorchSamples
from pipeline.samples import OnError, Samples
from pipeline.stage import ShardContext
from pipeline.stages.decode import Decode, each_image, pixels_of
from pipeline.storage.images import MAX_PIXELS, SECONDS
from pipeline.tensors import to_numpy

Transform = Callable[[Tensor], Tensor]


class ImageBatch(NamedTuple):
    """Images with labels.

    Attributes:
        image: (B, C, S, S), float32 normalised, or uint8.
        label: (B,) int64; -1 where there is none.
        key: B strings.
    """

    image: Tensor
    label: Tensor
    key: list[str]


class ImageTensors(TorchSamples[ImageBatch]):
    """Images, decoded when they are asked for. Arguments as of :meth:`Samples.to_torch`."""

    def __init__(
        self,
        samples: Samples,
        size: int | None,
        channels: Literal[1, 3] | None,
        normalize: bool,
        transform: Transform | None,
        on_error: OnError,
    ) -> None:
        super().__init__(samples, on_error)
        known = samples.image
        about = known or ImageConfig()
        self.size = size or (known.size if known else None)
        self.channels = channels or about.channels
        self.transform = transform
        self._scale: tuple[Tensor, Tensor] | None = None
        if normalize:
            mean, std = (torch.tensor(v).view(-1, 1, 1) for v in (about.mean, about.std))
            if self.channels != about.channels:
                mean, std = mean.mean(0, keepdim=True), std.mean(0, keepdim=True)
            self._scale = 1 / (255 * std), -mean / std

    def batch(self, rows: Rows, epoch: int) -> ImageBatch:
        table = self.samples.table(rows, self.on_error)
        context = ShardContext("", 0)
        if self.size is None:
            kept, images = self._as_they_are(table, context)
        else:
            kept, pixels = Decode(self.size, self.channels).pixels(table, context)
            # A view in channels-last order, which is how networks take images fastest.
            images = torch.from_numpy(pixels).permute(0, 3, 1, 2)
            if self.transform:
                images = _stacked([self.transform(image) for image in images])
        if context.bad and self.on_error == "raise":
            bad = context.bad[0]
            raise RunError(
                f"The image '{bad['key']}' cannot be used ({bad['reason']}): {bad['detail']}.",
                hint="Give on_error='skip' to leave such samples out, or see them with 'pipeline "
                "inspect'.",
                code="bad-sample",
                where=self.samples.place,
            )
        if self._scale and not images.is_floating_point():
            scale, shift = self._scale
            images = images.to(torch.float32).mul_(scale).add_(shift)
        table = table.drop_columns(["image"]).take(pa.array(kept, pa.int64()))
        return ImageBatch(images, labels_of(table), table["key"].to_pylist())

    def _as_they_are(self, table: pa.Table, context: ShardContext) -> tuple[list[int], Tensor]:
        found: list[Tensor] = []

        def put(image: Any, _: int) -> None:
            pixels = pixels_of(image, self.channels, None, MAX_PIXELS)
            one = torch.from_numpy(np.array(pixels.transpose(2, 0, 1)))
            found.append(self.transform(one) if self.transform else one)

        kept = each_image(table, context, put, SECONDS)
        return kept, _stacked(found)


def _stacked(images: list[Tensor]) -> Tensor:
    shapes = {tuple(image.shape) for image in images}
    if len(shapes) > 1:
        raise UsageError(
            f"Images of unlike sizes make no batch: {' and '.join(map(str, sorted(shapes)[:2]))}.",
            hint="Give size=, or a transform that makes them alike.",
            code="unlike-images",
        )
    return torch.stack(images) if images else torch.empty(0)


def labels_of(table: pa.Table) -> Tensor:
    """Labels (n,) int64; -1 where there is none."""
    if "label" not in table.column_names:
        return torch.full((len(table),), -1)
    return torch.from_numpy(to_numpy(table["label"].fill_null(-1)).astype(np.int64))
