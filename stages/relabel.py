"""Soft labels as a stage: images in, seeds of views and logits out."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import pyarrow as pa

from pipeline.dataset_distill.label_codec import LabelCodec
from pipeline.dataset_distill.relabel import soft_labels
from pipeline.dataset_distill.views import ViewSampler
from pipeline.device import default_device
from pipeline.digest import seed_for
from pipeline.labelled_images import Pictures
from pipeline.stage import ShardContext
from pipeline.storage.artifact import Artifact
from pipeline.storage.models import read_model
from pipeline.tensors import tensor_column, to_numpy


@dataclass(frozen=True)
class Relabel:
    """Put the seed of each image's views, and the teachers' logits for each, in place of ``image``.

    New columns, a row: ``seed`` int64, from which
    :class:`~pipeline.dataset_distill.views.ViewSampler` draws any view, and what the codec makes of
    logits (V, classes).

    Args:
        teachers: fitted classifiers.
        units: which of them; labels are the mean of their logits.
        sampler: draws the views; its groups are the shards.
        views: V; view v of an image is the same whatever V is. With 0 there are seeds alone.
        codec: how logits are stored.
    """

    teachers: Artifact
    units: tuple[str, ...]
    sampler: ViewSampler
    views: int
    codec: LabelCodec

    version: ClassVar[int] = 2
    model: ClassVar[bool] = True

    def __call__(self, table: pa.Table, context: ShardContext) -> pa.Table:
        device = default_device()
        seeds = np.array([seed_for(context.seed, k) for k in table["key"].to_pylist()], np.int64)
        labels = table.select(["key", "label"]).append_column("seed", pa.array(seeds))
        if not self.views:
            return labels
        views = self.sampler.draw(seeds, range(self.views)).to(device)
        pictures = Pictures.of(to_numpy(table["image"]), self.sampler.image, device)
        teachers = [read_model(self.teachers, device, unit) for unit in self.units]
        columns = self.codec.encode(soft_labels(teachers, pictures, views))
        for name, values in columns.items():
            labels = labels.append_column(name, tensor_column(values))
        return labels
