"""What a distillation is put together from."""

from __future__ import annotations

from collections import Counter
from collections.abc import Container, Mapping
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import pyarrow as pa

from pipeline.dataset_distill.batchnorm import bn_layers
from pipeline.dataset_distill.class_statistics import ClassStatistics
from pipeline.dataset_distill.config import RecoverConfig
from pipeline.dataset_distill.label_codec import LabelCodec, plan_labels
from pipeline.dataset_distill.squeeze import Squeeze
from pipeline.dataset_distill.starts import rank_starts
from pipeline.dataset_distill.views import ViewSampler
from pipeline.datasets import Dataset
from pipeline.digest import digest, seed_for
from pipeline.errors import RunError, UsageError
from pipeline.orchestration.fit import Fit
from pipeline.orchestration.run import Run
from pipeline.recipes.distill_config import DistillConfig
from pipeline.recipes.nearest import NearestReal, nearest_keys
from pipeline.recipes.starts import StartSource, tiles_of
from pipeline.recipes.teacher import teacher_task
from pipeline.recipes.training_images import check_memory
from pipeline.stage import Stage
from pipeline.stages.candidates import Candidates
from pipeline.stages.decode import Decode
from pipeline.stages.embed import Embed
from pipeline.stages.recover import Recover
from pipeline.stages.relabel import Relabel
from pipeline.stages.select import Columns, Keep, Split
from pipeline.storage.array_artifact import read_arrays
from pipeline.storage.artifact import Artifact, ArtifactSource
from pipeline.storage.models import UNIT, FittedModels
from pipeline.storage.parquet import ParquetFormat
from pipeline.storage.regroup import ChosenSource, cut, find_places
from pipeline.storage.source import Source, TableSource
from pipeline.tensors import to_numpy

LABEL_ROWS = 100
"""Images of a shard of labels: partners of one another in CutMix."""
PICTURES = 20
"""Nearest real images that a report shows."""


@dataclass(frozen=True)
class Parts:
    """What a distillation is put together from."""

    run: Run
    data: Dataset
    config: DistillConfig

    @cached_property
    def classes(self) -> tuple[str, ...]:
        """Class names by label.

        Raises:
            UsageError: the data set has no labels.
        """
        if not self.data.train.classes:
            raise UsageError(
                "The data set has no labels, and synthetic images are made for classes.",
                hint="Give a data set with labels, such as a folder with one sub-folder a class.",
                code="no-labels",
            )
        return self.data.train.classes

    @property
    def decode(self) -> Decode:
        return Decode(self.config.image.size, self.config.image.channels)

    @cached_property
    def squeezes(self) -> dict[str, Squeeze]:
        """The teachers' tasks by unit."""
        settings = (self.config.teacher, *self.config.committee)
        names = [UNIT, *(f"{UNIT}-{number}" for number in range(2, len(settings) + 1))]
        tasks = [teacher_task(one, self.config.image, len(self.classes)) for one in settings]
        return dict(zip(names, tasks, strict=True))

    @property
    def units(self) -> tuple[str, ...]:
        return tuple(self.squeezes)

    @property
    def _train_part(self) -> list[Stage]:
        return [] if self.data.test else [Split("train")]

    def check(self) -> None:
        """Refuse now, before anything is computed, what cannot end well.

        Raises:
            UsageError: teachers do not fit, labels do not fit their budget, or the images do not
                fit in memory.
            RunError: a class has too few samples.
        """
        for task in self.squeezes.values():
            bn_layers(task.network())
        _ = self.label_plan
        index = self.index
        self.run.require(lambda: self._check(index))

    @cached_property
    def index(self) -> ArtifactSource:
        """Keys and labels of the training samples."""
        stages = [*self._train_part, Columns(("key", "label"))]
        return self.run.map("index", self.data.train, stages, to=ParquetFormat())

    def _check(self, index: ArtifactSource) -> None:
        rank_at_random(index, self.config.ipc, self.run.seed)
        if any(not task.given for task in self.squeezes.values()):
            image, count = self.config.image, index.artifact.manifest["counts"]["out"]
            hint = (
                "Give a teacher that is trained: --teacher-weights FILE, or "
                "--teacher-backbone torchvision:resnet18 --teacher-weights pretrained."
            )
            check_memory("a teacher", count, image.size, image.channels, hint)

    @cached_property
    def test(self) -> ArtifactSource:
        stages = [] if self.data.test else [Split("test")]
        source = self.data.test or self.data.train
        return self.run.map("test", source, [*stages, self.decode], to=ParquetFormat())

    @cached_property
    def train(self) -> ArtifactSource | None:
        """The training images, decoded, where a training or class statistics need them all."""
        given = all(task.given for task in self.squeezes.values())
        if given and self.config.recover.batch_of != "class":
            return None
        stages = [*self._train_part, self.decode]
        return self.run.map("train", self.data.train, stages, to=ParquetFormat())

    def _decoded(self) -> tuple[Source, list[Stage]]:
        """Where training images come from, and what makes pixels of them."""
        if self.train:
            return self.train, []
        return self.data.train, [*self._train_part, self.decode]

    def teachers(self) -> Artifact:
        fits = {}
        for unit, task in self.squeezes.items():
            inputs: dict[str, Source] = {"test": self.test}
            if not task.given and self.train:
                inputs["train"] = self.train
            fits[unit] = Fit(task, inputs)
        return self.run.fit_each("teacher", fits)

    def plan(self, recover: RecoverConfig) -> TableSource:
        """Keys, labels and iterations of the images to make; a batch is a shard."""
        return synthesis_plan(self.classes, self.config.ipc, recover)

    def synthesis(self, teachers: Artifact) -> tuple[Source, list[Stage]]:
        """What images are made of, and how."""
        recover, image = self.config.recover, self.config.image
        statistics = None
        if recover.batch_of == "class" and self.train:
            models = FittedModels(teachers, self.units)
            task = ClassStatistics(models, image, len(self.classes))
            statistics = self.run.rounds("class-statistics", task, self.train, "image", "label")
        stage = Recover(teachers, self.units, recover, image, statistics)
        plan = self.plan(recover)
        return (plan if recover.start == "noise" else self._starts(teachers, plan)), [stage]

    def _starts(self, teachers: Artifact, plan: TableSource) -> StartSource:
        """The plan with the real images that its images start from."""
        recover, image, ipc = self.config.recover, self.config.image, self.config.ipc
        keys = rank_at_random(self.index, recover.candidates, (self.run.seed, "start"), least=ipc)
        source, stages = self._decoded()
        chosen = Keep(tuple(sorted(key for of_class in keys for key in of_class)))
        tile = image.size // recover.tiles
        candidates = Candidates(teachers, self.units[0], image, tile, recover.crops)
        pool = self.run.map("candidates", source, [chosen, *stages, candidates], to=ParquetFormat())
        names = ["label", "loss", "feature"]
        table = pa.concat_tables([t.select(names) for t in pool.tables()])
        labels, losses, features = (to_numpy(table[name]) for name in names)
        counts = np.bincount(labels, minlength=len(self.classes)).tolist()
        _check_classes(dict(zip(self.classes, counts, strict=True)), 1)
        count = ipc * recover.tiles**2
        seed = seed_for(self.run.seed, "starts") % 2**32
        rows = rank_starts(
            recover.start, labels, losses, features, len(self.classes), count, seed
        ).reshape(len(self.classes), ipc, -1)
        tables = [plan.read(shard) for shard in plan.shards]
        wanted = [
            rows[label, number]
            for table in tables
            for label, number in zip(
                table["label"].to_pylist(), table["index"].to_pylist(), strict=True
            )
        ]
        sizes = [table.num_rows * recover.tiles**2 for table in tables]
        tiles = tiles_of(pool, np.concatenate(wanted), tuple(sizes))
        return StartSource(plan, tiles, recover.tiles, image.size)

    def in_order(self, images: ArtifactSource) -> ChosenSource:
        """Images one of each class after the other, whatever batches they were made in."""
        found = [
            (index, label, (shard, row))
            for shard, table in enumerate(images.tables())
            for row, (index, label) in enumerate(
                zip(table["index"].to_pylist(), table["label"].to_pylist(), strict=True)
            )
        ]
        return ChosenSource(images, tuple(place for _, _, place in sorted(found)), LABEL_ROWS)

    def noise(self, teachers: Artifact) -> ChosenSource:
        """The noise that CDA starts from, as images."""
        still = self.config.recover.model_copy(update={"iterations": 0, "batch_of": "classes"})
        recover = Recover(teachers, self.units, still, self.config.image)
        return self.in_order(self.run.map("noise", self.plan(still), [recover], to=ParquetFormat()))

    @cached_property
    def label_plan(self) -> tuple[LabelCodec, int]:
        """The codec and the number of views of the label store."""
        count = self.config.ipc * len(self.classes)
        heat = self.config.student.temperature
        return plan_labels(self.config.relabel, heat, count, len(self.classes))

    def relabel(self, teachers: Artifact) -> Relabel:
        settings, (codec, views) = self.config.relabel, self.label_plan
        sampler = ViewSampler(self.config.image, settings.crop_floor, settings.cutmix, LABEL_ROWS)
        return Relabel(teachers, self.units, sampler, 0 if settings.online else views, codec)

    def random_real(self) -> list[ChosenSource]:
        """Random real images, another draw for each seed, in the order of the synthetic ones."""
        seeds, ipc = range(self.config.seeds), self.config.ipc
        draws = [rank_at_random(self.index, ipc, (self.run.seed, n)) for n in seeds]
        keep = Keep(tuple(sorted({key for draw in draws for keys in draw for key in keys})))
        source, stages = self._decoded()
        pool = self.run.map("real", source, [keep, *stages], to=ParquetFormat())
        readable = find_places(pool)
        chosen = [random_real(draw, readable, self.classes, ipc) for draw in draws]
        return [ChosenSource(pool, tuple(readable[k] for k in keys), LABEL_ROWS) for keys in chosen]

    def audit(self, teachers: Artifact, pixels: ArtifactSource) -> tuple[Artifact, ArtifactSource]:
        """The real image that is nearest to each synthetic one, and some of these real images."""
        source, stages = self._decoded()
        embed = Embed(teachers, self.config.image)
        real = self.run.map("features", source, [*stages, embed], to=ParquetFormat())
        made = self.run.map("image-features", pixels, [embed], to=ParquetFormat())
        nearest = self.run.rounds("nearest", NearestReal(made), real, "feature", "key")
        keys = nearest_keys(read_arrays(nearest))[:PICTURES]
        keep = Keep(tuple(sorted(set(keys))))
        return nearest, self.run.map("nearest-images", source, [keep, *stages], to=ParquetFormat())


def rank_at_random(
    index: ArtifactSource, count: int, seed: object, *, least: int | None = None
) -> list[list[str]]:
    """Keys of real samples by class: ``count`` of each, and a few more should some be damaged.

    The samples of a class are ranked by the digest of (seed, key): the choice does not depend on
    the order in which they are stored. Students that differ in their seed get another draw, since
    which images are drawn matters more than how a student starts.

    Args:
        index: keys and labels.
        count: of each class.
        seed: of the draw.
        least: samples that every class has to have; ``count`` where not given.

    Raises:
        RunError: a class has too few samples.
    """
    by_class: list[list[str]] = [[] for _ in index.classes]
    for table in index.tables():
        for key, label in zip(table["key"].to_pylist(), table["label"].to_pylist(), strict=True):
            by_class[label].append(key)
    every = [key for keys in by_class for key in keys]
    if len(set(every)) < len(every):
        twice = next(key for key, count in Counter(every).items() if count > 1)
        raise RunError(
            f"{len(every) - len(set(every))} keys stand for more than one sample, such as "
            f"'{twice}'.",
            hint="Give every sample a key of its own, across all shards.",
            code="duplicate-keys",
        )
    names = zip(index.classes, by_class, strict=True)
    _check_classes({name: len(keys) for name, keys in names}, count if least is None else least)
    more = count + 1 + count // 10
    return [sorted(keys, key=lambda k: digest(seed, "random", k))[:more] for keys in by_class]


def random_real(
    ranked: list[list[str]], readable: Container[str], classes: tuple[str, ...], ipc: int
) -> tuple[str, ...]:
    """The best ranked ``ipc`` readable samples of each class, in the order of the synthetic ones.

    Raises:
        RunError: too many of a class's candidates could not be read.
    """
    kept = [[key for key in keys if key in readable] for keys in ranked]
    _check_classes({name: len(keys) for name, keys in zip(classes, kept, strict=True)}, ipc)
    return tuple(keys[index] for index in range(ipc) for keys in kept)


def _check_classes(counts: Mapping[str, int], ipc: int) -> None:
    small = [f"'{name}' has {count}" for name, count in counts.items() if count < max(ipc, 2)]
    if small:
        raise RunError(
            f"{len(small)} of {len(counts)} classes have too few readable training images for "
            f"--ipc {ipc}, which needs {max(ipc, 2)} of each: {', '.join(small[:5])}.",
            hint="Add images to these classes, remove the classes, or lower --ipc.",
            code="small-class",
        )


def synthesis_plan(classes: tuple[str, ...], ipc: int, recover: RecoverConfig) -> TableSource:
    """Keys, labels, numbers and iterations of the images to make.

    A batch of the optimisation is one shard, since its BatchNorm statistics, and so its images,
    depend on which images it holds: an image each of neighbouring classes (CDA), several of each,
    or images of one class. Images of the early-late schedule that get other iterations are in
    other shards.
    """
    groups, labels = recover.early_late, range(len(classes))
    late = [index * groups // ipc for index in range(ipc)]
    together = [[i for i in range(ipc) if late[i] == group] for group in range(groups)]
    if recover.batch_of == "classes":
        sets = [[(label, index) for label in labels] for index in range(ipc)]
    elif recover.batch_of == "mixed":
        sets = [[(label, index) for index in members for label in labels] for members in together]
    else:
        sets = [[(label, index) for index in members] for label in labels for members in together]
    batches = [batch for one in sets for batch in cut(one, recover.batch_size)]
    parts = []
    for number, batch in enumerate(batches):
        steps = recover.iterations * (groups - late[batch[0][1]]) // groups
        columns = {
            "key": [f"class{label:05d}-{index:04d}" for label, index in batch],
            "label": pa.array([label for label, _ in batch], pa.int64()),
            "index": pa.array([index for _, index in batch], pa.int64()),
            "iterations": pa.array([steps] * len(batch), pa.int64()),
        }
        parts.append((f"{number:05d}", pa.table(columns)))
    return TableSource(tuple(parts), classes)
