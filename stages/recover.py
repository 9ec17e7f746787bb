"""Synthesis as a stage: keys and labels in, images out."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import pyarrow as pa
import torch

from pipeline.dataset_distill.class_statistics import targets_of
from pipeline.dataset_distill.config import RecoverConfig
from pipeline.dataset_distill.recover import recover
from pipeline.device import default_device
from pipeline.digest import seed_for
from pipeline.labelled_images import ImageConfig, normalise
from pipeline.stage import ShardContext
from pipeline.storage.array_artifact import read_arrays
from pipeline.storage.artifact import Artifact
from pipeline.storage.models import read_model
from pipeline.tensors import tensor_column, to_numpy


@dataclass(frozen=True)
class Recover:
    """Optimise the images of one shard together.

    Each starts from ``image`` (uint8, S x S x C) where there is one, else from noise drawn for its
    key. Where there is a column ``iterations``, the same in all rows, it stands for the
    configuration's. Gives ``image``, and reports the loss trace.

    Args:
        teachers: fitted classifiers.
        units: which of them.
        config: of the synthesis.
        image: size, channels and normalisation of the images.
        statistics: of :class:`~pipeline.dataset_distill.class_statistics.ClassStatistics`, to match
            where all images of a shard are of one class.
    """

    teachers: Artifact
    units: tuple[str, ...]
    config: RecoverConfig
    image: ImageConfig
    statistics: Artifact | None = None

    version: ClassVar[int] = 2
    model: ClassVar[bool] = True

    def __call__(self, table: pa.Table, context: ShardContext) -> pa.Table:
        device = default_device()
        networks = [read_model(self.teachers, device, unit) for unit in self.units]
        labels = to_numpy(table["label"])
        config = self.config
        if "iterations" in table.column_names:
            config = config.model_copy(update={"iterations": table["iterations"][0].as_py()})
        targets = None
        if self.statistics is not None:
            targets = targets_of(read_arrays(self.statistics), int(labels[0]), networks)
        result = recover(
            networks,
            torch.from_numpy(labels.copy()).to(device),
            self._start(table, context.seed).to(device),
            seed_for(context.seed, context.shard),
            config,
            self.image,
            targets=targets,
            checkpoint=context.checkpoint,
        )
        context.metrics["trace"] = result.trace
        context.metrics["final"] = result.final
        if "image" in table.column_names:
            table = table.remove_column(table.schema.get_field_index("image"))
        return table.append_column("image", tensor_column(result.images))

    def _start(self, table: pa.Table, seed: int) -> torch.Tensor:
        if "image" in table.column_names:
            return normalise(to_numpy(table["image"]), self.image, torch.device("cpu"))
        shape = (self.image.channels, self.image.size, self.image.size)
        seeds = [seed_for(seed, key) for key in table["key"].to_pylist()]
        return torch.stack(
            [torch.randn(shape, generator=torch.Generator().manual_seed(s)) for s in seeds]
        )
