"""Soft labels as a stage: images in, views and logits out."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import pyarrow as pa

from pipeline.dataset_distill.config import ImageConfig, RelabelConfig
from pipeline.dataset_distill.relabel import soft_labels
from pipeline.dataset_distill.views import normalise, sample_views
from pipeline.device import default_device
from pipeline.digest import seed_for
from pipeline.stage import ShardContext
from pipeline.storage.artifact import Artifact
from pipeline.storage.models import read_model
from pipeline.tensors import tensor_column, to_numpy


@dataclass(frozen=True)
class Relabel:
    """Add V views of every image and the teacher's logits for each.

    New columns, a row: ``crop`` V x 4, ``flip`` V, ``partner`` V, ``box`` V x 4 (see
    :class:`~pipeline.dataset_distill.views.Views`; ``partner`` counts rows of the whole set) and
    ``logits`` V x classes float16.

    Args:
        shard_rows: rows of every shard but the last.
    """

    teacher: Artifact
    config: RelabelConfig
    image: ImageConfig
    shard_rows: int

    version: ClassVar[int] = 1
    model: ClassVar[bool] = True

    def __call__(self, table: pa.Table, context: ShardContext) -> pa.Table:
        device = default_device()
        pixels = to_numpy(table["image"])
        keys = table["key"].to_pylist()
        rngs = [np.random.default_rng(seed_for(context.seed, key)) for key in keys]
        views = sample_views(
            rngs, self.image, self.config.views, self.config.crop_floor, self.config.cutmix
        )
        images = normalise(pixels, self.image, device)
        logits = soft_labels(read_model(self.teacher, device), images, views.to(device))
        first = int(context.shard) * self.shard_rows
        columns = {**vars(views), "partner": views.partner + np.int32(first), "logits": logits}
        for name, values in columns.items():
            table = table.append_column(name, tensor_column(values))
        return table
