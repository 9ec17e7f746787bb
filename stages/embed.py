"""Pixels to features."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache, partial
from typing import ClassVar

import numpy as np
import pyarrow as pa
import torch
from torch import nn

from pipeline import backbones
from pipeline.device import default_device, in_batches
from pipeline.labelled_images import ImageConfig, normalise
from pipeline.stage import ShardContext
from pipeline.storage.artifact import Artifact
from pipeline.storage.models import read_model
from pipeline.tensors import tensor_column, to_numpy


@dataclass(frozen=True)
class Embed:
    """Put ``feature``, a float32 tensor (D,), in the place of ``image``, a uint8 tensor.

    Features are what the last linear layer of a classifier is given. Samples whose features are all
    0, which point nowhere, or not finite are quarantined as ``no-feature``.

    Args:
        network: a fitted classifier, or the name of a provider's network that comes with weights.
        image: size, channels and normalisation of the images.
    """

    network: Artifact | str
    image: ImageConfig

    version: ClassVar[int] = 1
    model: ClassVar[bool] = True

    def __call__(self, table: pa.Table, context: ShardContext) -> pa.Table:
        device = default_device()
        network = open_network(self.network, self.image.channels, device)
        images = normalise(to_numpy(table["image"]), self.image, device)
        features = in_batches(partial(backbones.embed, network), images).cpu().numpy()
        lengths = np.linalg.norm(features, axis=1)
        good = np.isfinite(lengths) & (lengths > 0)
        for row in np.flatnonzero(~good).tolist():
            detail = "Its features are all 0." if lengths[row] == 0 else "Its features overflow."
            context.quarantine(table["key"][row].as_py(), "no-feature", detail)
        table = table.remove_column(table.schema.get_field_index("image"))
        return table.filter(pa.array(good)).append_column("feature", tensor_column(features[good]))


def open_network(network: Artifact | str, channels: int, device: torch.device) -> nn.Module:
    """A fitted classifier, or a provider's by its name, ready to look at images."""
    if isinstance(network, str):
        return _pretrained(network, channels, device)
    return read_model(network, device)


@lru_cache(maxsize=1)
def _pretrained(name: str, channels: int, device: torch.device) -> nn.Module:
    # The number of classes is that of the published weights.
    network = backbones.build(name, 1000, channels, pretrained=True)
    return network.to(device).eval().requires_grad_(requires_grad=False)
