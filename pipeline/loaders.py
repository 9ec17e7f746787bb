"""Outputs as torch data sets."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset, IterableDataset, get_worker_info

from pipeline.api import recorded
from pipeline.dataset_distill.label_codec import LabelCodec
from pipeline.dataset_distill.relabel import mean_logits
from pipeline.dataset_distill.student import EpochViews, SoftLabels
from pipeline.dataset_distill.views import ViewSampler, render
from pipeline.datasets import find_dataset
from pipeline.digest import seed_for
from pipeline.errors import UsageError
from pipeline.labelled_images import ImageConfig, Pictures
from pipeline.stage import ShardContext
from pipeline.stages.decode import Decode
from pipeline.storage.artifact import Artifact, ArtifactSource
from pipeline.storage.models import read_model
from pipeline.storage.selected import SelectedSource, selected_keys
from pipeline.storage.source import Source
from pipeline.storage.store import open_store
from pipeline.tensors import to_numpy
from pipeline.token_dataset import TokenDataset

CPU = torch.device("cpu")


class DistilledDataset(Dataset[tuple[Tensor, Tensor]]):
    """A distilled set: item i is a view of image i and the teachers' logits for that view.

    Any image and view can be asked for by itself, in any order, in batches of any size and by any
    number of processes. Labels are held as they are stored and decoded one by one. Where a run
    stored none (``relabel.online``), the teachers are asked.

    Attributes:
        classes: class names by label.
        keys: the images' keys.
        labels: (N,) int64 class of each image.
        soft_labels: the label store: ``views``, how many there are of each image, and ``logits``.
    """

    def __init__(self, artifact: Artifact) -> None:
        labels = ArtifactSource(artifact.product("labels"))
        config, told = artifact.manifest["config"], artifact.manifest["label_store"]
        image = ImageConfig.model_validate(config["image"])
        table = pa.concat_tables(labels.tables())
        self.classes = labels.classes
        self.keys: list[str] = table["key"].to_pylist()
        self.labels = torch.from_numpy(np.array(to_numpy(table["label"])))
        codec = LabelCodec.model_validate(told["codec"])
        self.soft_labels = SoftLabels.of(table, codec, len(self.classes))
        self._pictures = Pictures.of(_pixels(artifact, self.keys, image), image, CPU)
        relabel = config["relabel"]
        sampler = ViewSampler(image, relabel["crop_floor"], relabel["cutmix"], told["group"])
        self._views = EpochViews(sampler, self.soft_labels.seeds)
        self._teachers: list[nn.Module] = []
        if not self.soft_labels.views:
            teachers = artifact.product("teacher")
            units = [record["name"] for record in teachers.records()]
            self._teachers = [read_model(teachers, CPU, unit) for unit in units]
        self._view = 0

    def __len__(self) -> int:
        return len(self.keys)

    @property
    def images(self) -> Tensor:
        """(N, C, S, S) float32, normalised, without augmentation."""
        return self._pictures.take(slice(None))

    def set_epoch(self, epoch: int) -> None:
        """Choose the view that items show: epoch e shows view e mod V of every image."""
        views = self.soft_labels.views
        self._view = epoch % views if views else epoch

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        row = range(len(self))[index]
        rows, first = torch.tensor([row]), torch.zeros(1, dtype=torch.int64)
        picture = render(self._pictures, self._views.of(self._view, CPU), rows, first)[0]
        if self._teachers:
            with torch.no_grad():
                return picture, mean_logits(self._teachers, picture[None])[0]
        return picture, torch.from_numpy(self.soft_labels.logits(row, self._view))


def _pixels(artifact: Artifact, keys: list[str], image: ImageConfig) -> npt.NDArray[np.uint8]:
    """The synthetic images with these keys, (N, S, S, C)."""
    decode = Decode(image.size, image.channels)
    found: dict[str, npt.NDArray[np.uint8]] = {}
    for table in ArtifactSource(artifact.product("images")).tables():
        decoded = decode(table.select(["key", "image"]), ShardContext("", 0))
        found |= dict(zip(decoded["key"].to_pylist(), to_numpy(decoded["image"]), strict=True))
    return np.stack([found[key] for key in keys])


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
    split: str = "train",
) -> DistilledDataset | PrunedDataset | TokenDataset:
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
        split: of a token store, ``train`` or ``test``.

    Raises:
        UsageError: there is no finished run, it is of a kind that is not opened this way, or the
            pruned data set is not found.
        RunError: a file is missing or damaged.
    """
    artifact = Artifact.open(open_store(path))
    if artifact.manifest["kind"] == "distilled":
        return DistilledDataset(artifact)
    if artifact.manifest["kind"] == "tokens":
        return TokenDataset(artifact, split)
    if artifact.manifest["kind"] != "pruned":
        raise UsageError(
            f"This folder holds '{artifact.manifest['kind']}', which is no training set.",
            hint="Give the output folder of the whole run, of 'distill', 'prune' or 'tokenize'.",
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
