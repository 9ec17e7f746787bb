"""Synthesis as a stage: keys and labels in, images out."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import pyarrow as pa
import torch

from pipeline.dataset_distill.config import ImageConfig, RecoverConfig
from pipeline.dataset_distill.recover import recover
from pipeline.device import default_device
from pipeline.digest import seed_for
from pipeline.stage import ShardContext
from pipeline.storage.artifact import Artifact
from pipeline.storage.models import read_model
from pipeline.tensors import tensor_column, to_numpy


@dataclass(frozen=True)
class Recover:
    """Optimise the images of one shard together; each starts from noise drawn for its key.

    Adds ``image`` (uint8, S x S x C) to ``key`` and ``label``, and reports the loss trace.
    """

    teacher: Artifact
    config: RecoverConfig
    image: ImageConfig

    version: ClassVar[int] = 1
    model: ClassVar[bool] = True

    def __call__(self, table: pa.Table, context: ShardContext) -> pa.Table:
        device = default_device()
        shape = (self.image.channels, self.image.size, self.image.size)
        noise = torch.stack(
            [
                torch.randn(shape, generator=torch.Generator().manual_seed(seed))
                for seed in (seed_for(context.seed, key) for key in table["key"].to_pylist())
            ]
        )
        labels = torch.from_numpy(to_numpy(table["label"]).copy()).to(device)
        rng = np.random.default_rng(seed_for(context.seed, context.shard))
        teacher = read_model(self.teacher, device)
        result = recover(teacher, labels, noise.to(device), rng, self.config, self.image)
        context.metrics["trace"] = result.trace
        context.metrics["final"] = result.final
        return table.append_column("image", tensor_column(result.images))
