"""Distil a data set into a few synthetic images a class with soft labels (CDA)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Container, Mapping
from typing import Any

import pyarrow as pa
from pydantic import Field

from pipeline.config import Config, TrainConfig, merge
from pipeline.dataset_distill.config import (
    ImageConfig,
    RecoverConfig,
    RelabelConfig,
    SqueezeConfig,
    StudentConfig,
)
from pipeline.dataset_distill.recover import BatchNormMatching
from pipeline.dataset_distill.squeeze import Squeeze
from pipeline.dataset_distill.student import Student
from pipeline.datasets import Dataset
from pipeline.digest import digest
from pipeline.errors import RunError, UsageError
from pipeline.orchestration.fit import Fit
from pipeline.orchestration.run import Run
from pipeline.recipes import Recipe
from pipeline.recipes.distill_report import evaluation_table, report
from pipeline.recipes.teacher import portable, teacher_task
from pipeline.stages.decode import Decode
from pipeline.stages.recover import Recover
from pipeline.stages.relabel import Relabel
from pipeline.stages.select import Columns, Keep, Split
from pipeline.storage.artifact import ArtifactSource
from pipeline.storage.parquet import ParquetFormat
from pipeline.storage.regroup import ChosenSource, cut, find_places
from pipeline.storage.source import Source, TableSource
from pipeline.storage.webdataset import WebDatasetFormat
from pipeline.storage.zarr import ZarrFormat


class DistillConfig(Config):
    """Configuration of the recipe ``distill``."""

    ipc: int = Field(10, ge=1, description="synthetic images per class")
    image: ImageConfig = ImageConfig()
    teacher: SqueezeConfig = SqueezeConfig()
    recover: RecoverConfig = RecoverConfig()
    relabel: RelabelConfig = RelabelConfig()
    student: StudentConfig = StudentConfig()
    seeds: int = Field(3, ge=1, description="students trained for each row of the evaluation")


def distill(run: Run, data: Dataset, config: DistillConfig) -> dict[str, Any]:
    """Squeeze, recover, relabel and evaluate; publish images, labels, teacher and evaluation."""
    image, classes = config.image, data.train.classes
    if not classes:
        raise UsageError(
            "The data set has no labels, and synthetic images are made for classes.",
            hint="Give a data set with labels, such as a folder with one sub-folder a class.",
            code="no-labels",
        )
    decode = Decode(image.size, image.channels)
    squeeze = teacher_task(config.teacher, image, len(classes))
    BatchNormMatching(squeeze.network(), 1.0).close()  # refuses a teacher without BatchNorm now
    train_part, test_part = ([], []) if data.test else ([Split("train")], [Split("test")])

    index = run.map(
        "index", data.train, [*train_part, Columns(("key", "label"))], to=ParquetFormat()
    )
    # A class that is too small is refused now, and not when the teacher has been trained.
    run.require(lambda: rank_at_random(index, config.ipc, run.seed))
    test = run.map("test", data.test or data.train, [*test_part, decode], to=ParquetFormat())

    train = None
    if config.teacher.weights is None:
        train = run.map("train", data.train, [*train_part, decode], to=ParquetFormat())
    inputs: dict[str, Source] = {"test": test, "train": train} if train else {"test": test}
    teacher = run.fit("teacher", squeeze, **inputs)

    rows = min(config.recover.batch_size, len(classes))
    plan = synthesis_plan(classes, config.ipc, rows)
    images = run.map(
        "images", plan, [Recover(teacher, config.recover, image)], to=WebDatasetFormat()
    )
    relabel = Relabel(teacher, config.relabel, image, rows)
    labels = run.map("labels", images, [decode, relabel], to=ZarrFormat())

    draws = [rank_at_random(index, config.ipc, (run.seed, n)) for n in range(config.seeds)]
    candidates = Keep(tuple(sorted({key for draw in draws for keys in draw for key in keys})))
    pool = run.map("real", data.train, [*train_part, candidates, decode], to=ParquetFormat())
    readable = find_places(pool)
    chosen = [random_real(draw, readable, classes, config.ipc) for draw in draws]
    real = [ChosenSource(pool, tuple(readable[key] for key in keys), rows) for keys in chosen]
    real_labels = [
        run.map(f"real-labels-{number}", source, [relabel], to=ZarrFormat())
        for number, source in enumerate(real)
    ]

    backbone = config.student.backbone or config.teacher.backbone
    soft = Student(config.student, backbone, image, len(classes))
    plain = SqueezeConfig(backbone=backbone, train=config.student.train)
    hard = Squeeze(plain, image, len(classes))
    fits: dict[str, Fit] = {}
    for seed in range(config.seeds):
        fits[f"distilled-soft-{seed}"] = Fit(soft, {"train": labels, "test": test})
        fits[f"random-real-soft-{seed}"] = Fit(soft, {"train": real_labels[seed], "test": test})
        fits[f"random-real-hard-{seed}"] = Fit(hard, {"train": real[seed], "test": test})
    students = run.fit_each("students", fits)
    real_images = train.artifact.manifest["counts"]["out"] if train else None
    table = evaluation_table(
        teacher, students, images.artifact.manifest["counts"]["out"], real_images
    )
    evaluation = run.map(
        "evaluation",
        TableSource((("evaluation", pa.Table.from_pylist(table)),)),
        [],
        to=ParquetFormat(),
    )
    products = {
        "images": images.artifact,
        "labels": labels.artifact,
        "teacher": teacher,
        "students": students,
        "evaluation": evaluation.artifact,
    }
    about = {
        "dataset": data.name,
        "classes": list(classes),
        "evaluation": table,
        "config": portable(config, "teacher"),
        "seed": run.seed,
    }
    if not run.published("distilled", products):
        steps = [index, test, *([train] if train else []), pool, images, labels]
        page = report(about, images, labels, real[0], teacher, students, steps)
        run.publish("distilled", products, about, page)
    return {
        **about,
        "images": str(images.artifact.store),
        "labels": str(labels.artifact.store),
        "report": f"{run.out}/report.html",
    }


def rank_at_random(index: ArtifactSource, ipc: int, seed: object) -> list[list[str]]:
    """Keys of real samples by class: ``ipc`` of each, and a few more should some be damaged.

    The samples of a class are ranked by the digest of (seed, key): the choice does not depend on
    the order in which they are stored. Students that differ in their seed get another draw, since
    which images are drawn matters more than how a student starts.

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
    _check_classes({name: len(keys) for name, keys in names}, ipc)
    spare = 1 + ipc // 10
    return [
        sorted(keys, key=lambda k: digest(seed, "random", k))[: ipc + spare] for keys in by_class
    ]


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


def synthesis_plan(classes: tuple[str, ...], ipc: int, rows: int) -> TableSource:
    """Keys and labels of the images to make, ``rows`` a shard, all of another class.

    Source: CDA; one batch of the optimisation is one shard, since its BatchNorm statistics, and so
    its images, depend on which images it holds.
    """
    pairs = [(label, index) for index in range(ipc) for label in range(len(classes))]
    parts = [
        (
            f"{number:05d}",
            pa.table(
                {
                    "key": [f"class{label:05d}-{index:04d}" for label, index in group],
                    "label": pa.array([label for label, _ in group], pa.int64()),
                }
            ),
        )
        for number, group in enumerate(cut(pairs, rows))
    ]
    return TableSource(tuple(parts), classes)


UNKNOWN: dict[str, Any] = {"size": 32, "mean": (0.5,) * 3, "std": (0.25,) * 3}
SMALL: dict[str, Any] = {
    "recover": {"jitter": 4, "crop_floor": 0.25, "batch_size": 100},
    "relabel": {"crop_floor": 0.25},
}
PRESETS: dict[str, Any] = {
    "digits": {
        "teacher": {
            "backbone": "convnet3",
            "train": TrainConfig(epochs=25, batch_size=64, lr=2e-3).model_dump(),
        },
        # r_bn was chosen on training digits held out from teacher and synthesis.
        "recover": {"iterations": 400, "jitter": 2, "r_bn": 0.1},
        "relabel": {"views": 300},
        "student": {"train": TrainConfig(epochs=300, batch_size=20, lr=2e-3).model_dump()},
    },
    "cifar10": {
        "teacher": {
            "backbone": "resnet20",
            "train": TrainConfig(
                epochs=30, optimizer="sgd", lr=0.1, weight_decay=5e-4
            ).model_dump(),
        },
        "recover": {"iterations": 1000},
        "relabel": {"views": 300},
        "student": {"train": TrainConfig(epochs=300, batch_size=20, lr=2e-3).model_dump()},
    },
}


def defaults(data: Dataset) -> dict[str, Any]:
    """Settings for a data set: its own preset, or one for its image size."""
    image = data.info.image if data.info else UNKNOWN
    values: dict[str, Any] = {"image": image}
    if image["size"] <= 64:
        preset = data.name if data.info and data.name in PRESETS else "cifar10"
        values = merge(merge(values, SMALL), PRESETS[preset])
    return values


RECIPE = Recipe(DistillConfig, defaults, distill)
