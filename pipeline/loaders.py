"""Outputs as torch data sets."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor
from torch.utils.data import Dataset, IterableDataset, get_worker_info

from pipeline.api import recorded
from pipeline.dataset_distill.config import ImageConfig
from pipeline.dataset_distill.views import Views, normalise, render
from pipeline.datasets import find_dataset
from pipeline.digest import seed_for
from pipeline.errors import UsageError
from pipeline.stage import ShardContext
from pipeline.stages.decode import Decode
from pipeline.storage.artifact import Artifact, ArtifactSource
from pipeline.storage.selected import SelectedSource, selected_keys
from pipeline.storage.source import Source
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


class PrunedDataset(IterableDataset[tuple[Tensor, int, str]]):
    """The samples that a pruning kept, read shard by shard: image, label and key of each.

    Images are uint8 (C, S, S); the label is -1 where there are none. Every epoch has another order:
    shards are shuffled, and samples within their shard. The workers of a ``DataLoader`` share the
    shards, and so do ranks.

    Attributes:
        classes: class names by label.
        keys: the keys that were kept.
    """

    def __init__(
        self, source: Source, selection: Artifact, decode: Decode, seed: int, rank: int, world: int
    ) -> None:
        self.classes = source.classes
        self.keys: list[str] = selected_keys(selection).to_pylist()
        self._source, self._decode = SelectedSource(source, selection), decode
        self._seed, self._rank, self._world, self._epoch = seed, rank, world, 0

    def __len__(self) -> int:
        return len(self.keys)

    def set_epoch(self, epoch: int) -> None:
        """Choose the order: the same for all workers and ranks."""
        self._epoch = epoch

    def __iter__(self) -> Iterator[tuple[Tensor, int, str]]:
        worker = get_worker_info()
        part, parts = (worker.id, worker.num_workers) if worker else (0, 1)
        part, parts = self._rank * parts + part, self._world * parts
        rng = np.random.default_rng(seed_for(self._seed, "order", self._epoch))
        shards = self._source.shards
        for number in rng.permutation(len(shards))[part::parts].tolist():
            table = self._decode(self._source.read(shards[number]), ShardContext("", 0))
            images = torch.from_numpy(to_numpy(table["image"]).transpose(0, 3, 1, 2).copy())
            labels = table["label"].to_pylist() if self.classes else [-1] * len(table)
            keys = table["key"].to_pylist()
            order = np.random.default_rng(seed_for(self._seed, self._epoch, number))
            for row in order.permutation(len(table)).tolist():
                yield images[row], labels[row], keys[row]


def open(  # noqa: A001
    path: str | Path,
    *,
    dataset: str | None = None,
    data: str | Path | None = None,
    size: int | None = None,
    seed: int = 0,
    rank: int = 0,
    world: int = 1,
) -> DistilledDataset | PrunedDataset:
    """Open what a run published.

    Args:
        path: path or URL of the output folder of a finished run.
        dataset: of a pruned data set, where its samples are read from: a name, a path or a URL of
            what was pruned or of any copy. Where not given, the shards that were materialised, or
            the place that the run itself read.
        data: where named data sets lie.
        size: of a pruned data set, the side of its images in pixels; the recipe's where not given.
        seed: of a pruned data set's order.
        rank: of a pruned data set, the part of the shards that this process reads.
        world: number of such parts.

    Raises:
        UsageError: there is no finished run, it is of a kind that is not opened this way, or the
            pruned data set is not found.
        RunError: a file is missing or damaged.
    """
    artifact = Artifact.open(open_store(path))
    if artifact.manifest["kind"] == "distilled":
        return DistilledDataset(artifact)
    if artifact.manifest["kind"] != "pruned":
        raise UsageError(
            f"This folder holds '{artifact.manifest['kind']}', which is no training set.",
            hint="Give the output folder of the whole run, of 'distill' or 'prune'.",
            code="not-a-run",
            where=str(path),
        )
    image = ImageConfig.model_validate(artifact.manifest["config"]["image"])
    source = _pruned_source(artifact, dataset, data)
    decode = Decode(size or image.size, image.channels)
    return PrunedDataset(source, artifact.product("selection"), decode, seed, rank, world)


def _pruned_source(artifact: Artifact, dataset: str | None, data: str | Path | None) -> Source:
    """Where the samples of a pruned data set are read from."""
    if dataset is None and "train" in artifact.products:
        return ArtifactSource(artifact.product("train"))
    if dataset is None:
        job = recorded(artifact.store)
        dataset, data = job["dataset"], data or job["data"]
    return find_dataset(dataset, data).train
