"""Pixels to the features of their places, and these to the nearest codes of a codebook."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import numpy as np
import pyarrow as pa
import torch
import torch.nn.functional as F
from torch import Tensor

from pipeline import backbones
from pipeline.device import default_device, in_batches
from pipeline.labelled_images import ImageConfig, normalise
from pipeline.stage import ShardContext
from pipeline.stages.embed import open_network
from pipeline.storage.array_artifact import read_arrays
from pipeline.storage.artifact import Artifact
from pipeline.tensors import tensor_column, to_numpy


@dataclass(frozen=True)
class PatchFeatures:
    """Put ``features``, a float32 tensor (P, D), in the place of ``image``, a uint8 tensor.

    P places are in rows, from the top left. Images whose features are not finite are quarantined as
    ``no-feature``.

    Args:
        network: whose last map is taken, as for :class:`~pipeline.stages.embed.Embed`; without one
            features are the pixels of a place themselves.
        image: size, channels and normalisation of the images.
        patch: side in pixels of a place, where features are pixels.
        pool: places of a side whose features are averaged.
    """

    network: Artifact | str | None
    image: ImageConfig
    patch: int = 4
    pool: int = 1

    version: ClassVar[int] = 1
    model: ClassVar[bool] = True

    def __call__(self, table: pa.Table, context: ShardContext) -> pa.Table:
        device = default_device()
        images = normalise(to_numpy(table["image"]), self.image, device)
        if self.network is None:
            maps = F.pixel_unshuffle(images, self.patch)
        else:
            network = open_network(self.network, self.image.channels, device)
            maps = in_batches(partial(backbones.feature_maps, network), images)
        if self.pool > 1:
            maps = F.avg_pool2d(maps, self.pool)
        features = _rows(maps).cpu().numpy()
        good = np.isfinite(features).all((1, 2))
        for row in np.flatnonzero(~good).tolist():
            context.quarantine(table["key"][row].as_py(), "no-feature", "Its features overflow.")
        table = table.remove_column(table.schema.get_field_index("image"))
        return table.filter(pa.array(good)).append_column("features", tensor_column(features[good]))


def _rows(maps: Tensor) -> Tensor:
    """Maps (n, D, h, w) as vectors (n, h * w, D)."""
    return maps.flatten(2).transpose(1, 2).contiguous()


@dataclass(frozen=True)
class NearestCodes:
    """Put ``codes`` int32 (P,) and ``distances`` float32 (P,), squared, in ``features``' place.

    Args:
        codebook: a step that has found ``centroids`` (K, D).
    """

    codebook: Artifact

    version: ClassVar[int] = 1

    def __call__(self, table: pa.Table, context: ShardContext) -> pa.Table:
        from pipeline.clustering.kmeans import nearest

        features = to_numpy(table["features"])
        flat = np.ascontiguousarray(features.reshape(-1, features.shape[-1]))
        centroids = np.asarray(read_arrays(self.codebook)["centroids"], np.float32)
        codes, distances = nearest(flat, centroids, torch.get_num_threads())
        table = table.remove_column(table.schema.get_field_index("features"))
        for name, values in (("codes", codes), ("distances", distances)):
            column = tensor_column(values.reshape(features.shape[:2]))
            table = table.append_column(name, column)
        return table
