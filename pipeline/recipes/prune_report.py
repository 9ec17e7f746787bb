"""What a pruning kept and dropped: a report to read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from pipeline.recipes.prune_config import PruneConfig
from pipeline.recipes.prune_scores import SCORES
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
from pipeline.stage import ShardContext
from pipeline.stages.decode import Decode
from pipeline.storage.artifact import ArtifactSource
from pipeline.storage.source import Source
from pipeline.tensors import to_numpy

Image8 = npt.NDArray[np.uint8]
Kept = npt.NDArray[np.bool_]
Rows = npt.NDArray[np.int64]
Scores = npt.NDArray[np.float64]
BINS = 40
SHEET = 40
"""Images of a contact sheet."""
PAIRS = 20
"""Duplicates that are shown beside what they are duplicates of."""
CLASSES = 40
"""Classes of the table of class balance."""


@dataclass(frozen=True)
class Told:
    """One row a sample of all that was pruned: what the report is drawn from.

    Attributes:
        keys: string (N,).
        labels: int64 (N,), or None.
        scores: float64 (N,), NaN where there is none, or None.
        kept: bool (N,).
        bytes: int64 (N,), size of each image.
        shards: int64 (N,), number of the source's shard that each lies in, -1 where in none.
        duplicates: a table with ``key``, ``of`` and ``kind``.
    """

    keys: pa.Array
    labels: Rows | None
    scores: Scores | None
    kept: Kept
    bytes: Rows
    shards: Rows
    duplicates: pa.Table


def report(
    about: Mapping[str, Any],
    told: Told,
    source: Source,
    config: PruneConfig,
    products: Mapping[str, str],
    steps: Sequence[ArtifactSource],
) -> bytes:
    """The report as HTML; it depends on the arguments and the versions of packages alone.

    Args:
        about: data set, classes, counts, configuration and seed, as the manifest holds them.
        told: every sample.
        source: where pictures are read from.
        config: the recipe's.
        products: identity of each product by role.
        steps: the steps whose samples the report accounts for.
    """
    kept, total = int(told.kept.sum()), len(told.kept)
    size, before = int(told.bytes[told.kept].sum()), int(told.bytes.sum())
    lead = paragraph(
        f"{kept:,} of {total:,} samples are kept ({100 * kept / total:.1f}%), {size:,} of "
        f"{before:,} bytes. {about['why']}"
    )
    sheets, pairs = _sheets(told), _shown_pairs(told)
    pictures = _pictures(told, source, config, np.concatenate([*sheets.values(), *pairs]))
    sections = [("Selection", _selection(about))]
    if told.scores is not None:
        sections.append(("Scores", _histogram(about["score"], told.scores, told.kept)))
    sections.append(("Kept and dropped", _contact_sheets(sheets, pictures)))
    if told.labels is not None:
        sections.append(("Classes", _classes(about["classes"], told.labels, told.kept)))
    if len(told.duplicates):
        sections.append(("Duplicates", _duplicates(told, pairs, pictures)))
    sections += [
        ("Samples of each step", accounting(steps)),
        ("Provenance", provenance(about, products)),
    ]
    return page(f"Pruned {about['dataset']}: {kept:,} of {total:,}", lead, sections)


def _selection(about: Mapping[str, Any]) -> str:
    counts = about["counts"]
    rows: list[tuple[object, ...]] = [("samples", counts["samples"])]
    rows += [(f"{kind} duplicates", n) for kind, n in counts["duplicates"].items()]
    rows += [("samples to choose from", counts["pool"]), ("kept", counts["kept"])]
    parts = [html_table(("", "samples"), rows)]
    if recall := about.get("recall"):
        parts.append(paragraph(recall))
    if sweep := about.get("sweep"):
        rows = [(float(epsilon), n) for epsilon, n in sweep.items()]
        parts.append(html_table(("epsilon", "semantic duplicates"), rows, digits=3))
    if pilots := about.get("pilots"):
        header = ("pilot run", "images", "accuracy, %", "held-out images")
        cells = [
            (f"keeps the {p['selector']} samples", p["images"], p["accuracy"], p["tested"])
            for p in pilots
        ]
        parts.append(html_table(header, cells))
    return "\n".join(parts)


def _histogram(name: str, scores: Scores, kept: Kept) -> str:
    known = np.isfinite(scores)
    edges = np.histogram_bin_edges(scores[known], BINS)
    middles = ((edges[1:] + edges[:-1]) / 2).tolist()
    series = {
        what: list(zip(middles, np.histogram(scores[known & side], edges)[0].tolist(), strict=True))
        for what, side in (("kept", kept), ("dropped", ~kept))
    }
    chart = line_chart(
        f"Samples by {name}",
        series,
        x_label=f"{name}, harder to the right",
        y_label="samples",
        log=True,
    )
    caption = f"{name}: {SCORES[name].means}. {BINS} bins of equal width."
    if missing := int((~known).sum()):
        caption += f" {missing:,} samples have no score: they were in quarantine, or duplicates."
    return figure(chart, caption)


def _sheets(told: Told) -> dict[str, Rows]:
    """Rows of the samples at both ends of what is kept and of what is dropped, by caption."""
    found = {}
    for what, side in (("kept", told.kept), ("dropped", ~told.kept)):
        if told.scores is None:
            rows = np.flatnonzero(side)
            spread = np.linspace(0, len(rows) - 1, min(SHEET, len(rows))).astype(np.int64)
            found[f"Some of what is {what}"] = rows[spread]
            continue
        rows = np.flatnonzero(side & np.isfinite(told.scores))
        rows = rows[np.argsort(told.scores[rows], kind="stable")]
        half = min(SHEET, -(-len(rows) // 2))
        found[f"The easiest of what is {what}"] = rows[:half]
        found[f"The hardest of what is {what}"] = rows[len(rows) - half :][::-1]
    return {caption: rows for caption, rows in found.items() if len(rows)}


def _contact_sheets(sheets: Mapping[str, Rows], pictures: Mapping[int, Image8]) -> str:
    parts = []
    for caption, rows in sheets.items():
        images = [pictures[row] for row in rows.tolist() if row in pictures]
        if images:
            parts.append(figure(png_image(contact_sheet(images), caption), caption))
    return "\n".join(parts) or paragraph("No picture could be read.")


def _classes(names: Sequence[str], labels: Rows, kept: Kept) -> str:
    before = np.bincount(labels, minlength=len(names))
    after = np.bincount(labels[kept], minlength=len(names))
    # Where there are many classes, those that lost or kept the most say what there is to say.
    order = np.argsort(after / np.maximum(before, 1), kind="stable")
    shown = order if len(order) <= CLASSES else np.r_[order[: CLASSES // 2], order[-CLASSES // 2 :]]
    rows = [
        (names[c], int(before[c]), int(after[c]), 100 * after[c] / max(before[c], 1))
        for c in (np.sort(shown) if len(order) <= CLASSES else shown).tolist()
    ]
    text = f"The smallest class has {after.min():,} samples, the largest {after.max():,}."
    if len(order) > CLASSES:
        text += f" Of {len(names):,} classes those of which least and most is kept are shown."
    return paragraph(text) + html_table(("class", "samples", "kept", "kept, %"), rows, digits=1)


def _shown_pairs(told: Told) -> tuple[Rows, Rows]:
    """Rows of some duplicates, of each kind, and of what they are duplicates of."""
    chosen = []
    kinds = told.duplicates["kind"].to_pylist()
    for kind in dict.fromkeys(kinds):
        rows = np.flatnonzero(np.array(kinds) == kind)
        spread = np.linspace(0, len(rows) - 1, min(PAIRS, len(rows))).astype(np.int64)
        chosen.append(rows[spread])
    table = told.duplicates.take(np.concatenate([np.empty(0, np.int64), *chosen]))
    one, other = (
        np.asarray(pc.index_in(table[name], told.keys), np.int64) for name in ("key", "of")
    )
    return one, other


def _duplicates(told: Told, pairs: tuple[Rows, Rows], pictures: Mapping[int, Image8]) -> str:
    table = told.duplicates
    kind_of = dict(zip(table["key"].to_pylist(), table["kind"].to_pylist(), strict=True))
    shown: dict[str, list[Image8]] = {}
    for row, kept in zip(*(side.tolist() for side in pairs), strict=True):
        if row in pictures and kept in pictures:
            sheet = shown.setdefault(kind_of[told.keys[row].as_py()], [])
            sheet += [pictures[kept], pictures[row]]
    parts = [paragraph("In pairs: the sample that stays, and the one that is left out.")]
    for kind, images in shown.items():
        caption = f"{len(images) // 2} of the {kind} duplicates"
        parts.append(figure(png_image(contact_sheet(images), caption), caption))
    return "\n".join(parts)


def _pictures(told: Told, source: Source, config: PruneConfig, rows: Rows) -> dict[int, Image8]:
    """The pictures of some rows, as networks see them; those that cannot be read are left out."""
    decode = Decode(config.image.size, config.image.channels)
    found = dict[int, Image8]()
    wanted = np.unique(rows[told.shards[rows] >= 0])
    for number in np.unique(told.shards[wanted]).tolist():
        here = wanted[told.shards[wanted] == number]
        keys = told.keys.take(pa.array(here)).to_pylist()
        row_of = dict(zip(keys, here.tolist(), strict=True))
        table = source.take(source.shards[number], keys)
        table = decode(table.filter(pc.is_valid(table["image"])), ShardContext("", 0))
        images = to_numpy(table["image"])
        found |= {row_of[k]: i for k, i in zip(table["key"].to_pylist(), images, strict=True)}
    return found
