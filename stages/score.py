"""How hard samples are, as a stage."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import torch
from torch import Tensor

from pipeline.device import BATCH, default_device, in_batches
from pipeline.labelled_images import ImageConfig, normalise
from pipeline.pruning import scores
from pipeline.pruning.gradients import grand
from pipeline.stage import ShardContext
from pipeline.storage.array_artifact import read_arrays
from pipeline.storage.artifact import Artifact
from pipeline.storage.models import read_model, snapshots
from pipeline.tensors import to_numpy

Columns = dict[str, npt.NDArray[Any]]


@dataclass(frozen=True)
class Score:
    """Put scores, float32, in the place of ``image``, a uint8 tensor; the higher, the harder.

    They are the mean over networks. ``el2n`` and ``grand`` give the column of their name,
    ``uncertainty`` gives ``margin``, ``entropy`` and ``least-confidence``, and ``dynamics``, from
    the weights after every epoch, ``forgetting``, ``aum`` and ``tdds``.

    Args:
        networks: fitted classifiers.
        units: which of them.
        group: what to find.
        image: size, channels and normalisation of the images.
    """

    networks: Artifact
    units: tuple[str, ...]
    group: str
    image: ImageConfig

    version: ClassVar[int] = 1
    model: ClassVar[bool] = True

    def __call__(self, table: pa.Table, context: ShardContext) -> pa.Table:
        device = default_device()
        images = normalise(to_numpy(table["image"]), self.image, device)
        labels = torch.empty(0, dtype=torch.int64)
        if self.group != "uncertainty":
            labels = torch.from_numpy(to_numpy(table["label"]).astype(np.int64)).to(device)
        found = [self._of(unit, images, labels, device) for unit in self.units]
        table = table.remove_column(table.schema.get_field_index("image"))
        for name in found[0]:
            mean = np.mean([columns[name] for columns in found], axis=0, dtype=np.float64)
            table = table.append_column(name, pa.array(mean.astype(np.float32)))
        return table

    def _of(self, unit: str, images: Tensor, labels: Tensor, device: torch.device) -> Columns:
        if self.group == "dynamics":
            dynamics = scores.Dynamics(labels)
            for network in snapshots(self.networks, device, unit):
                dynamics.add(in_batches(network, images))
            return dict(dynamics.scores())
        network = read_model(self.networks, device, unit)
        if self.group == "grand":
            pairs = zip(torch.split(images, BATCH), torch.split(labels, BATCH), strict=True)
            norms = [grand(network, x, y) for x, y in pairs]
            return {"grand": torch.cat(norms).cpu().numpy()}
        logits = in_batches(network, images)
        if self.group == "el2n":
            return {"el2n": scores.el2n(logits, labels).cpu().numpy()}
        return {name: score(logits).cpu().numpy() for name, score in UNCERTAINTY.items()}


UNCERTAINTY: Mapping[str, Callable[[Tensor], Tensor]] = {
    "margin": scores.margin,
    "entropy": scores.entropy,
    "least-confidence": scores.least_confidence,
}


@dataclass(frozen=True)
class CentreDistances:
    """Put the distance of ``feature`` from its class's centre, float32, in its place.

    Args:
        centres: of :class:`~pipeline.pruning.class_centres.ClassCentres`.
        name: of the column. ``supervised-prototypes``: cosine distance (Sorscher et al., "Beyond
            neural scaling laws", 2022). ``moderate``: Euclidean distance (Xia et al., "Moderate
            Coreset", ICLR 2023).
    """

    centres: Artifact
    name: str

    version: ClassVar[int] = 1

    def __call__(self, table: pa.Table, context: ShardContext) -> pa.Table:
        x, labels = to_numpy(table["feature"]), to_numpy(table["label"])
        own = read_arrays(self.centres)["centres"][labels]
        if self.name == "moderate":
            found = np.linalg.norm(x.astype(np.float64) - own, axis=1)
        else:
            found = scores.cosine_distance(x, own)
        column = pa.array(found.astype(np.float32))
        index = table.schema.get_field_index("feature")
        return table.remove_column(index).append_column(self.name, column)
