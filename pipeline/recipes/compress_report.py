"""A compressed classifier: a report to read."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from pipeline.codecs.low_rank_vq import Curve
from pipeline.recipes.sections import accounting, provenance
from pipeline.report import figure, html_table, line_chart, page, paragraph
from pipeline.storage.artifact import Artifact, ArtifactSource

STAGES = {
    "teacher": "the network as it was given or trained",
    "low_rank": "after training with low-rank weights",
    "coded": "after training of the codes",
    "compressed": "rebuilt from the file",
}
WHY = {
    "named": "it was named",
    "first": "it is the first convolution",
    "shared": "it shares its weight with another layer",
    "small": "its codes would take no less",
}


def report(
    about: Mapping[str, Any],
    products: Mapping[str, Artifact],
    curves: Sequence[Curve],
    steps: Sequence[ArtifactSource],
) -> bytes:
    """The report as HTML; it depends on the arguments and the versions of packages alone.

    Args:
        about: what the manifest holds.
        products: by role.
        curves: errors of each coded layer by the numbers of its codes.
        steps: whose samples the report accounts for.
    """
    size, accuracy = about["bytes"], about["accuracy"]
    lead = paragraph(
        f"{size['dense']:,} bytes of weights are a file of {size['file']:,}: "
        f"{size['ratio']:.1f} times less. Accuracy is {accuracy['compressed']:.2f}%, and was "
        f"{accuracy['teacher']:.2f}%."
    )
    identities = {role: artifact.identity for role, artifact in products.items()}
    sections = [
        ("Accuracy", html_table(("", "%"), [(STAGES[n], v) for n, v in accuracy.items()])),
        ("Bytes", _bytes(size)),
        ("Numbers of a code", _widths(about["layers"], curves)),
        ("Layers", _layers(about)),
        ("Samples of each step", accounting(steps)),
        ("Provenance", provenance(about, identities)),
    ]
    return page(f"A compressed network for {about['dataset']}", lead, sections)


def _bytes(size: Mapping[str, Any]) -> str:
    parts = {name: size[name] for name in ("codes", "codebooks", "bases", "rest")}
    rows = [
        ("codes, packed or entropy-coded", parts["codes"]),
        ("codebooks, float16", parts["codebooks"]),
        ("bases, float16", parts["bases"]),
        ("what is not coded, float32", parts["rest"]),
        ("names, shapes and settings", size["file"] - sum(parts.values())),
        ("the file", size["file"]),
        ("all of the network in float32", size["dense"]),
    ]
    return html_table(("", "bytes"), rows)


def _widths(layers: Sequence[Mapping[str, Any]], curves: Sequence[Curve]) -> str:
    most = Counter(layer["m"] for layer in layers).most_common(1)[0][0]
    own = [n for n, layer in enumerate(layers) if layer["m"] == most]
    low = np.mean([curves[n].low_rank for n in own], 0)
    clustering = np.mean([curves[n].clustering for n in own], 0)
    kinds = {"low rank": low, "clustering": clustering, "both": low + clustering}
    series = {n: [(float(d), float(v)) for d, v in enumerate(row, 1)] for n, row in kinds.items()}
    chart = line_chart(
        "Errors by the numbers of a code",
        series,
        x_label="numbers of a code",
        y_label="share of the weights' energy",
    )
    told = (
        f"Mean of the {len(own)} layers with sub-vectors of {most} numbers, before anything is "
        "trained. What low rank leaves out can be learned again; what clustering leaves out cannot."
    )
    return figure(chart, told)


def _layers(about: Mapping[str, Any]) -> str:
    header = ("layer", "weight", "m", "codes", "numbers of a code", "bytes", "times less")
    rows = [
        (
            layer["name"],
            " x ".join(map(str, layer["shape"])),
            *(layer["m"], layer["k"], layer["d"], round(layer["bytes"]), layer["ratio"]),
        )
        for layer in about["layers"]
    ]
    left = [(layer["name"], WHY[layer["why"]]) for layer in about["left"]]
    table = html_table(
        (*header, "low rank", "clustering"),
        [
            (*row, layer["low_rank"], layer["clustering"])
            for row, layer in zip(rows, about["layers"], strict=True)
        ],
        digits=3,
    )
    return table + (html_table(("stays as it is", "because"), left) if left else "")
