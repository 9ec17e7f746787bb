"""Distil a data set into a few synthetic images a class with soft labels (CDA and beyond)."""

from __future__ import annotations

from typing import Any

import pyarrow as pa

from pipeline.datasets import Dataset
from pipeline.orchestration.run import Run
from pipeline.recipes import Recipe
from pipeline.recipes.distill_config import DistillConfig, defaults
from pipeline.recipes.distill_estimate import estimate
from pipeline.recipes.distill_evaluation import Trainings, evaluation_table, metrics
from pipeline.recipes.distill_parts import LABEL_ROWS, Parts
from pipeline.recipes.distill_report import Found, report
from pipeline.recipes.teacher import portable
from pipeline.stage import Stage
from pipeline.stages.select import Columns
from pipeline.storage.models import FittedModels
from pipeline.storage.parquet import ParquetFormat
from pipeline.storage.source import TableSource
from pipeline.storage.webdataset import WebDatasetFormat
from pipeline.storage.zarr import ZarrFormat


def distill(run: Run, data: Dataset, config: DistillConfig) -> dict[str, Any]:
    """Squeeze, recover, relabel and evaluate; publish images, labels, teachers and evaluation."""
    parts = Parts(run, data, config)
    parts.check()
    test, teachers = parts.test, parts.teachers()
    images = run.map("images", *parts.synthesis(teachers), to=WebDatasetFormat())

    # From here on images lie as they are stored, one of each class after the other.
    stages: list[Stage] = [Columns(("key", "label", "image")), parts.decode]
    pixels = run.map("pixels", parts.in_order(images), stages, to=ParquetFormat())
    relabel = parts.relabel(teachers)
    labels = run.map("labels", pixels, [relabel], to=ZarrFormat())

    trainings = Trainings(config, len(parts.classes), relabel, FittedModels(teachers, parts.units))
    trainings.synthetic(test, pixels, labels)
    real = parts.random_real()
    for seed, source in enumerate(real):
        trainings.real_hard(test, source, seed)
        if "random-real-soft" in config.arms:
            real_labels = run.map(f"real-labels-{seed}", source, [relabel], to=ZarrFormat())
            trainings.real(test, source, real_labels, seed)
    if "noise-soft" in config.arms:
        noise = parts.noise(teachers)
        noise_labels = run.map("noise-labels", noise, [relabel], to=ZarrFormat())
        trainings.noise(test, noise, noise_labels)
    students = run.fit_each("students", trainings.fits)

    seen = parts.train.artifact.manifest["counts"]["out"] if parts.train else None
    table = evaluation_table(trainings, students, teachers, images, labels, seen)
    evaluation = run.map(
        "evaluation",
        TableSource((("evaluation", pa.Table.from_pylist(table)),)),
        [],
        to=ParquetFormat(),
    )
    products = {
        "images": images.artifact,
        "labels": labels.artifact,
        "teacher": teachers,
        "students": students,
        "evaluation": evaluation.artifact,
    }
    about = {
        "dataset": data.name,
        "classes": list(parts.classes),
        "evaluation": table,
        "metrics": metrics(table),
        "config": portable(config, "teacher", "committee"),
        "label_store": {
            "codec": relabel.codec.model_dump(),
            "views": relabel.views,
            "group": LABEL_ROWS,
        },
        "seed": run.seed,
    }
    nearest = parts.audit(teachers, pixels)
    if not run.published("distilled", products):
        steps = [parts.index, test, *([parts.train] if parts.train else []), images, pixels, labels]
        found = Found(images, pixels, labels, real[0], teachers, students, trainings, *nearest)
        run.publish("distilled", products, about, report(about, found, steps))
    return {
        **about,
        "images": str(images.artifact.store),
        "labels": str(labels.artifact.store),
        "report": f"{run.out}/report.html",
    }


RECIPE = Recipe(DistillConfig, defaults, distill, estimate)
