"""Distilled sets: synthetic images and what teachers say of views of them."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import torch
from torch import Tensor, nn

from pipeline.dataset_distill.label_codec import LabelCodec
from pipeline.dataset_distill.relabel import mean_logits
from pipeline.dataset_distill.student import EpochViews, SoftLabels
from pipeline.dataset_distill.views import ViewSampler, render
from pipeline.epoch_order import Rows
from pipeline.labelled_images import ImageConfig, Pictures
from pipeline.loaders import TorchSamples
from pipeline.samples import Samples
from pipeline.stage import ShardContext
from pipeline.stages.decode import Decode
from pipeline.storage.artifact import Artifact, ArtifactSource
from pipeline.storage.models import read_model
from pipeline.storage.shard_reader import Places
from pipeline.tensors import to_numpy

CPU = torch.device("cpu")


class DistilledSamples(Samples):
    """Synthetic images with their soft labels.

    Attributes:
        soft_labels: the label store, as it is stored: ``views``, how many there are of each image,
            and ``logits``. Its rows are in an order of their own, see :meth:`label_rows`.
    """

    kind = "distilled"

    def __init__(self, artifact: Artifact, place: str) -> None:
        images = ArtifactSource(artifact.product("images"))
        stored, told = ArtifactSource(artifact.product("labels")), artifact.manifest["label_store"]
        super().__init__(
            images,
            place=place,
            artifact=artifact,
            places=Places.read(images),
            image=ImageConfig.model_validate(artifact.manifest["config"]["image"]),
        )
        table = pa.concat_tables(stored.tables())
        self.store = LabelStore(artifact, table["key"].to_pylist(), int(told["group"]))
        codec = LabelCodec.model_validate(told["codec"])
        self.soft_labels = SoftLabels.of(table, codec, len(self.classes))
        self._labels = np.array(to_numpy(table["label"]))
        row_of = {key: row for row, key in enumerate(self.store.keys)}
        self._label_rows = np.array([row_of[key] for key in self.keys], np.int64)

    def label_rows(self, rows: Rows) -> Rows:
        """Rows of the label store for samples."""
        return self._label_rows[self.rows_of(rows)]

    @property
    def labels(self) -> Tensor:
        """Class of each image, int64 (N,)."""
        return torch.from_numpy(self._labels[self.label_rows(np.arange(len(self)))])

    def to_torch(self) -> DistilledTensors:  # type: ignore[override]
        """A torch data set of (image, logits, key), each image in one of its stored views.

        All images are decoded and held, as uint8. Where a run stored no labels
        (``relabel.online``), the teachers are asked.
        """
        return DistilledTensors(self)


class LabelStore(NamedTuple):
    """What the label store of a run is of.

    Attributes:
        artifact: the run.
        keys: of its rows.
        group: rows that are partners of one another.
    """

    artifact: Artifact
    keys: list[str]
    group: int


class DistilledBatch(NamedTuple):
    """Views of images with soft labels.

    Attributes:
        image: (B, C, S, S) float32, normalised.
        logits: (B, K) float32, the teachers' for these views.
        key: B strings.
    """

    image: Tensor
    logits: Tensor
    key: list[str]


class DistilledTensors(TorchSamples[DistilledBatch]):
    """Item i is a view of image i and the teachers' logits for that view.

    Epoch e shows view e mod V of every image; any image and view can be asked for by itself.
    """

    samples: DistilledSamples

    def __init__(self, samples: DistilledSamples) -> None:
        super().__init__(samples)
        image, (artifact, keys, group) = samples.image or ImageConfig(), samples.store
        self._labels = samples.soft_labels
        self._keys = keys
        self._pictures = Pictures.of(_pixels(artifact, keys, image), image, CPU)
        relabel = artifact.manifest["config"]["relabel"]
        sampler = ViewSampler(image, relabel["crop_floor"], relabel["cutmix"], group)
        self._views = EpochViews(sampler, self._labels.seeds)
        self._teachers: list[nn.Module] = []
        if not self._labels.views:
            teachers = artifact.product("teacher")
            units = [record["name"] for record in teachers.records()]
            self._teachers = [read_model(teachers, CPU, unit) for unit in units]

    @property
    def images(self) -> Tensor:
        """(N, C, S, S) float32, normalised, without augmentation."""
        return self._pictures.take(torch.from_numpy(self.samples.label_rows(np.arange(len(self)))))

    def batch(self, rows: Rows, epoch: int) -> DistilledBatch:
        number = epoch % self._labels.views if self._labels.views else epoch
        own = self.samples.label_rows(rows)
        places, views = torch.from_numpy(own), self._views.of(number, CPU)
        pictures = render(self._pictures, views, places, torch.zeros_like(places))
        if self._teachers:
            with torch.no_grad():
                logits = mean_logits(self._teachers, pictures)
        else:
            logits = torch.from_numpy(self._labels.logits(own, number))
        return DistilledBatch(pictures, logits, [self._keys[row] for row in own.tolist()])


def _pixels(artifact: Artifact, keys: list[str], image: ImageConfig) -> npt.NDArray[np.uint8]:
    """The synthetic images with these keys, (N, S, S, C)."""
    decode = Decode(image.size, image.channels)
    found: dict[str, npt.NDArray[np.uint8]] = {}
    for table in ArtifactSource(artifact.product("images")).tables():
        decoded = decode(table.select(["key", "image"]), ShardContext("", 0))
        found |= dict(zip(decoded["key"].to_pylist(), to_numpy(decoded["image"]), strict=True))
    return np.stack([found[key] for key in keys])
