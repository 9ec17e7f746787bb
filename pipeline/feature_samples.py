"""Features in few bytes, as a codec wrote them."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from pipeline.codecs.feature_codec import FeatureDecoder
from pipeline.epoch_order import Rows
from pipeline.image_tensors import labels_of
from pipeline.loaders import TorchSamples
from pipeline.recipes.compress_features import load_codec
from pipeline.samples import OnError, Samples
from pipeline.storage.artifact import Artifact, ArtifactSource
from pipeline.tensors import to_numpy


class FeatureSamples(Samples):
    """Latents of images, as records of a bitstream in Parquet or as an array in Zarr."""

    kind = "features"

    def __init__(self, artifact: Artifact, split: Artifact, place: str) -> None:
        super().__init__(ArtifactSource(split), place=place, artifact=artifact)

    def to_torch(self, *, on_error: OnError = "raise") -> FeatureTensors:  # type: ignore[override]
        """A torch data set of (latents, label, key).

        :meth:`FeatureDecoder.features` of :func:`pipeline.load_codec` makes features of them, on
        whatever device the training is.

        Args:
            on_error: what becomes of shards that cannot be read: an error, or they are left out and
                counted.
        """
        return FeatureTensors(self, load_codec(self.place)[1], on_error)


class FeatureBatch(NamedTuple):
    """Latents of images.

    Attributes:
        latents: (B, C, h, w) float32, whole numbers.
        label: (B,) int64; -1 where there is none.
        key: B strings.
    """

    latents: Tensor
    label: Tensor
    key: list[str]


class FeatureTensors(TorchSamples[FeatureBatch]):
    """Item i is the latents of image i, decoded when they are asked for."""

    def __init__(self, samples: FeatureSamples, decoder: FeatureDecoder, on_error: OnError) -> None:
        super().__init__(samples, on_error)
        self._decoder = decoder

    def batch(self, rows: Rows, epoch: int) -> FeatureBatch:
        table = self.samples.table(rows, self.on_error)
        if "latents" in table.column_names:
            latents = torch.from_numpy(to_numpy(table["latents"]).astype(np.float32))
        else:
            latents = self._decoder.latents(table["features"].to_pylist())
        return FeatureBatch(latents, labels_of(table), table["key"].to_pylist())
