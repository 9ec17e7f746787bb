"""A contact sheet of a data set."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from pipeline.errors import UsageError
from pipeline.inspect import ROW, image_facts, numbered
from pipeline.orchestration.screen import screen
from pipeline.report import contact_sheet
from pipeline.stage import ShardContext
from pipeline.stages.decode import Decode
from pipeline.storage.source import UNREADABLE, Source
from pipeline.storage.store import LocalStore
from pipeline.tensors import to_numpy

SHEET, SIDE, SPREAD = 100, 96, 8  # images of a sheet, pixels of one, shards they are taken from


def write_sheet(source: Source | None, path: Path) -> dict[str, Any]:
    """Write a PNG of up to 100 images of ``source``, of as many classes as it meets.

    Returns:
        ``images``, their number, and ``path``, which is ``None`` where no image can be read.

    Raises:
        UsageError: the file cannot be written.
    """
    images = _pictures(source) if source else []
    if not images:
        return {"path": None, "images": 0}
    try:
        LocalStore(path.absolute().parent).replace(path.name, contact_sheet(images, side=SIDE))
    except OSError as error:
        raise UsageError(
            f"The sheet cannot be written: {error.strerror or error}.",
            hint="Choose a file in a folder that you can write.",
            code="unwritable-output",
            where=str(path),
        ) from error
    return {"path": str(path), "images": len(images)}


def _pictures(source: Source) -> list[npt.NDArray[np.uint8]]:
    """Up to 100 images of one size, from shards at equal distances that begin with the first."""
    total = len(source.shards)
    places = sorted({index * total // SPREAD for index in range(SPREAD)}) if total else []
    images: list[npt.NDArray[np.uint8]] = []
    labels: list[int | None] = []
    size = 0
    for index in places:
        try:
            table = _good(source.read(source.shards[index]), source)
        except UNREADABLE:
            continue
        table = table.take(_in_turn(_labels(table))[: 2 * SHEET])  # some may be undecodable
        size = size or _side(table)
        table = Decode(size, 3)(table, ShardContext("", 0)) if size else table.slice(0, 0)
        if len(table):
            images += list(to_numpy(table["image"]))
            labels += _labels(table)
        if len(images) >= SHEET and len(set(labels)) >= min(SHEET, len(source.classes)):
            break
    return [images[index] for index in _in_turn(labels)[:SHEET]]


def _good(table: pa.Table, source: Source) -> pa.Table:
    """The samples of a table as a step would see them: key, image and label."""
    good, _ = screen(numbered(table), source)
    kept = [name for name in ("key", "image", "label") if name in table.column_names]
    rows = good[ROW] if {"key", "image"} <= set(kept) else []
    return table.select(kept).take(pa.array(rows, pa.int64()) if rows == [] else rows)


def _labels(table: pa.Table) -> list[int | None]:
    if "label" not in table.column_names:
        return [None] * len(table)
    found: list[int | None] = table["label"].to_pylist()
    return found


def _in_turn(labels: Sequence[int | None]) -> list[int]:
    """Positions: the first of every label, then the second of every label, and so on."""
    seen: Counter[int | None] = Counter()
    turns = []
    for position, label in enumerate(labels):
        turns.append((seen[label], -1 if label is None else label, position))
        seen[label] += 1
    return [position for _, _, position in sorted(turns)]


def _side(table: pa.Table) -> int:
    """A side that enlarges none of the larger images; 0 where none can be read."""
    if "image" not in table.column_names:
        return 0
    images = image_facts(table["image"])
    sides = [min(image["width"], image["height"]) for image in images if "width" in image]
    return min(SIDE, max(sides, default=0))
