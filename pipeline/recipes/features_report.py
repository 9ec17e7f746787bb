"""Compressed features: a report to read."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from pipeline.recipes.sections import accounting, provenance
from pipeline.report import figure, html_table, line_chart, page, paragraph
from pipeline.storage.artifact import Artifact, ArtifactSource
from pipeline.storage.models import UNIT

KINDS = {
    "prior": "tables of the learned prior, one a channel",
    "channel": "counted tables, one a channel",
    "position": "counted tables, one a position",
    "tree": "hidden tree",
}


def report(
    about: Mapping[str, Any],
    products: Mapping[str, Artifact],
    sizes: Sequence[int],
    steps: Sequence[ArtifactSource],
) -> bytes:
    """The report as HTML; it depends on the arguments and the versions of packages alone.

    Args:
        about: what the manifest holds.
        products: by role.
        sizes: bytes of each test image.
        steps: whose samples the report accounts for.
    """
    accuracy, size = about["accuracy"], about["bytes"]
    lead = paragraph(
        f"{size['mean']:.1f} bytes an image, of which a classifier has {accuracy['tail']:.2f}% "
        f"right; the teacher has {accuracy['teacher']:.2f}% of whole images. The encoder takes "
        f"{about['encoder']['network']:,} bytes on a device, and its entropy model "
        f"{about['encoder']['entropy']:,}."
    )
    identities = {role: artifact.identity for role, artifact in products.items()}
    sections = [
        ("Bytes and accuracy", _trade_off(about)),
        ("Bytes of an image", _sizes(sizes)),
        ("Entropy model", _entropy(about)),
        ("Training", _training(products)),
        ("Samples of each step", accounting(steps)),
        ("Provenance", provenance(about, identities)),
    ]
    return page(f"Features of {about['dataset']}", lead, sections)


def _trade_off(about: Mapping[str, Any]) -> str:
    accuracy = about["accuracy"]
    rows = [("this codec and its tail", about["bytes"], accuracy["tail"])]
    rows += [(_named(row["name"]), row["bytes"], row["accuracy"]) for row in about["baselines"]]
    table = html_table(
        ("", "bytes, mean", "median", "99 in 100", "largest", "accuracy, %"),
        [
            (name, *(size[n] for n in ("mean", "p50", "p99", "max")), hits)
            for name, size, hits in rows
        ],
    )
    told = paragraph(
        "Of other codecs whole files are counted, and the teacher sees them without having been "
        "trained on them: with that it would see more. Features in 8 bits are packed by zstd. "
        "Few channels in 8 bits have an encoder and a tail of their own, and no entropy model. "
        f"Before the tail was trained, accuracy was {accuracy['mimic']:.2f}%. "
        f"{about['over_budget']:,} images lost some of their symbols to a budget."
    )
    return table + told


def _named(baseline: str) -> str:
    kind, _, quality = baseline.partition(":")
    names = {
        "jpeg": "JPEG",
        "webp": "WebP",
        "avif": "AVIF",
        "int8": "the teacher's features, 8 bits",
        "channels": "latents in 8 bits",
    }
    what = "channels" if kind == "channels" else "quality"
    return names[kind] + (f", {what} {quality}" if quality else "")


def _sizes(sizes: Sequence[int]) -> str:
    shares = np.arange(101)
    points = zip(shares.tolist(), np.percentile(sizes, shares).tolist(), strict=True)
    series = {"bytes": [(float(x), float(y)) for x, y in points]}
    axes = ("percent of test images", "bytes, at most")
    chart = line_chart("Bytes of an image", series, x_label=axes[0], y_label=axes[1])
    return figure(chart, "Records of test images, from the smallest to the largest.")


def _entropy(about: Mapping[str, Any]) -> str:
    rows = [
        (KINDS[row["kind"]], row["sample"], row["model"], round(row["total"]))
        for row in about["entropy"]
    ]
    told = paragraph(
        f"Of training images that were kept out; the model is compressed. The least total is used. "
        f"{100 * about['escapes']:.4f}% of all symbols are not in its tables."
    )
    return (
        html_table(("", "bytes an image", "bytes of the model", "all images and model"), rows)
        + told
    )


def _training(products: Mapping[str, Artifact]) -> str:
    charts = []
    for role, what in (("codec", "the encoder"), ("tail", "the tail")):
        history = json.loads(products[role].read(f"{UNIT}/history.json"))
        series = {what: [(float(n), float(v)) for n, v in enumerate(history["loss"], 1)]}
        chart = line_chart(f"Loss of {what}", series, x_label="epoch", y_label="loss")
        charts.append(figure(chart, f"Mean loss of {what} in each epoch."))
    return "".join(charts)
