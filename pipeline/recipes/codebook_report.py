"""A codebook: a report to read."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt

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
from pipeline.tensors import to_numpy

POINTS = 200
"""Of the curve of use."""


def report(
    about: Mapping[str, Any],
    products: Mapping[str, Artifact],
    counts: npt.NDArray[np.int64],
    examples: Mapping[int, tuple[str, int]],
    pictures: ArtifactSource,
    steps: Sequence[ArtifactSource],
) -> bytes:
    """The report as HTML; it depends on the arguments and the versions of packages alone.

    Args:
        about: what the manifest holds.
        products: by role.
        counts: (K,) features nearest to each code.
        examples: key and place of the feature nearest to some codes.
        pictures: the images that these lie in.
        steps: whose samples the report accounts for.
    """
    codes = about["codes"]
    lead = paragraph(
        f"{codes['size']:,} codes of {codes['features']:,} features with {codes['width']:,} "
        f"numbers each. {100 * codes['used']:.2f}% of the codes are nearest to some feature; their "
        f"perplexity is that of {codes['perplexity']:,.0f} codes in even use."
    )
    identities = {role: artifact.identity for role, artifact in products.items()}
    sections = [
        ("Use of the codes", _use(counts)),
        ("Most and least used codes", _pictures(counts, examples, codes["places"], pictures)),
        ("Samples of each step", accounting(steps)),
        ("Provenance", provenance(about, identities)),
    ]
    return page(f"A codebook for {about['dataset']}", lead, sections)


def _use(counts: npt.NDArray[np.int64]) -> str:
    covered = np.cumsum(np.sort(counts)[::-1]) / max(int(counts.sum()), 1)
    ranks = np.unique(np.linspace(1, len(counts), POINTS).astype(int))
    series = {
        "codes, most used first": [
            (r / len(counts), float(covered[r - 1])) for r in ranks.tolist()
        ],
        "even use": [(0.0, 0.0), (1.0, 1.0)],
    }
    chart = line_chart(
        "Use of the codes", series, x_label="share of the codes", y_label="share of the features"
    )
    edges = [0, 1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, np.inf]
    found = np.histogram(counts, edges)[0]
    ranges = [f"{low:g} to {high - 1:g}" for low, high in pairwise(edges[2:-1])]
    names = ["0", "1", *ranges, f"{edges[-2]:,g} and more"]
    rows = [(name, int(count)) for name, count in zip(names, found, strict=True) if count]
    return figure(chart, "How many features the most used codes are nearest to.") + html_table(
        ("features of a code", "codes"), rows
    )


def _pictures(
    counts: npt.NDArray[np.int64],
    examples: Mapping[int, tuple[str, int]],
    places: int,
    pictures: ArtifactSource,
) -> str:
    images: dict[str, npt.NDArray[np.uint8]] = {}
    for table in pictures.tables():
        keys = table["key"].to_pylist()
        images |= dict(zip(keys, to_numpy(table["image"]), strict=True))
    order = sorted(examples, key=lambda code: (-counts[code], code))
    half = (len(order) + 1) // 2
    parts = []
    for told, chosen in [("most", order[:half]), ("least", order[half:])]:
        found = [examples[code] for code in chosen]
        patches = [_patch(images[key], place, places) for key, place in found]
        if patches:
            text = f"The {told} used codes, each as the place in an image that is nearest to it."
            parts.append(figure(png_image(contact_sheet(patches, columns=20), text), text))
    return "\n".join(parts)


def _patch(image: npt.NDArray[np.uint8], place: int, places: int) -> npt.NDArray[np.uint8]:
    """The part of an image that one place of its grid, row by row, is about."""
    side = math.isqrt(places)
    size = image.shape[0] // side
    top, left = place // side * size, place % side * size
    return image[top : top + size, left : left + size]
