"""Outputs as torch data sets."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor
from torch.utils.data import Dataset

from pipeline.dataset_distill.config import ImageConfig
from pipeline.dataset_distill.views import Views, normalise, render
from pipeline.errors import UsageError
from pipeline.storage.artifact import Artifact, ArtifactSource
from pipeline.storage.store import open_store
from pipeline.tensors import to_numpy


class DistilledDataset(Dataset[tuple[Tensor, Tensor]]):
    """A distilled set: item i is a view of image i and the teacher's logits for that view.

    Attributes:
        classes: class names by label.
        keys: the images' keys.
        images: (N, C, S, S) float32, normalised, without augmentation.
        labels: (N,) int64 class of each image.
        logits: (N, V, classes) float16, one row for each stored view.
    """

    def __init__(self, artifact: Artifact) -> None:
        labels = ArtifactSource(artifact.product("labels"))
        table = pa.concat_tables(labels.tables())
        image = ImageConfig.model_validate(artifact.manifest["config"]["image"])
        device = torch.device("cpu")
        self.classes = labels.classes
        self.keys: list[str] = table["key"].to_pylist()
        self.images = normalise(to_numpy(table["image"]), image, device)
        self.labels = torch.from_numpy(np.array(to_numpy(table["label"])))
        self.logits = torch.from_numpy(np.array(to_numpy(table["logits"])))
        self._views = Views(*(to_numpy(table[name]) for name in Views.NAMES)).to(device)
        self._view = 0

    def __len__(self) -> int:
        return len(self.labels)

    def set_epoch(self, epoch: int) -> None:
        """Choose the view that items show: epoch e shows view e mod V of every image."""
        self._view = epoch % self.logits.shape[1]

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        rows, view = torch.tensor([range(len(self))[index]]), torch.tensor([self._view])
        picture = render(self.images, self._views, rows, view)[0]
        return picture, self.logits[index, self._view].float()


def open(path: str | Path) -> DistilledDataset:  # noqa: A001
    """Open what a run published.

    Args:
        path: path or URL of the output folder of a finished run.

    Raises:
        UsageError: there is no finished run, or it is of a kind that is not opened this way.
        RunError: a file is missing or damaged.
    """
    artifact = Artifact.open(open_store(path))
    if artifact.manifest["kind"] != "distilled":
        raise UsageError(
            f"This folder holds one step of a run ('{artifact.manifest['kind']}').",
            hint="Give the output folder of the whole run.",
            code="not-a-run",
            where=str(path),
        )
    return DistilledDataset(artifact)
