"""What a distillation gave: a report to read."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

import numpy as np
import numpy.typing as npt

from pipeline.dataset_distill.curriculum import min_scale
from pipeline.dataset_distill.label_codec import LabelCodec, label_bytes
from pipeline.recipes.distill_evaluation import Trainings, history, logits_bytes
from pipeline.recipes.nearest import nearest_keys
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
from pipeline.storage.array_artifact import read_arrays
from pipeline.storage.artifact import Artifact, ArtifactSource
from pipeline.storage.images import decode_png
from pipeline.storage.models import UNIT
from pipeline.storage.regroup import ChosenSource
from pipeline.storage.source import Source
from pipeline.tensors import is_tensor, to_numpy

CLASSES_SHOWN, IMAGES_SHOWN = 20, 50
PIXEL_BYTES = 32 * 2**20  # of all pictures in a report, before compression


@dataclass(frozen=True)
class Found:
    """What a distillation made.

    Attributes:
        images: the synthetic images.
        pixels: the same, decoded, an image of each class after the other.
        labels: their label store.
        real: the random real images of the first seed.
        teachers: fitted.
        students: fitted.
        trainings: what students were trained on.
        nearest: the real image nearest to each synthetic one.
        nearest_images: some of these.
    """

    images: ArtifactSource
    pixels: ArtifactSource
    labels: ArtifactSource
    real: ChosenSource
    teachers: Artifact
    students: Artifact
    trainings: Trainings
    nearest: Artifact
    nearest_images: ArtifactSource


def report(about: Mapping[str, Any], found: Found, steps: Sequence[ArtifactSource]) -> bytes:
    """The report as HTML; it depends on the arguments and the versions of packages alone.

    Args:
        about: data set, classes, evaluation, configuration and seed, as the manifest holds them.
        found: what was made.
        steps: the steps whose samples the report accounts for.
    """
    image, ipc, classes = about["config"]["image"], about["config"]["ipc"], about["classes"]
    pixels = f"{image['size']} x {image['size']} pixels"
    made = found.images.artifact.manifest["counts"]["out"]
    lead = paragraph(
        f"{len(classes):,} classes, {made:,} synthetic images of {pixels}. "
        f"{_outcome(about['evaluation'])}"
    )
    products = {"images": found.images.identity, "labels": found.labels.identity}
    products |= {"real images": found.real.identity, "teacher": found.teachers.identity}
    products |= {"students": found.students.identity}
    sections = [
        ("Evaluation", _evaluation(about, found.students)),
        ("Images", _pictures(about, found.pixels, found.real)),
        ("Nearest real images", _audit(about, found)),
        ("Synthesis", _synthesis(about["config"]["recover"], found.images.artifact)),
        ("Trainings", _trainings(found)),
        ("Sizes", _sizes(about, found)),
        ("Samples of each step", accounting(steps)),
        ("Provenance", provenance(about, products)),
    ]
    return page(f"Distilled {about['dataset']}, {ipc} images a class", lead, sections)


def _outcome(rows: Sequence[Mapping[str, Any]]) -> str:
    """How the synthetic images did, in a sentence or two."""
    first = {row["arm"]: row for row in reversed(rows)}
    synthetic = first.get("distilled-soft")
    if synthetic is None:
        return ""
    text = f"With soft labels they train a student to {synthetic['accuracy']:.1f}%."
    for arm, name in (
        ("random-real-soft", "random real images with the same kind of labels"),
        ("noise-soft", "noise with such labels"),
        ("random-real-hard", "random real images with class labels"),
    ):
        if arm in first:
            text += f" They {_versus(synthetic, first[arm], name)}."
    if synthetic["seeds"] == 1:
        text += " There is one seed of each, so the spread is not known."
    return text


def _versus(a: Mapping[str, Any], b: Mapping[str, Any], name: str) -> str:
    gap = a["accuracy"] - b["accuracy"]
    name = f"{name} ({b['accuracy']:.1f}%)"
    if abs(gap) <= a["spread"] + b["spread"]:
        return f"are level with {name}: {gap:+.1f} points, within the spread over seeds"
    return (
        f"beat {name} by {gap:.1f} points" if gap > 0 else f"fall {-gap:.1f} points behind {name}"
    )


def _evaluation(about: Mapping[str, Any], students: Artifact) -> str:
    rows = about["evaluation"]
    table = html_table(
        ("trained on", "network", "images", "accuracy, %", "spread", "best epoch, %", "seeds"),
        [
            (
                *(r[n] for n in ("trained_on", "network", "images", "accuracy")),
                r["spread"] if r["seeds"] > 1 else None,
                r["best"],
                r["seeds"],
            )
            for r in rows
        ],
    )
    several = len(
        {row["network"] for row in rows if row["seeds"] > 1 or "teacher" not in row["arm"]}
    )
    bars = [
        (
            f"{row['trained_on']} ({row['network']})" if several > 1 else row["trained_on"],
            row["accuracy"],
            row["spread"],
        )
        for row in rows
    ]
    chart = bar_chart("Accuracy by training set", bars, limit=100, unit="%")
    tested = students.metrics["images"]
    caption = (
        f"Accuracy after the last epoch on {tested:,} test images: mean over seeds and sample "
        "standard deviation. The best epoch was chosen on these very images: it flatters."
    )
    return table + figure(chart, caption) + _metrics(about["metrics"])


def _metrics(metrics: Mapping[str, float | None]) -> str:
    told = {
        "hlr": "Hard-label recovery (HLR, lower is better): {:+.1f} points are lost to a network "
        "trained on all data when synthetic images come with class labels.",
        "ior": "Improvement over random (IOR, higher is better): {:+.1f} points over random real "
        "images with the same labels.",
    }
    texts = [told[name].format(value) for name, value in metrics.items() if value is not None]
    return "".join(paragraph(text) for text in texts)


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


def _audit(about: Mapping[str, Any], found: Found) -> str:
    """How close synthetic images are to real ones, which may be private or licensed."""
    arrays = read_arrays(found.nearest)
    similarity, keys = arrays["similarity"], nearest_keys(arrays)
    config = about["config"]
    text = (
        f"For each of {len(similarity):,} synthetic images, the training image whose features "
        "point most nearly in the same direction: the cosine is at least "
        f"{similarity.min():.3f}, in the middle {np.median(similarity):.3f}, at most "
        f"{similarity.max():.3f}. "
    )
    if config["recover"]["start"] == "noise":
        text += "The images come from noise: no pixel was copied from a real image."
    else:
        text += (
            "The images come from real ones, which the column 'origin' names, and may show what "
            "these show: the rights in the real images bear on them too."
        )
    pictures = _by_key(found.nearest_images)
    shown = [row for row in range(min(len(keys), CLASSES_SHOWN)) if keys[row] in pictures]
    first = _first_rows(found.pixels, CLASSES_SHOWN)
    sheet = [first[row] for row in shown] + [pictures[keys[row]] for row in shown]
    if not shown:
        return paragraph(text)
    image = png_image(contact_sheet(sheet, len(shown)), "synthetic images and their nearest")
    caption = "Above, synthetic images; below each, the real image that is nearest to it."
    return paragraph(text) + figure(image, caption)


def _first_rows(source: Source, count: int) -> list[npt.NDArray[np.uint8]]:
    rows: list[npt.NDArray[np.uint8]] = []
    for table in source.tables():
        rows += list(to_numpy(table["image"]))
        if len(rows) >= count:
            break
    return rows[:count]


def _by_key(source: Source) -> dict[str, npt.NDArray[np.uint8]]:
    return {
        key: pixels
        for table in source.tables()
        for key, pixels in zip(table["key"].to_pylist(), to_numpy(table["image"]), strict=True)
    }


def _synthesis(recover: Mapping[str, Any], images: Artifact) -> str:
    total = recover["iterations"]
    if not total:
        return paragraph("The images are what they start from: nothing was optimised.")
    if not recover["milestone"]:
        share = f"{100 * recover['crop_floor']:g}%"
        return _trace(recover, images) + paragraph(
            f"Without a curriculum: each iteration sees a crop of at least {share} of the area."
        )
    steps = sorted({round(total * n / 200) for n in range(200)})
    names = {"kind": "curriculum", "milestone": "milestone", "floor": "crop_floor"}
    options = {name: recover[field] for name, field in names.items()}
    course = [(float(s), min_scale(s, total, **options)) for s in steps]
    chart = line_chart(
        "The curriculum",
        {"smallest share of the area": course},
        x_label="iteration",
        y_label="share",
    )
    caption = "Each iteration sees a crop of at least this share of the images' area, at most all."
    return _trace(recover, images) + figure(chart, caption)


def _trace(recover: Mapping[str, Any], images: Artifact) -> str:
    """The synthesis: its losses by iteration, mean over shards."""
    metrics = [shard["metrics"] for shard in images.records()]
    # Images that join late have shorter courses.
    longest = max(len(m["trace"]) for m in metrics)
    metrics = [m for m in metrics if len(m["trace"]) == longest]
    steps = [row[0] for row in metrics[0]["trace"]]
    losses = {
        name: list(zip(steps, _mean([[r[i] for r in m["trace"]] for m in metrics]), strict=True))
        for i, name in enumerate(("cross-entropy", "BatchNorm statistics"), start=1)
    }
    options: dict[str, Any] = {"x_label": "iteration", "y_label": "loss", "log": True}
    whole = {n: statistics.fmean(m["final"][n] for m in metrics) for n in metrics[0]["final"]}
    caption = (
        f"On one random crop of the images an iteration, mean over {len(metrics):,} shards. On the "
        f"whole, final images: cross-entropy {whole['cross_entropy']:.3g}, BatchNorm statistics "
        f"{whole['batchnorm']:.3g}."
    )
    if recover["milestone"] > 0:
        caption += (
            " The crops get smaller as the synthesis goes on (curriculum), so losses that rise "
            "late are expected and no failure."
        )
    return figure(line_chart("Losses of the synthesis by iteration", losses, **options), caption)


def _trainings(found: Found) -> str:
    parts = []
    options: dict[str, Any] = {"x_label": "epoch", "y_label": "loss", "log": True}
    courses = {
        unit: losses
        for unit in found.trainings.teachers.units
        if (losses := history(found.teachers, unit)["loss"])
    }
    if courses:
        names = {unit: unit.replace(UNIT, "teacher") for unit in courses}
        points = {names[u]: list(enumerate(losses, 1)) for u, losses in courses.items()}
        chart = line_chart("Teachers' loss by epoch", points, **options)
        parts.append(figure(chart, "Cross-entropy on the real training images."))
    for kind, caption in (
        ("soft", "Temperature-scaled KL divergence, mean over seeds."),
        ("hard", "Cross-entropy, mean over seeds."),
    ):
        rows = [
            row
            for row in found.trainings.rows.values()
            if row.arm.endswith(kind) and row.network == found.trainings.networks[0]
        ]
        if rows:
            means = {
                row.title: list(
                    enumerate(_mean([history(found.students, u)["loss"] for u in row.units]), 1)
                )
                for row in rows
            }
            parts.append(figure(line_chart("Students' loss by epoch", means, **options), caption))
    return "\n".join(parts)


def _sizes(about: Mapping[str, Any], found: Found) -> str:
    count = found.images.artifact.manifest["counts"]["out"]
    codec, views = LabelCodec(**about["label_store"]["codec"]), about["label_store"]["views"]
    classes = len(about["classes"])
    sizes = {"images": found.images.bytes()}
    text = "Labels are not stored: the teachers are asked while a student is trained."
    if views:
        sizes[f"labels: {views:,} views of each image, as {codec.kind}"] = logits_bytes(
            found.labels
        )
        exact = label_bytes(LabelCodec(), about["config"]["relabel"]["views"], count, classes)
        text = (
            f"All {about['config']['relabel']['views']:,} views as float16 would take {exact:,} "
            "bytes before compression."
        )
    rows = [(name, size, size / count) for name, size in sizes.items()]
    table = html_table(("product", "bytes", "bytes an image"), rows, digits=0) + paragraph(text)
    series: dict[str, list[tuple[float, float]]] = {"soft labels": [], "class labels": []}
    for row in about["evaluation"]:
        if row["network"] == about["evaluation"][0]["network"] and row["image_bytes"]:
            size = (row["image_bytes"] + (row["label_bytes"] or 0)) / 1000
            if row["arm"] == "distilled-hard":
                series["class labels"].append((size, row["accuracy"]))
            elif row["arm"].startswith("distilled-soft"):
                series["soft labels"].append((size, row["accuracy"]))
    points = {name: sorted(found) for name, found in series.items() if found}
    if not points:
        return table
    chart = line_chart(
        "Accuracy against bytes", points, x_label="kB", y_label="accuracy, %", log_x=True
    )
    return table + figure(
        chart, "Accuracy of students against bytes of images and labels together."
    )


def _mean(series: Sequence[Sequence[float]]) -> list[float]:
    return [statistics.fmean(values) for values in zip(*series, strict=True)]
