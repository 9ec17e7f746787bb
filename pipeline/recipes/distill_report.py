"""What a distillation gave: the table of its evaluation and a report to read."""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

import numpy as np
import numpy.typing as npt

from pipeline.recipes.sections import accounting, provenance
from pipeline.report import (
    bar_chart,
    contact_sheet,
    figure,
    html_table,
    line_chart,
    page,
    paragraph,
    png_image,
)
from pipeline.storage.artifact import Artifact, ArtifactSource
from pipeline.storage.images import decode_png
from pipeline.storage.models import UNIT
from pipeline.storage.regroup import ChosenSource
from pipeline.storage.source import Source
from pipeline.tensors import is_tensor, to_numpy

ARMS = {
    "distilled-soft": "synthetic images, soft labels",
    "random-real-soft": "random real images, soft labels",
    "random-real-hard": "random real images, class labels",
}
NAMES = ("arm", "trained_on", "images", "accuracy", "spread", "seeds")
CLASSES_SHOWN, IMAGES_SHOWN = 20, 50
PIXEL_BYTES = 32 * 2**20  # of all pictures in a report, before compression


def evaluation_table(
    teacher: Artifact,
    students: Artifact,
    images: int,
    teacher_images: int | None,
) -> list[dict[str, Any]]:
    """The accuracy of every arm and of the teacher, a row each.

    Args:
        teacher: the fitted teacher.
        students: the fitted students, named ``<arm>-<seed>``.
        images: images that each student was trained on.
        teacher_images: images that the teacher was trained on; None for given weights.
    """

    def row(arm: str, title: str, count: int | None, scores: Sequence[float]) -> dict[str, Any]:
        mean, spread = statistics.fmean(scores), statistics.stdev(scores) if scores[1:] else 0.0
        return dict(zip(NAMES, (arm, title, count, mean, spread, len(scores)), strict=True))

    scores = {shard["name"]: shard["metrics"]["accuracy"] for shard in students.records()}
    title = "teacher: real images" if _losses(teacher, UNIT) else "teacher: given weights"
    rows = [
        row(arm, trained_on, images, [scores[unit] for unit in _units(students, arm)])
        for arm, trained_on in ARMS.items()
    ]
    return [*rows, row("teacher", title, teacher_images, [teacher.metrics["accuracy"]])]


def report(
    about: Mapping[str, Any],
    images: ArtifactSource,
    labels: ArtifactSource,
    real: ChosenSource,
    teacher: Artifact,
    students: Artifact,
    steps: Sequence[ArtifactSource],
) -> bytes:
    """The report as HTML; it depends on the arguments and the versions of packages alone.

    Args:
        about: data set, classes, evaluation, configuration and seed, as the manifest holds them.
        images: the synthetic images.
        labels: the same with views and logits.
        real: the random real images of the evaluation.
        teacher: the fitted teacher.
        students: the fitted students, named ``<arm>-<seed>``.
        steps: the steps whose samples the report accounts for.
    """
    image, ipc, classes = about["config"]["image"], about["config"]["ipc"], about["classes"]
    pixels = f"{image['size']} x {image['size']} pixels"
    lead = paragraph(
        f"{len(classes):,} classes, {images.artifact.manifest['counts']['out']:,} synthetic images "
        f"of {pixels}. {_outcome(about['evaluation'])}"
    )
    products = {"images": images.identity, "labels": labels.identity, "real images": real.identity}
    products |= {"teacher": teacher.identity, "students": students.identity}
    sections = [
        ("Evaluation", _evaluation(about["evaluation"], students)),
        ("Images", _pictures(about, images, real)),
        ("Losses", _loss_charts(about["config"], images.artifact, teacher, students)),
        ("Sizes", _sizes(images, labels)),
        ("Samples of each step", accounting(steps)),
        ("Provenance", provenance(about, products)),
    ]
    return page(f"Distilled {about['dataset']}, {ipc} images a class", lead, sections)


def _outcome(rows: Sequence[Mapping[str, Any]]) -> str:
    """How the synthetic images did, in a sentence."""
    synthetic, soft, hard = rows[:3]
    real = f"random real images with class labels ({hard['accuracy']:.1f}%)"
    text = (
        f"Synthetic images with soft labels ({synthetic['accuracy']:.1f}%) "
        f"{_versus(synthetic, hard, real)}; random real images with soft labels "
        f"({soft['accuracy']:.1f}%) {_versus(soft, synthetic, 'the synthetic ones')}."
    )
    if synthetic["seeds"] == 1:
        return f"{text} There is one seed of each, so the spread is not known."
    return text


def _versus(a: Mapping[str, Any], b: Mapping[str, Any], name: str) -> str:
    gap = a["accuracy"] - b["accuracy"]
    if abs(gap) <= a["spread"] + b["spread"]:
        return f"are level with {name} ({gap:+.1f} points, within the spread over seeds)"
    return (
        f"beat {name} by {gap:.1f} points" if gap > 0 else f"fall {-gap:.1f} points behind {name}"
    )


def _evaluation(rows: Sequence[Mapping[str, Any]], students: Artifact) -> str:
    table = html_table(
        ("trained on", "images", "accuracy, %", "spread", "seeds"),
        [
            (*(r[n] for n in NAMES[1:4]), r["spread"] if r["seeds"] > 1 else None, r["seeds"])
            for r in rows
        ],
    )
    bars = [(row["trained_on"], row["accuracy"], row["spread"]) for row in rows]
    chart = bar_chart("Accuracy by training set", bars, limit=100, unit="%")
    tested = students.metrics["images"]
    caption = f"Accuracy on {tested:,} test images: mean over seeds and sample standard deviation."
    return table + figure(chart, caption)


def _pictures(about: Mapping[str, Any], images: Source, real: Source) -> str:
    image, ipc, names = about["config"]["image"], about["config"]["ipc"], about["classes"]
    classes = min(len(names), CLASSES_SHOWN)
    fits = PIXEL_BYTES // (2 * classes * image["size"] ** 2 * image["channels"])
    count = min(ipc, IMAGES_SHOWN, max(1, fits))
    shown = "All images of every class"
    if (classes, count) != (len(names), ipc):
        shown = f"The first {count} of {ipc} images of {classes} of {len(names):,} classes"
    parts = [paragraph(f"{shown}; below the synthetic ones, the random real ones.")]
    columns = max(1, min(10, 1130 // max(image["size"], 64)))
    made, found = (_first_images(source, classes, count) for source in (images, real))
    for name, *pair in zip(names[:classes], made, found, strict=True):
        sheets = [
            figure(png_image(contact_sheet(sheet, columns), f"{what}, class {name}"), what)
            for what, sheet in zip(("synthetic", "random real"), pair, strict=True)
        ]
        parts.append(f'<div class="pair"><h3>{escape(name)}</h3>{"".join(sheets)}</div>')
    return "\n".join(parts)


def _first_images(source: Source, classes: int, count: int) -> list[list[npt.NDArray[np.uint8]]]:
    """The first ``count`` images of each of the first ``classes`` classes."""
    found: list[list[npt.NDArray[np.uint8]]] = [[] for _ in range(classes)]
    for table in source.tables():
        column = table["image"]
        pixels = to_numpy(column) if is_tensor(column.type) else None
        for row, label in enumerate(table["label"].to_pylist()):
            if label < classes and len(found[label]) < count:
                data = decode_png(column[row].as_py()) if pixels is None else pixels[row]
                found[label].append(data)
        if all(len(sheet) == count for sheet in found):
            break
    return found


def _loss_charts(
    config: Mapping[str, Any], images: Artifact, teacher: Artifact, students: Artifact
) -> str:
    parts = ["<h3>Synthesis</h3>", _trace(config["recover"], images)]
    options: dict[str, Any] = {"x_label": "epoch", "y_label": "loss", "log": True}
    if losses := _losses(teacher, UNIT):
        points = list(enumerate(losses, 1))
        chart = line_chart("Teacher's loss by epoch", {"teacher": points}, **options)
        parts += ["<h3>Teacher</h3>", figure(chart, "Cross-entropy on the real training images.")]
    means = {}
    for arm, title in ARMS.items():
        losses = _mean([_losses(students, unit) for unit in _units(students, arm)])
        means[title] = list(enumerate(losses, 1))
    caption = (
        "Mean over seeds. Soft labels: temperature-scaled KL divergence; class labels: "
        "cross-entropy. The two kinds of loss cannot be compared with each other."
    )
    chart = line_chart("Students' loss by epoch", means, **options)
    return "\n".join([*parts, "<h3>Students</h3>", figure(chart, caption)])


def _trace(recover: Mapping[str, Any], images: Artifact) -> str:
    """The synthesis: its losses by iteration, mean over shards."""
    metrics = [shard["metrics"] for shard in images.records()]
    steps = [row[0] for row in metrics[0]["trace"]]
    losses = {
        name: list(zip(steps, _mean([[r[i] for r in m["trace"]] for m in metrics]), strict=True))
        for i, name in enumerate(("cross-entropy", "BatchNorm statistics"), start=1)
    }
    options: dict[str, Any] = {"x_label": "iteration", "y_label": "loss", "log": True}
    whole = {n: statistics.fmean(m["final"][n] for m in metrics) for n in metrics[0]["final"]}
    caption = (
        f"Mean over {len(metrics):,} shards, on one random crop of the images an iteration. On the "
        f"whole, final images: cross-entropy {whole['cross_entropy']:.3g}, BatchNorm statistics "
        f"{whole['batchnorm']:.3g}."
    )
    if recover["milestone"] > 0:
        caption += (
            " The crops get smaller as the synthesis goes on (curriculum), so losses that rise "
            "late are expected and no failure."
        )
    return figure(line_chart("Losses of the synthesis by iteration", losses, **options), caption)


def _sizes(images: ArtifactSource, labels: ArtifactSource) -> str:
    count = images.artifact.manifest["counts"]["out"]
    files = {e["path"]: e["bytes"] for shard in labels.artifact.records() for e in shard["files"]}
    logits = sum(size for path, size in files.items() if "/logits/" in path)
    sizes = {
        "images": images.bytes(),
        "labels: views, logits and a copy of the images": labels.bytes(),
        "of these, logits": logits,
    }
    rows = [(name, size, size / count) for name, size in sizes.items()]
    return html_table(("product", "bytes", "bytes an image"), rows, digits=0)


def _units(students: Artifact, arm: str) -> list[str]:
    names: list[str] = [shard["name"] for shard in students.records()]
    return [name for name in names if name.rpartition("-")[0] == arm]


def _losses(artifact: Artifact, unit: str) -> list[float]:
    history = json.loads(artifact.read(f"{unit}/history.json"))
    return [float(loss) for loss in history["loss"]]


def _mean(series: Sequence[Sequence[float]]) -> list[float]:
    return [statistics.fmean(values) for values in zip(*series, strict=True)]
