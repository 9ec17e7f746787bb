"""Images to latents and records of a feature codec."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import ClassVar

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import torch
from torch import nn

from pipeline.codecs.choose_model import model_from_arrays
from pipeline.codecs.feature_codec import (
    Bottleneck,
    FeatureEncoder,
    FeatureSpec,
    latents_of,
    quantized,
    read_spec,
)
from pipeline.device import default_device
from pipeline.stage import ShardContext
from pipeline.storage.array_artifact import FILE, read_arrays
from pipeline.storage.artifact import Artifact
from pipeline.storage.models import ModelFiles
from pipeline.storage.store import Store
from pipeline.tensors import tensor_column, to_numpy

BATCH = 64


def read_encoder(files: ModelFiles, entropy: Artifact, device: torch.device) -> FeatureEncoder:
    """The encoder with its entropy model; one copy a process and device."""
    return _read_encoder(files, entropy.store, entropy.files[FILE].sha256, device)


@lru_cache(maxsize=2)
def _read_encoder(
    files: ModelFiles, store: Store, _sha256: str, device: torch.device
) -> FeatureEncoder:
    model = model_from_arrays(read_arrays(Artifact.open(store)))
    made = FeatureEncoder.load(*files.read(), model)
    made.network.to(device)
    return made


@dataclass(frozen=True)
class EncodeLatents:
    """Put ``latents``, an int16 tensor (C, h, w), in the place of ``image``, a uint8 tensor.

    Args:
        codec: a trained bottleneck.
    """

    codec: ModelFiles

    version: ClassVar[int] = 1
    model: ClassVar[bool] = True

    def __call__(self, table: pa.Table, context: ShardContext) -> pa.Table:
        spec, weights = self.codec.read()
        encoder = Bottleneck.load(spec, weights).encoder.to(default_device())
        found = _latents(read_spec(spec), encoder, table)
        return _without_image(table).append_column("latents", tensor_column(quantized(found)))


@dataclass(frozen=True)
class EncodeFeatures:
    """Put what a codec makes of an image in the place of ``image``, a uint8 tensor.

    New columns: ``dropped``, int32, how many symbols a budget has cost, and ``features``, binary, a
    record of the codec's bitstream; or, with ``arrays``, ``latents``, an int16 tensor (C, h, w).

    Args:
        codec: a trained bottleneck.
        entropy: a step that has the entropy model.
        budget: bytes that no record may exceed.
        arrays: leave the coding to the format that is written.
    """

    codec: ModelFiles
    entropy: Artifact
    budget: int | None = None
    arrays: bool = False

    version: ClassVar[int] = 1
    model: ClassVar[bool] = True

    def __call__(self, table: pa.Table, context: ShardContext) -> pa.Table:
        encoder = read_encoder(self.codec, self.entropy, default_device())
        found = quantized(_latents(encoder.spec, encoder.network, table))
        coded = [encoder.record(one, self.budget) for one in found]
        records, dropped = [record for record, _, _ in coded], [lost for _, _, lost in coded]
        symbols = np.array([kept for _, kept, _ in coded], np.int16).reshape(found.shape)
        context.metrics["bytes"] = sum(map(len, records))
        context.metrics["over_budget"] = sum(lost > 0 for lost in dropped)
        context.metrics["escapes"] = encoder.model.escapes(symbols.reshape(len(found), -1))
        context.metrics["symbols"] = symbols.size
        table = _without_image(table).append_column("dropped", pa.array(dropped, pa.int32()))
        if self.arrays:
            return table.append_column("latents", tensor_column(symbols))
        return table.append_column("features", pa.array(records, pa.binary()))


def _latents(spec: FeatureSpec, encoder: nn.Module, table: pa.Table) -> npt.NDArray[np.float32]:
    """Latents (N, C, h, w) of the images of a table."""
    pixels = torch.from_numpy(to_numpy(table["image"]).transpose(0, 3, 1, 2).copy())
    device, found = next(encoder.parameters()).device, []
    for part in torch.split(pixels, BATCH):
        x = part.to(device).float() / 255
        # Sums of floats depend on the size of a batch: all have the same.
        whole = torch.cat([x, x[:1].expand(BATCH - len(x), -1, -1, -1)])
        found.append(latents_of(spec, encoder, whole)[: len(x)].float().cpu().numpy())
    return np.concatenate([np.zeros((0, *spec.latents), np.float32), *found])


def _without_image(table: pa.Table) -> pa.Table:
    return table.remove_column(table.schema.get_field_index("image"))
