"""A trained tokenizer: a report to read."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import pyarrow as pa

from pipeline.recipes.sections import accounting, provenance
from pipeline.report import (
    contact_sheet,
    figure,
    html_table,
    line_chart,
    page,
    paragraph,
    png_image,
)
from pipeline.storage.artifact import Artifact, ArtifactSource
from pipeline.storage.models import UNIT
from pipeline.tensors import to_numpy

CHOOSERS = {
    "fixed": "one length for all",
    "lagrangian": "least mean error, measured",
    "predicted": "least mean error, predicted",
    "threshold": "the same quality for all, measured",
}


def report(
    about: Mapping[str, Any],
    products: Mapping[str, Artifact],
    shown: ArtifactSource,
    steps: Sequence[ArtifactSource],
) -> bytes:
    """The report as HTML; it depends on the arguments and the versions of packages alone.

    Args:
        about: what the manifest holds.
        products: by role.
        shown: some test images with their reconstructions.
        steps: the steps whose samples the report accounts for.
    """
    tokens, psnr = about["tokens"], about["psnr"]
    most = tokens["max_tokens"]
    lead = paragraph(
        f"{most:,} tokens of {tokens['bits']:,} bits, {most * tokens['bits'] / 8:g} bytes an "
        f"image, show test images with a PSNR of {psnr[str(most)]:.2f} dB (of the mean squared "
        "error)."
    )
    identities = {role: artifact.identity for role, artifact in products.items()}
    sections = [
        ("Reconstructions", _pictures(about, shown)),
        ("Quality against bytes", _lengths(about)),
        ("What the bits are worth", _health(about)),
        ("Training", _training(products["tokenizer"])),
        ("Samples of each step", accounting(steps)),
        ("Provenance", provenance(about, identities)),
    ]
    return page(f"A tokenizer for {about['dataset']}", lead, sections)


def _pictures(about: Mapping[str, Any], shown: ArtifactSource) -> str:
    table = pa.concat_tables(shown.tables())
    images, decoded = to_numpy(table["image"]), to_numpy(table["decoded"])
    lengths = ", ".join(about["psnr"])
    rows = [images, *(decoded[:, place] for place in range(decoded.shape[1]))]
    sheet = contact_sheet([image for row in rows for image in row], columns=len(images))
    told = f"Test images, and below them what their first {lengths} tokens show."
    return figure(png_image(sheet, told), told)


def _lengths(about: Mapping[str, Any]) -> str:
    series = {
        CHOOSERS[name]: [
            (row["bytes"], row["psnr_of_mean"])
            for row in about["lengths"]
            if row["chooser"] == name
        ]
        for name in CHOOSERS
    }
    chart = line_chart(
        "Quality against bytes",
        series,
        x_label="mean bytes of an image, with those that say how long it is",
        y_label="PSNR of the mean squared error, dB",
        log_x=True,
    )
    header = (
        "tokens",
        "chooser",
        "mean bytes",
        "PSNR of mean error",
        "mean PSNR",
        "5th percentile",
    )
    rows = [
        (
            *(row["tokens"], CHOOSERS[row["chooser"]], row["bytes"]),
            *(row["psnr_of_mean"], row["mean_psnr"], row["psnr_5"]),
        )
        for row in about["lengths"]
    ]
    note = paragraph(
        "Prices and thresholds are those with which training images take the same bytes. Spending "
        "where it helps most lowers the mean error; the same quality for all raises the worst "
        "images, and the mean error with them."
    )
    return "\n".join([figure(chart, "On test images."), note, html_table(header, rows)])


def _health(about: Mapping[str, Any]) -> str:
    names = {
        "entropy": "mean entropy of a bit, bits",
        "dead": "share of bits that hardly change",
        "copies": "share of bits that another one follows",
        "effective": "independent bits that would spread as much",
        "bits": "bits of an image",
        "used": "share of the vocabulary that occurs",
        "perplexity": "perplexity of ids",
    }
    rows = [(names[name], float(value)) for name, value in about["health"].items()]
    explained = 100 * about["predictor"]["explained"]
    note = paragraph(
        f"The predictor of error curves explains {explained:.0f}% of what differs between images."
    )
    return html_table(("on test images", ""), rows, digits=3) + note


def _training(tokenizer: Artifact) -> str:
    history = json.loads(tokenizer.read(f"{UNIT}/history.json"))
    losses = {"loss": [(float(n), v) for n, v in enumerate(history["loss"], 1)]}
    chart = line_chart("Loss", losses, x_label="epoch", y_label="loss")
    parts = [
        figure(chart, "Mean loss of each epoch; images are seen through some of their tokens.")
    ]
    points = [(epoch, metrics["psnr"]) for epoch, metrics in history["evaluations"]]
    if len(points) > 1:
        series = {
            f"{k} tokens": [(float(epoch), found[k]) for epoch, found in points]
            for k in points[0][1]
        }
        quality = line_chart("Quality", series, x_label="epoch", y_label="PSNR, dB")
        parts.append(figure(quality, "Of test images seen through so many tokens."))
    return "\n".join(parts)
